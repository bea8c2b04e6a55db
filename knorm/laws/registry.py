"""The catalogue's index: a law is a check's first docstring line, its key the check's name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from knorm.laws.strategies import Cache

# Of one layer's keys, values and a keep_ratio, it returns the keys and values that stay.
Compressor = Callable[..., tuple[Tensor, ...]]
Check = Callable[[Compressor, Cache], None]

CHECKS: dict[str, Check] = {}


class Refuted(AssertionError):
    """A law does not hold; the message is the sentence with the evidence."""


def check(function: Check) -> Check:
    """Enter a check_<law>(compressor, cache) into the catalogue."""
    name = function.__name__.removeprefix("check_")
    if name in CHECKS:
        raise ValueError(f"check {name!r} is in the catalogue already")
    CHECKS[name] = function
    return function


def law(name: str) -> str:
    """The sentence that a check tries to refute."""
    if name not in CHECKS:
        raise ValueError(f"no check is named {name!r}; there are {', '.join(sorted(CHECKS))}")
    return (CHECKS[name].__doc__ or "").strip().splitlines()[0]
