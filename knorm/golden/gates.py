"""The one judgement of two golden results, metric by metric.

A gate in a file names its rule (rules.py). `judge` is what `knorm golden verify`, `record`, `diff` and `accept` ask.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from knorm.golden.format import Environment, Golden, Metric, Tensors, differing, environment_changes
from knorm.golden.rules import RULES, Judgement, Pair, Where

Value = int | float | str
Verdict = Literal["holds", "moved", "shown", "inconclusive"]

_WORST = 1e9  # per cent; what was 0 and is something, or is not finite, is worse by this: JSON holds no infinity


@dataclass(frozen=True)
class Results:
    """Hold the `metrics` and `tensors` of a golden, a candidate or a run, and the `environment` that they come from."""

    metrics: tuple[Metric, ...]
    tensors: Tensors
    environment: Environment

    @classmethod
    def of(cls, golden: Golden, tensors: Tensors) -> Results:
        """Take the results of `golden`, which may be a candidate, and its `tensors` by metric."""
        return cls(golden.metrics, tensors, golden.environment)

    def metric(self, name: str) -> Metric | None:
        """Look up the metric `name`; None where there is none."""
        return next((metric for metric in self.metrics if metric.name == name), None)


@dataclass(frozen=True)
class Finding:
    """Hold the verdict on one metric, and the evidence.

    Attributes:
        metric: its name.
        verdict: "holds"; "moved"; "shown": it differs where its gate does not speak; "inconclusive": noise hides it.
        golden: the accepted value; None for a metric that is new.
        measured: the value found here; None for one that is gone.
        anchor: the value accepted first.
        evidence: in one line.
        difference: measured minus golden; None where they are no numbers.
        low: lower end of the difference's interval, in the metric's unit: clustered by window, or by block.
        high: upper end.
        worse: per cent by which the metric is worse than its gate lets pass; 0 where it is not.
    """

    metric: str
    verdict: Verdict
    golden: Value | None
    measured: Value | None
    anchor: Value | None
    evidence: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    worse: float = 0.0


# The judgement


def where(then: Environment, now: Environment) -> Where:
    """Tell how near `then` and `now` are: the "same", others of the same "versions", or "elsewhere"."""
    if not environment_changes(then, now):
        return "same"
    was, will = ((_release(e.torch), e.transformers, e.packages) for e in (then, now))
    return "versions" if was == will else "elsewhere"


def _release(version: str) -> str:
    return version.partition("+")[0]  # 2.13.0+cpu does what 2.13.0 does


def judge(old: Results, new: Results) -> list[Finding]:
    """Judge each metric by the gate that was accepted with it.

    Args:
        old: what was accepted: `Results.of(golden, tensors)`.
        new: a candidate, or what a run gave.

    Returns:
        A finding for each metric of either, those of `new` first. A metric that only one of them has moved.
    """
    near = where(old.environment, new.environment)
    peers = Counter(metric.gate.rule for metric in old.metrics)
    findings = []
    for now in new.metrics:
        before = old.metric(now.name)
        if before is None:
            findings.append(Finding(now.name, "moved", None, _as_json(now.value), None, "is new: record it again"))
            continue
        tensors = old.tensors.get(now.name), new.tensors.get(now.name)
        findings.append(_judge_pair(Pair(before, now, *tensors, near, peers[before.gate.rule])))
    for name in sorted({metric.name for metric in old.metrics} - {metric.name for metric in new.metrics}):
        before = old.metric(name)
        assert before is not None
        gone = "is not measured any more: record it again"
        findings.append(Finding(name, "moved", before.value, None, before.anchor, gone))
    return findings


def _judge_pair(pair: Pair) -> Finding:
    before, now = pair.before, pair.now
    rule = RULES[before.gate.rule]
    if rule.numbers and isinstance(now.value, str):
        judged = Judgement("moved", f"is {now.value!r}, but should be a number")
    elif rule.tensors and (pair.old is None or pair.new is None):
        judged = Judgement("moved", f"has no {rule.tensors} to compare")
    else:
        judged = rule.judge(pair)
    verdict: Verdict = judged.verdict
    if verdict != "holds" and pair.where not in rule.speaks:
        verdict = "shown"
    difference = None
    if not isinstance(before.value, str) and not isinstance(now.value, str) and math.isfinite(now.value):
        difference = now.value - before.value
    return Finding(
        now.name, verdict, before.value, _as_json(now.value), before.anchor, judged.evidence,
        difference, judged.low, judged.high, _worse(before, now, rule.slack(before)),
    )  # fmt: skip


def _as_json(value: Value) -> Value:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _worse(before: Metric, now: Metric, slack: float) -> float:
    if before.direction == "same" or isinstance(before.value, str) or isinstance(now.value, str):
        return 0.0
    change = (now.value - before.value) * (1 if before.direction == "lower" else -1)
    if change <= slack:
        return 0.0
    percent = 100 * change / abs(before.value) if before.value else math.inf
    return min(percent, _WORST) if math.isfinite(percent) else _WORST


def gate_changes(before: Golden, now: Golden) -> dict[str, str]:
    """Say which metrics a candidate would judge by other bounds than before.

    Args:
        before: what was accepted.
        now: the candidate.

    Returns:
        Metric -> what changes; "gone" for one that the candidate lacks.
    """
    changes = {}
    for metric in before.metrics:
        new = now.metric(metric.name)
        if new is None:
            changes[metric.name] = "gone"
            continue
        was, will = _bounds(metric), _bounds(new)
        if changed := differing(was, will):
            words = ", ".join(f"{name} {was.get(name)} becomes {will.get(name)}" for name in changed)
            changes[metric.name] = f"judged by another gate: {words}"
    return changes


def _bounds(metric: Metric) -> dict[str, Any]:
    """Everything that decides what is accepted later without permission."""
    gate = metric.gate
    noise = gate.noise.model_dump(include={"sigma", "largest", "typical", "alpha", "worst"}) if gate.noise else {}
    return {"rule": gate.rule, "threshold": gate.threshold, "direction": metric.direction, "unit": metric.unit} | noise
