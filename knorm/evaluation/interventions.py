"""What can be changed about a compressed run, one thing at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from knorm.evaluation.windows import Windows
from knorm.perplexity import Run, Schedule, exact_run
from knorm.policy import Policy, Score
from knorm.rounding import attend_shuffled
from knorm.schedule import cache_lengths, evicted_at

SINKS = 4  # tokens at the start that are protected


@dataclass(frozen=True)
class _Case:
    """A run to evaluate: what differs from the explained one."""

    policy: Policy
    prompt_length: int
    options: dict[str, Any]

    def runs(self, model: PreTrainedModel, windows: Windows, batch: int) -> Iterator[Run]:
        for ids in windows.input_ids.split(batch):
            options: dict[str, Any] = dict(self.options)
            if "position_ids" in options:
                options["position_ids"] = options["position_ids"].expand(ids.shape)
            yield exact_run(model, ids, self.policy, prompt_length=self.prompt_length, **options)


def stored_positions(policy: Policy, length: int, prompt_length: int) -> Tensor:
    """The position that each token gets where it is taken from the compressed cache's length: int64 [T].

    Counts do not depend on scores, so these are known before the run.
    """
    return cache_lengths(evicted_at(torch.zeros(length), policy, prompt_length)) - 1


def _newest_kept(policy: Policy, prompt_length: int) -> Schedule:
    """As many tokens as the policy keeps, at every step, but the newest."""

    def schedule(layer: int, keys: Tensor) -> Tensor:
        if layer in policy.skip_layers:
            return torch.full(keys.shape[:3], keys.shape[2], device=keys.device)
        age = -torch.arange(keys.shape[2], dtype=torch.float32, device=keys.device)
        return evicted_at(age.expand(keys.shape[:3]), replace(policy, protect_first=0, protect_recent=0), prompt_length)

    return schedule


def sees_itself(_: int, keys: Tensor) -> Tensor:
    """The schedule of no cache at all: each token sees itself only."""
    return torch.arange(1, keys.shape[2] + 1, device=keys.device).expand(keys.shape[:3]).contiguous()


def _smallest_budget(policy: Policy, prompt_length: int) -> int:
    """Tokens that the first compression leaves: no later one leaves fewer."""
    return policy.budget(policy.prune_after if policy.protocol == "streaming" else prompt_length)


def newest_to_protect(policy: Policy, prompt_length: int, newest: int) -> int:
    """How many of the newest tokens an intervention protects: `newest`, or half of the smallest budget if that is less.

    0 where the policy already protects as many.
    """
    smallest = _smallest_budget(policy, prompt_length)
    count = min(newest, max(1, (smallest - policy.protect_first) // 2))
    return count if count > policy.protect_recent else 0


def interventions(
    policy: Policy, layers: int, length: int, prompt_length: int, newest: int
) -> Iterator[tuple[str, Policy, int, dict[str, Any]]]:
    """Name, policy, prompt length and options of exact_run, for each single change that applies to a policy."""
    yield "slots shuffled", policy, prompt_length, {"attend": attend_shuffled}
    yield (
        "positions collapsed",
        policy,
        prompt_length,
        {"position_ids": stored_positions(policy, length, prompt_length)},
    )
    if count := newest_to_protect(policy, prompt_length, newest):
        yield f"newest {count} protected", replace(policy, protect_recent=count), prompt_length, {}
    smallest = _smallest_budget(policy, prompt_length)
    if policy.protect_first < SINKS <= smallest - policy.protect_recent:
        yield f"first {SINKS} protected", replace(policy, protect_first=SINKS), prompt_length, {}
    other: Score = "random" if policy.score != "random" else "low_norm"
    yield f"{other} instead of {policy.score}", replace(policy, score=other), prompt_length, {}
    compressed = [layer for layer in range(layers) if layer not in policy.skip_layers]
    for layer in compressed if len(compressed) > 1 else ():
        yield f"layer {layer} spared", replace(policy, skip_layers=(*policy.skip_layers, layer)), prompt_length, {}
    once = max(2, policy.prune_after, prompt_length)
    if policy.protocol == "streaming" and once < length:
        yield f"compressed once, at {once} tokens", replace(policy, protocol="prefill"), once, {}
    yield "as many tokens, the newest", policy, prompt_length, {"schedule": _newest_kept(policy, prompt_length)}
