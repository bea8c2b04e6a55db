"""The gates of golden results: did a metric move since a person accepted it?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from knorm.golden.format import (
    Environment,
    Gate,
    Golden,
    Measured,
    Metric,
    Noise,
    Tensors,
    differing,
    environment_changes,
)
from knorm.statistics import ALPHA, MARGIN, interval
from knorm.statistics import compare as compare_times

MEAN_ABSOLUTE = 1e-4  # nats a token, in the same environment
ANY_WINDOW = 0.05  # nats a token, of one window's tokens in another: four times what near-ties did to any single token
_SIGMAS = 5  # of mean shift, before it is looked at


@dataclass(frozen=True)
class Finding:
    """What became of one metric, and the evidence.

    verdict   "holds", "moved"; "shown" where it differs and is not gated; "inconclusive" where noise hides it
    """

    metric: str
    verdict: Literal["holds", "moved", "shown", "inconclusive"]
    golden: int | float | str | None
    measured: int | float | str | None
    anchor: int | float | str | None
    evidence: str


@dataclass(frozen=True)
class Shift:
    """How token NLLs [windows, tokens] differ from others, nats.

    mean          of all tokens; low, high: its interval at one-sided alpha each, clustered by window
    absolute      mean absolute difference; typical: its median over windows; worst: of any window
    largest       of any token, and where
    """

    mean: float
    low: float
    high: float
    absolute: float
    typical: float
    worst: float
    largest: float
    where: tuple[int, ...]


def shift_of(measured: np.ndarray[Any, Any], golden: np.ndarray[Any, Any], alpha: float = 0.01) -> Shift:
    """How far tokens moved: float [windows, tokens] twice."""
    difference = measured.astype(np.float64) - golden.astype(np.float64)
    difference = np.where(np.isnan(difference), np.inf, difference)
    means = difference.mean(1)
    mean = float(means.mean())
    low, high = interval(means, 1 - 2 * alpha) if np.isfinite(means).all() else (None, None)
    at = tuple(int(i) for i in np.unravel_index(np.abs(difference).argmax(), difference.shape))
    each = np.abs(difference).mean(1)
    largest = float(np.abs(difference).max())
    typical, worst = float(np.median(each)), float(each.max())
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return Shift(mean, low, high, float(each.mean()), typical, worst, largest, at)


def shift_limit(gate: Gate) -> float:
    """The mean shift, nats a token, that environments alone may cause: the threshold, or 5 standard deviations."""
    sigma = gate.noise.sigma if gate.noise else 0.0
    return max(gate.threshold or 0.0, _SIGMAS * sigma)


def judge_tokens(
    gate: Gate, measured: np.ndarray[Any, Any], golden: np.ndarray[Any, Any], same_environment: bool
) -> str | None:
    """Why token NLLs [windows, tokens] moved; None if they did not.

    In the same environment: no token by more than noise.largest, all by at most 1e-4 on average. In another one of the
    same device class: the mean by more than shift_limit, with an interval, clustered by window, that excludes 0; or
    the typical window's tokens by more than noise.typical (near-ties of a window or two may flip); or any window's by
    more than ANY_WINDOW.
    """
    noise = gate.noise or Noise(runs=0, sigma=0.0, largest=0.0, typical=0.0, alpha=0.01, power=None)
    if measured.shape != golden.shape:
        return f"{[*measured.shape]} windows and tokens, but the golden has {[*golden.shape]}"
    if not np.isfinite(measured).all():
        return f"the NLL of window {np.argwhere(~np.isfinite(measured))[0].tolist()} is not finite"
    shift = shift_of(measured, golden, noise.alpha)
    at = f"window {shift.where[0]}, token {shift.where[1]}"
    if same_environment:
        if shift.absolute > MEAN_ABSOLUTE:
            return f"tokens moved by {shift.absolute:.1e} nats on average, most at {at} ({shift.largest:.1e})"
        if shift.largest > noise.largest:
            return f"{at} moved by {shift.largest:.1e} nats, at most {noise.largest:.0e} in the same environment"
        return None
    if abs(shift.mean) > shift_limit(gate) and not shift.low <= 0 <= shift.high:
        return f"the mean moved by {shift.mean:+.1e} nats ({shift.low:+.1e} to {shift.high:+.1e})"
    if shift.typical > noise.typical:
        return f"the typical window's tokens moved by {shift.typical:.1e} nats, at most {noise.typical:.0e} elsewhere"
    if shift.worst > ANY_WINDOW:
        return f"one window's tokens moved by {shift.worst:.1e} nats, at most {ANY_WINDOW:g} (most at {at})"
    return None


def compare(golden: Golden, tensors: Tensors, measured: Measured, environment: Environment) -> list[Finding]:
    """Judge each metric by the gate that was accepted with it."""
    same = not environment_changes(golden, environment)
    shares = sum(metric.gate.rule == "timing" for metric in golden.metrics)
    found = []
    for metric in measured.metrics:
        before = golden.metric(metric.name)
        if before is None:
            found.append(Finding(metric.name, "moved", None, _finite(metric.value), None, "is new: record it again"))
            continue
        why = why_moved(before, metric, tensors, measured.tensors, same)
        verdict: Any = (
            "holds" if why is None else "moved" if _gated(before.gate, golden, environment, same) else "shown"
        )
        if before.gate.rule == "timing" and metric.name in tensors and metric.name in measured.tensors:
            verdict, why = judge_timing(before, tensors[metric.name], measured.tensors[metric.name], shares)
            verdict = verdict if same else "shown"
        found.append(Finding(metric.name, verdict, before.value, _finite(metric.value), before.anchor, why or ""))
    for name in sorted({m.name for m in golden.metrics} - {m.name for m in measured.metrics}):
        before = golden.metric(name)
        assert before is not None
        found.append(
            Finding(name, "moved", before.value, None, before.anchor, "is not measured any more: record it again")
        )
    return found


def _gated(gate: Gate, golden: Golden, environment: Environment, same: bool) -> bool:
    """Whether a gate speaks in this environment."""
    if gate.rule == "same_versions":
        was, now = golden.environment, environment
        return (_release(was.torch), was.transformers) == (_release(now.torch), now.transformers)
    return same or gate.rule not in ("same_environment", "timing")


def _release(version: str) -> str:
    return version.partition("+")[0]  # 2.13.0+cpu does what 2.13.0 does


def judge_timing(
    before: Metric, old: np.ndarray[Any, Any], new: np.ndarray[Any, Any], shares: int = 1
) -> tuple[Literal["holds", "moved", "inconclusive"], str]:
    """Whether a ratio of times rose, from the log-ratio of each block [blocks, 1], then and now; and the evidence.

    shares   metrics that share the alpha. Moved where it rose, and by the gate's threshold or more for all one knows
    """
    margin = before.gate.threshold or MARGIN["cpu"]
    found = compare_times(new[:, 0].tolist(), margin=margin, alpha=ALPHA / shares, golden=old[:, 0].tolist())
    said = f"{found.ratio - 1:+.1%} ({found.low - 1:+.1%} to {found.high - 1:+.1%}, could see {found.mde:.1%})"
    if found.verdict == "PASS":
        return "holds", said
    if found.verdict == "FAIL":
        return "moved", f"the ratio rose: {said}, at most {margin:.1%}"
    return "inconclusive", f"{said}: about {found.more} more blocks would decide"


def _finite(value: int | float | str) -> int | float | str:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value  # as JSON can hold it


def why_moved(before: Metric, now: Metric, old: Tensors, new: Tensors, same: bool) -> str | None:
    """Why a metric moved by the gate it was accepted with; None if it did not."""
    if before.gate.rule == "tokens":
        if before.name not in old or now.name not in new:
            return "has no tokens to compare"
        return judge_tokens(before.gate, new[now.name], old[before.name], same)
    if before.gate.rule == "timing":
        if before.name not in old or now.name not in new:
            return "has no blocks to compare"
        verdict, why = judge_timing(before, old[before.name], new[now.name])
        return why if verdict == "moved" else None
    if before.gate.rule == "at_most":
        was, value, threshold = float(before.value), float(now.value), before.gate.threshold or 0.0
        if value <= was + abs(was) * threshold:
            return None
        if not was or not math.isfinite(value):
            return f"is {value:g}, not at most {was:g}"
        return f"is {(value - was) / abs(was):.2%} above the golden, at most {threshold:.2%}"
    if before.value == now.value:
        return None
    if before.name in old and now.name in new:
        return _first_difference(old[before.name], new[now.name])
    return "differs"


def _first_difference(old: np.ndarray[Any, Any], new: np.ndarray[Any, Any]) -> str:
    if old.shape != new.shape:
        return f"shape {[*new.shape]}, but the golden has {[*old.shape]}"
    if (old == new).all():
        return "differs"
    at = np.argwhere((old != new).any(-1))[0]
    return f"positions {new[tuple(at)].tolist()} at {at.tolist()}, but the golden has {old[tuple(at)].tolist()}"


def worse_by(before: Metric, now: Metric) -> float:
    """Per cent by which a metric is worse than its gate lets pass unsaid; 0 if it is not."""
    if before.direction == "same" or isinstance(before.value, str) or isinstance(now.value, str):
        return 0.0
    change = (float(now.value) - float(before.value)) * (1 if before.direction == "lower" else -1)
    slack = shift_limit(before.gate) if before.gate.rule == "tokens" else 0.0
    if before.gate.rule in ("at_most", "timing"):
        slack = abs(float(before.value)) * (before.gate.threshold or 0.0)
    if change <= slack:
        return 0.0
    return 100 * change / abs(float(before.value)) if before.value else math.inf


def gate_changes(before: Golden, now: Golden) -> list[str]:
    """In words: metrics that a candidate lacks, and bounds by which it would judge others than before."""
    words: dict[str, list[str]] = {}
    for metric in before.metrics:
        new = now.metric(metric.name)
        if new is None:
            words.setdefault("gone", []).append(metric.name)
            continue
        was, will = _bounds(metric.gate), _bounds(new.gate)
        if changed := differing(was, will):
            said = ", ".join(f"{name} {was.get(name)} becomes {will.get(name)}" for name in changed)
            words.setdefault(f"judged by another gate: {said}", []).append(metric.name)
    return [f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} {what}" for what, names in words.items()]


def _bounds(gate: Gate) -> dict[str, Any]:
    noise = gate.noise.model_dump(include={"sigma", "largest", "typical", "alpha"}) if gate.noise else {}
    return {"rule": gate.rule, "threshold": gate.threshold} | noise
