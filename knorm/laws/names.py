"""The names of the checks, read from the catalogue's source: importing it would load PyTorch."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
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


def _enters(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "check"


def refuse_unknown(names: Iterable[str], families: bool = False) -> None:
    """Raise ValueError for a name that is no check's, nor, where those may be named, a family's."""
    known = check_names()
    for name in names:
        if name not in known and not (families and name in known.values()):
            raise unknown(name, known)
