"""The catalogue's index: a law is a check's first docstring line, its key the check's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from knorm.laws.traits import Traits

Surface = Literal["compressor", "model", "cache", "nll", "evaluator"]


class Refuted(AssertionError):
    """A law does not hold; the message is the sentence with the evidence."""


class Malformed(Refuted):
    """An answer that is no compressed cache at all: the laws `accepts` and `shape` speak of it, the others skip it."""


class Vacuous(Exception):
    """A case on which a law has nothing to say: it does not count as tried."""


@dataclass(frozen=True)
class Check:
    """An entry of the catalogue.

    function   check_<name>(subject, case), raises Refuted
    family     the module it stands in
    surface    what it is run on: "compressor", tensors; "model", any compressor or cache inside a model; "cache", a
               transformers cache of the target's own; "nll", the token NLLs of any of them, or of an evaluator;
               "evaluator", an evaluator's only
    needs      the traits it needs, in words; empty: it applies to every compressor
    applies    whether a subject's traits are those
    exact      draws only keys whose norms are exact in every dtype
    first      of a subject's traits: cases that are tried before any is drawn
    """

    name: str
    function: Callable[[Any, Any], None]
    family: str
    surface: Surface
    needs: str
    applies: Callable[[Traits], bool]
    exact: bool
    first: Callable[[Traits], Iterable[Any]]

    @property
    def law(self) -> str:
        """The sentence that the check tries to refute."""
        return (self.function.__doc__ or "").strip().splitlines()[0]


CHECKS: dict[str, Check] = {}


def check(
    surface: Surface = "compressor",
    *,
    needs: str = "",
    applies: Callable[[Traits], bool] = lambda traits: True,
    exact: bool = False,
    first: Callable[[Traits], Iterable[Any]] = lambda traits: (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Enter a check_<law>(subject, case) into the catalogue. Raises ValueError for a name that is taken."""

    def enter(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__.removeprefix("check_")
        if name in CHECKS:
            raise ValueError(f"check {name!r} is in the catalogue already")
        family = function.__module__.rpartition(".")[2]
        CHECKS[name] = Check(name, function, family, surface, needs, applies, exact, first)
        return function

    return enter


def find(name: str) -> Check:
    """The check of that name. Raises ValueError where there is none."""
    if name not in CHECKS:
        raise ValueError(f"no check is named {name!r}; there are {', '.join(sorted(CHECKS))}")
    return CHECKS[name]
