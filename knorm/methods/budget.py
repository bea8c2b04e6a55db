"""How much a method may keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from knorm.methods.kinds import TOKENS
from knorm.policy import Ratio, exact_ratio, whole


class NeedsBudget(ValueError):
    """Say that a method that has no budget of its own was given none."""


class TakesNoBudget(ValueError):
    """Say that a method was given a budget that it does not take."""


@dataclass(frozen=True)
class Budget:
    """Hold what one compression retains: a share of the cache, or a number of tokens; never both.

    Args:
        keep_ratio: in (0, 1], read as a decimal: 0.55 is 11/20.
        keep_tokens: at least 1.

    Raises:
        TypeError: for a ratio that is no number.
        ValueError: for a ratio outside (0, 1], for fewer tokens than one, and for both or neither.

    Example:
        >>> Budget(keep_tokens=64).ratio(256)
        Fraction(1, 4)
    """

    keep_ratio: Ratio | None = None
    keep_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.keep_ratio is None) == (self.keep_tokens is None):
            raise ValueError("a budget is either keep_ratio or keep_tokens: give one of them")
        if self.keep_ratio is not None:
            exact_ratio(self.keep_ratio)
        elif (tokens := whole("keep_tokens", self.keep_tokens)) < 1:
            raise ValueError(f"keep_tokens={tokens}, but should be at least 1")

    def ratio(self, length: int) -> Fraction:
        """Return the share of a cache of `length` tokens, at most 1."""
        if self.keep_tokens is not None:
            return min(Fraction(1), Fraction(self.keep_tokens, length))
        assert self.keep_ratio is not None
        return exact_ratio(self.keep_ratio)

    def removed(self, length: int) -> float:
        """Return the share to remove, as a float whose complement keeps exactly `keep_tokens` of `length` tokens.

        Truncating length * (1 - removed) to an integer, as kvpress does, gives the number of tokens: where a number is
        asked for, the share leaves half a token of room.
        """
        if self.keep_tokens is not None and self.keep_tokens < length:
            return 1 - (self.keep_tokens + 0.5) / length
        return float(1 - self.ratio(length))

    def __str__(self) -> str:
        return str(self.keep_ratio) if self.keep_tokens is None else f"{self.keep_tokens} tokens"


def budget_argument(name: str | None, budget: Budget, length: int) -> Any:
    """Say a budget as a parameter takes it.

    Args:
        name: of the parameter.
        budget: to be kept.
        length: tokens of the cache.

    Returns:
        A number of tokens, the share that is removed, or the share that is kept, by the name.
    """
    if name in TOKENS:
        return budget.keep_tokens or math.ceil(budget.ratio(length) * length)
    return budget.removed(length) if name == "compression_ratio" else float(budget.ratio(length))
