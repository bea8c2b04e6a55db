"""The oracle of what was witnessed: the plain model in one pass, each query seeing what it was seen to see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knorm.laws.oracle import attending
from knorm.laws.probe import Draws, attention_modules, probe, projected
from knorm.laws.witness import Witnessed


def _turned(states: Tensor, places: Tensor) -> Tensor:
    """Turn states [..., T, width] to places [..., T], as Llama does: halves of a head make pairs."""
    half = states.shape[-1] // 2
    angles = places[..., None].double() * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    one, two = states.double().split(half, -1)
    return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1)


def _places(run: Witnessed, layer: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each call: its positions, which tokens its queries see, and the slot of each token, [rows, heads, T]."""
    looks = [look for look in run.looks if look.layer == layer]
    calls = []
    if looks[0].call:  # a method read the prompt in a way of its own: each query saw all before it
        rows, heads, groups = looks[0].seen.shape[:3]
        prompt = torch.arange(int(looks[0].positions[0]))
        seen = (torch.arange(run.length) <= prompt[:, None]).expand(rows, heads, groups, -1, -1)
        calls.append((prompt, seen, torch.arange(run.length).expand(rows, heads, -1)))
    for look in looks:
        slots = torch.zeros(*look.tokens.shape[:2], run.length + 1, dtype=torch.int64)
        index = look.tokens.where(look.tokens >= 0, run.length)
        slots.scatter_(2, index, torch.arange(index.shape[2]).expand_as(index))
        calls.append((look.positions, look.seen_by_token(run.length), slots[..., :-1]))
    return calls


@torch.no_grad()
def replayed(run: Witnessed, *, renumbered: bool) -> Tensor:
    """Answer a reading by the plain model under a mask made of what was seen.

    Args:
        run: of a reading with real keys, on a Llama.
        renumbered: a key is turned to its slot, not to its position.

    Returns:
        Logits, [rows, tokens, vocabulary]; attention in float64, all else in the model's own float32.
    """
    reading = run.reading
    model = probe(reading.family)
    layers = {id(module): layer for layer, module in enumerate(attention_modules(model))}
    draws = Draws(model, reading.rows, reading.length, 0, drawn=False, row=reading.row)

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        query = query.unflatten(1, (key.shape[1], groups)).double()
        parts = []
        for positions, seen, slots in _places(run, layers[id(module)]):
            places = slots if renumbered else torch.arange(run.length).expand(slots.shape)
            keys = _turned(key, places)[:, :, None]
            queries = _turned(query[..., positions, :], places[..., positions][:, :, None])
            weights = (queries @ keys.mT * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
            parts.append(weights @ value[:, :, None].double())
        return torch.cat(parts, 3).flatten(1, 2).transpose(1, 2).to(key.dtype).contiguous(), None

    with projected(draws), attending(model, attention):
        draws.begin(0)
        return model(input_ids=reading.input_ids, use_cache=False).logits
