"""Presses of kvpress as compressors: in one attention module of Llama, with what kvpress' hook sees of a prompt."""

from __future__ import annotations

import copy
import functools
import inspect
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache
from transformers.models.llama import modeling_llama as llama

from knorm.laws.subjects import Compress
from knorm.methods.kinds import is_press

HIDDEN = 16  # width of the hidden states


@functools.lru_cache(maxsize=16)
def _attention(kv_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Any:
    """An attention module of Llama, two queries a head. Heads have the same weights: one alone is as among others."""
    heads = 2 * kv_heads
    config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width, hidden_size=heads)
    config.hidden_size = HIDDEN  # need not be a multiple of the heads, though LlamaConfig has it so
    module = llama.LlamaAttention(config, 0).eval()
    generator = torch.Generator().manual_seed(0)
    for linear in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
        copies = (1, kv_heads) if linear is module.o_proj else (kv_heads, 1)
        rows, columns = (size // number for size, number in zip(linear.weight.shape, copies, strict=True))
        block = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu") / HIDDEN**0.5
        linear.weight.data = block.repeat(copies)
    module.to(device=device, dtype=dtype)
    module.rotary_emb = llama.LlamaRotaryEmbedding(config).to(device)  # float32, as in a loaded model
    return module


def _prompt(module: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What kvpress' forward hook sees of a prompt: hidden states and keywords. Rows are alike."""
    batch, _, length, _ = keys.shape
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(length, HIDDEN, generator=generator, dtype=torch.float32, device="cpu")
    states = states.to(keys).expand(batch, -1, -1)
    places = torch.arange(length, device=keys.device)
    cache = DynamicCache()
    cache.update(keys, values, 0)
    turns = module.rotary_emb(states, places[None])
    return states, {"hidden_states": states, "past_key_values": cache, "attention_mask": None, "cache_position": places,
                    "position_ids": places[None], "position_embeddings": turns}  # fmt: skip


def _weights(module: Any, states: Tensor, keys: Tensor, values: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Eager attention's weights of the prompt: [batch, heads, length, length]."""
    length, width = keys.shape[2:]
    queries = module.q_proj(states).unflatten(-1, (module.config.num_attention_heads, width)).transpose(1, 2)
    queries, _ = llama.apply_rotary_pos_emb(queries, queries, *turns)
    unseen = torch.full((length, length), -torch.inf, dtype=keys.dtype, device=keys.device).triu(1)
    return llama.eager_attention_forward(module, queries, keys, values, unseen, module.scaling)[1]


def _compress(press: Any, module: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    states, keywords = _prompt(module, keys, values)
    try:
        return press.compress(module, states, keys, values, None, keywords)
    except Exception as error:  # some need attention weights, which only eager attention has; others refuse them
        weights = _weights(module, states, keys, values, keywords["position_embeddings"])
        try:
            return press.compress(module, states, keys, values, weights, keywords)
        except Exception:
            raise error from None


def through_attention(press: Any) -> Compress:
    """Turn a press of kvpress into a compressor, (keys, values, keep_ratio) -> keys, values[, mask].

    press   its class or an instance, of which a copy is made for each ratio; compression_ratio is 1 - keep_ratio in
            decimal

    It compresses the prompt's cache of one attention module of Llama, with seeded weights and hidden states. The mask
    is that of presses that only mark what is evicted, as AdaKVPress. Raises TypeError for presses that have no compress
    of their own, or no ratio.
    """
    kind = press if isinstance(press, type) else type(press)
    if not is_press(kind):
        raise TypeError(f"{kind.__name__} is no press of kvpress")
    if next(base for base in kind.__mro__ if "compress" in vars(base)).__name__ == "BasePress":
        raise TypeError(f"{kind.__name__} has no compress(module, hidden_states, keys, values, attentions, kwargs)")
    if "compression_ratio" not in (inspect.signature(press).parameters if press is kind else dir(press)):
        wraps = press is kind and "press" in inspect.signature(kind).parameters
        hint = f"; give an instance, as {kind.__name__}(KnormPress())" if wraps else ""
        raise TypeError(f"{kind.__name__} takes no compression_ratio{hint}")

    @functools.cache
    def made(keep_ratio: float) -> Any:
        removed = float(1 - Decimal(str(keep_ratio)))
        if press is kind:
            return press(compression_ratio=removed)
        own = copy.deepcopy(press)
        own.compression_ratio = removed
        return own

    @torch.no_grad()
    def compress(keys: Tensor, values: Tensor, keep_ratio: float) -> tuple[Tensor, ...]:
        module = _attention(keys.shape[1], keys.shape[3], keys.dtype, keys.device)
        module.masked_key_indices = None
        kept = _compress(made(keep_ratio), module, keys, values)
        if module.masked_key_indices is None:
            return kept
        mask = torch.ones(kept[0].shape[:3], dtype=torch.bool, device=keys.device)
        mask[module.masked_key_indices] = False
        return *kept, mask

    return compress
