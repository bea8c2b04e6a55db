"""Strict JSON: nothing unknown, missing, twice, or of another type; the field that is wrong is named."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Strict(BaseModel):
    """Hold exactly its fields, each exactly of its type; frozen, and its numbers finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def no_field_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of `pairs` for json.loads(object_pairs_hook=...). Raises ValueError for a field that is there twice.

    >>> no_field_twice([("a", 1), ("a", 2)])
    Traceback (most recent call last):
    ValueError: field a stands there twice
    """
    names = [name for name, _ in pairs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"field {', '.join(sorted(twice))} stands there twice")
    return dict(pairs)


def first_error(error: ValidationError) -> str:
    """Say in one line what `error` names first: the field, and what it should be."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the whole"
    return f"field {where}: {first['msg'].removeprefix('Value error, ').lower()}"
