"""Types of options that take numbers: each has a least one, which --help names and which is refused before the work."""

from __future__ import annotations

import math
from typing import Any

import click


def _option(param: click.Parameter | None) -> str:
    return param.opts[0] if param else "the number"


class AtLeast(click.IntRange):
    """Take whole numbers from a least one up; --help shows it as [x>=LEAST]."""

    name = "integer"

    def __init__(self, least: int, why: str = "") -> None:
        super().__init__(min=least)
        self.least = least
        self.why = f": {why}" if why else ""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read the number. Raises ValueError for one below the least, which says why."""
        number = int(click.INT.convert(value, param, ctx))
        if number < self.least:
            raise ValueError(f"{_option(param)} {number}, but should be at least {self.least}{self.why}")
        return number


class Above(click.FloatRange):
    """Take finite numbers above zero; --help shows that as [x>0]."""

    name = "float"

    def __init__(self, unit: str) -> None:
        super().__init__(min=0, min_open=True)
        self.unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read the number. Raises ValueError for one that is not above zero, or not finite."""
        number = float(click.FLOAT.convert(value, param, ctx))
        if not 0 < number < math.inf:
            raise ValueError(f"{_option(param)} {number:g}, but should be {self.unit} above 0")
        return number


class Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Take numbers separated by commas: whole ones from a least one up, or, without a least one, as they are written.

    Their option's help says the least one: click has no place for it.
    """

    name = "N[,N...]"

    def __init__(self, least: int | None = None) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the numbers: a tuple of int, or of str. Raises ValueError for one below the least."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if self.least is None:
            return tuple(parts)
        try:
            numbers = tuple(map(int, parts))
        except ValueError:
            self.fail(f"{value!r} should be numbers separated by commas, e.g. 1,2", param, ctx)
        if low := [number for number in numbers if number < self.least]:
            raise ValueError(f"{_option(param)} {low[0]}, but should be at least {self.least}")
        return numbers
