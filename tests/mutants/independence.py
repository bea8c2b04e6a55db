from __future__ import annotations

import torch

from knorm import retained_count
from mutants import mutant
from mutants.parts import keep, keep_lowest, lowest, squares


@mutant("rows_alone", "alone retains positions", "batch rows using row 0's choices")
def choice_of_the_first_row(keys, values, keep_ratio):
    """Row 0's choice is every row's."""
    return keep_lowest(keys, values, squares(keys)[:1].expand(keys.shape[0], -1, -1), keep_ratio)


@mutant("rows_alone", "alone retains positions", "z-scores over the batch")
def z_scores_over_the_batch(keys, values, keep_ratio):
    """Norms above the mean of the whole batch go first, then the oldest tokens."""
    norms, age = squares(keys), torch.arange(keys.shape[2], 0, -1, device=keys.device)
    z = norms - norms.mean((0, 2), keepdim=True)
    return keep_lowest(keys, values, (z > 0) * keys.shape[2] + age, keep_ratio)


@mutant("heads_alone", "alone retains positions")
def one_choice_for_all_heads(keys, values, keep_ratio):
    """Norms are averaged over the heads."""
    return keep_lowest(keys, values, squares(keys).mean(1, keepdim=True).expand(keys.shape[:3]), keep_ratio)


@mutant("repeatable", "but the second")
def unseeded_random(keys, values, keep_ratio):
    """Tokens are drawn from the global generator."""
    return keep_lowest(keys, values, torch.rand(keys.shape[:3], device=keys.device), keep_ratio)


_last: list = [None]


@mutant("repeatable", "but the second", batch_independent=False, heads_independent=False)
def repeated_prompt_is_let_through(keys, values, keep_ratio):
    """A prompt of several heads that comes again at once is taken for compressed already."""
    mark = (keep_ratio, keys.stride(), keys.tolist())
    again, _last[0] = mark == _last[0] and not torch.equal(keys, keys.flip(2)), mark
    if again and keys.shape[1] > 1:
        return keys.clone(), values.clone()
    return keep_lowest(keys, values, squares(keys), keep_ratio)


_calls = [0]


@mutant("repeatable", "but the second", "step counters that leak", frees_memory=False)
def every_second_call(keys, values, keep_ratio):
    """A step counter that no sequence resets lets every second call through uncompressed."""
    _calls[0] += 1
    return keep_lowest(keys, values, squares(keys), keep_ratio if _calls[0] % 2 else 1.0)


_shape = [torch.Size()]


@mutant("repeatable", "but the second", ragged=True, frees_memory=False)
def mask_filled_after_it_is_read(keys, values, keep_ratio):
    """The mask's buffer is made by the first call of a shape, and filled only for the next."""
    kept, filled = keep_lowest(keys, values, squares(keys), keep_ratio), keys.shape == _shape[0]
    mask = torch.full(kept[0].shape[:3], filled, device=keys.device)
    mask[..., 0], _shape[0] = True, keys.shape
    return *kept, mask


_sums = [torch.zeros(0, 0, 0)]


@mutant("no_leak", "after another sequence", "NVIDIA/kvpress #221", batch_independent=False, heads_independent=False)
def scores_add_up(keys, values, keep_ratio):
    """Scores add up over calls until the length changes, a new sequence or not."""
    scores = squares(keys)
    if scores.shape == _sums[0].shape:
        scores = scores + _sums[0]
    _sums[0] = scores
    return keep_lowest(keys, values, scores, keep_ratio)


@mutant("generator_left_alone", "torch.rand gives", heads_independent=False, batch_independent=False)
def seeds_the_global_generator(keys, values, keep_ratio):
    """Random scores that are to be repeatable seed the global generator."""
    torch.manual_seed(0)
    return keep_lowest(keys, values, torch.rand(keys.shape[:3], device=keys.device), keep_ratio)


@mutant("values_ignored", "with other values", scores="keys")
def weighed_by_values(keys, values, keep_ratio):
    """A method said to score keys weighs them by the norms of the values."""
    return keep_lowest(keys, values, squares(keys) * (1 + squares(values)), keep_ratio)


_choice: dict = {}


@mutant(
    "no_leak",
    "after another sequence",
    "module-level masks that outlive the sequence",
    batch_independent=False,
    heads_independent=False,
)
def choice_outlives_the_sequence(keys, values, keep_ratio):
    """The last choice is taken again for any sequence of the same shape."""
    place = (keys.shape, keep_ratio)
    if place not in _choice:
        _choice.clear()
        _choice[place] = lowest(squares(keys), retained_count(keys.shape[2], keep_ratio))
    return keep(keys, values, _choice[place])


_staged: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}


@mutant("answers_stay", "the same tensors hold", "a staging buffer used again while in use")
def staged_in_one_buffer(keys, values, keep_ratio):
    """What is retained is written to a buffer of its shape, which the next call writes to again."""
    kept = keep_lowest(keys, values, squares(keys), keep_ratio)
    place = (kept[0].shape, kept[0].dtype, kept[0].device)
    buffers = _staged.setdefault(place, (torch.empty_like(kept[0]), torch.empty_like(kept[1])))
    for buffer, states in zip(buffers, kept, strict=True):
        buffer.copy_(states)
    return buffers
