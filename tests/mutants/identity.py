from __future__ import annotations

from knorm import retained_count
from mutants import PROMISES, mutant
from mutants.parts import keep, keep_lowest, lowest, squares


@mutant("full_ratio", "should come back as they were", "l2compress permutes at ratio 1")
def permutes_at_ratio_1(keys, values, keep_ratio):
    """Where nothing is dropped, the way back to time order is skipped."""
    if keep_ratio == 1 and keys.shape[2]:
        return keep(keys, values, squares(keys).argsort(dim=-1, stable=True))
    return keep_lowest(keys, values, squares(keys), keep_ratio)


@mutant("full_ratio", "should come back as they were", **PROMISES)
def makes_room_for_one(keys, values, keep_ratio):
    """One token goes even at ratio 1, so that the next has a slot."""
    count = min(retained_count(keys.shape[2], keep_ratio), keys.shape[2] - 1)
    return keep(keys, values, lowest(squares(keys), max(1, count)))


@mutant("short_caches", "below prune_after=8", prune_after=8)
def prunes_one_too_early(keys, values, keep_ratio):
    """Caches of prune_after - 1 tokens are compressed too."""
    if 0 < keys.shape[2] < 8 - 1:
        return keys, values
    return keep_lowest(keys, values, squares(keys), keep_ratio)


@mutant("skipped_layers", "in layer 0", skip_layers=(0,))
def layer_0_is_false(keys, values, keep_ratio, layer=None):
    """`if layer` takes layer 0 for none."""
    if layer and layer in (0,):
        return keys, values
    return keep_lowest(keys, values, squares(keys), keep_ratio)
