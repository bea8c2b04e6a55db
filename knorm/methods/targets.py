"""How a target is written: parsed, never evaluated, then loaded."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from knorm.methods.known import ABSTRACT, CACHES, PRESSES, lacking, other_version
from knorm.paths import resolved

FORMS = "path/to/file.py:name, package.module:name, kvpress:PressName or transformers:CacheName, also with (arguments)"
KVPRESS = "install it with pip install 'knorm[kvpress]' -c constraints-kvpress.txt"
ENGINES = ("llama.cpp", "vllm")  # reserved words, no modules: what follows is a model
ENDPOINTS = ("http://", "https://")  # of servers, whose models they serve
_SPEC = re.compile(r"(?P<where>[^()]*?):(?P<path>[\w.]+)\s*(?P<call>\(.*\))?", re.DOTALL)
_ENGINE = re.compile(
    rf"(?P<where>{'|'.join(map(re.escape, ENGINES))}):(?P<path>[^()]+?)\s*(?P<call>\(.*\))?", re.DOTALL
)


@dataclass(frozen=True)
class Call:
    """Hold the `path` of a name in the target's package, and the `positional` and `named` arguments in parentheses."""

    path: str
    positional: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)

    def names(self) -> Iterator[str]:
        """Generate the dotted names that the call and its arguments take from the target's module."""
        yield self.path
        todo: list[Any] = [*self.positional, *self.named.values()]
        while todo:
            value = todo.pop()
            if isinstance(value, Call):
                yield from value.names()
            elif isinstance(value, _Named):
                yield value.path
            elif isinstance(value, (list, tuple)):
                todo += value


@dataclass(frozen=True)
class Target:
    """Hold a target as it was written.

    Attributes:
        spec: the whole text.
        where: a module, the path of a Python file, or one of ENGINES.
        path: a dotted name in it; of an engine, the model.
        call: what it is called with; None where it is only named.
        file: the file's absolute path; None for a module.
    """

    spec: str
    where: str
    path: str
    call: Call | None = None
    file: Path | None = None


def parse_target(spec: str) -> Target:
    """Read a target; nothing of it is imported.

    Args:
        spec: path/to/file.py:name, package.module:name, kvpress:PressName or transformers:CacheName; the name may be
            dotted, and be called with literals, and with names and calls of the same module.

    Returns:
        The target's parts, for load_target.

    Raises:
        ValueError: another form, a missing file, or a module whose package is not installed.

    Example:
        >>> parse_target('transformers:QuantizedCache(backend="fp8")').call.named
        {'backend': 'fp8'}
    """
    if is_endpoint(spec):
        raise ValueError(f"target {spec!r} is a server's endpoint, which knorm ppl and knorm check alone take")
    if is_engine(spec):
        return _engine(spec)
    match = _SPEC.fullmatch(spec.strip())
    if match is None or not match["where"] or "\0" in spec:
        raise ValueError(f"target {spec!r}, but should be {FORMS}")
    where, path = match["where"], match["path"]
    call = _call(spec, f"{path}{match['call']}") if match["call"] else None
    file = resolved(Path(where)) if where.endswith(".py") or os.sep in where else None
    if file and (file.suffix != ".py" or not file.is_file()):
        raise ValueError(f"target {spec!r}: there is no Python file {file}; it should be {FORMS}")
    package = where.partition(".")[0]
    if not file and not _is_there(package):
        raise ValueError(f"target {spec!r}: {no_module(where, package or where)}")
    return Target(spec, where, path, call, file)


def is_engine(spec: str) -> bool:
    """Tell whether a target is an engine with a model, which runs in a process of its own.

    Args:
        spec: as on the command line.

    Returns:
        True where its first word is one of ENGINES, and for a server's endpoint.

    Example:
        >>> is_engine('llama.cpp:model.gguf(type_k="q8_0")'), is_engine("mine.py:compress")
        (True, False)
    """
    return spec.strip().partition(":")[0] in ENGINES or is_endpoint(spec)


def is_endpoint(spec: str) -> bool:
    """Tell whether a target is the endpoint of a server, which is asked over HTTP.

    Args:
        spec: as on the command line.

    Returns:
        True where it begins as a URL does.

    Example:
        >>> is_endpoint("http://127.0.0.1:8000/v1#small")
        True
    """
    return spec.strip().startswith(ENDPOINTS)


def _engine(spec: str) -> Target:
    match = _ENGINE.fullmatch(spec.strip())
    if match is None or "\0" in spec:
        raise ValueError(f"target {spec!r}, but should be ENGINE:MODEL or ENGINE:MODEL(option=value, ...)")
    call = _call(spec, f"engine{match['call']}") if match["call"] else None
    return Target(spec, match["where"], match["path"], call)


def _call(spec: str, text: str) -> Call:
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"target {spec!r}: {getattr(error, 'msg', 'it')} in {text!r}") from None
    value = _value(spec, node)
    assert isinstance(value, Call)
    return value


def _value(spec: str, node: ast.expr) -> Any:
    """Turn an argument into a value: a literal, or a Call of a name in the target's module."""
    if isinstance(node, ast.Call):
        if any(keyword.arg is None for keyword in node.keywords) or any(isinstance(x, ast.Starred) for x in node.args):
            raise ValueError(f"target {spec!r}: * and ** have no place in a target")
        positional = tuple(_value(spec, argument) for argument in node.args)
        named = {str(keyword.arg): _value(spec, keyword.value) for keyword in node.keywords}
        return Call(_dotted(spec, node.func), positional, named)
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_value(spec, element) for element in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    if isinstance(node, (ast.Name, ast.Attribute)):
        return _Named(_dotted(spec, node))
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        what = f"{ast.unparse(node)!r} is neither a literal nor a name or call of the target's module"
        raise ValueError(f"target {spec!r}: {what}") from None


@dataclass(frozen=True)
class _Named:
    path: str


def _dotted(spec: str, node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(spec, node.value)}.{node.attr}"
    raise ValueError(f"target {spec!r}: {ast.unparse(node)!r} is not a name of the target's module")


def no_module(where: str, missing: str) -> str:
    """Say that importing `where` found no module of the name `missing`, and what to do."""
    todo = f"install it, or run this in the folder that has {missing}"
    package = missing.partition(".")[0]
    return f"importing {where}: there is no module {missing!r}; {KVPRESS if package == 'kvpress' else todo}"


def _is_there(package: str) -> bool:
    """Tell whether a package, looked for in the current folder too, can be found; it is not imported."""
    before = sys.path.copy()
    sys.path.insert(0, os.getcwd())
    try:
        return package in sys.modules or importlib.util.find_spec(package) is not None
    except ValueError:  # an empty name
        return False
    finally:
        sys.path[:] = before


def load_target(target: Target) -> tuple[Any, dict[str, Any]]:
    """Import what a target names.

    Args:
        target: as parse_target read it.

    Returns:
        The object, and the keywords that it is to be called with: for a class or function with (arguments). A call with
        positional arguments, of a press, is made here, and its result returned without keywords.

    Raises:
        ValueError: in one line, for a target that does not exist, does not import, or fails to be made, and for an
            engine, which is no object of Python's.
    """
    if target.where in ENGINES:
        raise ValueError(
            f"target {target.spec!r} is an engine, which knorm ppl and knorm check take, alone or with others"
        )
    try:
        module = _imported(target.where, target.file)
        named = _named(target.where, target.path, module)
        if target.call is None:
            return named, {}
        positional, keywords = _arguments(target, module, target.call)
    except _Missing as error:
        raise ValueError(f"target {target.spec!r}: {error}{_version(target)}") from error.__cause__
    from knorm.methods.kinds import is_press, signature_of

    if isinstance(named, type) and is_press(named):
        return _called(target, named, positional, keywords), {}
    if positional:
        signature = signature_of(named)
        names = [*signature.parameters] if signature else []
        keywords = {**dict(zip(names, positional, strict=False)), **keywords}
    return named, keywords


def _version(target: Target) -> str:
    """Say that another kvpress than the one that was tried is installed: what is not there may be called otherwise."""
    other = other_version() if target.where.partition(".")[0] == "kvpress" and _is_there("kvpress") else ""
    return f"; {other}" if other else ""


def _arguments(target: Target, module: ModuleType, call: Call) -> tuple[list[Any], dict[str, Any]]:
    def made(value: Any) -> Any:
        if isinstance(value, Call):
            positional, keywords = _arguments(target, module, value)
            return _called(target, _named(target.where, value.path, module), positional, keywords)
        if isinstance(value, _Named):
            return _named(target.where, value.path, module)
        if isinstance(value, (list, tuple)):
            return type(value)(map(made, value))
        return value

    return [made(x) for x in call.positional], {name: made(value) for name, value in call.named.items()}


def _called(target: Target, function: Callable[..., Any], positional: list[Any], keywords: dict[str, Any]) -> Any:
    try:
        return function(*positional, **keywords)
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        name = getattr(function, "__name__", function)
        raise ValueError(f"target {target.spec!r}: {name} refused: {said}{_version(target)}") from error


class _Missing(Exception):
    """A target that is not there or does not import; the message says what to do."""


def _imported(where: str, file: Path | None) -> ModuleType:
    folder = str(file.parent) if file else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = _run(file) if file else importlib.import_module(where)
        if getattr(module, "__file__", "") is None:
            raise ModuleNotFoundError(name=where)  # a folder of that name
        return module
    except ModuleNotFoundError as error:
        raise _Missing(no_module(where, error.name or where)) from error
    except SyntaxError as error:
        raise _Missing(f"{error.filename}, line {error.lineno}, is not valid Python: {error.msg}") from error
    except (Exception, SystemExit) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        todo = KVPRESS if where.partition(".")[0] == "kvpress" else "mend that first"
        raise _Missing(f"importing {where} raised {said}; {todo}") from error


def _run(file: Path) -> ModuleType:
    """Import a file under a name of its own: it may be called as a module that is loaded already."""
    name = f"knorm_target_{file.stem}"
    spec: Any = spec_from_file_location(name, file)
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
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


def expanded(spec: str) -> list[str]:
    """List what a target stands for.

    Args:
        spec: as on the command line.

    Returns:
        All that the package ships for "kvpress:*" or "transformers:*", without caches whose own requirements are not
        installed; any other target alone.

    Raises:
        ValueError: the package is not installed, or * stands for another's.

    Example:
        >>> expanded("knorm")
        ['knorm']
    """
    where, _, name = spec.partition(":")
    if name != "*":
        return [spec]
    if where == "transformers":
        return [f"transformers:{cache}" for cache in CACHES if not lacking(cache)]
    if where != "kvpress":
        raise ValueError(f"target {spec!r}: * stands for all that kvpress or transformers ships, no other module")
    try:
        kvpress: Any = importlib.import_module("kvpress")
    except ModuleNotFoundError:
        raise ValueError(f"target {spec!r}: kvpress is not there; {KVPRESS}") from None
    names = sorted(name for name in vars(kvpress) if name.endswith("Press") and name not in ABSTRACT)
    return [f"kvpress:{PRESSES.get(name, name)}" for name in names]
