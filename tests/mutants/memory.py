from __future__ import annotations

import torch

from knorm import retained_count
from mutants import mutant
from mutants.parts import keep, keep_lowest, lowest, squares


@mutant("inputs_unwritten", "should be left as it was", "in-place mutation of inputs", deterministic=False)
def compacts_in_place(keys, values, keep_ratio):
    """What is kept is moved to the front of the caller's own buffer."""
    kept = keep_lowest(keys, values, squares(keys), keep_ratio)
    keys[:, :, : kept[0].shape[2]] = kept[0]
    return kept


@mutant("own_bytes", "return a copy, not a view", "a view that keeps the full buffer alive")
def window_is_a_view(keys, values, keep_ratio):
    """The window is a slice of the full cache."""
    count = retained_count(keys.shape[2], keep_ratio)
    return keys[:, :, -count:], values[:, :, -count:]


@mutant("frees_memory", "but should be fewer")
def never_compresses(keys, values, keep_ratio):
    """Nothing is ever evicted."""
    retained_count(keys.shape[2], keep_ratio)
    return keys, values


@mutant("frees_memory", "but should be fewer", "methods that mask but never free")
def masks_but_never_frees(keys, values, keep_ratio):
    """The evicted are masked, and stay where they are."""
    index = lowest(squares(keys), retained_count(keys.shape[2], keep_ratio))
    mask = torch.zeros_like(keys[..., 0], dtype=torch.bool).scatter(-1, index, True)
    return keys, values, mask


@mutant("own_bytes", "return a copy, not a view")
def spare_room(keys, values, keep_ratio):
    """What is kept is the front of a buffer with room for as much again."""
    keys, values = keep(keys, values, lowest(squares(keys), retained_count(keys.shape[2], keep_ratio)))
    return tuple(torch.cat([x, torch.zeros_like(x)], 2)[:, :, : x.shape[2]] for x in (keys, values))
