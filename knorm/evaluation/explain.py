"""Why did perplexity move? One thing about a compressed run is changed at a time, and the run evaluated again.

Each intervention is a run of its own, exactly evaluated on the same tokens; its change is the mean difference of the
tokens' NLLs, with an interval over windows, since tokens of one window are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from knorm.evaluation.curve import NEWEST, mean_recent
from knorm.evaluation.interventions import (
    Intervention,
    Kind,
    interventions,
    sees_itself,
    stored_positions,
)
from knorm.evaluation.runner import Changes, Runner
from knorm.evaluation.tokens import TokenView, WindowTokens, check_window, window_tokens, worst_tokens
from knorm.perplexity import Run
from knorm.policy import Policy
from knorm.rounding import ROUNDING, OrderProbe, Rounding
from knorm.statistics import interval

NO_LOSS = 0.005  # nats a token: less is nothing to explain
STARVED = 0.8 * NEWEST  # so many of the newest tokens cached, on average, are few
_WORSE = "Norms choose worse than chance here."


@dataclass(frozen=True)
class Effect:
    """Hold what one intervention did, in nats per token; the change is against the explained run, negative if it helps.

    Attributes:
        kind: what the intervention is about.
        name: what was changed.
        nll: mean of the changed run.
        change: mean difference from the explained run.
        low: lower end of its 95% interval, clustered by window; None for one window.
        high: upper end.
        recovered: share of the loss (run - full cache) that it takes back; None where nothing was lost, and for changes
            that are no remedy.
        largest: largest change of any token.
        sentence: what that proves.
        is_rounding: rounding explains all of it; for the order of slots: float64 has shown that it has no effect.
        kl: mean KL(full || changed run) in nats per token, where it is what `recovered` is a share of; else None.
    """

    kind: Kind
    name: str
    nll: float
    change: float
    low: float | None
    high: float | None
    recovered: float | None
    largest: float
    sentence: str
    is_rounding: bool = False
    kl: float | None = None


@dataclass(frozen=True)
class Explanation:
    """Hold why a run's NLL moved; NLLs are means in nats a token.

    nll        of the run; nll_full: of the full cache; nll_empty: of no cache, None where that is not run
    windows    how many were scored, and tokens in all; recent: as in a curve's row
    effects    of single changes, ranked by what they take back; worst: tokens that got worse
    verdict    sentences, the cause first; per_token: a window's tokens, where they were asked for
    """

    nll: float
    nll_full: float
    nll_empty: float | None
    windows: int
    tokens: int
    recent: float | None
    effects: tuple[Effect, ...]
    worst: tuple[TokenView, ...]
    verdict: tuple[str, ...]
    per_token: WindowTokens | None = None

    @property
    def loss(self) -> float:
        """Compute what compression costs, in nats per token."""
        return self.nll - self.nll_full


def sentence_of(change: Intervention, effect: Effect, policy: Policy, order: OrderProbe, dtype: torch.dtype) -> str:
    """Say what one intervention proves.

    Args:
        change: the intervention.
        effect: what it changed.
        policy: of the run that is explained.
        order: has judged in float64 whether attention sees slot order.
        dtype: that the run computes in.

    Returns:
        A sentence without its full stop, nats to three digits.
    """
    none = effect.is_rounding
    gain = "no effect" if none else f"{effect.change:+.3f} nats a token"
    share = f"makes it worse, {gain}" if effect.change >= 0 else f"helps, {gain}"
    if effect.change < 0 and effect.recovered is not None:
        share = f"recovers {effect.recovered:.0%} of the loss"
    if none:
        share = "has no effect" if effect.largest <= ROUNDING else "has no effect beyond rounding"
    elif effect.low is not None and effect.high is not None and effect.low < 0 < effect.high:
        share += " (the interval includes none)"
    if change.kind == "order":
        seen = "attention does not see slot order" if none else "attention must not see slot order"
        kind = str(dtype).removeprefix("torch.")
        agree = f"in float64 attention's outputs agree to {order.difference:.0e}"
        within = f" (the rounding of {kind}: {agree})" if none and effect.largest > ROUNDING else ""
        return f"{gain}, at most {effect.largest:.0e} per token{within}: {seen}"
    if change.kind == "positions" and change.remedy:
        return "none was wrong" if none else f"{change.doing} {share}"
    if change.kind == "positions":
        who = (
            "an unaware loop is spared it here, because it reads layer 0's length and layer 0 is skipped"
            if 0 in policy.skip_layers
            else "a loop that takes positions from the stored length does this"
        )
        return f"{gain}; {who}"
    return f"{change.doing} {share}"


def effect_of(change: Intervention, nll: Tensor, own: Tensor, loss: float) -> Effect:
    """Compare a changed run with the explained one.

    Args:
        change: what was changed.
        nll: the changed run's NLLs, float64 [windows, scored], nats.
        own: those of the explained run, [windows, scored].
        loss: nats a token that compression costs.

    Returns:
        The effect; its sentence is still to come.
    """
    difference = nll - own
    mean, (low, high) = float(difference.mean()), interval(difference.mean(1))
    recovered = -mean / loss if loss > NO_LOSS and change.remedy else None
    largest = float(difference.abs().max())
    return Effect(change.kind, change.name, float(nll.mean()), mean, low, high, recovered, largest, "")


def _cause(found: Explanation) -> str:
    """Which single change takes back most of the loss, if any is certain to; recency first, as the usual one."""
    helping = [e for e in found.effects if e.change < 0 and e.recovered is not None]
    certain = [e for e in helping if e.high is None or e.high < 0]
    best = next(iter(certain or helping), None)
    if best is None or not certain:
        least = f"; the largest is uncertain: {best.name}" if best else ""
        return f"No single change takes back any of the loss of {found.loss:.3f} nats a token for certain{least}."
    if (best.recovered or 0.0) < 0.5:
        return (
            f"No single change takes back half of the loss of {found.loss:.3f} nats a token. "
            f"The most is {best.recovered:.0%}: {best.name}."
        )
    recency = [e for e in certain if e.kind in ("recency", "amount") and (e.recovered or 0.0) >= 0.5]
    cause = next((e for e in recency if e.kind == "recency"), None) or (best if best in recency else None)
    if cause and found.recent is not None and found.recent < STARVED:
        cached = f"{found.recent:.1f} of the newest {NEWEST} are cached"
        return f"The newest tokens were starved ({cached}): {cause.sentence}."
    said = f"{best.sentence}."
    return said[0].upper() + said[1:]


def verdict_of(found: Explanation, worse_than_chance: str) -> tuple[str, ...]:
    """Say in plain words what the cause is, and what is acquitted.

    Args:
        found: all but its verdict.
        worse_than_chance: what is to be said where a random choice does better; empty: the choice is random.

    Returns:
        Sentences, the cause first.
    """
    if found.loss > NO_LOSS:
        said = [_cause(found)]
    elif found.loss >= -NO_LOSS:
        said = [f"Compression costs {found.loss:+.4f} nats a token here: there is no loss to explain."]
    else:
        undoing = max(found.effects, key=lambda e: e.change)
        said = [
            f"Compression gains {-found.loss:.3f} nats a token here; what takes most of that away again is "
            f"{undoing.name} ({undoing.change:+.3f})."
        ]
    if any(e.is_rounding for e in found.effects if e.kind == "order"):
        said.append("The order of the cache plays no part in it.")
    chance = next((e for e in found.effects if e.kind == "choice" and worse_than_chance), None)
    if found.loss > NO_LOSS and chance and chance.high is not None and chance.high < 0:
        said.append(worse_than_chance)
    ends = [found.nll_full] + ([] if found.nll_empty is None else [found.nll_empty])
    if found.nll_empty is not None and not min(ends) <= found.nll <= max(ends):
        side = "below the full cache's" if found.nll < found.nll_full else "above that of no cache at all"
        said.append(f"Perplexity lies {side}, which can be right: what is left may mislead.")
    if found.windows == 1:
        said.append("One window only: there is no interval, and these numbers may be this text's alone.")
    return tuple(said)


def _refuse_idle(run: Run, policy: Policy, layers: int, length: int, prompt_length: int) -> None:
    if all(bool((lost == length).all()) for lost in run.evicted_at):
        raise ValueError(_nothing_evicted(policy, layers, length, prompt_length))


def _nothing_evicted(policy: Policy, layers: int, length: int, prompt_length: int) -> str:
    """Say why nothing was evicted."""
    unexplained = "nothing to explain: no token was evicted; "
    if policy.keep_ratio == 1:
        return unexplained + "keep_ratio is 1"
    if len(policy.skip_layers) == layers:
        return unexplained + "every layer is skipped"
    longest = length - 1 if policy.protocol == "streaming" else prompt_length  # nobody sees what the last token leaves
    if longest < policy.prune_after:
        return unexplained + f"prune_after {policy.prune_after} was never reached"
    if policy.budget(longest) == longest:
        return unexplained + f"keep_ratio {policy.keep_ratio} of {longest} tokens rounds up to all of them"
    return unexplained + "the prompt is the whole text"


def rank_effects(
    changes: Iterable[tuple[Intervention, Callable[..., Tensor]]],
    own: Tensor,
    loss: float,
    policy: Policy,
    dtype: torch.dtype,
) -> tuple[tuple[Effect, ...], Rounding]:
    """Evaluate each single change to a run, and rank what they do.

    Args:
        changes: each with a function from its options (those of `exact_run`) to NLLs, float64 [windows, scored]. A
            shuffle of slots comes first: attention is summed otherwise there, which measures what rounding does.
        own: NLLs of the run itself, float64 [windows, scored].
        loss: what the run's mean NLL lost against the full cache, in nats.
        policy: of the run; only words come from it.
        dtype: of the model.

    Returns:
        The effects, the best first, and the change of a token's NLL that is rounding.
    """
    order, rounding, effects = OrderProbe(), Rounding(), []
    for change, evaluate in changes:
        options: Changes = {**change.options, "attend": order} if change.kind == "order" else change.options
        nll = evaluate(**options)
        if change.kind == "order" and order.holds:
            rounding = Rounding.measured(nll - own)
        acquitted = order.holds if change.kind == "order" else rounding.covers(nll - own)
        effect = replace(effect_of(change, nll, own, loss), is_rounding=acquitted)
        effects.append(replace(effect, sentence=sentence_of(change, effect, policy, order, dtype)))
    return tuple(sorted(effects, key=lambda effect: effect.change)), rounding


def explain(
    runner: Runner,
    tokenizer: PreTrainedTokenizerFast,
    policy: Policy,
    *,
    newest: int = NEWEST,
    stored: bool = False,
    worst: int = 8,
    tokens: int | None = None,
    on_step: Callable[[str], None] = lambda name: None,
) -> Explanation:
    """Evaluate a policy's run, then every single change to it, all exactly and on the same tokens.

    Args:
        runner: the model, the windows of the text, and their prompt.
        tokenizer: of the model, to show tokens.
        policy: of the run to explain.
        newest: of the newest tokens, those that one intervention protects (half the budget, if that is less).
        stored: the run is a loop's that takes positions from the stored length; corrections are tried.
        worst: how many tokens to show of those that got worse.
        tokens: the window, from 0, of which each token is told.
        on_step: called with each evaluation's name before it.

    Returns:
        The effects, ranked by what they take back, worst tokens and a verdict. Raises ValueError as exact_nll does.

    Example:
        >>> (model, tokenizer), ids = load_embedded(), torch.arange(64).view(2, 32)
        >>> windows = knorm.evaluation.windows.Windows(ids)
        >>> explain(Runner(model, windows, prompt_length=16), tokenizer, Policy(0.5)).tokens
        32
    """
    check_window(runner.model, runner.windows.input_ids, tokens)
    length, prompt_length = runner.windows.input_ids.shape[1], runner.prompt_length
    of_run: Any = {"layers": runner.model.config.num_hidden_layers, "length": length, "prompt_length": prompt_length}

    def measured(name: str, policy: Policy, prompt_length: int, changes: Changes) -> tuple[Tensor, Run]:
        on_step(name)
        run = runner.run(policy, prompt_length=prompt_length, **changes)
        return run.nll.double().cpu(), run

    def nlls(change: Intervention, **options: Unpack[Changes]) -> Tensor:
        return measured(change.name, change.policy, change.prompt_length, options)[0]

    places: Changes = {"position_ids": stored_positions(policy, length, prompt_length)} if stored else {}
    own, run = measured("the run", policy, prompt_length, places)
    _refuse_idle(run, policy, **of_run)
    full = measured("full cache", Policy(), prompt_length, {})[0]
    empty = measured("no cache", Policy(), prompt_length, {"schedule": sees_itself})[0]
    changes = interventions(policy, **of_run, newest=newest, stored=stored)
    tried = ((change, partial(nlls, change)) for change in changes)
    ranked, rounding = rank_effects(tried, own, float((own - full).mean()), policy, runner.model.dtype)
    on_step("tokens")
    found = Explanation(
        float(own.mean()), float(full.mean()), float(empty.mean()), len(own), own.numel(),
        mean_recent(run, policy, prompt_length), ranked,
        tuple(worst_tokens(runner, tokenizer, run, full, worst, policy, rounding)), (),
        window_tokens(runner, tokenizer, tokens, own, full, run.evicted_at, policy),
    )  # fmt: skip
    return replace(found, verdict=verdict_of(found, "" if policy.score == "random" else _WORSE))
