"""Why did a method's predictions move? What its queries saw is recovered, then one thing is changed at a time.

A method that evicts gives a schedule, which one pass runs and changes exactly. A method that keeps every token, and
changes keys or values instead, is given them back as the model computed them: of one layer, all keys, or all values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from knorm.evaluation.curve import NEWEST, mean_recent
from knorm.evaluation.damage import PerToken
from knorm.evaluation.explain import (
    Effect,
    Explanation,
    effect_of,
    explain,
    rank_effects,
    sentence_of,
    verdict_of,
)
from knorm.evaluation.interventions import SINKS, Intervention, Kind, sees_itself
from knorm.evaluation.recovery import Beside, Exact, Recovery, Unrecoverable
from knorm.evaluation.runner import Changes, Runner
from knorm.evaluation.tokens import check_window, window_tokens, worst_tokens
from knorm.evaluation.ways import Evaluation, Ways
from knorm.methods.budget import Budget
from knorm.methods.method import Method
from knorm.perplexity import Run, exact_run, refuse_model
from knorm.policy import Policy
from knorm.rounding import OrderProbe
from knorm.schedule import cache_lengths, evicted_like, never

Table = list[Tensor]  # for each layer: evicted_at, int64 [windows, kv_heads, T]
Step = Callable[[str], None]


_BY_KEYS = "its schedule follows from its keys"


@dataclass(frozen=True)
class MethodExplanation:
    """Hold why a method's predictions moved.

    Attributes:
        method: its name.
        budget: what one compression retains; None where the method has its own.
        how: the way it was run, and `check`, how that was checked.
        acts: "evicts", or "changes" where every token stays and its keys or values are others.
        seen: what its queries saw, in words.
        explanation: the effects, the worst tokens, and the verdict.
    """

    method: str
    budget: Budget | None
    how: str
    check: str
    acts: Literal["evicts", "changes"]
    seen: str
    explanation: Explanation


def explain_method(
    ways: Ways,
    method: Method,
    *,
    newest: int = NEWEST,
    worst: int = 8,
    tokens: int | None = None,
    on_step: Step = lambda name: None,
) -> MethodExplanation:
    """Run a method, recover what its queries saw, and evaluate every single change to it on the same tokens.

    Args:
        ways: the model, the windows and their prompt.
        method: made by `knorm.method`.
        newest: how many of the newest tokens one intervention protects.
        worst: how many tokens to show of those that got worse.
        tokens: the window, from 0, of which each token is told.
        on_step: called with the name of each evaluation before it begins.

    Returns:
        The effects, ranked by what they take back, and a verdict in words.

    Raises:
        MethodError: what the method's own code raised.
        ValueError: nothing changed, what queries saw cannot be recovered, or the model's schedules are not one pass.

    Example:
        >>> (model, tokenizer), ids = load_embedded(), torch.arange(96).view(2, 48)
        >>> ways = Ways(model, knorm.evaluation.windows.Windows(ids), 24, tokenizer=tokenizer)
        >>> newest = lambda keys, values, keep_ratio: (keys[:, :, -12:], values[:, :, -12:])
        >>> explain_method(ways, method(newest, keep_ratio=0.5)).explanation.windows
        2
    """
    tokenizer, after = ways.tokenizer, ways.ids.shape[1] - ways.prompt_length
    if tokenizer is None or ways.scored != after:
        raise ValueError("explaining shows tokens, and scores all after the prompt: give Ways a tokenizer, not scored")
    check_window(ways.model, ways.ids, tokens)
    runner = Runner(ways.model, ways.windows, ways.prompt_length, ways.batch)
    if method.policy is not None:
        found = explain(runner, tokenizer, method.policy, newest=newest, worst=worst, tokens=tokens, on_step=on_step)
        return MethodExplanation(method.name, method.budget, "schedule", "", "evicts", _BY_KEYS, found)
    on_step(method.label)
    row = ways.evaluate(method)
    _refuse_unchanged(row)
    on_step("what its queries saw")
    try:
        recoveries = _recovered(ways, method, row)
        evicts = any(recovery.evicts for recovery in recoveries)
        table = [torch.cat(layer) for layer in zip(*(w.schedule() for w in recoveries), strict=True)] if evicts else []
        if evicts:
            found = _Evicted(ways, row, table, recoveries[0].shift).explained(newest, worst, on_step)
        else:
            found = _explained_changes(ways, method, row, on_step)
    except Unrecoverable as error:
        raise ValueError(f"{row.label}: which tokens its queries see cannot be recovered: {error}") from None
    losses = row.per_token.nll, row.per_token.nll_full
    told = window_tokens(runner, tokenizer, tokens, *losses, table, Policy(), row.per_token.kl)
    acts: Literal["evicts", "changes"] = "evicts" if evicts else "changes"
    said = _shares(ways, table) if evicts else _changes(recoveries)
    return MethodExplanation(row.method, row.budget, row.how, row.check, acts, said, replace(found, per_token=told))


def _changes(recoveries: Iterable[Recovery]) -> str:
    """Say what a method does that evicts nothing."""
    changed = sorted(set().union(*(recovery.changed for recovery in recoveries)))
    return f"every query sees every token; changed: {' and '.join(changed)}"


def _refuse_unchanged(row: Evaluation) -> None:
    if not row.changed:
        check = f"; {row.check}" if row.check else ""
        raise ValueError(f"nothing to explain: {row.label}: no token's prediction changed{check}")


def _recovered(ways: Ways, method: Method, row: Evaluation) -> list[Recovery]:
    recoveries: list[Recovery] = []

    def make(rows: int) -> Beside:
        recoveries.append(Recovery(rows, ways.prompt_length, ways.ids.shape[1]))
        return recoveries[-1]

    tokens, _ = ways.beside(method, row.how, make)
    if not ways.covers(tokens.nll - row.per_token.nll, row.how):
        raise Unrecoverable("its predictions differ from one run to the next")
    return recoveries


def _shares(ways: Ways, table: Table) -> str:
    """Say how many of the prompt's tokens the first query after it sees."""
    prompt = ways.prompt_length
    kept = torch.stack([(lost[..., :prompt] > prompt).double().sum(-1).mean(0) for lost in table])
    low, high = float(kept.min()), float(kept.max())
    several = f"{low:.0f} to {high:.0f}" if round(high) > round(low) else f"{low:.0f}"
    said = f"after the prompt {several} of its {prompt} tokens are seen, by layer and head"
    if all(bool(((lost <= prompt) | (lost == lost.shape[-1])).all()) for lost in table):
        return said
    last = torch.stack([cache_lengths(lost)[..., -2].double().mean(0) for lost in table])
    return f"{said}; the last query sees {float(last.min()):.0f} to {float(last.max()):.0f}"


class _Evicted:
    """The run that a recovered schedule gives, and the changes to it."""

    def __init__(self, ways: Ways, row: Evaluation, table: Table, shift: int) -> None:
        refuse_model(ways.model)
        self.ways, self.row, self.table, self.shift = ways, row, table, shift
        self.full = row.per_token.nll_full

    def run(self, table: Table | None, **changes: Unpack[Changes]) -> Run:
        """Run a schedule, None for that of no cache at all, on every window by one pass each."""
        ways, runs = self.ways, []
        for rows in torch.arange(len(ways.ids)).split(ways.batch):

            def schedule(layer: int, keys: Tensor, rows: Tensor = rows) -> Tensor:
                return sees_itself(layer, keys) if table is None else table[layer][rows].to(keys.device)

            ids, places = ways.ids[rows], changes.get("position_ids")
            runs.append(
                exact_run(
                    ways.model, ids, Policy(), prompt_length=ways.prompt_length, schedule=schedule,
                    position_ids=None if places is None else places.expand(ids.shape), attend=changes.get("attend"),
                )
            )  # fmt: skip
        nll, correct = (torch.cat(column)[:, -ways.scored :] for column in list(zip(*runs, strict=True))[:2])
        return Run(nll, correct, tuple(table or ()), sum(r.seconds for r in runs), sum(r.scheduling for r in runs))

    def explained(self, newest: int, worst: int, on_step: Step) -> Explanation:
        """Evaluate the schedule and each change to it."""
        ways, method_nll = self.ways, self.row.per_token.nll
        on_step("its schedule")
        run = self.run(self.table)
        own, loss = run.nll.double().cpu(), float((method_nll - self.full).mean())

        def nlls(name: str, table: Table, **options: Unpack[Changes]) -> Tensor:
            on_step(name)
            return self.run(table, **options).nll.double().cpu()

        changes = ((change, partial(nlls, change.name, table)) for change, table in self._changes(newest))
        effects, rounding = rank_effects(changes, own, loss, Policy(), ways.model.dtype)
        if not ways.covers(method_nll - own, self.row.how):
            content = self._content(method_nll, own, loss)
            effects = tuple(sorted((*effects, content), key=lambda effect: effect.change))
        on_step("no cache")
        empty = self.run(None).nll.double().mean()
        on_step("tokens")
        runner = Runner(ways.model, ways.windows, ways.prompt_length, ways.batch)
        tokenizer: Any = ways.tokenizer
        views = worst_tokens(runner, tokenizer, run, self.full, worst, Policy(), rounding)
        found = Explanation(
            float(method_nll.mean()), float(self.full.mean()), float(empty), len(own), own.numel(),
            mean_recent(run, Policy(), ways.prompt_length), effects, tuple(views), (),
        )  # fmt: skip
        return replace(found, verdict=verdict_of(found, "It chooses worse than chance here."))

    def _content(self, method_nll: Tensor, own: Tensor, loss: float) -> Effect:
        """Compare the method's run with that of its evictions alone: the rest is what it does to what it retains."""
        kind: Kind = "positions" if self.shift else "content"
        doing = (
            "leaving positions as they were instead of renumbering"
            if self.shift
            else "leaving what it retains as the model computed it"
        )
        change = Intervention(kind, "evictions alone", doing, Policy(), self.ways.prompt_length)
        effect = effect_of(change, own, method_nll, loss)
        sentence = sentence_of(change, effect, Policy(), OrderProbe(), self.ways.model.dtype)
        return replace(effect, sentence=sentence)

    def _changes(self, newest: int) -> Iterator[tuple[Intervention, Table]]:
        """Generate each single change that makes sense for the schedule; the order of slots comes first."""
        table, prompt = self.table, self.ways.prompt_length

        def change(kind: Kind, name: str, doing: str, *, remedy: bool = True, **options: Unpack[Changes]) -> Any:
            return Intervention(kind, name, doing, Policy(), prompt, options, remedy)

        yield change("order", "slots shuffled", "shuffling slots", remedy=False), table
        lengths = cache_lengths(table[0]).flatten(0, 1).unique(dim=0)
        if not self.shift and len(lengths) == 1 and int(lengths[0, -1]) < lengths.shape[-1]:
            places = change(
                "positions", "positions collapsed", "counting them from the tokens stored", remedy=False,
                position_ids=lengths[0] - 1,
            )  # fmt: skip
            yield places, table
        draw = torch.Generator().manual_seed(0)

        def chance(lost: Tensor) -> Tensor:
            return torch.rand(lost.shape, generator=draw, dtype=torch.float64).to(lost.device)

        protected: tuple[tuple[Kind, str, int, int], ...] = (
            ("recency", "newest", 0, newest),
            ("sinks", "first", SINKS, 0),
        )
        for kind, what, first, recent in protected:
            both = [evicted_like(lost, chance(lost) - lost, protect_first=first, protect_recent=recent)
                    for lost in table]  # fmt: skip
            count = max(most for _, most in both)
            others = [other for other, _ in both]
            if _differ(others, table):
                yield change(kind, f"{what} {count} protected", f"protecting the {what} {count}"), others
        instead = "a random choice instead of its own"
        yield change("choice", instead, instead), [evicted_like(lost, chance(lost))[0] for lost in table]
        acting = [layer for layer, lost in enumerate(table) if bool((lost < lost.shape[-1]).any())]
        for layer in acting if len(acting) > 1 else ():
            spared = [never(lost.shape, lost.device) if i == layer else lost for i, lost in enumerate(table)]
            yield change("layers", f"layer {layer} spared", f"sparing layer {layer}"), spared
        age = -torch.arange(table[0].shape[-1], dtype=torch.float64)
        kept = [evicted_like(lost, age.expand(lost.shape))[0] for lost in table]
        if _differ(kept, table):
            yield change("amount", "as many tokens, the newest", "as many tokens, the newest,"), kept


def _differ(others: Sequence[Tensor], table: Table) -> bool:
    return not all(torch.equal(other, lost) for other, lost in zip(others, table, strict=True))


def _explained_changes(ways: Ways, method: Method, row: Evaluation, on_step: Step) -> Explanation:
    """Give a method that changes keys or values the exact ones back, a part at a time; ranked by KL."""
    own = row.per_token

    def measured(name: str, **part: Any) -> PerToken:
        on_step(name)
        return ways.beside(method, row.how, lambda rows: Exact(**part))[0]

    exact = measured("all exact")
    if not ways.covers(exact.nll - exact.nll_full, row.how):
        raise Unrecoverable("with exact keys and values its predictions are still not the full cache's")
    parts: list[tuple[Kind, str, str, dict[str, Any]]] = [
        ("keys", "keys exact", "storing all keys exactly", {"values": False}),
        ("values", "values exact", "storing all values exactly", {"keys": False}),
    ]
    for layer in range(len(row.tokens_seen)):
        only = {"layers": frozenset({layer})}
        parts.append(("layers", f"layer {layer} exact", f"storing layer {layer} exactly", only))
    effects, kl = [], float(own.kl.mean())
    for kind, name, doing, part in parts:
        tokens = measured(name, **part)
        left = float(tokens.kl.mean())
        change = Intervention(kind, name, doing, Policy(), ways.prompt_length)
        effect = effect_of(change, tokens.nll, own.nll, 0.0)
        none = ways.covers(tokens.nll - own.nll, row.how)
        share = 1 - left / kl
        said = f"takes back {share:.0%} of the KL" if share >= 0 else f"adds {-share:.0%} to the KL"
        sentence = f"{doing} {'has no effect beyond rounding' if none else said}"
        effects.append(replace(effect, sentence=sentence, is_rounding=none, kl=left, recovered=share))
    effects.sort(key=lambda effect: effect.kl or 0.0)
    found = Explanation(
        float(own.nll.mean()), float(own.nll_full.mean()), None, len(own.nll), own.nll.numel(), None,
        tuple(effects), (), (),
    )  # fmt: skip
    return replace(found, verdict=tuple(_blamed(effects, kl)))


def _blamed(effects: Sequence[Effect], kl: float) -> Iterator[str]:
    """Say which of keys and values, and which layer, cost most."""
    parts = {effect.kind: effect for effect in effects if effect.kind in ("keys", "values")}
    keys, values = parts["keys"], parts["values"]
    dearer = "keys" if (keys.kl or 0.0) < (values.kl or 0.0) else "values"
    yield (
        f"The {dearer} cost most: of a KL of {kl:.2g} nats a token, exact keys take back {keys.recovered:.0%}, exact "
        f"values {values.recovered:.0%}."
    )
    layers = [effect for effect in effects if effect.kind == "layers"]
    if len(layers) > 1:
        most, least = (
            f"{effect.name.removesuffix(' exact')} ({effect.recovered:.0%})" for effect in (layers[0], layers[-1])
        )
        yield f"Of the layers, {most} costs most, {least} least."
