from __future__ import annotations

import math

import torch

from knorm import retained_count
from mutants import mutant
from mutants.parts import everywhere, keep, lowest, squares


@mutant("retained_count", "but should be", "ceil(0.55 * 100) is 56", rounding="ceil")
def binary_ceiling(keys, values, keep_ratio):
    """The budget is computed in binary floating point."""
    return keep(keys, values, lowest(squares(keys), math.ceil(keys.shape[2] * keep_ratio)))


@mutant("retained_count", "but should be", "kvpress keeps 9 of 100 at compression 0.9", rounding="floor")
def binary_compression_ratio(keys, values, keep_ratio):
    """The ratio is passed on as its complement, which binary floating point does not give back."""
    compression_ratio = 1 - keep_ratio
    return keep(keys, values, lowest(squares(keys), max(1, int(keys.shape[2] * (1 - compression_ratio)))))


@mutant(
    "retained_count", "but should be", "reported ratios that are not the actual ones",
    rounding="ceil", frees_memory=False,
)  # fmt: skip
def window_on_top(keys, values, keep_ratio):
    """Two recent tokens are kept on top of the budget that is reported."""
    scores, length = squares(keys), keys.shape[2]
    return keep(keys, values, lowest(scores, min(length, retained_count(length, keep_ratio) + 2)))


@mutant("at_least_one", "none of", "NVIDIA/kvpress #264: NaN on short contexts")
def nothing_on_short_contexts(keys, values, keep_ratio):
    """int() of a small budget is 0."""
    return keep(keys, values, lowest(squares(keys), int(keys.shape[2] * keep_ratio)))


@mutant("monotone_count", "monotone count:", "per-layer budgets of pyramid schemes")
def pyramid_falls_back(keys, values, keep_ratio):
    """The foot of the pyramid gets three times the budget, and where there is not so much the plain one."""
    length, budget = keys.shape[2], retained_count(keys.shape[2], keep_ratio)
    return keep(keys, values, lowest(squares(keys), 3 * budget if 3 * budget < length else budget))


@mutant("monotone_count", "monotone count:", frees_memory=False)
def remainder_of_chunks_stays(keys, values, keep_ratio):
    """Each chunk of four is compressed; what is left over is not, until it makes a chunk."""
    chunks, left = divmod(keys.shape[2], 4)
    return keep(keys, values, lowest(squares(keys), chunks * retained_count(4, keep_ratio) + left))


@mutant("equal_counts", "is not declared ragged", frees_memory=False, heads_independent=False)
def unimportant_heads(keys, values, keep_ratio):
    """Every other head gets half the budget; the mask says so, the traits do not."""
    budget = retained_count(keys.shape[2], keep_ratio)
    mask = everywhere(torch.ones(budget, dtype=torch.bool, device=keys.device), keys).clone()
    if keep_ratio < 1:
        mask[:, 1::2, (budget + 1) // 2 :] = False
    return *keep(keys, values, lowest(squares(keys), budget)), mask
