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


_MASK = 2**25  # elements of a mask at most, where it can be made for a part of the queries


def has_windows(model: PreTrainedModel) -> bool:
    """Tell whether some layers of `model` attend through a window, whose mask only the model knows."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    return bool(kinds - {"full_attention"}) or (not kinds and getattr(config, "sliding_window", None) is not None)


class Seen:
    """Count the tokens that the queries of a run saw, by layer and key/value head.

    Attributes:
        queries: number of queries, over all rows.
        tokens: for each layer, float64 [kv_heads]: visible tokens, summed over queries, and averaged over the query
            heads of a group.
    """

    def __init__(self) -> None:
        self.queries: dict[int, int] = {}
        self.tokens: dict[int, Tensor] = {}

    def add(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        """Add one call of a layer's attention.

        Args:
            layer: its index.
            query: [batch, heads, queries, head_dim].
            key: [batch, kv_heads, slots, head_dim], the new tokens' included.
            value: the same.
            mask: what the queries see, boolean or to be added, [batch or 1, heads or 1, queries or 1, slots]; None:
                one query sees all slots, and as many as there are slots see them causally.
        """
        batch, heads, queries, _ = query.shape
        kv_heads, slots = key.shape[1:3]
        if mask is None:
            total = slots if queries == 1 else queries * (queries + 1) // 2  # of slots == queries: causal
            counts = torch.full((kv_heads,), float(batch * total), dtype=torch.float64)
        else:
            shown = mask if mask.dtype == torch.bool else mask == 0
            by_head = shown.sum((-1, -2)).expand(batch, heads).double()
            counts = by_head.unflatten(1, (kv_heads, -1)).mean(-1).sum(0).cpu()
        self.tokens[layer] = self.tokens.get(layer, 0) + counts
        self.queries[layer] = self.queries.get(layer, 0) + batch * queries

    def mean(self) -> Tensor:
        """Return tokens seen by a query on average, float64 [layers, kv_heads]."""
        return torch.stack([self.tokens[layer] / self.queries[layer] for layer in sorted(self.tokens)])


def masked_heads(module: nn.Module, key: Tensor) -> Tensor | None:
    """Return what kvpress' own attention reads.

    Args:
        module: an attention module, whose `masked_key_indices`, if any, hide slots from heads.
        key: [batch, kv_heads, slots, head_dim].

    Returns:
        Boolean [batch, kv_heads, slots], False where a slot is hidden from a head; None where nothing is.
    """
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
        layer, own, shown = int(getattr(module, "layer_idx", 0)), own_attention(module), visible(module, key)
        queries, slots = query.shape[2], key.shape[2]
        size = max(1, _MASK // slots)
        if attention_mask is not None or queries <= size or (queries == slots and shown is None and not eager):
            mask = fitted(attention_mask, query, key, shown, added=eager)
            seen.add(layer, query, key, value, mask)
            return own(module, query, key, value, mask, **keywords)
        outputs = []  # a mask of the whole text would take more memory than the cache
        for start in range(0, queries, size):
            block = query[:, :, start : start + size]
            mask = fitted(None, block, key, shown, added=eager, first=slots - queries + start, always=True)
            seen.add(layer, block, key, value, mask)
            outputs.append(own(module, block, key, value, mask, **keywords)[0])
        return torch.cat(outputs, 1), None

    with attention_over(model, attend, masked=masked):
        yield


def fitted(
    mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    visible: Tensor | None,
    *,
    added: bool = False,
    first: int | None = None,
    always: bool = False,
) -> Tensor | None:
    """Return a mask for the slots that there are, with what `visible` hides hidden.

    Args:
        mask: what the model was given, [batch or 1, heads or 1, queries, slots], boolean or to be added; or None.
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, slots, head_dim].
        visible: boolean [batch, kv_heads, slots], or None.
        added: the mask is to be added to scores, as eager attention does, which knows no other rule.
        first: slot of the first query; by default the queries are the last slots.
        always: make a mask even where PyTorch's own causal rule would do.

    Returns:
        None where PyTorch's own causal rule, or no mask at all, is right; otherwise a mask, boolean or to be added,
        [batch or 1, heads or 1, queries, slots].
    """
    queries, slots = query.shape[2], key.shape[2]
    first = slots - queries if first is None else first
    if (mask is not None and mask.shape[-1] != slots) or (mask is None and (1 < queries < slots or added or always)):
        places = torch.arange(slots, device=key.device)
        mask = (places <= places[first : first + queries, None])[None, None]
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
