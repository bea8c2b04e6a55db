"""The compression core: keep the keys with the lowest L2 norm, in time order.

Source: Devoto, Zhao, Scardapane, Minervini, "A Simple and Effective L2 Norm-Based Strategy for KV Cache
Compression", EMNLP 2024. Keys of low norm draw high attention, so they are the ones to keep.
"""

from __future__ import annotations

import contextlib
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from knorm import kernels
from knorm.policy import SCORES, Policy, Ratio, whole
from knorm.tensors import refuse_mapped, refuse_unreadable

DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_FLOAT32_MAX = torch.finfo(torch.float32).max
_UNDERFLOW = 2.0**-100  # below it, float32 squares have lost bits
_HUGE = 2**22  # bytes from which NumPy asks for huge pages
_CACHED = 2**19  # elements of a temporary that stays in a CPU's cache
_RANKED_BY_KERNELS = {"low_norm": False, "high_norm": True}  # score -> are the highest norms kept?


class Compressed(NamedTuple):
    """Hold what a compression retains, in time order.

    Attributes:
        keys: [batch, kv_heads, kept, head_dim], dtype and device as given.
        values: the same.
        positions: int64 [batch, kv_heads, kept], the index of each token in the original sequence.

    Example:
        >>> compress(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2), 0.5).positions.tolist()
        [[[0, 1]]]
    """

    keys: Tensor
    values: Tensor
    positions: Tensor


def squared_norms(keys: Tensor, layer: int | None = None) -> Tensor:
    """Compute the squared L2 norm of each of `keys`: floating [..., length, head_dim] -> [..., length].

    Accumulates in float32; in float64 for float64 keys, and where float32 would underflow (norms down to 1e-154).
    Raises ValueError at the first key that is not finite or whose squared norm exceeds float32; it names the `layer`.
    """
    refuse_mapped("keys", keys)
    wide = torch.promote_types(keys.dtype, torch.float32)
    if keys.is_cuda:
        norms = keys.to(wide).square().sum(-1)
    else:  # a few rows at a time: a fraction of the time, and no temporary of the whole size
        rows = keys.reshape(-1, keys.shape[-1]).split(max(1, _CACHED // max(1, keys.shape[-1])))
        norms = torch.cat([part.to(wide).square().sum(-1) for part in rows]).view(keys.shape[:-1])
    lowest, highest = torch.stack(norms.aminmax()).tolist()
    if not highest <= _FLOAT32_MAX:
        at = (~(norms <= _FLOAT32_MAX)).nonzero()[0].tolist()
        place = ", ".join(f"{name} {i}" for name, i in zip(("position", "head", "batch row"), at[::-1], strict=False))
        what = "its squared norm overflows float32" if keys[tuple(at)].isfinite().all() else "it is not finite"
        raise ValueError(f"the key at {f'layer {layer}, ' if layer is not None else ''}{place} has no norm: {what}")
    if lowest < _UNDERFLOW:
        norms = torch.where(norms < _UNDERFLOW, keys.double().square().sum(-1), norms.double())
    return norms


def _hash(seed: int, layer: int, positions: Tensor) -> Tensor:
    """Uniform in [0, 1) from (seed, layer, head, position) by splitmix64: the same on every device, rows alike."""
    heads = torch.arange(positions.shape[1], device=positions.device)[:, None]
    start = ((seed * 1_000_003 + layer) * 6364136223846793005 + 2**63) % 2**64 - 2**63
    state = start + heads * 7046029254386353131 + positions
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        state = (state ^ (state >> shift & (1 << (64 - shift)) - 1)) * factor
    return (state ^ (state >> 31 & (1 << 33) - 1)).bitwise_and((1 << 53) - 1).double() / 2**53


def token_scores(keys: Tensor, policy: Policy, positions: Tensor, layer: int | None = None) -> Tensor:
    """Score each token by its key and position alone, low ones to stay: [..., length, head_dim] -> [..., length].

    `policy` names the score; `keys` are floating, `positions` int64 [..., length]; `layer` varies the random score.
    """
    norms = squared_norms(keys, layer)
    return SCORES[policy.score](norms, positions, lambda: _hash(policy.seed, layer or 0, positions).expand_as(norms))


def select(scores: Tensor, count: int, protect_first: int = 0, protect_recent: int = 0) -> Tensor:
    """Find the indices of the `count` lowest `scores`, ascending: floating [..., length] -> int64 [..., count].

    The `protect_first` and `protect_recent` tokens at the ends come first; of equal scores, the earlier one is kept.
    """
    if protect_first or protect_recent:
        scores = scores.clone()
        scores[..., :protect_first] = -torch.inf
        scores[..., scores.shape[-1] - protect_recent :] = -torch.inf
    cut = scores.kthvalue(count, dim=-1, keepdim=True).values
    kept, at_cut = scores < cut, scores == cut
    kept |= at_cut & (at_cut.cumsum(-1) <= count - kept.sum(-1, keepdim=True))
    return kept.nonzero()[:, -1].view(*scores.shape[:-1], count)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised, on a CPU; not to be resized. NumPy asks for huge pages: touching small ones outlasts the copy."""
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _take(rows: Tensor, indices: Tensor) -> Tensor:
    """rows[b, h, indices[b, h]], by one flat index: ten times a gather's speed on a CPU."""
    batch, heads, length, width = rows.shape
    offsets = torch.arange(batch * heads, device=rows.device).view(batch, heads, 1) * length
    flat, index = rows.reshape(-1, width), (offsets + indices).flatten()
    shape = batch, heads, indices.shape[-1], width
    if len(index) * width * rows.itemsize >= _HUGE and rows.device.type == "cpu":
        with contextlib.suppress(RuntimeError):  # derivatives and vmap know no out=
            return torch.index_select(flat, 0, index, out=_empty((len(index), width), rows.dtype)).view(shape)
    return flat.index_select(0, index).view(shape)


def _check(keys: Tensor, values: Tensor, positions: Tensor | None) -> None:
    refuse_unreadable(keys=keys, values=values, **({} if positions is None else {"positions": positions}))
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"{_given(keys, values)}, but both should be [batch, kv_heads, length, head_dim] with the same batch, "
            "kv_heads and length"
        )
    if 0 in keys.shape or 0 in values.shape:
        raise ValueError(f"{_given(keys, values)}, but a cache without tokens, heads or rows cannot be compressed")
    if keys.dtype not in DTYPES or values.dtype not in DTYPES or keys.device != values.device:
        raise ValueError(
            f"{_given(keys, values)} on {keys.device} and {values.device}, but both should be float16, bfloat16, "
            "float32 or float64, on one device"
        )
    if positions is not None and (positions.shape != keys.shape[:3] or positions.dtype != torch.int64):
        raise ValueError(
            f"positions {list(positions.shape)} {positions.dtype}, but should be int64 {list(keys.shape[:3])}, "
            "as the compression before returned them"
        )
    if positions is not None and positions.device != keys.device:
        raise ValueError(f"positions on {positions.device}, but should be on {keys.device}, as the keys are")


def _given(keys: Tensor, values: Tensor) -> str:
    return f"keys {list(keys.shape)} {keys.dtype}, values {list(values.shape)} {values.dtype}"


@lru_cache(maxsize=4096)
def _budget(policy: Policy, length: int) -> int:  # exact decimal arithmetic takes as long as a launch
    return policy.budget(length)


def compress(
    keys: Tensor,
    values: Tensor,
    policy: Policy | Ratio,
    *,
    positions: Tensor | None = None,
    layer: int | None = None,
) -> Compressed:
    """Compress one layer's cache once; what is retained stays in time order.

    Args:
        keys: floating [batch, kv_heads, length, head_dim]; never written to.
        values: the same, but for head_dim.
        policy: a Policy, or a bare keep_ratio.
        positions: int64 [batch, kv_heads, length] from an earlier compression; by default 0 to length - 1.
        layer: index of the layer, which skip_layers, the random score and messages refer to.

    Returns:
        The input itself, its keys not looked at, where nothing is to be evicted; copies otherwise.

    Raises:
        ValueError: shapes that disagree, no tokens, no numbers, no norm, vmap, or protections beyond the budget.
        TypeError: a bad ratio, or no tensor.

    Example:
        >>> compress(torch.tensor([[[[3.0], [1.0], [2.0]]]]), torch.zeros(1, 1, 3, 1), 0.5).keys.flatten().tolist()
        [1.0, 2.0]
    """
    policy = policy if isinstance(policy, Policy) else Policy(policy)
    layer = None if layer is None else whole("layer", layer)
    _check(keys, values, positions)
    length = keys.shape[2]
    count = length if layer in policy.skip_layers else _budget(policy, length)
    if count < length and policy.score in _RANKED_BY_KERNELS and kernels.available(keys, values):
        protected = policy.protect_first, policy.protect_recent
        fast = kernels.compress(keys, values, positions, count, *protected, highest=_RANKED_BY_KERNELS[policy.score])
        if fast is not None:  # otherwise a key has no norm, or one that wants float64
            return Compressed(*fast)
    if positions is None:
        positions = torch.arange(length, device=keys.device).expand(keys.shape[:3]).contiguous()
    if count == length:
        return Compressed(keys, values, positions)
    scores = token_scores(keys, policy, positions, layer)
    kept = select(scores, count, policy.protect_first, policy.protect_recent)
    return Compressed(_take(keys, kept), _take(values, kept), positions.gather(-1, kept))
