"""Who attends in a model, and under which mask: knorm's entry in transformers' registries.

Transformers makes one mask for all layers, from the length of the first. Where layers differ in length (skip_layers),
or rows in how many tokens are padding, that mask is wrong: `with attention(model):` gives every layer its own.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

# (module, query, key, value, attention_mask, **keywords) -> (output [batch, queries, heads, head_dim], weights or None)
Attention = Callable[..., tuple[Tensor, Tensor | None]]

_attention: ContextVar[Attention] = ContextVar("knorm_attention")
_switching = threading.RLock()


def _call_attention(module: nn.Module, *states: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
    try:
        attention = _attention.get()
    except LookupError:
        raise RuntimeError(
            "attention implementation 'knorm' was called outside knorm: "
            "call model.set_attn_implementation('sdpa') first"
        ) from None
    return attention(module, *states, **keywords)


class _Call:
    """What one forward pass inside `attention(model)` knows of padding.

    own     the attention implementation that the model came with
    leads   padding tokens at the left of each row; None: there are none
    total   tokens that the attention mask speaks of; None: there is no mask
    spare   for each layer, how many of its slots in front hold padding, by row
    """

    def __init__(self, own: str) -> None:
        self.own = own
        self.leads: list[int] | None = None
        self.total: int | None = None
        self.spare: dict[int, list[int] | None] = {}


current_call: ContextVar[_Call | None] = ContextVar("knorm_call", default=None)


def _leads(mask: Tensor) -> list[int] | None:
    """Padding at the left of each row of an attention mask [batch, length]; None: no row has any."""
    real = mask.bool()
    *leads, unordered = torch.cat([(~real).sum(1), (real[:, 1:] < real[:, :-1]).sum()[None]]).tolist()
    if unordered:
        row = int((real[:, 1:] < real[:, :-1]).any(1).nonzero()[0])
        raise ValueError(
            f"row {row} of attention_mask has padding after its first token, but padding should be on the left: "
            "set tokenizer.padding_side = 'left'"
        )
    return leads if any(leads) else None


def _mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """The attention makes its own mask. Without an entry here, transformers would drop padding in silence."""
    call = current_call.get()
    if call is not None:
        call.leads = None if attention_mask is None else _leads(attention_mask)
        call.total = None if attention_mask is None else attention_mask.shape[1]
        call.spare = {}


AttentionInterface.register("knorm", _call_attention)
AttentionMaskInterface.register("knorm", _mask)


@contextmanager
def attention_through(model: PreTrainedModel, attention: Attention | None) -> Iterator[None]:
    """Let the model attend through `attention` (None: PyTorch's SDPA); its own setting comes back whatever happens.

    The setting lies in the model's configuration, so one thread at a time holds it.
    """
    with _switching:
        own = model.config._attn_implementation
        token = _attention.set(attention) if attention else None
        try:
            model.set_attn_implementation("knorm" if attention else "sdpa")
            yield
        finally:
            model.set_attn_implementation(own)
            if token:
                _attention.reset(token)


def not_a_row_of_ones(mask: Tensor) -> ValueError:
    """Return the error for a mask that somebody has made already, where knorm makes one for each layer."""
    return ValueError(
        f"attention_mask is {list(mask.shape)}, but should be [batch, length], 1 for each token: knorm.attention makes "
        "the masks of the layers itself"
    )


def _attend_last(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention, under the mask of this layer: its last slots are this call's tokens.

    query [batch, heads, queries, head_dim]; key, value [batch, kv_heads, slots, head_dim].
    """
    call = current_call.get()
    assert call is not None
    if attention_mask is not None:
        raise not_a_row_of_ones(attention_mask)
    queries, slots = query.shape[2], key.shape[2]
    spare = call.leads and [max(0, lead - (call.total or slots) + slots) for lead in call.leads]
    spare = call.spare.get(getattr(module, "layer_idx", -1), spare)
    mask = None
    if spare or call.own == "eager" or 1 < queries < slots:
        slot = torch.arange(slots, device=key.device)
        now = slot[slots - queries :, None]
        mask = (slot <= now)[None, None]
        if spare:  # a padding token sees itself, so that its row of the softmax is not empty
            mask = mask & (slot >= torch.tensor(spare, device=key.device)[:, None, None, None]) | (slot == now)
    if call.own == "sdpa":
        return AttentionInterface()["sdpa"](module, query, key, value, mask, **keywords)
    least = torch.finfo(query.dtype).min
    added = torch.zeros(mask.shape, dtype=query.dtype, device=key.device).masked_fill_(~mask, least)  # type: ignore
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, added, **keywords)


@contextmanager
def attention(model: PreTrainedModel) -> Iterator[None]:
    """Give each layer of the model a mask of its own: for padded batches, and for skip_layers.

        with knorm.attention(model):
            model.generate(**batch, past_key_values=KnormCache(policy))

    The model's own attention, "sdpa" or "eager", runs under that mask, and is set again at the end. Inside, a
    KnormCache sees the padding: it goes first, is never attended to, and every row comes out as it would alone. Other
    caches, and calls without one, work as before. Raises ValueError for other implementations, and inside for padding
    that is not on the left, before anything is written to a cache.
    """
    own = model.config._attn_implementation
    if own not in ("sdpa", "eager"):
        raise ValueError(
            f"the model attends by {own!r}, but should by 'sdpa' or 'eager': model.set_attn_implementation()"
        )
    token = current_call.set(_Call(own))
    try:
        with attention_through(model, _attend_last):
            yield
    finally:
        current_call.reset(token)


def cache_keyword(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache: "past_key_values", or "cache" in newer releases of transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
