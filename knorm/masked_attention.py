"""Attention under a schedule: query t sees key s where s <= t < evicted_at[s]. Never a T x T mask of a long text."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# (query, key, value, evicted_at or None, scale) -> output
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]

_QUERIES = {"cpu": 128, "cuda": 2048}  # per block at most (docs/one-pass.md)
_MASK = 2**29  # elements of a block's mask at most
_COMPILED_FROM = 8192  # tokens: shorter texts do not wait for a compiler
_TILE = 128  # FlexAttention's


def attend_seen(query: Tensor, key: Tensor, value: Tensor, evicted: Tensor | None, scale: float | None) -> Tensor:
    """Attend with T queries, of which query t sees key s where s <= t < evicted[s].

    Queries go in blocks, each against the keys that some query of the block still sees: no T x T mask, and the cost
    follows the compressed cache's length, not T. Long texts in half precision on CUDA go through attend_compiled, which
    is faster there (docs/one-pass.md).

    Args:
        query: [batch, heads, T, head_dim].
        key: [batch, kv_heads, T, head_dim].
        value: [batch, kv_heads, T, head_dim].
        evicted: a schedule, int64 [batch, kv_heads, T]; None: nothing is ever evicted.
        scale: factor of the products; None: head_dim ** -0.5.

    Returns:
        [batch, heads, T, head_dim].

    Example:
        >>> x = torch.ones(1, 1, 3, 2)
        >>> attend_seen(x, x, x, torch.tensor([[[1, 3, 3]]]), None).shape
        torch.Size([1, 1, 3, 2])
    """
    (batch, heads, length, _), groups = query.shape, query.shape[1] // key.shape[1]
    sdpa = functional.scaled_dot_product_attention

    def per_query_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(groups, dim=1) if groups > 1 else x

    if evicted is None:
        return sdpa(query, per_query_head(key), per_query_head(value), is_causal=True, scale=scale)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and length >= _COMPILED_FROM:
        return attend_compiled(query, per_query_head(key), per_query_head(value), per_query_head(evicted), scale)
    size = min(length, _QUERIES.get(query.device.type, 512), max(64, _MASK // (batch * heads * length)))
    fewest = _lost_before(evicted, size) if length > size else [0]
    positions = torch.arange(length, device=query.device)
    causal = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    blocks = []
    for start, gone in zip(range(0, length, size), fewest, strict=True):
        stop = min(start + size, length)
        keys, values, lost = key[:, :, :stop], value[:, :, :stop], evicted[:, :, :stop]
        if gone:
            index, spare = _compact(lost > start, stop - gone)
            keys, values = (x.gather(2, index[..., None].expand(*index.shape, x.shape[3])) for x in (keys, values))
            lost = lost.gather(2, index).masked_fill(spare, 0)
        mask = positions[start:stop, None] < lost[..., None, :]
        mask[..., start - stop :] &= causal[: stop - start, : stop - start]  # the block's own keys stand last
        blocks.append(
            sdpa(
                query[:, :, start:stop],
                per_query_head(keys),
                per_query_head(values),
                attn_mask=per_query_head(mask),
                scale=scale,
            )
        )
    return torch.cat(blocks, dim=2)


def _lost_before(evicted: Tensor, size: int) -> list[int]:
    """How many tokens every row has lost before each block of `size` queries; waits for the device once, for all."""
    lost = torch.zeros(*evicted.shape[:2], evicted.shape[2] + 1, dtype=torch.int64, device=evicted.device)
    lost = lost.scatter_add_(-1, evicted, torch.ones_like(evicted)).cumsum(-1)
    return lost[..., : evicted.shape[2] : size].amin((0, 1)).tolist()


def _compact(alive: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Indices of the true entries of each row, ascending, in the last of `most` slots; the slots before are spare.

    bool [batch, heads, n] -> int64 and bool [batch, heads, most]. Rows differ in number only where padding made them.
    """
    spare = most - alive.sum(-1, keepdim=True)
    slots = torch.where(alive, alive.cumsum(-1) - 1 + spare, most)
    index = torch.zeros(*alive.shape[:2], most + 1, dtype=torch.int64, device=alive.device)
    index.scatter_(2, slots, torch.arange(alive.shape[2], device=alive.device).expand(alive.shape))
    return index[..., :most], torch.arange(most, device=alive.device) < spare


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def attend_compiled(query: Tensor, key: Tensor, value: Tensor, evicted: Tensor, scale: float | None) -> Tensor:
    """Attend as attend_seen, by FlexAttention: [batch, heads, T, head_dim] thrice, evicted int64 [batch, heads, T].

    Compiles at the first call for a shape and dtype, seconds each.
    """
    length = query.shape[2]
    spare = -length % _TILE
    if spare:  # padded queries see padded keys, and nobody else does
        query, key, value = (functional.pad(x, (0, 0, 0, spare)) for x in (query, key, value))
        evicted = functional.pad(evicted, (0, spare), value=length + spare)
    return _compiled()(query, key, value, block_mask=block_mask(evicted), scale=scale)[:, :, :length]


def block_mask(evicted: Tensor) -> BlockMask:
    """FlexAttention's block mask of a schedule [batch, heads, T], T a multiple of 128.

    From each block's minimum and maximum: which tiles are empty, which are seen whole. No pair is looked at.
    """
    batch, heads, length = evicted.shape
    blocks = length // _TILE
    tiles = evicted.view(batch, heads, 1, blocks, _TILE)
    row = torch.arange(blocks, device=evicted.device)[:, None]
    column = torch.arange(blocks, device=evicted.device)
    alive = (column <= row) & (tiles.amax(-1) > row * _TILE)
    whole = (column < row) & (tiles.amin(-1) >= (row + 1) * _TILE)

    def ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
        return tiles.sum(-1).int(), tiles.int().argsort(dim=-1, descending=True, stable=True).int()

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < evicted[b, h, key])

    return BlockMask.from_kv_blocks(*ordered(alive & ~whole), *ordered(whole), BLOCK_SIZE=_TILE, mask_mod=visible)
