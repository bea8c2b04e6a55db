"""A target named on a command line, loaded from a file, a module or kvpress."""

from __future__ import annotations

import ast
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knorm.laws.adapters import _importable, _Source, _subject
from knorm.laws.subjects import Subject
from knorm.laws.traits import Traits
from knorm.methods.kinds import kind_of
from knorm.methods.targets import Target, parse_target
from knorm.methods.targets import load_target as load
from knorm.paths import resolved


def load_target(spec: str, kind: str | None = None, traits: Traits | Mapping[str, Any] | None = None) -> Subject:
    """Load the Subject that a command line names.

    Args:
        spec: path/to/file.py:name, package.module:name or kvpress:PressName; the name may be dotted. Modules are
            looked for in the current folder too, those that a file imports beside it.
        kind: as adapt takes it.
        traits: as adapt takes them.

    Returns:
        The target behind one signature, with the code that imports it.

    Raises:
        ValueError: it does not exist, does not import or cannot be called; in one line.

    Example:
        >>> load_target("knorm:compress").name
        'compress'
    """
    target = parse_target(spec)
    named, keywords = load(target)
    told = kind or (kind_of(named) if callable(named) else "")
    made = functools.partial(named, **keywords) if keywords and told not in ("cache", "press") else named
    options = keywords if made is named else {}
    try:
        return _subject(
            made, traits, kind or (told if made is not named else None), target.path, _origin(target, keywords), options
        )
    except TypeError as error:
        raise ValueError(f"target {spec!r}: {error}") from error


def _origin(target: Target, keywords: Mapping[str, Any]) -> _Source:
    """Say how a snippet imports the target, and what it is given there: all but a press is called with more later."""
    folder, module, path = "", target.where, target.path
    if target.file is not None:
        folder = _folder_line(Path(target.where), target.file)
        module = target.file.stem
        if not module.isidentifier():
            return _Source(path, lambda root, alias: f"{folder}{alias} = __import__({module!r}).{root}")
    if target.call is None:
        return _Source(path, lambda root, alias: folder + _importable(module, path).lines(root, alias))
    names = ", ".join(sorted({name.partition(".")[0] for name in target.call.names()}))
    made = target.spec[len(target.where) + 1 :].strip()
    if keywords:
        call: Any = ast.parse(made, mode="eval").body
        given = zip(keywords, [*call.args, *(keyword.value for keyword in call.keywords)], strict=True)
        made = f"partial({path}, {', '.join(f'{name}={ast.unparse(value)}' for name, value in given)})"
        folder += "from functools import partial\n"
    return _Source("made", lambda root, alias: f"{folder}from {module} import {names}\n{alias} = {made}")


def _folder_line(written: Path, file: Path) -> str:
    """Let a snippet find a file as the target names it: an absolute path would say on which machine it was run."""
    if resolved(written.parent) / written.name != file:  # a link: what its file imports lies beside that
        written = file if written.is_absolute() else Path(os.path.relpath(file))
    shown = written.as_posix() if written.as_posix().isprintable() else repr(written.as_posix())
    hint = "" if written.is_absolute() else f"  # run this in the folder from which {shown} is seen"
    return f"import sys; sys.path.insert(0, {str(written.parent)!r}){hint}\n"
