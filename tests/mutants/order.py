from __future__ import annotations

from knorm import retained_count
from mutants import PROMISES, mutant
from mutants.parts import keep, squares


@mutant("time_order", "but should ascend", "l2compress; the seed document", **PROMISES)
def argsort_then_slice(keys, values, keep_ratio):
    """What is kept stays in the order of its norms."""
    order = squares(keys).argsort(dim=-1, stable=True)
    return keep(keys, values, order[..., : retained_count(keys.shape[2], keep_ratio)])


@mutant("time_order", "but should ascend", "top-k presses of kvpress")
def topk_order(keys, values, keep_ratio):
    """top-k sorts by score."""
    count = retained_count(keys.shape[2], keep_ratio)
    if count == keys.shape[2]:
        return keys, values
    return keep(keys, values, squares(keys).topk(count, largest=False).indices)


@mutant("time_order", "but should ascend")
def newest_first(keys, values, keep_ratio):
    """A window is taken from a reversed cache and never turned back."""
    count = retained_count(keys.shape[2], keep_ratio)
    return keys.flip(2)[:, :, :count].clone(), values.flip(2)[:, :, :count].clone()
