"""The small model that laws about caches run through, and the oracle beside it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache as TransformersCache

from knorm.laws.blame import is_refusal
from knorm.laws.registry import Malformed, Refusal, Refuted, Unfed
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
    """Build a Llama of two layers with grouped heads on `device`, in float64: differences are more than rounding."""
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            spread = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(0.3 * spread if weight.ndim == 2 else weight + 0.3 * spread)
    return model.to(device)


@torch.no_grad()
def feed(model: PreTrainedModel, ids: Tensor, cache: TransformersCache, sizes: Iterable[int], **options: Any) -> Tensor:
    """Feed tokens to a model and a cache, positions left to the model.

    Args:
        model: a causal language model of transformers.
        ids: int64 [batch, length].
        cache: what is filled.
        sizes: tokens of each call; those beyond the text are left out.
        options: given to each call, cut to its tokens.

    Returns:
        Logits of all tokens, [batch, length, vocabulary].

    Raises:
        Refuted: the cache breaks the model.
        Refusal: the cache says why it cannot.
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
        except (Malformed, Refuted, Refusal):
            raise
        except Exception as error:
            if is_refusal(error):
                raise Refusal(str(error)) from error
            raise Unfed(f"tokens {start} to {stop - 1} of a text could not be fed: {in_words(error)}") from error
        parts.append(out.logits)
        start = stop
    return torch.cat(parts, 1)


def steps(prompt: int, length: int, chunk: int) -> list[int]:
    """List the sizes of the calls that feed a text.

    Args:
        prompt: tokens of the first call.
        length: tokens of the text.
        chunk: tokens of each later call; the last may reach beyond the text.

    Returns:
        Tokens of each call.

    Example:
        >>> steps(5, 10, 2)
        [5, 2, 2, 2]
    """
    return [prompt, *[chunk] * -(-(length - prompt) // chunk)]


def keeps_all(cache: TransformersCache, length: int) -> bool:
    """Tell whether `cache` holds at least `length` slots in every layer; True where it does not say."""
    return not any(
        isinstance(keys := getattr(layer, "keys", None), Tensor) and keys.ndim == 4 and keys.shape[2] < length
        for layer in cache.layers
    )


def apart(first: Tensor, second: Tensor) -> Tensor:
    """Compute how far numbers are from each other.

    Args:
        first: numbers, of any shape.
        second: numbers of the same shape.

    Returns:
        The absolute differences, of that shape; infinite where one alone is NaN, 0 where both are.
    """
    same = (first == second) | (first.isnan() & second.isnan())
    return (first - second).abs().masked_fill(same, 0.0).nan_to_num(torch.inf, torch.inf)


def gap(first: Tensor, second: Tensor) -> float:
    """Compute the largest absolute difference of `first` and `second`, of the same shape; infinite at NaN."""
    return float((first - second).abs().nan_to_num(torch.inf).amax())
