"""Policy: how to compress, and how many tokens that retains. Needs no torch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Ratio = float | int | str | Decimal | Fraction
Score = Literal["low_norm", "high_norm", "random"]
Protocol = Literal["prefill", "streaming"]
LEAST_STREAMED = 2  # tokens of a cache that a streaming policy compresses

# Score of each token, the lowest to be kept: from the squared norms of the keys and the positions of the tokens in the
# sequence, both [batch, kv_heads, length], and from `draw`, which makes one uniform number for each seed and position.
SCORES: Mapping[Score, Callable[[Tensor, Tensor, Callable[[], Tensor]], Tensor]] = {
    "low_norm": lambda norms, positions, draw: norms,
    "high_norm": lambda norms, positions, draw: -norms,
    "random": lambda norms, positions, draw: draw(),
}


@lru_cache(maxsize=256)
def _fraction(written: str) -> Fraction:
    if len(written) > 100 or abs(int(written.lower().partition("e")[2] or 0)) > 400:
        raise ValueError("that many digits are not needed, and an exponent of millions takes seconds to expand")
    if "_" in written or not written.isascii():
        raise ValueError("Python would read 0.5_0 and digits of other scripts, which in a table are mistakes")
    return Fraction(written)


def exact_ratio(keep_ratio: Ratio) -> Fraction:
    """Read a ratio as an exact fraction, a float being the decimal that it prints as.

    Args:
        keep_ratio: in (0, 1].

    Returns:
        The fraction.

    Raises:
        TypeError: a float of NumPy or torch, a bool, or no number.
        ValueError: a ratio outside (0, 1].

    Example:
        >>> exact_ratio(0.55)
        Fraction(11, 20)
    """
    if type(keep_ratio) not in get_args(Ratio):  # not isinstance: numpy.float64 is a float, True an int
        kind = f"{type(keep_ratio).__module__}.{type(keep_ratio).__qualname__}"
        raise TypeError(
            f"keep_ratio={keep_ratio!r} is a {kind}, but should be a float, str, Decimal or Fraction, as "
            "keep_ratio=0.55 or '0.55': in float32 it is 0.5500000119, which would keep 56 of 100 tokens"
        )
    try:
        ratio = _fraction(str(keep_ratio))  # a float means the decimal that it prints as
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(0)
    if not 0 < ratio <= 1:
        raise ValueError(f"keep_ratio={keep_ratio!r}, but should lie in (0, 1]: the share of tokens to retain")
    return ratio


def retained_count(length: int, keep_ratio: Ratio) -> int:
    """Count the tokens that one compression retains: ceil(keep_ratio * length), exactly, at least 1.

    Args:
        length: tokens of the cache, at least 1.
        keep_ratio: the share to retain, in (0, 1].

    Returns:
        The number of tokens.

    Raises:
        ValueError: a length below 1, or a ratio outside (0, 1].
        TypeError: a ratio that is no float, int, str, Decimal or Fraction.

    Example:
        >>> retained_count(100, 0.55)  # binary floating point gives 56
        55
    """
    length = whole("length", length)  # an int64 of NumPy would overflow below
    if length < 1:
        raise ValueError(f"length={length}, but should be at least 1: an empty cache cannot be compressed")
    ratio = exact_ratio(keep_ratio)
    return -(-ratio.numerator * length // ratio.denominator)


def whole(name: str, value: object, least: int = 0) -> int:
    """Read a value as an int.

    Args:
        name: what the value is, for messages.
        value: the value.
        least: the smallest that is allowed.

    Returns:
        The int.

    Raises:
        TypeError: the value is no integer.
        ValueError: it is a bool, or below `least`.

    Example:
        >>> whole("prune_after", 8)
        8
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name}={value!r}, but should be an integer") from None
    if "bool" in f"{type(value).__name__} {getattr(value, 'dtype', '')}" or number < least:
        raise ValueError(f"{name}={value!r}, but should be an integer of at least {least}")
    return number


@dataclass(frozen=True, slots=True)
class Policy:
    """Configure how a cache is compressed: one object for core, cache, oracle, goldens and reports.

    Attributes:
        keep_ratio: share of the present cache that one compression retains, in (0, 1].
        prune_after: tokens; a layer's cache is compressed only once it holds at least this many.
        skip_layers: layers that are never compressed; stored as a sorted tuple.
        protect_first: tokens at the start of the sequence (attention sinks) that are never evicted.
        protect_recent: newest tokens that are never evicted.
        score: "low_norm" keeps the lowest key norms, "high_norm" the highest, "random" a seeded draw.
        protocol: "prefill" compresses once, after the prompt; "streaming" after every later token too.
        seed: seed of the random score; 0 for the other scores.

    Raises:
        TypeError: a value of the wrong type; the message says what to give instead.
        ValueError: a value that cannot work, likewise.

    Example:
        >>> Policy(0.5, protocol="streaming", prune_after=512, skip_layers=[1, 0]).skip_layers
        (0, 1)
    """

    keep_ratio: Ratio = 1.0
    prune_after: int = 0
    skip_layers: tuple[int, ...] = ()
    protect_first: int = 0
    protect_recent: int = 0
    score: Score = "low_norm"
    protocol: Protocol = "prefill"
    seed: int = 0

    def __post_init__(self) -> None:
        ratio = exact_ratio(self.keep_ratio)
        near = float(ratio)
        try:
            layers = None if isinstance(self.skip_layers, str | bytes) else tuple(self.skip_layers)
        except TypeError:  # a tensor without dimensions is iterable by its type alone
            layers = None
        if layers is None:
            raise TypeError(f"skip_layers={self.skip_layers!r}, but should be layer indices, e.g. skip_layers=(0,)")
        normal: dict[str, object] = {
            "keep_ratio": near if _fraction(str(near)) == ratio else ratio,
            "skip_layers": tuple(sorted({whole("skip_layers", layer) for layer in layers})),
            "seed": whole("seed", self.seed, -(2**63)),
        }
        for name in ("prune_after", "protect_first", "protect_recent"):
            normal[name] = whole(name, getattr(self, name))
        for name, allowed in (("score", get_args(Score)), ("protocol", get_args(Protocol))):
            given = getattr(self, name)
            if not isinstance(given, str) or given not in allowed:
                raise ValueError(f"{name}={given!r}, but should be one of {', '.join(allowed)}")
        if self.score != "random":
            normal["seed"] = 0
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        if self.protocol == "streaming":
            if self.prune_after < LEAST_STREAMED:
                raise ValueError(
                    f"prune_after={self.prune_after} with protocol='streaming', but should be at least "
                    f"{LEAST_STREAMED}: a cache of one token has nothing to evict"
                )
            self._afford(self.prune_after)

    def _afford(self, length: int) -> int:
        count, protected = retained_count(length, self.keep_ratio), self.protect_first + self.protect_recent
        if count < protected:
            raise ValueError(
                f"protect_first={self.protect_first} and protect_recent={self.protect_recent} need {protected} tokens, "
                f"but keep_ratio={self.keep_ratio} retains {count} of {length}. Protect fewer, or raise "
                f"{'prune_after' if self.protocol == 'streaming' else 'keep_ratio'}"
            )
        return count

    def budget(self, length: int) -> int:
        """Count the tokens that one compression leaves.

        Args:
            length: tokens of the cache.

        Returns:
            The number of tokens: all of them below prune_after, or where there are no more than are protected.

        Raises:
            ValueError: the protected tokens exceed what keep_ratio retains, or the length is negative.

        Example:
            >>> Policy(0.5, prune_after=8).budget(7), Policy(0.5, prune_after=8).budget(8)
            (7, 4)
        """
        length = operator.index(length)
        if length < 0:
            raise ValueError(f"length={length}, but should be a number of tokens, from 0")
        if length < self.prune_after or length <= self.protect_first + self.protect_recent:
            return length
        return self._afford(length)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON holds them: keep_ratio is a number, or "1/3" where no float is that fraction.

        Returns:
            The fields; Policy(**fields) reads them back.

        Example:
            >>> Policy(**Policy("1/3").as_json()) == Policy("1/3")
            True
        """
        ratio = self.keep_ratio if isinstance(self.keep_ratio, float) else str(self.keep_ratio)
        return asdict(self) | {"keep_ratio": ratio, "skip_layers": [*self.skip_layers]}
