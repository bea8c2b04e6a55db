"""What transformers predicts once tokens have left its cache by their positions: beside an engine that evicts so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from knorm.model_attention import cache_keyword


@torch.no_grad()
def states_after_a_cut(model: PreTrainedModel, tokens: Tensor, prompt: int, cut: Sequence[tuple[int, int]]) -> Tensor:
    """Read a prompt, take tokens out of the cache, and read the rest.

    Args:
        model: a causal language model.
        tokens: int64 [T].
        prompt: tokens that are read before the cut.
        cut: positions [first, last) that leave the cache; what stays keeps its position.

    Returns:
        Hidden states that predict the tokens after the prompt, [T - prompt, width]; the first was made before the cut.

    Example:
        >>> states_after_a_cut(load_embedded()[0], torch.arange(8), 4, [(1, 3)]).shape
        torch.Size([4, 256])
    """
    cache: Any = DynamicCache()
    base, keyword = model.base_model, cache_keyword(model)
    places = torch.arange(len(tokens))[None]

    def read(start: int, stop: int) -> Tensor:
        output = base(
            input_ids=tokens[None, start:stop],
            position_ids=places[:, start:stop],
            use_cache=True,
            return_dict=True,
            **{keyword: cache},
        )
        states: Tensor = output.last_hidden_state[0]
        return states

    before = read(0, prompt)[-1:]
    kept = torch.ones(prompt, dtype=torch.bool)
    for first, last in cut:
        kept[first:last] = False
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    if prompt >= len(tokens) - 1:
        return before
    return torch.cat([before, read(prompt, len(tokens) - 1)])


@torch.no_grad()
def states_of_the_last(model: PreTrainedModel, tokens: Tensor, prompt: int, kept: int) -> Tensor:
    """Read a window while each token sees the last few alone, itself among them.

    Args:
        model: a causal language model.
        tokens: int64 [T].
        prompt: tokens that are not scored.
        kept: tokens that each sees.

    Returns:
        Hidden states that predict the tokens after the prompt, [T - prompt, width].

    Example:
        >>> states_of_the_last(model, torch.arange(9), 4, 2).shape[0]  # doctest: +SKIP
        5
    """
    seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril().triu(1 - kept)
    output = model.base_model(input_ids=tokens[None], attention_mask=seen[None, None], use_cache=False)
    states: Tensor = output.last_hidden_state[0, prompt - 1 : -1]
    return states
