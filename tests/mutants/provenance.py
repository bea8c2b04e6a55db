from __future__ import annotations

import torch

from knorm import retained_count
from mutants import PROMISES, mutant
from mutants.parts import everywhere, keep, keep_lowest, lowest, squares, take


@mutant("accepts", "but should answer", "crashes at batch 3", batch_independent=False, heads_independent=False)
def crashes_at_batches(keys, values, keep_ratio):
    """The mean of each row lacks keepdim: it is subtracted along the sequence."""
    scores = squares(keys)
    return keep_lowest(keys, values, scores - scores.mean((1, 2)), keep_ratio)


@mutant("accepts", "but should answer", "crashes at length 1")
def crashes_at_length_1(keys, values, keep_ratio):
    """At least two tokens are asked of topk."""
    count = max(2, retained_count(keys.shape[2], keep_ratio))
    return keep(keys, values, squares(keys).topk(count, largest=False).indices.sort(-1).values)


@mutant("accepts", "but should answer", "crashes at particular lengths modulo a chunk")
def crashes_between_chunks(keys, values, keep_ratio):
    """The chunk's length must divide the sequence's."""
    means = squares(keys).unflatten(2, (-1, min(4, keys.shape[2]))).mean(-1)
    return keep_lowest(keys, values, means.repeat_interleave(min(4, keys.shape[2]), -1), keep_ratio)


@mutant("shape", "but should keep batch, heads and width", "a batch of 2 comes back as a batch of 1")
def first_row_only(keys, values, keep_ratio):
    """The index of the first row stands for the batch."""
    return keep_lowest(keys[:1], values[:1], squares(keys[:1]), keep_ratio)


@mutant("shape", "as many values as keys")
def values_left_whole(keys, values, keep_ratio):
    """Only the keys are compressed."""
    return keep_lowest(keys, values, squares(keys), keep_ratio)[0], values


@mutant("shape", "should return (keys, values)")
def legacy_list(keys, values, keep_ratio):
    """What comes back is a list of layers, as caches once were."""
    return [keep_lowest(keys, values, squares(keys), keep_ratio)]


@mutant("pairing", "no token of that row and head has both", "values gathered with another head's index", ragged=True)
def values_of_another_head(keys, values, keep_ratio):
    """The index that gathers the values has its heads reversed."""
    index = lowest(squares(keys), retained_count(keys.shape[2], keep_ratio))
    return take(keys, index), take(values.flip(1), index)


@mutant("pairing", "no token of that row and head has both", "rajveer43/VeloxQuant-MLX #364", **PROMISES)
def zero_padded_heads(keys, values, keep_ratio):
    """Every other head gets half the budget and is filled up with zeros, which are attended to."""
    budget = retained_count(keys.shape[2], keep_ratio)
    kept = keep(keys, values, lowest(squares(keys), budget))
    for tensor in kept if keep_ratio < 1 else ():
        tensor[:, 1::2, (budget + 1) // 2 :] = 0
    return kept


@mutant("pairing", "no token of that row and head has both", "rajveer43/VeloxQuant-MLX #137")
def rotated_to_their_slots(keys, values, keep_ratio):
    """Kept keys are rotated to their new slots as if no rotation were in them."""
    keys, values = keep_lowest(keys, values, squares(keys), keep_ratio)
    angle = torch.arange(keys.shape[2], device=keys.device, dtype=torch.float64)[:, None]
    one, two = keys.double().chunk(2, -1)
    turned = torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)
    return turned.to(keys.dtype), values


@mutant("pairing", "no token of that row and head has both", "fake keys, as kvpress masks heads", frees_memory=False)
def fake_keys(keys, values, keep_ratio):
    """Evicted keys are replaced by one that no query should like."""
    index = lowest(squares(keys), retained_count(keys.shape[2], keep_ratio))
    kept = torch.zeros_like(keys[..., 0], dtype=torch.bool).scatter(-1, index, True)
    return keys.where(kept[..., None], torch.full_like(keys, -100.0)), values.clone()


@mutant("no_duplicates", "but should be distinct", "overlapping sinks and window", ragged=True)
def sinks_overlap_the_window(keys, values, keep_ratio):
    """Two sinks and a window of four, in a cache of fewer than six tokens."""
    length, places = keys.shape[2], torch.arange(keys.shape[2], device=keys.device)
    if not length:
        raise ValueError("no tokens")
    both = torch.cat([places[:2], places[-4:]]).sort().values
    return keep(keys, values, everywhere(both, keys))


@mutant("no_duplicates", "but should be distinct", "recent=0 slices")
def recent_zero(keys, values, keep_ratio):
    """A quarter of the budget is recent: of a small one nothing, and [-0:] is everything."""
    length, count = keys.shape[2], retained_count(keys.shape[2], keep_ratio)
    recent = count // 4
    older = lowest(squares(keys)[..., : length - recent], count - recent)
    newest = everywhere(torch.arange(length, device=keys.device)[-recent:], keys)
    return keep(keys, values, torch.cat([older, newest], -1).sort(-1).values)


@mutant("no_duplicates", "but should be distinct")
def indices_in_bytes(keys, values, keep_ratio):
    """Positions are held in uint8: the 257th is the first again."""
    index = lowest(squares(keys), retained_count(keys.shape[2], keep_ratio))
    return keep(keys, values, index.to(torch.uint8).long())


@mutant("no_duplicates", "but should be distinct")
def indices_in_the_dtype_of_the_keys(keys, values, keep_ratio):
    """Positions are held in the keys' dtype: bfloat16 has no odd numbers beyond 256."""
    index = lowest(squares(keys), retained_count(keys.shape[2], keep_ratio))
    return keep(keys, values, index.to(keys.dtype).long().clamp(max=keys.shape[2] - 1))
