"""What can be changed about a compressed run, one thing at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Unpack

import torch
from torch import Tensor

from knorm.evaluation.curve import NEWEST, Row, measure_row
from knorm.evaluation.runner import Changes, Runner
from knorm.perplexity import Schedule
from knorm.policy import Policy, Score
from knorm.rounding import attend_shuffled
from knorm.schedule import cache_lengths, evicted_at, never

SINKS = 4  # tokens at the start that are protected

Kind = Literal[
    "order", "positions", "recency", "sinks", "choice", "layers", "repetition", "amount", "content", "keys", "values"
]


@dataclass(frozen=True)
class Intervention:
    """Describe one change to an explained run: what it is about, and the run that has it.

    Attributes:
        kind: what the change is about.
        name: what was changed, as "newest 14 protected".
        doing: the same as the subject of a sentence, as "protecting the newest 14".
        policy: of the changed run.
        prompt_length: tokens of the changed run's first call.
        options: what else differs from a policy's own run.
        remedy: False for a change that is meant to do nothing or harm, and so recovers nothing of a loss.
    """

    kind: Kind
    name: str
    doing: str
    policy: Policy
    prompt_length: int
    options: Changes = field(default_factory=Changes)
    remedy: bool = True


def stored_positions(policy: Policy, length: int, prompt_length: int) -> Tensor:
    """Compute the positions that tokens get where the compressed cache's length gives them.

    Counts do not depend on scores, so these are known before the run.

    Args:
        policy: of the run.
        length: tokens of a window, T.
        prompt_length: tokens of the first call.

    Returns:
        A position for each token, int64 [T].
    """
    return cache_lengths(evicted_at(torch.zeros(length), policy, prompt_length)) - 1


def _newest_kept(policy: Policy, prompt_length: int) -> Schedule:
    """As many tokens as the policy keeps, at every step, but the newest."""

    def schedule(layer: int, keys: Tensor) -> Tensor:
        if layer in policy.skip_layers:
            return never(keys.shape[:3], keys.device)
        age = -torch.arange(keys.shape[2], dtype=torch.float32, device=keys.device)
        return evicted_at(age.expand(keys.shape[:3]), replace(policy, protect_first=0, protect_recent=0), prompt_length)

    return schedule


def sees_itself(_: int, keys: Tensor) -> Tensor:
    """Return the schedule of no cache at all: each token sees itself only.

    Args:
        _: the layer, which does not matter.
        keys: [batch, kv_heads, T, head_dim].

    Returns:
        int64 [batch, kv_heads, T].
    """
    return torch.arange(1, keys.shape[2] + 1, device=keys.device).expand(keys.shape[:3]).contiguous()


def _smallest_budget(policy: Policy, prompt_length: int) -> int:
    """Tokens that the first compression leaves: no later one leaves fewer."""
    return policy.budget(policy.prune_after if policy.protocol == "streaming" else prompt_length)


def newest_to_protect(policy: Policy, prompt_length: int, newest: int) -> int:
    """Count the newest tokens that an intervention protects.

    Args:
        policy: of the run that is explained.
        prompt_length: tokens of the run's first call.
        newest: how many are wanted.

    Returns:
        As many, or half of the smallest budget if less; 0 where the policy already protects as many.

    Raises:
        ValueError: a budget that does not cover what the policy protects.
    """
    smallest = _smallest_budget(policy, prompt_length)
    count = min(newest, max(1, (smallest - policy.protect_first) // 2))
    return count if count > policy.protect_recent else 0


def interventions(
    policy: Policy, *, layers: int, length: int, prompt_length: int, newest: int, stored: bool = False
) -> Iterator[Intervention]:
    """Generate each single change that applies to a policy's run.

    Args:
        policy: of the run that is explained.
        layers: how many the model has.
        length: tokens of a window.
        prompt_length: tokens of the run's first call.
        newest: how many of the newest tokens one intervention protects (half the budget, if that is less).
        stored: the run takes positions from the stored length; so does each changed run but the one that corrects them.

    Yields:
        Interventions, each of one change: slot order, positions, recency, sinks, choice, layers, repetition, amount.
    """

    def change(
        kind: Kind,
        name: str,
        doing: str,
        changed: Policy = policy,
        prompt: int = prompt_length,
        *,
        remedy: bool = True,
        **options: Unpack[Changes],
    ) -> Intervention:
        if stored:
            options = {"position_ids": stored_positions(changed, length, prompt), **options}
        return Intervention(kind, name, doing, changed, prompt, options, remedy)

    yield change("order", "slots shuffled", "shuffling slots", attend=attend_shuffled, remedy=False)
    if stored:
        seen = "counting them from the tokens seen"
        yield Intervention("positions", "positions corrected", seen, policy, prompt_length)
    else:
        places, doing = stored_positions(policy, length, prompt_length), "counting them from the tokens stored"
        yield change("positions", "positions collapsed", doing, position_ids=places, remedy=False)
    if count := newest_to_protect(policy, prompt_length, newest):
        protected = replace(policy, protect_recent=count)
        yield change("recency", f"newest {count} protected", f"protecting the newest {count}", protected)
    if policy.protect_first < SINKS <= _smallest_budget(policy, prompt_length) - policy.protect_recent:
        protected = replace(policy, protect_first=SINKS)
        yield change("sinks", f"first {SINKS} protected", f"protecting the first {SINKS}", protected)
    score: Score = "random" if policy.score != "random" else "low_norm"
    instead = f"{score} instead of {policy.score}"
    yield change("choice", instead, instead, replace(policy, score=score))
    compressed = [layer for layer in range(layers) if layer not in policy.skip_layers]
    for layer in compressed if len(compressed) > 1 else ():
        spared = replace(policy, skip_layers=(*policy.skip_layers, layer))
        yield change("layers", f"layer {layer} spared", f"sparing layer {layer}", spared)
    at = max(2, policy.prune_after, prompt_length)
    if policy.protocol == "streaming" and at < length:
        once = f"compressed once, at {at} tokens"
        doing = f"{once} instead of after every token"
        yield change("repetition", once, doing, replace(policy, protocol="prefill"), at)
    kept = _newest_kept(policy, prompt_length)
    yield change("amount", "as many tokens, the newest", "as many tokens, the newest,", schedule=kept)


def curves_around(
    runner: Runner, policy: Policy, ratios: Sequence[str], *, on_step: Callable[[str], None] = lambda name: None
) -> dict[str, list[Row]]:
    """Measure a policy at other ratios, as it is and with the newest half of its budget protected.

    Args:
        runner: of the windows that are explained.
        policy: at the ratio that is explained.
        ratios: to measure; one whose budget does not cover what is protected is left out.
        on_step: called with the name of each measurement before it starts.

    Returns:
        Rows by the curve's name, to draw beside the explanation.
    """
    curves: dict[str, list[Row]] = {"as given": [], "newest half of the budget protected": []}
    for ratio in ratios:
        own = replace(policy, keep_ratio=ratio)
        try:
            count = newest_to_protect(own, runner.prompt_length, NEWEST) or own.protect_recent
        except ValueError:  # a budget that does not cover what is protected
            continue
        for name, each in zip(curves, (own, replace(own, protect_recent=count)), strict=True):
            on_step(f"ratio {ratio}")
            curves[name].append(measure_row(runner, each))
    return curves
