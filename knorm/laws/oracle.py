"""The oracle that laws compare with: a plain list of living tokens, and attention written out under its mask.

It shares no arithmetic, no selection, no schedule, no mask and no attention with what it judges, and is as slow as that
is plain. Everything is computed in the model's dtype: give it a model in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from knorm.policy import Policy

_NAME = "knorm_oracle"
_WORD = 2**64 - 1


@dataclass(frozen=True)
class Rules:
    """Hold what a Policy is asked for, as plain values: the oracle reads these, never what a Policy makes of them.

    They are keep_ratio, prune_after, skip_layers, protect_first, protect_recent, score, protocol and seed.
    """

    keep_ratio: Any = 1.0
    prune_after: int = 0
    skip_layers: tuple[int, ...] = ()
    protect_first: int = 0
    protect_recent: int = 0
    score: str = "low_norm"
    protocol: str = "prefill"
    seed: int = 0

    def policy(self) -> Policy:
        """Make the Policy that is asked for the same."""
        return Policy(**asdict(self))

    def count(self, length: int) -> int:
        """Count how many of `length` tokens one compression leaves."""
        if length < self.prune_after or length <= self.protect_first + self.protect_recent:
            return length
        return math.ceil(Fraction(str(self.keep_ratio)) * length)

    def leave(self, alive: Sequence[int], scores: Sequence[float]) -> list[int]:
        """List those of the tokens `alive` that one compression leaves, in time order; `scores[s]` is token s's."""
        edge = len(alive) - self.protect_recent
        safe = {*alive[: self.protect_first], *alive[edge:]}
        ranked = sorted(alive, key=lambda token: (token not in safe, scores[token], token))
        return sorted(ranked[: self.count(len(alive))])

    def __str__(self) -> str:
        given = {name: value for name, value in asdict(self).items() if value != getattr(Rules(), name)}
        return f"Policy({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def random_score(seed: int, layer: int, head: int, position: int) -> float:
    """Draw the random score of one token: the low 53 bits of a splitmix64 of all arguments.

    Args:
        seed: of the policy.
        layer: index of the layer.
        head: key/value head.
        position: of the token in the sequence.

    Returns:
        A number in [0, 1).
    """
    state = ((seed * 1_000_003 + layer) * 6364136223846793005 + head * 0x61C8864680B583EB + position) & _WORD
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ state >> shift) * factor & _WORD
    return ((state ^ state >> 31) & 2**53 - 1) / 2**53


def scores_of(keys: Tensor, rules: Rules, layer: int) -> list[list[list[float]]]:
    """List the scores of keys, low ones to be kept.

    Args:
        keys: floating [batch, kv_heads, T, head_dim].
        rules: which score.
        layer: its index, for the random score.

    Returns:
        A number for each token, by row and head.
    """
    batch, heads, length, _ = keys.shape
    if rules.score == "random":
        row = [[random_score(rules.seed, layer, head, s) for s in range(length)] for head in range(heads)]
        return [row] * batch
    sign = 1 if rules.score == "low_norm" else -1
    return (sign * (keys.double() ** 2).sum(-1)).tolist()


class Life(NamedTuple):
    """Follow the tokens of one row and head through a run.

    lost       for each token the first query that no longer sees it; the number of tokens if there is none
    alive      the tokens that are left after the last call
    evictions  how many tokens had been seen when something was evicted, each time
    """

    lost: list[int]
    alive: list[int]
    evictions: list[int]


def live(rules: Rules, scores: Sequence[float], calls: Sequence[int], *, spared: bool = False) -> Life:
    """Feed the tokens of one row and head, and throw out after each call what the rules say.

    Args:
        rules: of the policy.
        scores: of each token, low ones to be kept.
        calls: tokens of each call.
        spared: True for a layer in which nothing is thrown out.

    Returns:
        What became of each token.
    """
    lost, alive, evictions, seen = [sum(calls)] * sum(calls), list[int](), list[int](), 0
    for call, size in enumerate(calls):
        alive += range(seen, seen + size)
        seen += size
        if spared or (call and rules.protocol == "prefill"):
            continue
        left = rules.leave(alive, scores)
        for token in {*alive} - {*left}:
            lost[token] = seen
        if len(left) < len(alive):
            evictions.append(seen)
        alive = left
    return Life(lost, alive, evictions)


def attend(query: Tensor, key: Tensor, value: Tensor, lost: Tensor, scale: float) -> Tensor:
    """Attend with query t to key s where s <= t < lost[s]: products, a mask, softmax, products.

    Args:
        query: [batch, heads, T, head_dim].
        key: [batch, kv_heads, T, head_dim].
        value: [batch, kv_heads, T, head_dim].
        lost: int64 [batch, kv_heads, T], as Life.lost.
        scale: factor of the products.

    Returns:
        [batch, heads, T, head_dim].
    """
    group, place = query.shape[1] // key.shape[1], torch.arange(query.shape[2], device=query.device)
    seen = (place <= place[:, None]) & (place[:, None] < lost[:, :, None, :])
    of = torch.arange(query.shape[1], device=query.device) // group  # the key's head of each query's
    weights = (query @ key[:, of].transpose(2, 3) * scale).masked_fill(~seen[:, of], -torch.inf).softmax(-1)
    return weights @ value[:, of]


@contextmanager
def attending(model: PreTrainedModel, attention: Any) -> Iterator[None]:
    """Let `model` attend through `attention`, called (module, query, key, value, mask, scaling=...), for a while."""
    own = model.config._attn_implementation
    AttentionInterface.register(_NAME, attention)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


class Truth(NamedTuple):
    """Hold what a run must come to.

    logits   [batch, T, vocabulary]
    lost     by layer, int64 [batch, kv_heads, T], as Life.lost
    lives    by layer, row and head
    """

    logits: Tensor
    lost: list[Tensor]
    lives: list[list[list[Life]]]


@torch.no_grad()
def run(model: PreTrainedModel, ids: Tensor, rules: Rules, calls: Sequence[int]) -> Truth:
    """Run a model over texts all at once, without a cache, masked as if they were fed in `calls`.

    Args:
        model: a causal language model of transformers.
        ids: int64 [batch, T], without padding.
        rules: of the policy.
        calls: tokens of each call; their sum is T.

    Returns:
        Logits, and what became of each token in each layer.
    """
    lost: list[Tensor] = []
    lives: list[list[list[Life]]] = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, scaling: float, **__: Any) -> Any:
        layer = module.layer_idx
        spared = layer in rules.skip_layers
        lives.append(
            [[live(rules, head, calls, spared=spared) for head in row] for row in scores_of(key, rules, layer)]
        )
        lost.append(torch.tensor([[life.lost for life in row] for row in lives[-1]], device=key.device))
        return attend(query, key, value, lost[-1], scaling).transpose(1, 2).contiguous(), None

    places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    with attending(model, attention):
        logits = model(ids, position_ids=places, use_cache=False).logits
    return Truth(logits, lost, lives)


def nll_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Take each token's NLL from `logits` [batch, T, vocabulary] and `ids` [batch, T] -> float64 [batch, T-1], nats."""
    return -logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
