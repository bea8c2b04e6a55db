"""A target named on a command line, loaded from a file, a module or kvpress."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from knorm.laws.adapters import _importable, _Source, _subject
from knorm.laws.subjects import Subject
from knorm.laws.traits import Traits

_KVPRESS = "pip install 'knorm[kvpress]' -c constraints-kvpress.txt"


_FORMS = "path/to/file.py:name, package.module:name, or kvpress:PressName"


def load_target(spec: str, kind: str | None = None, traits: Traits | Mapping[str, Any] | None = None) -> Subject:
    """The Subject that a command line names.

    spec           path/to/file.py:name, package.module:name or kvpress:PressName; the name may be dotted. Modules are
                   looked for in the current folder too, those that a file imports beside it
    kind, traits   as adapt takes them

    Raises ValueError, in one line, for a target that does not exist, does not import or cannot be called.
    """
    where, _, path = spec.rpartition(":")
    if not where or not path:
        raise ValueError(f"target {spec!r}, but should be {_FORMS}")
    file = Path(where).resolve() if where.endswith(".py") or os.sep in where else None
    try:
        module = _imported(where, file)
        return _subject(_named(where, path, module), traits, kind, path, _origin(module, path, file))
    except TypeError as error:
        raise ValueError(f"target {spec!r}: {error}") from error
    except _Missing as error:
        raise ValueError(f"target {spec!r}: {error}") from error.__cause__


class _Missing(Exception):
    """A target that is not there or does not import; the message says what to do."""


def _imported(where: str, file: Path | None) -> ModuleType:
    if file and (file.suffix != ".py" or not file.is_file()):
        raise _Missing(f"there is no Python file {file}; it should be {_FORMS}")
    folder = str(file.parent) if file else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    kvpress = f"install it with {_KVPRESS}"
    try:
        module = _run(file) if file else importlib.import_module(where)
        if getattr(module, "__file__", "") is None:
            raise ModuleNotFoundError(name=where)  # a folder of that name
        return module
    except ModuleNotFoundError as error:
        missing = error.name or where
        todo = kvpress if missing.startswith("kvpress") else f"install it, or run this in the folder that has {missing}"
        raise _Missing(f"importing {where}: there is no module {missing!r}; {todo}") from error
    except SyntaxError as error:
        raise _Missing(f"{error.filename}, line {error.lineno}, is not valid Python: {error.msg}") from error
    except (Exception, SystemExit) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        todo = kvpress if where.startswith("kvpress") else "mend that first"
        raise _Missing(f"importing {where} raised {said}; {todo}") from error


def _run(file: Path) -> ModuleType:
    """A file's module, under a name of its own: it may be called as one that is loaded already."""
    name = f"knorm_target_{file.stem}"
    found: Any = spec_from_file_location(name, file)
    module = sys.modules[name] = module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _named(where: str, path: str, module: ModuleType) -> Any:
    target: Any = module
    for done, part in enumerate(path.split(".")):
        if not hasattr(target, part):
            there = [name for name in dir(target) if not name.startswith("_")]
            known = ", ".join(get_close_matches(part, there) or there[:8]) or "nothing"
            raise _Missing(f"{'.'.join([where, *path.split('.')[:done]])} has no {part!r}; it has {known}")
        target = getattr(target, part)
    return target


def _origin(module: ModuleType, path: str, file: Path | None) -> _Source:
    if file is None:
        return _importable(module.__name__, path)
    folder = f"import sys; sys.path.insert(0, {str(file.parent)!r})\n"
    if file.stem.isidentifier():
        return _Source(path, lambda root, alias: folder + _importable(file.stem, path).lines(root, alias))
    return _Source(path, lambda root, alias: f"{folder}{alias} = __import__({file.stem!r}).{root}")
