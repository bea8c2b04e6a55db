"""The names of the checks, read from the catalogue's source: importing it would load PyTorch."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from pathlib import Path

from knorm.laws.registry import unknown


@cache
def check_names() -> dict[str, str]:
    """Read the name of every check, and its family.

    >>> check_names()["time_order"]
    'order'
    """
    names = {}
    for file in sorted((Path(__file__).parent / "catalogue").glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(map(_enters, node.decorator_list)):
                names[node.name.removeprefix("check_")] = file.stem
    return names


@cache
def suite_revision() -> str:
    """Name the laws and the ways that cases are drawn: 12 hexadecimal digits of a hash of their source.

    >>> len(suite_revision())
    12
    """
    folder = Path(__file__).parent
    parts = [
        f"{file.relative_to(folder).as_posix()}\n{file.read_text(encoding='utf-8')}"
        for file in sorted(folder.rglob("*.py"))
    ]
    return sha256("\n".join(parts).encode()).hexdigest()[:12]


@cache
def engine_names() -> dict[str, str]:
    """Read the name of every check of an engine, and their family.

    >>> engine_names()["survives"]
    'engine'
    """
    top = ast.parse((Path(__file__).parent / "engine.py").read_text(encoding="utf-8"))
    functions = [node.name for node in top.body if isinstance(node, ast.FunctionDef)]
    return {name.removeprefix("check_"): "engine" for name in functions if name.startswith("check_")}


def _enters(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "check"


def refuse_unknown(names: Iterable[str], families: bool = False, engine: bool = False) -> None:
    """Raise ValueError for a name that is no check's.

    Args:
        names: what a user wrote.
        families: names of families are right too.
        engine: the message names the checks of engines, else all others.
    """
    known = {**check_names(), **engine_names()}
    for name in names:
        if name not in known and not (families and name in known.values()):
            raise unknown(name, engine_names() if engine else check_names())
