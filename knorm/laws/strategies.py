"""What Hypothesis draws: one layer's cache, with values that tell where they came from; and short texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from knorm.laws.traits import Traits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTH = 4  # of keys and values, where a target is made for any


def made_for(traits: Traits | None) -> tuple[tuple[torch.dtype, ...], tuple[int, ...]]:
    """Return the dtypes and the widths of a head that a target of `traits` is made for; None stands for no traits."""
    if traits is None:
        return DTYPES, (WIDTH,)
    named = (torch.float32, *DTYPES) if not traits.dtypes else [getattr(torch, name) for name in traits.dtypes]
    return tuple(dict.fromkeys(named)), traits.head_dim or (WIDTH,)


SHORT = (1, 2, 3, 4, 5, 6, 8, 10)
BORDERS = (7, 9, 15, 16, 17, 31, 32, 33)  # of the chunks that people work in
AWKWARD = (25, 50, 100)  # the only ones up to 100 with hundredths that ceil(ratio * length) gets wrong
LONG = (63, 64, 65, 127, 128, 129, 257, 300)


@dataclass(frozen=True)
class Cache:
    """Hold one layer's cache and how much of it to keep.

    keys         [batch, kv_heads, length, 4] or wider, small integers times a power of two: where the power is 1,
                 squares and sums are exact in every dtype
    values       same shape, tagged: each row begins with (batch, head, position // 256, position % 256)
    keep_ratio   the decimal that it prints as
    """

    keys: Tensor
    values: Tensor
    keep_ratio: float

    @property
    def length(self) -> int:
        return int(self.keys.shape[2])

    def norms(self) -> Tensor:
        """Compute the exact squared norm of each key: float64 [batch, kv_heads, length]."""
        return self.keys.double().square().sum(-1)

    def positions(self, kept: Any) -> Tensor:
        """Find where each of `kept.values` says it came from, -1 where kept.mask is False: int64 [b, h, kept]."""
        tags = kept.values.double().nan_to_num(-1.0)
        positions = (tags[..., 2] * 256 + tags[..., 3]).long()
        mask = getattr(kept, "mask", None)
        return positions if mask is None else positions.masked_fill(~mask, -1)

    def retained(self, kept: Any) -> Tensor:
        """Tell which tokens are in `kept`, what a compressor returned: bool [batch, kv_heads, length]."""
        positions = self.positions(kept)
        real = (positions >= 0) & (positions < self.length)
        seen = torch.zeros(*positions.shape[:2], self.length + 1, dtype=torch.bool, device=positions.device)
        return seen.scatter_(-1, positions.where(real, self.length), True)[..., : self.length]

    def on(self, device: str) -> Cache:
        """Move the cache to `device`."""
        return replace(self, keys=self.keys.to(device), values=self.values.to(device))

    def __repr__(self) -> str:
        keys = f"keys {list(self.keys.shape)} {str(self.keys.dtype).removeprefix('torch.')}"
        return f"{keys} at ratio {self.keep_ratio}"


def tagged_values(batch: int, heads: int, length: int, dtype: torch.dtype, width: int = WIDTH) -> Tensor:
    """Make values that name their own place, exactly in every floating dtype.

    Args:
        batch: rows.
        heads: key/value heads.
        length: tokens.
        dtype: a floating one.
        width: of a head.

    Returns:
        [batch, heads, length, width]: row, head, and the token's place in base 256, then zeros.
    """
    grid = torch.meshgrid(torch.arange(batch), torch.arange(heads), torch.arange(length), indexing="ij")
    tags = torch.stack([grid[0], grid[1], grid[2] // 256, grid[2] % 256], dim=-1)
    return torch.nn.functional.pad(tags, (0, width - 4)).to(dtype)


USUAL = (0.5, 1.0, 0.55, 0.1, 0.25, 0.75, 0.3, 0.7, 0.9, 0.05, 0.95, 0.333, 0.999, 0.001)


@lru_cache(maxsize=256)
def ratios(length: int) -> tuple[float, ...]:
    """Ratios in (0, 1] to draw from, most often those whose product with `length` binary arithmetic rounds wrongly.

    As ceil or floor of ratio x length, if any exists (25 tokens: 0.28; 50: 0.14; 100: 0.55), and by way of the
    complement, 1 - (1 - ratio). 0.25 and 0.75 give products that lie half-way.
    """
    hundredths = [n / 100 for n in range(1, 100)]
    exact = {ratio: Decimal(str(ratio)) * length for ratio in hundredths}
    wrong = [r for r, n in exact.items() for whole in (math.ceil, math.floor) if whole(r * length) != whole(n)]
    complement = [r for r, n in exact.items() if math.floor((1 - (1 - r)) * length) != math.floor(n)]
    complement += [
        r for r, n in exact.items() if math.floor((1 - float(1 - Decimal(str(r)))) * length) != math.floor(n)
    ]
    return (*USUAL, *(wrong * 40)[:40], *(complement * 20)[:20], *hundredths[::14])


def scales(dtype: torch.dtype) -> tuple[float, ...]:
    """List powers of two for keys of `dtype`: 1, one at which norms overflow half precision, one of tiny keys.

    Times the last, float16 is subnormal.
    """
    return (1.0, 2.0**12, 2.0**-20) if dtype == torch.float16 else (1.0, 2.0**40, 2.0**-40)


@lru_cache(maxsize=64)
def _sizes(traits: Traits | None, long: bool, small: bool) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """Lengths, short ones often, each with the ratios that a budget covers."""
    enough = max(traits.prune_after, 2 * traits.protected, traits.min_length) if traits else 0
    lengths = [*SHORT * 3, *BORDERS * 2, *AWKWARD * 4, *(LONG * 2 if long else ())]
    lengths += [enough + n for n in (0, 1, 2, 5, 9, 20)] * 3 if enough else []
    if small:
        lengths = [length for length in sorted(set(lengths)) if length <= max(3, enough + 2)]
    if traits and traits.min_length:
        lengths = [length for length in lengths if length >= traits.min_length]
    pairs = ((n, tuple(r for r in ratios(n) if traits is None or traits.affords(n, r))) for n in lengths)
    return tuple((length, affordable) for length, affordable in pairs if affordable)


STYLES = ("any", "any", "constant blocks", "zeros")
NEAR_ZERO = tuple(sorted(range(-8, 9), key=lambda n: (abs(n), n < 0)))  # 0, 1, -1, 2 ...: what keys shrink along


class _Choices:
    """Choices made one after another by one drawn number.

    Hypothesis would try many variations of several equal draws, and into integers it mixes constants that it finds in
    the modules loaded: bytes it leaves alone, so that a seed draws the same cases everywhere.
    """

    def __init__(self, draw: Any) -> None:
        self.rest = int.from_bytes(draw(st.binary(min_size=9, max_size=9)), "big")

    def pick(self, choices: Sequence[Any]) -> Any:
        self.rest, index = divmod(self.rest, len(choices))
        return choices[index]


@st.composite
def caches(
    draw: Any, traits: Traits | None = None, *, exact: bool = False, long: bool = False, small: bool = False
) -> Cache:
    """Draw caches of one layer.

    Args:
        draw: Hypothesis gives it: callers leave it out.
        traits: only lengths and ratios whose budget covers what is protected.
        exact: no scale but 1.
        long: also lengths around 64, 128 and 256.
        small: what a person can read: 1 to 3 tokens (beyond what is protected), 1 or 2 rows and heads.

    Returns:
        A cache, with tagged values.

    Shrinks towards one row, one head, one token, float32, ratio 0.5, and if `small` towards keys whose norms are the
    first integers. Keys are four integers of -8 to 8, exact ties abound, and whole rows may be equal; of small caches
    (n, 0, 0, 0). Draws: 2 keys 3, -1; 32 keys of norm 0.
    """
    pick, (dtypes, widths) = _Choices(draw).pick, made_for(traits)
    length, affordable = pick(_sizes(traits, long, small))
    ratio, dtype, style = pick(affordable), pick(dtypes), pick(STYLES)
    width = pick(widths) if len(widths) > 1 else widths[0]
    most = (1, 2) if small else (1, 2, 3, 4)
    batch, heads = pick(most), pick(most)
    scale = 1.0 if exact else pick(scales(dtype))
    keys = torch.zeros(batch, heads, length, width)
    if style != "zeros" and small:
        count = batch * heads * length
        numbers = [NEAR_ZERO[byte % 17] for byte in draw(st.binary(min_size=count, max_size=count))]
        keys[..., 0] = torch.tensor(numbers).view(batch, heads, length)
    elif style != "zeros":
        generator = torch.Generator().manual_seed(pick(range(2**16)))
        keys += torch.randint(-8, 9, keys.shape, generator=generator)
    if style == "constant blocks":
        keys = keys[:, :, torch.arange(length) // 4 * 4]
    return Cache((keys * scale).to(dtype), tagged_values(batch, heads, length, dtype, width), ratio)


def larger_ratio(keep_ratio: float) -> float:
    """Return the ratio half-way from `keep_ratio` to 1, exactly."""
    return float((Decimal(str(keep_ratio)) + 1) / 2)


AWKWARD_COUNTS = ((5, 0.2), (10, 0.1), (25, 0.28), (100, 0.55), (100, 0.07), (100, 0.29), (100, 0.57))


def awkward_counts(traits: Traits) -> Iterator[Cache]:
    """Yield caches whose length times ratio binary arithmetic rounds to another count, up, down or by the complement.

    Those that `traits` do not afford are left out.
    """
    for length, ratio in AWKWARD_COUNTS:
        if traits.affords(length, ratio) and length >= traits.min_length:
            dtypes, widths = made_for(traits)
            keys = torch.zeros(1, 1, length, widths[0], dtype=dtypes[0])
            keys[..., 0] = torch.arange(length) * 7 % 11
            yield Cache(keys, tagged_values(1, 1, length, keys.dtype, widths[0]), ratio)


def beyond_a_byte(traits: Traits) -> Iterator[Cache]:
    """Yield a cache of more positions than uint8 can tell apart, or bfloat16's integers without gaps; nearly all stay.

    Nothing where `traits` do not afford it.
    """
    length, ratio = max(300, traits.prune_after, traits.min_length), 0.95
    dtypes, widths = made_for(traits)
    if traits.affords(length, ratio):
        dtype = torch.bfloat16 if torch.bfloat16 in dtypes else dtypes[0]
        keys = torch.zeros(1, 1, length, widths[0], dtype=dtype)
        keys[..., 0] = torch.arange(length) % 7
        yield Cache(keys, tagged_values(1, 1, length, keys.dtype, widths[0]), ratio)


def one_apart(traits: Traits) -> Iterator[Cache]:
    """Keys that lie together but for the first, as of models that take their first token for a sink.

    Products with what they have in common are large, and of both signs. The `traits` tell dtypes, widths and lengths.
    """
    length = max(3, traits.prune_after, traits.min_length, 2 * traits.protected)
    dtypes, widths = made_for(traits)
    if traits.affords(length, 0.5):
        keys = torch.full((1, 1, length, widths[0]), 8.0, dtype=dtypes[0])
        keys[:, :, 0, 1::2] = -8
        yield Cache(keys, tagged_values(1, 1, length, keys.dtype, widths[0]), 0.5)


@dataclass(frozen=True)
class Text:
    """Hold tokens for a tiny model, and how they are fed to it.

    input_ids    int64 [batch, length]
    prompt       tokens of the first call
    chunk        tokens of each later call
    keep_ratio   as for Cache
    pads         left padding of each row, where a law speaks of it
    """

    input_ids: Tensor
    prompt: int
    chunk: int
    keep_ratio: float
    pads: tuple[int, ...] = ()

    def on(self, device: str) -> Text:
        """Move the text to `device`."""
        return replace(self, input_ids=self.input_ids.to(device))

    def __repr__(self) -> str:
        padded = f", left padding {list(self.pads)}" if any(self.pads) else ""
        return (
            f"token ids {self.input_ids.tolist()}, a prompt of {self.prompt}, then {self.chunk} at a time, "
            f"at ratio {self.keep_ratio}{padded}"
        )


VOCABULARY = 97


@st.composite
def texts(draw: Any, traits: Traits | None = None) -> Text:
    """Draw texts of 4 to 20 tokens in 1 to 3 rows; `draw` is Hypothesis's own.

    `traits` allow only prompts and ratios whose budget covers what is protected.

    Shrinks towards one row, a short prompt, one token a call, tokens 1, 2, 3 ... Rows have left padding in about half
    of the draws; only the laws on padding use it.
    """
    pick = _Choices(draw).pick
    # Where prune_after is beyond the small model's texts, nothing is evicted in any of them.
    bounds = (traits.prune_after, traits.min_length) if traits else ()
    reached = max((bound for bound in bounds if bound <= 40), default=0)
    least = max(3, traits.protected + 2 if traits else 0, reached)
    prompt, later, batch = least + pick(range(10)), 1 + pick(range(8)), 1 + pick(range(3))
    ratio = pick([r for r in (0.5, 0.75, 0.3) if traits is None or traits.affords(prompt, r)] or [1.0])
    ids = (torch.arange(batch * (prompt + later)) % (VOCABULARY - 1) + 1).view(batch, -1)
    if seed := pick(range(100)):
        ids = torch.randint(1, VOCABULARY, ids.shape, generator=torch.Generator().manual_seed(seed))
    pads = tuple(pick(range(prompt - 1)) for _ in range(batch))
    return Text(ids, prompt, pick((1, 2, 7, later)), ratio, (0, *pads[1:]))


def distinct(ids: Tensor) -> Tensor:
    """Draw tokens of which none stands twice in a row of up to 96: of two alike, either may be evicted.

    Args:
        ids: int64 [batch, T], looked at for its shape and device.

    Returns:
        int64 [batch, T].
    """
    places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    return places * 7 % (VOCABULARY - 1) + 1
