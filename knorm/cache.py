"""KnormCache: a transformers cache that compresses itself; and the way into a model's attention."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from knorm.core import compress
from knorm.policy import Policy

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


def _no_mask(*_: Any, **__: Any) -> None:
    """The attention makes its own mask. Without an entry here, transformers would drop padding in silence."""


AttentionInterface.register("knorm", _call_attention)
AttentionMaskInterface.register("knorm", _no_mask)


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


def cache_keyword(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache: "past_key_values", or "cache" in newer releases of transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class KnormLayer(DynamicLayer):
    """One layer's cache: what is retained of the tokens seen, and their positions in the sequence.

    keys, values   [batch, kv_heads, kept, head_dim]
    positions      int64 [batch, kv_heads, kept], ascending
    seen           tokens fed so far
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, policy: Policy, index: int) -> None:
        super().__init__()
        self.policy, self.index = policy, index
        self.positions: Tensor | None = None
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the new tokens, hand everything to the attention of this call, then compress what stays stored."""
        keys, values = super().update(key_states, value_states)
        new = torch.arange(self.seen, self.seen + key_states.shape[2], device=keys.device)
        positions = new.expand(*key_states.shape[:2], -1)
        if self.positions is not None:
            positions = torch.cat([self.positions, positions], dim=-1)
        if self.seen == 0 or self.policy.protocol == "streaming":
            kept = compress(keys, values, self.policy, positions=positions, layer=self.index)
            self.keys, self.values, positions = kept
        self.positions = positions
        self.seen += key_states.shape[2]
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens seen, not tokens stored: positions continue from here."""
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset of the mask: the stored tokens count as the newest of those seen, as in a sliding window.

        Before 5.3, transformers gives the queries' positions in place of their number.
        """
        queries = query_length if isinstance(query_length, int) else query_length.shape[0]
        stored = 0 if self.positions is None else self.positions.shape[-1]
        return stored + queries, self.seen - stored

    def reset(self) -> None:
        self.keys = self.values = self.positions = None
        self.is_initialized, self.seen = False, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.positions is not None:
            self.positions = self.positions.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.positions is not None:
            self.positions = self.positions[indices]

    def crop(self, *_: Any) -> None:
        raise NotImplementedError("a compressed cache cannot be cropped: the tokens that it evicted are gone")


class KnormCache(Cache):
    """A transformers cache that compresses each layer after each call, as its policy says.

        model.generate(**inputs, past_key_values=KnormCache(Policy(0.5, protocol="streaming", prune_after=512)))

    The first call is the prompt: a prefill policy compresses after it and never again, a streaming policy after every
    call. Positions continue from the tokens seen. Limits: prompts of one length, since the cache does not see padding;
    with skip_layers, SDPA and one token a call after the first, since transformers makes one mask for all layers.
    """

    def __init__(self, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy={policy!r}, but should be a knorm.Policy, e.g. Policy(keep_ratio=0.5)")
        super().__init__(layers=[])
        self.policy = policy

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(KnormLayer(self.policy, len(self.layers)))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def positions(self, layer: int) -> Tensor:
        """Positions in the sequence of what the layer retains: int64 [batch, kv_heads, kept], ascending."""
        if not 0 <= layer < len(self.layers):
            raise IndexError(f"layer={layer}, but the cache holds {len(self.layers)} layers so far")
        held: Any = self.layers[layer]
        if held.positions is None:
            raise IndexError(f"layer={layer}, but the cache is empty: nothing has been fed since reset()")
        return held.positions
