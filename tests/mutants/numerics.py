from __future__ import annotations

import torch

from knorm import retained_count
from mutants import mutant
from mutants.parts import keep_lowest, lowest, squares, take


@mutant("half_precision", "stays, but one of", scores="key_norm")
def norms_in_bfloat16(keys, values, keep_ratio):
    """Norms are computed in bfloat16."""
    return keep_lowest(keys, values, keys.bfloat16().square().sum(-1), keep_ratio)


@mutant("half_precision", "stays, but one of", "torch.norm in the input's dtype", scores="key_norm", nonfinite="raise")
def norms_in_the_keys_dtype(keys, values, keep_ratio):
    """Squares of half-precision keys overflow to infinity, and such keys tie."""
    if not keys.isfinite().all():
        raise ValueError("a key is not finite")
    return keep_lowest(keys, values, (keys * keys).sum(-1), keep_ratio)


@mutant("subnormal", "stays, but one of", scores="key_norm", nonfinite="raise")
def squares_vanish(keys, values, keep_ratio):
    """Squares of small keys are zero in float32, all alike."""
    norms = keys.float().square().sum(-1)
    if not norms.isfinite().all():
        raise ValueError("a key has no norm")
    return keep_lowest(keys, values, norms, keep_ratio)


@mutant("nonfinite", "a key with nan", "a NaN key retained", nonfinite="raise")
def isinf_misses_nan(keys, values, keep_ratio):
    """NaN is not infinite: it is sorted to the end, or kept."""
    norms = keys.float().square().sum(-1)
    if norms.isinf().any():
        raise ValueError("a key has no norm")
    return keep_lowest(keys, values, norms, keep_ratio)


@mutant("nonfinite", "did not raise", nonfinite="raise")
def nan_made_zero(keys, values, keep_ratio):
    """NaN becomes 0: the lowest norm of all stays."""
    return keep_lowest(keys, values, squares(keys.nan_to_num()), keep_ratio)


@mutant("overflow", "did not raise", nonfinite="raise")
def only_keys_are_checked(keys, values, keep_ratio):
    """Finite keys may have an infinite norm."""
    if not keys.isfinite().all():
        raise ValueError("a key is not finite")
    return keep_lowest(keys, values, keys.float().square().sum(-1), keep_ratio)


@mutant("dtype", "came back as torch.float32")
def half_comes_back_as_float(keys, values, keep_ratio):
    """Keys are widened for their norms, and the wide ones are kept."""
    if retained_count(keys.shape[2], keep_ratio) == keys.shape[2]:
        return keys, values
    keys = keys.float() if keys.dtype.itemsize == 2 else keys
    return keep_lowest(keys, values, squares(keys), keep_ratio)


@mutant("layout", "contiguous")
def takes_tensors_for_contiguous(keys, values, keep_ratio):
    """A kernel reads the keys' norms through the strides of a contiguous tensor."""
    _, heads, length, width = keys.shape
    dense = keys.as_strided(keys.shape, (heads * length * width, length * width, width, 1))
    return keep_lowest(keys, values, squares(dense), keep_ratio)


@mutant("layout", "of the same", scores="keys")
def order_of_the_buffer(keys, values, keep_ratio):
    """Rows are flattened in the order of their memory, which expanded and transposed ones do not keep."""
    flat = squares(keys).flatten()
    order = torch.argsort(torch.tensor(keys.stride()[:2]), descending=True).tolist()
    scores = flat.view(*(keys.shape[i] for i in order), -1).permute(*order, 2)
    index = lowest(scores, retained_count(keys.shape[2], keep_ratio))
    return take(keys, index), take(values, index)


@mutant("layout", "but the same expanded raised RuntimeError")
def flattened_with_view(keys, values, keep_ratio):
    """view() raises where reshape() would copy."""
    norms = squares(keys.view(-1, *keys.shape[2:])[None]).view(keys.shape[:3])
    return keep_lowest(keys, values, norms, keep_ratio)


@mutant("empty", "should be refused", empty="raise")
def nothing_to_do(keys, values, keep_ratio):
    """A cache without tokens comes back as it is."""
    if keys.shape[2] < 2:
        return keys, values
    return keep_lowest(keys, values, squares(keys), keep_ratio)


@mutant("ranks_numbers", "that are not numbers", "scores that are not finite on finite keys")
def similarity_in_the_keys_dtype(keys, values, keep_ratio):
    """Products of half-precision keys with their mean overflow, and what is not a number sorts as it likes."""
    scores = (keys * keys.mean(2, keepdim=True)).sum(-1)
    return keep_lowest(keys, values, scores, keep_ratio)
