"""Golden results: what was measured once and accepted by a person; and did anything move since?

A golden is golden/<case>/<device class>.json, readable and diffable; beside it lies a .safetensors file, named by its
content, with the NLL of each token. Here are the format and the gates; store.py keeps them, cases.py measures.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, ValidationError
from safetensors.numpy import save

from knorm.interval import interval
from knorm.paired import ALPHA, MARGIN
from knorm.paired import compare as compare_times
from knorm.strict import Strict, first_error, no_field_twice

SCHEMA = 1
MEAN_ABSOLUTE = 1e-4  # nats a token, in the same environment
ANY_WINDOW = 0.05  # nats a token, of one window's tokens in another: four times what near-ties did to any single token
_SIGMAS = 5  # of mean shift, before it is looked at

Tensors = Mapping[str, np.ndarray[Any, Any]]


class Damaged(ValueError):
    """A golden that cannot be trusted: which file, which field, and how to get it back."""


class Noise(Strict):
    """What runs showed that differed in nothing that matters (docs/golden-power.md).

    runs      how many
    sigma     standard deviation of a metric's mean shift between environments, nats a token
    largest   of any token's NLL within one environment, nats
    typical   of a window's mean absolute difference between environments, nats: the median over windows is gated
    alpha     of the one-sided interval that has to exclude 0
    power     share of the injected changes that the gates caught; None where not measured
    """

    runs: int
    sigma: float
    largest: float
    typical: float
    alpha: float
    power: float | None


class Gate(Strict):
    """How a metric is judged.

    rule        "exact": equal everywhere. "same_environment": equal there, elsewhere shown. "same_versions": equal with
                the golden's torch and transformers, else shown. "tokens": see judge_tokens. "at_most": not above the
                golden value x (1 + threshold). "timing": in the same environment, see judge_timing; elsewhere shown
    threshold   relative for "at_most"; nats a token of mean shift for "tokens"; a slowdown for "timing"; else None
    noise       where it came from
    """

    rule: Literal["exact", "same_environment", "same_versions", "tokens", "at_most", "timing"]
    threshold: float | None = None
    noise: Noise | None = None


class Metric(Strict):
    """One number, or hash, of a case.

    direction   which way is better; "same": neither
    anchor      the first accepted value: small accepted drifts add up in sight
    """

    model_config = ConfigDict(allow_inf_nan=True)  # what was measured may be broken: `make` refuses it

    name: str
    unit: str
    direction: Literal["lower", "higher", "same"]
    kind: Literal["count", "selection", "schedule", "nll", "ratio", "memory"]
    value: int | float | str
    anchor: int | float | str
    gate: Gate


class Environment(Strict):
    """What numbers may depend on besides the code; numerics: batches and attention. No host is named."""

    device: str
    driver: str | None
    cuda: str | None
    capability: str
    threads: int
    numerics: str
    torch: str
    transformers: str
    numpy: str
    python: str


class Provenance(Strict):
    """Where a golden comes from: the commit and a hash of knorm's sources, when, how many agreeing runs, and why."""

    knorm: str
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")
    clean: bool
    code: str = Field(pattern=r"^[0-9a-f]{64}$")
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
    runs: int = Field(ge=3)
    reason: str


class Golden(Strict):
    """An accepted result, or a candidate for one.

    tensors   sha256 of the .safetensors file: the NLL of each token by metric; None where there is none
    seal      of each other field a hash: an edit by hand is noticed, and where
    """

    schema_version: Literal[1]
    case: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    device_class: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    configuration: dict[str, Any]
    metrics: tuple[Metric, ...] = Field(min_length=1)
    tensors: str | None = Field(pattern=r"^[0-9a-f]{64}$")
    environment: Environment
    provenance: Provenance
    seal: dict[str, str]

    def metric(self, name: str) -> Metric | None:
        """The metric of that name, if there is one."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    def text(self) -> str:
        """What its file holds."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Measured:
    """What one run of a case gave: metrics with their gates, and tensors by metric."""

    metrics: tuple[Metric, ...]
    tensors: Tensors = field(default_factory=dict)


def digest(data: bytes) -> str:
    """Sha256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _seals(fields: Mapping[str, Any]) -> dict[str, str]:
    names = [name for name in Golden.model_fields if name != "seal"]
    return {name: digest(json.dumps(fields[name], sort_keys=True).encode())[:16] for name in names}


def pack(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a .safetensors file, the same for the same tensors."""
    return save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}, metadata=metadata)


def make(
    case: str,
    device_class: str,
    configuration: Mapping[str, Any],
    measured: Measured,
    environment: Environment,
    provenance: Provenance,
) -> Golden:
    """A sealed golden. Raises ValueError, naming the metric, for a value that is not finite."""
    for metric in measured.metrics:
        if isinstance(metric.value, float) and not math.isfinite(metric.value):
            raise ValueError(
                f"{case}: metric {metric.name} is {metric.value}, but should be finite: nothing was recorded"
            )
    for name, tensor in measured.tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"{case}: a token of {name} is not finite: nothing was recorded")
    fields = {
        "schema_version": SCHEMA,
        "case": case,
        "device_class": device_class,
        "configuration": dict(configuration),
        "metrics": [metric.model_dump(mode="json") for metric in measured.metrics],
        "tensors": digest(pack(measured.tensors)) if measured.tensors else None,
        "environment": environment.model_dump(mode="json"),
        "provenance": provenance.model_dump(mode="json"),
    }
    return parse(json.dumps(fields | {"seal": _seals(fields)}), case)


def _no_constant(name: str) -> Any:
    raise ValueError(f"a value is {name}, but should be finite")


def parse(text: str, name: str) -> Golden:
    """A golden from JSON. Raises Damaged, naming the field, for anything but what `make` and `accept` write."""
    try:
        fields = json.loads(text, object_pairs_hook=no_field_twice, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} is truncated, edited or no JSON: {error}") from None
    version = fields.get("schema_version") if isinstance(fields, dict) else None
    if version != SCHEMA:
        raise Damaged(f"{name}: field 'schema_version' is {version!r}, but this knorm reads {SCHEMA}: update knorm")
    try:
        golden = Golden.model_validate_json(text)
    except ValidationError as error:
        raise Damaged(f"{name}: {first_error(error)}") from None
    names = [metric.name for metric in golden.metrics]
    if len({*names}) < len(names):
        raise Damaged(f"{name}: field 'metrics' has {next(n for n in names if names.count(n) > 1)!r} twice")
    if golden.tensors is None and (bare := [m.name for m in golden.metrics if m.gate.rule in ("tokens", "timing")]):
        raise Damaged(f"{name}: field 'tensors' is null, but {bare[0]} is judged by its tokens or blocks")
    if edited := [key for key, seal in _seals(fields).items() if golden.seal.get(key) != seal]:
        raise Damaged(f"{name}: field {edited[0]!r} was edited by hand")
    return golden


# Comparison


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


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the entries in which two mappings differ."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def environment_changes(golden: Golden, environment: Environment) -> list[str]:
    """In which fields an environment is not the golden's. Where there are none, numbers have to agree as in one run.

    What a golden does not know (None) does not count.
    """
    known = {name: value for name, value in golden.environment if value is not None}
    return differing(known, {name: value for name, value in environment if name in known})


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
