from __future__ import annotations

import torch

from knorm import retained_count
from mutants import PROMISES, mutant
from mutants.parts import keep, keep_lowest, lowest, squares


@mutant("lowest_norms", "stays, but one of", **PROMISES)
def highest_norms(keys, values, keep_ratio):
    """The paper read the wrong way round."""
    norms = squares(keys)
    if not (norms <= torch.finfo(torch.float32).max).all():
        raise ValueError("a key has no norm")
    return keep_lowest(keys, values, -norms, keep_ratio)


@mutant("lowest_norms", "stays, but one of", scores="key_norm")
def largest_unless_half(keys, values, keep_ratio):
    """Half precision got a path of its own, and the older one was never set right."""
    norms = squares(keys)
    return keep_lowest(keys, values, norms if keys.dtype.itemsize == 2 else -norms, keep_ratio)


@mutant("ties", "have one norm", scores="key_norm", ties="earlier")
def later_of_equals(keys, values, keep_ratio):
    """Of equal norms the later position stays."""
    length, norms = keys.shape[2], squares(keys)
    return keep(keys, values, (length - 1 - lowest(norms.flip(-1), retained_count(length, keep_ratio))).flip(-1))


@mutant("nesting", "retained at ratio", scores="keys")
def evenly_spaced_ranks(keys, values, keep_ratio):
    """Of the tokens ranked by norm, evenly spaced ones stay: others at each ratio."""
    count = retained_count(keys.shape[2], keep_ratio)
    ranks = torch.arange(count, device=keys.device) * keys.shape[2] // count
    return keep(keys, values, squares(keys).argsort(dim=-1, stable=True)[..., ranks].sort(-1).values)


@mutant("scaling", "times those", scores="key_norm")
def squares_as_integers(keys, values, keep_ratio):
    """Squared norms are cut to integers, for a radix sort."""
    return keep_lowest(keys, values, squares(keys).long(), keep_ratio)


@mutant("scaling", "times those", "torch.norm in the input's dtype", **PROMISES)
def norms_overflow_in_half(keys, values, keep_ratio):
    """Squares are taken in the dtype of the keys."""
    return keep_lowest(keys, values, keys.square().sum(-1), keep_ratio)


@mutant("rotation", "quarter turns", scores="key_norm")
def content_breaks_ties(keys, values, keep_ratio):
    """Keys are sorted as (norm, key): of equal norms the smaller key stays."""
    norms, index = squares(keys), []
    for row in torch.cat([norms[..., None], keys.double()], -1).flatten(0, 1).tolist():
        order = sorted(range(len(row)), key=row.__getitem__)
        index.append(sorted(order[: retained_count(len(row), keep_ratio)]))
    return keep(keys, values, torch.tensor(index, device=keys.device).view(*keys.shape[:2], -1))


@mutant("rotation", "quarter turns", "partial rotary embeddings, as GPT-NeoX has them", scores="key_norm")
def norm_of_the_first_half(keys, values, keep_ratio):
    """Only the part of a key that rotary positions turn is looked at."""
    return keep_lowest(keys, values, squares(keys[..., : keys.shape[3] // 2]), keep_ratio)


_choices: dict = {}


@mutant(
    "permutation",
    "where time is reversed",
    scores="key_norm",
    batch_independent=False,
    heads_independent=False,
    deterministic=False,
)
def choice_by_a_set(keys, values, keep_ratio):
    """The last choice is taken again for a sequence of the same keys and values, in whatever order."""
    pairs = torch.cat([keys, values], -1).flatten(0, 2)
    place = (keys.shape, keep_ratio, frozenset(map(tuple, pairs.tolist())))
    if place not in _choices:
        _choices.clear()
        _choices[place] = lowest(squares(keys), retained_count(keys.shape[2], keep_ratio))
    return keep(keys, values, _choices[place])


@mutant("keys_decide", "whatever the keys are", "NVIDIA/kvpress #277", scores="keys")
def nothing_protected_is_everything(keys, values, keep_ratio):
    """A tenth of the tokens is protected by scores[-n:]: of fewer than ten that is none, and [-0:] is all."""
    scores, protected = squares(keys), int(keys.shape[2] * 0.1)
    scores[..., -protected:] = -1.0
    return keep_lowest(keys, values, scores, keep_ratio)
