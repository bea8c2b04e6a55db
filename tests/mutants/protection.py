from __future__ import annotations

import torch

from knorm import retained_count
from mutants import mutant
from mutants.parts import everywhere, keep, keep_lowest, squares


@mutant(
    "protected_tokens", "but should include [0, 1", "StreamingLLM losing its sinks on the second compression",
    time_order=False, protect_first=2,
)  # fmt: skip
def sinks_come_back_last(keys, values, keep_ratio):
    """The sinks are put behind the window, where the next compression does not look for them."""
    length, count = keys.shape[2], retained_count(keys.shape[2], keep_ratio)
    places = torch.arange(length, device=keys.device)
    if length <= 2:
        return keys, values
    if count < 2:
        raise ValueError("two sinks do not fit")
    return keep(keys, values, everywhere(torch.cat([places[length - (count - 2) :], places[:2]]), keys))


def protecting(keys, values, keep_ratio, recent):
    scores = squares(keys)
    scores[..., recent] = -1.0
    return keep_lowest(keys, values, scores, keep_ratio)


@mutant("protected_tokens", "but should include", protect_recent=3)
def window_one_short(keys, values, keep_ratio):
    """The slice of the newest three begins one token too late."""
    length = keys.shape[2]
    if length > 3 and retained_count(length, keep_ratio) < 3:
        raise ValueError("three recent tokens do not fit")
    return protecting(keys, values, 1.0 if 0 < length <= 3 else keep_ratio, slice(-3 + 1, None))


@mutant("protection_refused", "but should raise ValueError", protect_recent=3)
def window_silently_cut(keys, values, keep_ratio):
    """A budget too small for the window cuts it."""
    return protecting(keys, values, 1.0 if 0 < keys.shape[2] <= 3 else keep_ratio, slice(-3, None))


@mutant("protection_refused", "but should raise ValueError", protect_first=2, protect_recent=2)
def topk_of_what_is_left(keys, values, keep_ratio):
    """A budget too small for what is protected is left for topk to complain of."""
    length, places = keys.shape[2], torch.arange(keys.shape[2], device=keys.device)
    if 0 < length <= 4:
        return keys, values
    middle = squares(keys)[..., 2:-2].topk(retained_count(length, keep_ratio) - 4, largest=False).indices + 2
    index = torch.cat([everywhere(places[:2], keys), middle.sort(-1).values, everywhere(places[-2:], keys)], -1)
    return keep(keys, values, index)
