"""What attention sees of a compressed cache."""

from __future__ import annotations

from typing import Any, cast

import torch

from knorm.laws.model import feed, gap, masked_logits, retained, small_model
from knorm.laws.registry import Refuted, check
from knorm.laws.strategies import Text
from knorm.laws.subjects import Subject


@check("model", needs={"merges_values": False, "ragged": False})
def check_masked_attention(subject: Subject, text: Text) -> None:
    """Attention over the compressed cache equals attention over the full cache with the evicted masked."""
    model, ids = small_model(str(text.input_ids.device)), text.input_ids
    cache = subject.cache(text.keep_ratio)
    feed(model, ids[:, : text.prompt], cache, [text.prompt])
    lengths = {layer.keys.shape[2] for layer in cast(Any, cache.layers)}
    queries = text.chunk if len(lengths) == 1 else 1  # transformers makes one mask for all layers
    ids = ids[:, : text.prompt + queries]
    held = retained(model, ids[:, : text.prompt], cache)
    positions = torch.arange(text.prompt, ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
    logits = feed(model, ids[:, text.prompt :], cache, [queries], position_ids=positions)
    difference = gap(logits, masked_logits(model, ids, text.prompt, held)[:, text.prompt :])
    if difference > 1e-8:
        raise Refuted(
            f"masked attention: {logits.shape[1]} queries after a prompt of {text.prompt} differ in their logits by "
            f"{difference:.3g} from the full cache with all but positions {held[0][0, 0].nonzero()[:, 0].tolist()} "
            "(layer 0, row 0, head 0) masked, but should be equal"
        )


@check("cache")
def check_slot_order(subject: Subject, text: Text) -> None:
    """Shuffling the slots, keys and values together, changes no output."""
    model, ids = small_model(str(text.input_ids.device)), text.input_ids
    cache, shuffled = subject.cache(text.keep_ratio), subject.cache(text.keep_ratio)
    for state in (cache, shuffled):
        feed(model, ids[:, : text.prompt], state, [text.prompt])
    for layer in cast(Any, shuffled.layers):
        layer.keys, layer.values = layer.keys.flip(2), layer.values.flip(2)
    later = ids[:, text.prompt : text.prompt + 1]
    positions = torch.full_like(later, text.prompt)
    difference = gap(*(feed(model, later, state, [1], position_ids=positions) for state in (cache, shuffled)))
    if difference > 1e-8:
        raise Refuted(
            f"slot order: with its slots reversed the cache's next logits differ by {difference:.3g}, but should not: "
            "attention does not see the order of slots"
        )
