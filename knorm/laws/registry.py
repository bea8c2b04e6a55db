"""The catalogue's index: a law is a check's first docstring line, its key the check's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from knorm.laws.traits import Traits

Surface = Literal["compressor", "cache", "witness", "press", "nll", "evaluator"]
Reads = Literal["drawn", "rows", "real", "half"]


class Refuted(AssertionError):
    """Say that a law does not hold; the message is the sentence with the evidence.

    Example:
        >>> from knorm.laws import Refuted
        >>> raise Refuted("time_order: positions [1, 0]")
        Traceback (most recent call last):
        knorm.laws.registry.Refuted: time_order: positions [1, 0]
    """


class Malformed(Refuted):
    """Say that an answer is no compressed cache: the laws `accepts` and `shape` speak of it, all others skip it.

    Example:
        >>> from knorm.laws import Malformed, Refuted
        >>> issubclass(Malformed, Refuted)
        True
    """


class Untested(Exception):
    """Say that too few cases were answered, or evicted anything: a law was not found to hold."""


class Unfed(Refuted):
    """Say that a cache broke the model off; where the witness saw it break off too, that is the one law refuted."""


class Vacuous(Exception):
    """Say that a law does not speak of a case, which then does not count as tried."""


class Silent(Vacuous):
    """Say that the target makes no statement that the law could judge: where it never does, the law does not apply."""


class Refusal(Exception):
    """Say that the target declined a case in a sentence of its own: it was not answered, and nothing is refuted."""


@dataclass(frozen=True)
class Condition:
    """State a condition on traits that their values alone do not express, as a sum or a size does.

    Attributes:
        traits: the names of the traits that it concerns, any of which may fulfil it.
        holds: decides it.

    Example:
        >>> from knorm.laws import Condition, Traits
        >>> Condition(("protect_first", "protect_recent"), lambda traits: traits.protected > 0).holds(Traits())
        False
    """

    traits: tuple[str, ...]
    holds: Callable[[Traits], bool]


@dataclass(frozen=True)
class Check:
    """Hold an entry of the catalogue.

    Attributes:
        name: what the command line calls it.
        function: check_<name>(subject, case), which raises Refuted.
        family: the module in which it stands.
        surface: what it is run on: "compressor", tensors; "cache", a transformers cache of the target's own; "witness",
            what attention sees of a cache or of a press; "press", of a press only; "nll", the token NLLs of any of
            them, or of an evaluator; "evaluator", the token NLLs of an evaluator only.
        needs: trait -> the values with which the check applies; empty: it applies to every compressor.
        applies: a further condition, for the few that values do not express.
        exact: True to draw only keys whose norms are exact in every dtype.
        first: makes, from a subject's traits, the cases that are tried before any is drawn.
        reads: what the witness reads: "drawn" keys, several "rows", "real" keys that positions turn, or drawn keys in
            "half" precision, large ones among them.
        evicts: True for a law that speaks of eviction: a case in which nothing was evicted does not count.

    Example:
        >>> from knorm.laws import find
        >>> find("time_order").law
        'Retained positions ascend.'
    """

    name: str
    function: Callable[[Any, Any], None]
    family: str
    surface: Surface
    needs: Mapping[str, tuple[object, ...]]
    applies: Condition | None
    exact: bool
    first: Callable[[Traits], Iterable[Any]]
    reads: Reads = "drawn"
    evicts: bool = False

    @property
    def law(self) -> str:
        """Return the sentence that the check tries to refute."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    def missing(self, traits: Traits) -> tuple[str, ...]:
        """Name the traits that keep the check from applying.

        Args:
            traits: what a compressor promises.

        Returns:
            Their names; none where the check applies.

        Example:
            >>> from knorm.laws import Traits, find
            >>> find("time_order").missing(Traits(time_order=False))
            ('time_order',)
        """
        names = tuple(name for name, values in self.needs.items() if getattr(traits, name) not in values)
        if self.applies is None or self.applies.holds(traits):
            return names
        return (*names, *(name for name in self.applies.traits if name not in names))

    def in_words(self, among: Iterable[str] | None = None) -> str:
        """Say which traits the check needs.

        Args:
            among: names of traits to speak of; by default all that the check needs.

        Returns:
            The words, as a command line would have them.

        Example:
            >>> from knorm.laws import find
            >>> find("nesting").in_words(["scores"])
            'scores=key_norm or keys'
        """
        wanted = {*self.needs, *(self.applies.traits if self.applies else ())} if among is None else {*among}
        said = [_in_words(name, values) for name, values in self.needs.items() if name in wanted]
        if self.applies and wanted & {*self.applies.traits}:
            said.append(" or ".join(self.applies.traits))
        return ", ".join(said)


def _in_words(name: str, values: tuple[object, ...]) -> str:
    return name if values == (True,) else f"{name}={' or '.join(map(str, values))}"


CHECKS: dict[str, Check] = {}


def check(
    surface: Surface = "compressor",
    *,
    needs: Mapping[str, object] | None = None,
    applies: Condition | None = None,
    exact: bool = False,
    first: Callable[[Traits], Iterable[Any]] = lambda traits: (),
    reads: Reads = "drawn",
    evicts: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Enter a check_<law>(subject, case) into the catalogue.

    Args:
        surface: what the check is run on, as Check says.
        needs: trait -> the value with which the check applies, or several in a tuple: {"scores": "key_norm"}.
        applies: a further condition, for the few that values do not express.
        exact: draw only keys whose norms are exact in every dtype.
        first: makes, from a subject's traits, the cases that are tried before any is drawn.
        reads: what the witness reads, as Check says.
        evicts: the law speaks of eviction.

    Returns:
        The decorator of the function, which it leaves as it is.

    Raises:
        ValueError: a name that is taken, or an unknown trait or value of one.

    Example:
        >>> from knorm.laws import check
        >>> check(needs={"rounding": "upwards"})
        Traceback (most recent call last):
        ValueError: trait rounding='upwards', but should be ceil, floor, half_even, None
    """
    known = {field.name for field in fields(Traits)}
    if wrong := [name for name in (*(needs or {}), *(applies.traits if applies else ())) if name not in known]:
        raise ValueError(f"no trait is named {wrong[0]!r}; there are {', '.join(sorted(known))}")
    several = {name: value if isinstance(value, tuple) else (value,) for name, value in (needs or {}).items()}
    for name, values in several.items():
        for value in values:
            Traits(**{name: value})  # refuses what is no value of it

    def enter(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__.removeprefix("check_")
        if name in CHECKS:
            raise ValueError(f"check {name!r} is in the catalogue already")
        family = function.__module__.rpartition(".")[2]
        CHECKS[name] = Check(name, function, family, surface, several, applies, exact, first, reads, evicts)
        return function

    return enter


def find(name: str) -> Check:
    """Look up a check by its name.

    Args:
        name: as the command line calls it.

    Returns:
        The check.

    Raises:
        ValueError: no check has that name; the message lists those that there are.

    Example:
        >>> from knorm.laws import find
        >>> find("time_order").family
        'order'
    """
    if name not in CHECKS:
        raise unknown(name, CHECKS)
    return CHECKS[name]


def unknown(name: str, known: Iterable[str]) -> ValueError:
    """Make the error for a `name` that no check has, with the `known` ones."""
    return ValueError(f"no check is named {name!r}; there are {', '.join(sorted(known))}")
