"""Attention while a method's cache is read: the masks that it needs, and how many tokens each head sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from knorm.model_attention import attention_over, implementation_of, own_attention

# (module, query, key, value) -> True where a head sees the slot, [batch, kv_heads, slots]; None: it sees all
Visible = Callable[[nn.Module, Tensor], Tensor | None]


class Seen:
    """How many tokens the queries of a run saw, by layer and key/value head.

    Attributes:
        queries: number of queries, over all rows.
        tokens: for each layer, float64 [kv_heads]: visible tokens, summed over queries, and averaged over the query
            heads of a group.
    """

    def __init__(self) -> None:
        self.queries: dict[int, int] = {}
        self.tokens: dict[int, Tensor] = {}

    def add(self, layer: int, counts: Tensor, queries: int) -> None:
        """Add the visible tokens of one call, [kv_heads], summed over its queries and rows."""
        self.tokens[layer] = self.tokens.get(layer, 0) + counts
        self.queries[layer] = self.queries.get(layer, 0) + queries

    def mean(self) -> Tensor:
        """Return tokens seen by a query on average, float64 [layers, kv_heads]."""
        return torch.stack([self.tokens[layer] / self.queries[layer] for layer in sorted(self.tokens)])


def masked_heads(module: nn.Module, key: Tensor) -> Tensor | None:
    """Return what kvpress' own attention reads: False where `module.masked_key_indices` hides a slot from a head."""
    indices = getattr(module, "masked_key_indices", None)
    if indices is None:
        return None
    visible = torch.ones(key.shape[:3], dtype=torch.bool, device=key.device)
    visible[tuple(indices)] = False
    return visible


@contextmanager
def watching(
    model: PreTrainedModel, seen: Seen, visible: Visible = masked_heads, *, masked: bool = True
) -> Iterator[None]:
    """Let a model attend to a method's cache under a mask that fits each layer, and count what is seen.

    Transformers makes one mask for all layers, from the length of the first: it does not fit layers of other lengths.
    Slots that a head must not see are masked, as a method asks that only marks them.

    Args:
        model: one that attends by "sdpa" or "eager".
        seen: counts are added to it.
        visible: says which slots each key/value head sees.
        masked: the cache wants the model's own masks; False for KnormCache.
    """
    eager = implementation_of(model.config) == "eager"

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
    ) -> tuple[Tensor, Tensor | None]:
        mask = fitted(attention_mask, query, key, visible(module, key), added=eager)
        _count(seen, module, query, key, mask)
        return own_attention(module)(module, query, key, value, mask, **keywords)

    with attention_over(model, attend, masked=masked):
        yield


def fitted(
    mask: Tensor | None, query: Tensor, key: Tensor, visible: Tensor | None, *, added: bool = False
) -> Tensor | None:
    """Return a mask for the slots that there are, with what `visible` hides hidden.

    Args:
        mask: what the model was given, [batch or 1, heads or 1, queries, slots], boolean or to be added; or None.
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, slots, head_dim].
        visible: boolean [batch, kv_heads, slots], or None.
        added: the mask is to be added to scores, as eager attention does, which knows no other rule.

    Returns:
        None where PyTorch's own causal rule, or no mask at all, is right; otherwise a mask, boolean or to be added.
    """
    queries, slots = query.shape[2], key.shape[2]
    if (mask is not None and mask.shape[-1] != slots) or (mask is None and (1 < queries < slots or added)):
        places = torch.arange(slots, device=key.device)
        mask = (places <= places[slots - queries :, None])[None, None]
    if visible is not None:
        if mask is None and queries == slots:
            mask = torch.ones(queries, slots, dtype=torch.bool, device=key.device).tril()[None, None]
        shown = visible.repeat_interleave(query.shape[1] // key.shape[1], 1)[:, :, None]
        if mask is None:
            mask = shown
        elif mask.dtype == torch.bool:
            mask = mask & shown
        else:
            return mask.masked_fill(~shown, torch.finfo(mask.dtype).min)
    if added and mask is not None and mask.dtype == torch.bool:
        least = torch.finfo(query.dtype).min
        return torch.zeros(mask.shape, dtype=query.dtype, device=key.device).masked_fill_(~mask, least)
    return mask


def _count(seen: Seen, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    batch, heads, queries, _ = query.shape
    kv_heads, slots = key.shape[1:3]
    if mask is None:
        total = slots if queries == 1 else queries * (queries + 1) // 2  # of slots == queries: causal
        counts = torch.full((kv_heads,), float(batch * total), dtype=torch.float64)
    else:
        shown = mask if mask.dtype == torch.bool else mask == 0
        by_head = shown.sum((-1, -2)).expand(batch, heads).double()
        counts = by_head.unflatten(1, (kv_heads, -1)).mean(-1).sum(0).cpu()
    seen.add(int(getattr(module, "layer_idx", 0)), counts, batch * queries)
