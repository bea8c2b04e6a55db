"""What mutants and correct subjects are made of."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from knorm import retained_count


def squares(keys: Tensor) -> Tensor:
    """Squared norms in float64: [batch, heads, length]. Refuses what every compressor must refuse."""
    if not keys.shape[2]:
        raise ValueError("a cache without tokens")
    return keys.double().square().sum(-1)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` lowest scores, ascending; of equal ones the earlier."""
    return scores.argsort(dim=-1, stable=True)[..., :count].sort(-1).values


def take(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.gather(2, index[..., None].expand(*index.shape, tensor.shape[3]))


def keep(keys: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return take(keys, index), take(values, index)


def everywhere(positions: Tensor, keys: Tensor) -> Tensor:
    """The same positions in every row and head."""
    return positions.expand(*keys.shape[:2], -1)


def keep_lowest(keys: Tensor, values: Tensor, scores: Tensor, keep_ratio: float) -> tuple[Tensor, Tensor]:
    return keep(keys, values, lowest(scores, retained_count(keys.shape[2], keep_ratio)))


class WindowLayer(DynamicLayer):
    """Of the prompt the newest two tokens stay, and all at ratio 1. Correct, with left padding too."""

    is_sliding = False

    def __init__(self, keep_ratio: float) -> None:
        super().__init__()
        self.keep_ratio, self.seen = keep_ratio, 0

    def choose(self, keys: Tensor) -> Tensor:
        length = keys.shape[2]
        return everywhere(torch.arange(max(0, length - 2), length, device=keys.device), keys)

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        if self.seen == 0 and self.keep_ratio < 1:
            self.keys, self.values = keep(keys, values, self.choose(keys))
        self.seen += key_states.shape[2]
        return keys, values

    @property
    def stored(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        queries = query_length if isinstance(query_length, int) else query_length.shape[0]  # before transformers 5.3
        return self.stored + queries, self.seen - self.stored

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None
        self.is_initialized, self.seen = False, 0

    def crop(self, *_) -> None:
        raise NotImplementedError("what was evicted is gone")


class WindowCache(Cache):
    """A cache of WindowLayers, or of the layer that a subclass names."""

    layer: type[DynamicLayer] = WindowLayer

    def __init__(self, keep_ratio: float) -> None:
        super().__init__(layer_class_to_replicate=partial(self.layer, keep_ratio))


class TurnedLayer(WindowLayer):
    """The window's keys are turned to the first places, and the next token follows: positions count what is stored."""

    base = 10000.0

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        if gone := keys.shape[2] - self.stored:
            half = keys.shape[3] // 2
            angle = -gone * self.base ** (-torch.arange(half, dtype=torch.float64, device=keys.device) / half)
            one, two = self.keys.double().split(half, -1)
            turned = [one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()]
            self.keys = torch.cat(turned, -1).to(keys.dtype)
        return keys, values

    def get_seq_length(self) -> int:
        return self.stored if self.seen else 0

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return super().get_mask_sizes(query_length)[0], 0


class TurnedCache(WindowCache):
    """A cache of TurnedLayers."""

    layer = TurnedLayer
