"""The small model that laws about caches run through, and the oracle beside it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import DynamicCache

from knorm.laws import oracle
from knorm.laws.registry import Malformed, Refuted
from knorm.laws.strategies import VOCABULARY
from knorm.laws.subjects import in_words
from knorm.model_attention import cache_keyword

CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


@lru_cache(maxsize=2)
def small_model(device: str) -> PreTrainedModel:
    """Build a Llama of two layers with grouped heads, in float64: what differs, differs by more than rounding."""
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            spread = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(0.3 * spread if weight.ndim == 2 else weight + 0.3 * spread)
    return model.to(device)


@torch.no_grad()
def feed(model: PreTrainedModel, ids: Tensor, cache: TransformersCache, sizes: Iterable[int], **options: Any) -> Tensor:
    """Logits of the tokens, fed `sizes` at a time, positions left to the model: [batch, length, vocabulary].

    Raises Refuted where the cache breaks the model.
    """
    parts, start = [], 0
    for size in sizes:
        stop = min(start + size, ids.shape[1])
        if stop == start:
            break
        given = {name: x[:, start:stop] if name == "position_ids" else x[:, : x.shape[1] - ids.shape[1] + stop]
                 for name, x in options.items()}  # fmt: skip
        try:
            out = model(ids[:, start:stop], use_cache=True, **{cache_keyword(model): cache}, **given)
        except (Malformed, Refuted):
            raise
        except Exception as error:
            raise Refuted(f"tokens {start} to {stop - 1} of a text could not be fed: {in_words(error)}") from error
        parts.append(out.logits)
        start = stop
    return torch.cat(parts, 1)


def retained(model: PreTrainedModel, prompt: Tensor, cache: TransformersCache) -> list[Tensor]:
    """Which of the prompt's tokens a cache holds, by their keys: per layer, bool [batch, kv_heads, prompt].

    The prompt's keys do not depend on a compression after it. Raises Refuted for a stored key that is none of them.
    """
    plain = DynamicCache()
    feed(model, prompt, plain, [prompt.shape[1]])
    places = []
    stored: Any = cache.layers
    for index, layer in enumerate(cast(Any, plain.layers)):
        same = (stored[index].keys[..., :, None, :] - layer.keys[..., None, :, :]).abs().amax(-1) < 1e-9
        if not same.any(-1).all():
            slot = (~same.any(-1)).nonzero()[0].tolist()
            raise Refuted(f"layer {index} holds a key (row, head, slot {slot}) that is none of the prompt's")
        places.append(same.any(-2))
    return places


@torch.no_grad()
def masked_logits(model: PreTrainedModel, ids: Tensor, prompt: int, held: list[Tensor]) -> Tensor:
    """Compute the oracle: logits of the plain model in which later tokens do not see the prompt's evicted ones."""
    later = ids.shape[1] - prompt

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, scaling: float, **__: Any) -> Any:
        alive = torch.nn.functional.pad(held[module.layer_idx], (0, later), value=True)
        lost = torch.where(alive, prompt + later, prompt)
        return oracle.attend(query, key, value, lost, scaling).transpose(1, 2), None

    with oracle.attending(model, attention):
        return model(ids, use_cache=False).logits


def steps(prompt: int, length: int, chunk: int) -> list[int]:
    """Sizes of the calls: the prompt, then `chunk` tokens at a time."""
    return [prompt, *[chunk] * -(-(length - prompt) // chunk)]


def gap(first: Tensor, second: Tensor) -> float:
    """Compute the largest absolute difference; infinite where a number is none."""
    return float((first - second).abs().nan_to_num(torch.inf).amax())
