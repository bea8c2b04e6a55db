"""Windows, as targets of the plans here: attention sinks and the newest tokens; transformers' own sliding caches."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

SINKS = 4


def sinks_and_recent(keys: Tensor, values: Tensor, keep_ratio: float) -> tuple[Tensor, Tensor]:
    """Keep the first 4 tokens and the newest ones, up to the budget; a cache of up to 5 tokens is left as it is."""
    length = keys.shape[2]
    count = math.ceil(Fraction(str(keep_ratio)) * length)
    if count == length or length <= SINKS + 1:
        return keys, values
    if count <= SINKS:
        raise ValueError(f"a budget of {count} tokens leaves no room for a recent one beside {SINKS} sinks")
    first, newest = torch.arange(SINKS), torch.arange(length - count + SINKS, length)
    kept = torch.cat([first, newest]).to(keys.device)
    return keys.index_select(2, kept), values.index_select(2, kept)


sinks_and_recent.__knorm_traits__ = {  # type: ignore[attr-defined]
    "rounding": "ceil",
    "protect_first": SINKS,
    "protect_recent": 1,
}


def _windowed(config: Any, window: int) -> Any:
    """Copy a configuration, and give every layer a sliding window."""
    changed = copy.deepcopy(config)
    changed.sliding_window, changed.layer_types = window, ["sliding_attention"] * config.num_hidden_layers
    return changed


class DynamicSlidingCache(DynamicCache):
    """Make transformers' own cache of a model with sliding windows."""

    def __init__(self, config: Any, window: int = 8) -> None:
        super().__init__(config=_windowed(config, window))


class StaticSlidingCache(StaticCache):
    """Make transformers' own static cache of a model with sliding windows."""

    def __init__(self, config: Any, max_cache_len: int, window: int = 8) -> None:
        super().__init__(config=_windowed(config, window), max_cache_len=max_cache_len)
