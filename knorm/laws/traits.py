"""Traits: what a compressor promises, and so which laws apply to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from math import ceil, floor
from typing import Any

from knorm.policy import Ratio

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "rounding": ("ceil", "floor", "half_even", None),
    "scores": ("key_norm", "keys", "queries", None),
    "ties": ("earlier", None),
    "nonfinite": ("raise", None),
    "empty": ("raise", None),
    "acts": ("prefill", "streaming", None),
    "positions": ("kept", "renumbered"),
}
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def exact_share(length: int, keep_ratio: Ratio) -> Fraction:
    """Multiply ratio and length exactly, the ratio being the decimal that it prints as.

    This is the laws' own arithmetic: knorm's is among what they judge.

    Args:
        length: tokens.
        keep_ratio: the share.

    Returns:
        The product.

    Example:
        >>> exact_share(100, 0.55)
        Fraction(55, 1)
    """
    return Fraction(str(keep_ratio)) * length


@dataclass(frozen=True)
class Traits:
    """State what a compressor promises; the defaults are what every compressor owes.

    Attributes:
        rounding: of keep_ratio x length, at least 1: "ceil", "floor" or "half_even"; None for any.
        time_order: what is retained stays in time order.
        scores: what decides: "key_norm" (the lowest stay), "keys" or "queries"; None for anything.
        ties: of equal norms, the "earlier" position stays; None for any.
        nonfinite: keys that are not finite, or whose squared norm is not in float32, "raise"; None for no promise.
        frees_memory: what is evicted is no longer held.
        merges_values: values of several tokens may be merged into one.
        ragged: heads may retain different counts, as a boolean mask [batch, kv_heads, kept] says.
        batch_independent: rows do not influence one another.
        heads_independent: nor do heads (unless ragged); False for one choice for all heads, or one that depends on
            the head.
        deterministic: the same input gives the same answer.
        protect_first: tokens at the start that are never evicted.
        protect_recent: newest tokens that are never evicted.
        prune_after: caches with fewer tokens are left as they are.
        skip_layers: layers that are left as they are, for a compressor that takes layer=.
        granularity: tokens that are evicted together, as in pages or chunks: counts are asked at this grain.
        acts: after the "prefill", or "streaming": what it retains stays as small while tokens are decoded; None for no
            promise.
        positions: "kept", or "renumbered": keys are turned to their places in the cache, and the next token follows.
        lossy: keys and values are rounded: how far, relative to the largest number of each.
        evicts: tokens become fewer; False for what makes them smaller.
        empty: a cache without tokens is refused, "raise"; None for no promise.
        min_length: shorter prompts and caches are refused or left alone: they are not tried.
        dtypes: "float16", "bfloat16", "float32" or "float64", those that it is made for; none for all.
        head_dim: widths of a head that it is made for, 4 or more; none for any.

    Raises:
        ValueError: a value that a trait does not have.

    Example:
        >>> Traits(rounding="ceil", protect_first=4).count(100, 0.55)
        55
    """

    rounding: str | None = None
    time_order: bool = True
    scores: str | None = None
    ties: str | None = None
    nonfinite: str | None = None
    frees_memory: bool = True
    merges_values: bool = False
    ragged: bool = False
    batch_independent: bool = True
    heads_independent: bool = True
    deterministic: bool = True
    protect_first: int = 0
    protect_recent: int = 0
    prune_after: int = 0
    skip_layers: tuple[int, ...] = ()
    granularity: int = 1
    acts: str | None = None
    positions: str = "kept"
    lossy: float = 0.0
    evicts: bool = True
    empty: str | None = None
    min_length: int = 0
    dtypes: tuple[str, ...] = ()
    head_dim: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value, default = getattr(self, field.name), field.default
            if field.name in _CHOICES:
                fits, should = value in _CHOICES[field.name], ", ".join(map(str, _CHOICES[field.name]))
            elif isinstance(default, bool):
                fits, should = isinstance(value, bool), "true or false"
            elif isinstance(default, float):
                fits, should = type(value) in (int, float) and 0 <= value <= 1, "a number from 0 to 1"
            elif isinstance(default, int):
                fits, should = type(value) is int and value >= 0, "an integer of at least 0"
            elif field.name == "dtypes":
                fits, should = isinstance(value, tuple) and {*value} <= {*_DTYPES}, f"of {', '.join(_DTYPES)}"
            else:
                least, should = (4, "widths from 4 up") if field.name == "head_dim" else (0, "layer indices")
                fits = isinstance(value, tuple) and all(type(x) is int and x >= least for x in value)
            if not fits:
                raise ValueError(f"trait {field.name}={value!r}, but should be {should}")

    def fits(self, dtype: str, head_dim: int) -> bool:
        """Tell whether it is made for a dtype and a width of a head.

        Args:
            dtype: its name.
            head_dim: the width.

        Returns:
            True where it is made for both.
        """
        return (not self.dtypes or dtype in self.dtypes) and (not self.head_dim or head_dim in self.head_dim)

    @property
    def protected(self) -> int:
        """Count the tokens that are never evicted."""
        return self.protect_first + self.protect_recent

    def count(self, length: int, keep_ratio: Ratio) -> int | None:
        """Count the tokens that are promised to be retained.

        Args:
            length: tokens of the cache.
            keep_ratio: the share to retain.

        Returns:
            The number of tokens; None where no rounding is promised.
        """
        if length < self.prune_after or (self.protected and length <= self.protected):
            return length
        share = exact_share(length, keep_ratio)
        if self.rounding == "ceil":
            return ceil(share)
        if self.rounding == "floor":
            return max(1, floor(share))
        if self.rounding == "half_even":
            return max(1, round(share))
        return None

    def affords(self, length: int, keep_ratio: Ratio) -> bool:
        """Tell whether the budget covers what is protected: if not, the compression is to be refused.

        Args:
            length: tokens of the cache.
            keep_ratio: the share to retain.

        Returns:
            True where it does.
        """
        lowest = self.count(length, keep_ratio) or max(1, floor(exact_share(length, keep_ratio)))
        return not self.protected or length <= self.protected or lowest >= self.protected


METHOD = Traits(time_order=False, heads_independent=False, frees_memory=False)  # what every cache and press owes
KNORM = Traits(rounding="ceil", scores="key_norm", ties="earlier", nonfinite="raise", empty="raise")


def traits_of(target: object, given: Traits | Mapping[str, Any] | None = None, base: Traits | None = None) -> Traits:
    """Collect what a target promises.

    Args:
        target: may have __knorm_traits__, a dict or Traits.
        given: promises made besides, which come first; Traits replace the target's own.
        base: what is promised otherwise; by default what every compressor owes.

    Returns:
        All of it.

    Raises:
        ValueError: an unknown name or value.

    Example:
        >>> traits_of(len, {"rounding": "ceil"}).rounding
        'ceil'
    """
    own = getattr(target, "__knorm_traits__", {})
    if not isinstance(own, (Mapping, Traits)):
        raise ValueError(f"__knorm_traits__={own!r}, but should be a dict, e.g. {{'rounding': 'ceil'}}")
    if isinstance(given, Traits):
        return given
    known = {field.name for field in fields(Traits)}
    named = dict(given or {})
    if not isinstance(own, Traits):
        named = {**dict(own), **named}
    for name in named:
        if name not in known:
            raise ValueError(f"no trait is named {name!r}; there are {', '.join(sorted(known))}")
    named |= {name: tuple(value) for name, value in named.items() if isinstance(value, list)}
    return replace(own if isinstance(own, Traits) else base or Traits(), **named)


def parse_trait(text: str) -> tuple[str, Any]:
    """Read a trait as a command line has it.

    Args:
        text: NAME=VALUE: rounding=ceil, time_order=false, protect_first=4, skip_layers=0,1.

    Returns:
        The name and the value.

    Raises:
        ValueError: no "=" in it.

    Example:
        >>> parse_trait("skip_layers=0,1")
        ('skip_layers', (0, 1))
    """
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"--trait {text}, but should be NAME=VALUE, e.g. rounding=ceil")
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name, words[value.lower()]
    if name in ("skip_layers", "head_dim", "dtypes"):
        return name, tuple(int(x) if x.strip().isdecimal() else x.strip() for x in value.split(",") if x)
    if name == "lossy" and re.fullmatch(r"\d*\.?\d+", value):
        return name, float(value)
    return name, int(value) if value.isdecimal() else value
