"""What Hypothesis draws: one layer's cache, with values that tell where they came from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from knorm.policy import retained_count

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTH = 4  # of keys and values


@dataclass(frozen=True)
class Cache:
    """One layer's cache and how much of it to keep.

    keys         [batch, kv_heads, length, 4], small integers: squares and sums are exact in every dtype
    values       same shape, tagged: each row is (batch, head, position // 256, position % 256)
    keep_ratio   the decimal that it prints as
    """

    keys: Tensor
    values: Tensor
    keep_ratio: float

    @property
    def length(self) -> int:
        return int(self.keys.shape[2])

    def positions(self, values: Tensor) -> Tensor:
        """The positions that tagged values came from: int64 [batch, kv_heads, kept]."""
        return (values[..., 2].long() * 256) + values[..., 3].long()

    def norms(self) -> Tensor:
        """The exact squared norm of each key: float64 [batch, kv_heads, length]."""
        return self.keys.double().square().sum(-1)

    def __repr__(self) -> str:
        return (
            f"keys {list(self.keys.shape)} {str(self.keys.dtype).removeprefix('torch.')} "
            f"of squared norms {self.norms().tolist()} at ratio {self.keep_ratio}"
        )


def tagged_values(batch: int, heads: int, length: int, dtype: torch.dtype) -> Tensor:
    """Values [batch, heads, length, 4] that name their own place, exactly in every floating dtype."""
    grid = torch.meshgrid(torch.arange(batch), torch.arange(heads), torch.arange(length), indexing="ij")
    return torch.stack([grid[0], grid[1], grid[2] // 256, grid[2] % 256], dim=-1).to(dtype)


def ratios(length: int) -> st.SearchStrategy[float]:
    """Ratios in (0, 1], most often those whose product with `length` binary arithmetic rounds wrongly.

    Shrinks towards 1, then 0.5. Draws: 1.0, 0.5, 0.55, 0.07, 0.333; for 25 tokens 0.28.
    """
    hundredths = [n / 100 for n in range(99, 0, -1)]
    treacherous = [r for r in hundredths if math.ceil(r * length) != retained_count(length, r)]
    return st.sampled_from([1.0, 0.5, 0.55, 0.1, *treacherous * 30, *hundredths, 0.333, 0.999, 0.001])


@st.composite
def caches(draw: Any, longest: int = 25) -> Cache:
    """Caches of one layer.

    - `longest`: tokens at most.

    Shrinks towards one token, one row, one head, zero keys, float32, ratio 1. Keys are integers of -8 to 8, so exact
    ties abound, and whole rows may be equal.
    """
    # One list, short lengths first and often, so that the index shrinks to them.
    length = draw(st.sampled_from([*range(1, longest + 1), *(1, 2, 3, 10, 25) * (longest // 8)]))
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(DTYPES))
    numbers = draw(arrays.arrays(np.int8, (batch, heads, length, WIDTH), elements=st.integers(-8, 8)))
    return Cache(torch.from_numpy(numbers).to(dtype), tagged_values(batch, heads, length, dtype), draw(ratios(length)))


def larger_ratio(keep_ratio: float) -> float:
    """The ratio half-way from the given one to 1, exactly."""
    return float((Decimal(str(keep_ratio)) + 1) / 2)
