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
    if compiles(query, length):
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


def compiles(states: Tensor, length: int) -> bool:
    """Tell whether a run over so many tokens waits for a compiler: long texts in half precision on CUDA do.

    Args:
        states: floating, of any shape: its device and dtype are looked at.
        length: tokens of the run.

    Returns:
        True if attend_seen goes through FlexAttention.
    """
    return states.is_cuda and states.dtype in (torch.float16, torch.bfloat16) and length >= _COMPILED_FROM


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
    """Attend as attend_seen, by FlexAttention, with keys in the order of by_lifetime.

    Compiles at the first call for a shape and dtype, seconds each.

    Args:
        query: [batch, heads, T, head_dim].
        key: [batch, heads, T, head_dim].
        value: [batch, heads, T, head_dim].
        evicted: a schedule, int64 [batch, heads, T].
        scale: factor of the products; None: head_dim ** -0.5.

    Returns:
        [batch, heads, T, head_dim].
    """
    length = query.shape[2]
    spare = -length % _TILE
    if spare:  # padded queries see padded keys, and nobody else does
        query, key, value = (functional.pad(x, (0, 0, 0, spare)) for x in (query, key, value))
        evicted = functional.pad(evicted, (0, spare), value=length + spare)
    order = by_lifetime(evicted)
    key, value = (x.gather(2, order[..., None].expand(x.shape)) for x in (key, value))
    mask = block_mask(evicted.gather(2, order), order)
    return _compiled()(query, key, value, block_mask=mask, scale=scale)[:, :, :length]


def by_lifetime(evicted: Tensor) -> Tensor:
    """Order keys so that those of a tile live at the same time.

    Few keys that live long are strewn over a long text; in time order nearly every tile of 128 keys holds one, and none
    is empty. Keys are sorted by the power of two below their lifetime, in time order where that is equal.

    Args:
        evicted: a schedule, int64 [batch, heads, T].

    Returns:
        Indices of the keys, int64 [batch, heads, T].
    """
    length = evicted.shape[-1]
    places = torch.arange(length, device=evicted.device)
    lifetime = (evicted - places).float().log2().floor().to(torch.int64)
    return (lifetime * length + places).argsort(dim=-1)


def block_mask(evicted: Tensor, places: Tensor) -> BlockMask:
    """Make FlexAttention's block mask of a schedule from each tile's extremes; no pair is looked at.

    Args:
        evicted: for each key the first query that no longer sees it, int64 [batch, heads, T], T a multiple of 128.
        places: for each key its place in the text, which is the first query that sees it, int64 of the same shape.

    Returns:
        A mask that says which tiles of 128 queries and 128 keys are empty, which are seen whole, and which are mixed.

    Example:
        >>> places = torch.arange(256).view(1, 1, 256)
        >>> block_mask(torch.full((1, 1, 256), 256), places).full_kv_num_blocks.tolist()
        [[[0, 1]]]
    """
    batch, heads, length = evicted.shape
    blocks = length // _TILE
    shape = (batch, heads, 1, blocks, _TILE)
    lost, first = evicted.view(shape), places.view(shape)
    row = torch.arange(blocks, device=evicted.device)[:, None] * _TILE
    alive = (first.amin(-1) < row + _TILE) & (lost.amax(-1) > row)
    whole = (first.amax(-1) <= row) & (lost.amin(-1) >= row + _TILE)

    def listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
        slots = torch.where(tiles, tiles.cumsum(-1) - 1, blocks)
        index = torch.zeros(*tiles.shape[:-1], blocks + 1, dtype=torch.int32, device=tiles.device)
        columns = torch.arange(blocks, dtype=torch.int32, device=tiles.device).expand(tiles.shape)
        return tiles.sum(-1, dtype=torch.int32), index.scatter_(-1, slots, columns)[..., :blocks].contiguous()

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (places[b, h, key] <= query) & (query < evicted[b, h, key])

    return BlockMask.from_kv_blocks(
        *listed(alive & ~whole), *listed(whole),
        BLOCK_SIZE=_TILE, mask_mod=visible, compute_q_blocks=torch.is_grad_enabled(),
    )  # fmt: skip
