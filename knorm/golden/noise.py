"""The noise of a method: what its numbers do where nothing that matters differs, and the gates that let it pass.

A method that chooses, or rounds to few bits, turns the last digit of a sum into another choice now and then. How often,
and what that does to a token, is the method's own, so `record` measures it.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from knorm.golden.environment import How
from knorm.golden.format import Gate, Golden, Measured, Metric, Tensors
from knorm.golden.rules import ANY_WINDOW, RULES
from knorm.golden.shift import Shift, shift_of
from knorm.rounding import rounded_otherwise

ROUNDINGS = 4  # of the weights: as many other CPUs, for all that a method can tell
MOST_RUNS = ROUNDINGS + 3
SAFETY = 2  # gates let pass this many times the most that was seen: docs/golden-power.md
_MATTERS = 10  # times the most that another rounding does: then it is no rounding


@dataclass(frozen=True)
class Variation:
    """Define a run in which nothing that matters differs.

    what      in words
    how       the way to run the case
    threads   of a CPU; None for those of the other runs
    """

    what: str
    how: How
    threads: int | None = None


@dataclass(frozen=True)
class Seen:
    """Hold what was seen of a case's noise.

    runs      how many count
    what      what differed in them
    matters   what differed and matters after all -> the most that it moved a typical window by, nats a token
    shifts    by metric, of its tokens
    values    by metric, how far from the first run's; a text that differs is infinitely far
    """

    runs: int
    what: tuple[str, ...]
    matters: Mapping[str, float] = field(default_factory=dict)
    shifts: Mapping[str, Sequence[Shift]] = field(default_factory=dict)
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def as_fields(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        matters = {what: nats if math.isfinite(nats) else None for what, nats in self.matters.items()}
        return {"repetitions": self.runs, "varied": [*self.what], "matters": matters}


def attending_otherwise(model: Any) -> Any:
    """Copy `model`, with transformers' other attention of the two that need no package: eager, or sdpa."""
    other = copy.deepcopy(model)
    other.set_attn_implementation(_other(model))
    return other


def _other(model: Any) -> str:
    return "sdpa" if model.config._attn_implementation == "eager" else "eager"


def _roundings(how: How) -> list[Variation]:
    """List the runs that differ in rounding alone."""
    return [
        Variation(f"weights rounded otherwise, {seed}", _modelled(how, partial(rounded_otherwise, seed=seed)))
        for seed in range(1, ROUNDINGS + 1)
    ]


def _variations(how: How, device: torch.device) -> list[Variation]:
    """List the other runs that the machine offers, none of which should matter."""
    batch = 2 if how.batch == 1 else 1
    made = [
        Variation("another attention", _modelled(how, attending_otherwise)),
        Variation(f"batch {batch}", replace(how, batch=batch)),
    ]
    if device.type == "cpu" and (os.cpu_count() or 1) > 1:
        made.append(Variation("another number of threads", how, threads=2 if torch.get_num_threads() == 1 else 1))
    return made


def _modelled(how: How, change: Callable[[Any], Any]) -> How:
    return replace(how, model=lambda model: change(how.model(model)))


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_noise(
    measure: Callable[[str, How], Measured],
    device: str,
    how: How,
    first: Measured,
    on_run: Callable[[], None] = lambda: None,
) -> Seen:
    """Measure a case where nothing that matters differs.

    Args:
        measure: the case's.
        device: to measure on.
        how: its own way.
        first: what it gave in that.
        on_run: called before each run.

    Returns:
        What was seen. What moves tokens by far more than other roundings do, matters, and is not counted: the batch
        does where a scale is that of all its rows.
    """
    way = next((str(metric.value) for metric in first.metrics if metric.name == "way"), None)
    how = replace(how, way=way)  # its check, which takes longest, has been made
    again = []
    for each in _roundings(how):
        on_run()
        again.append(measure(device, each.how))
    gates = {metric.name: metric.gate.noise.typical for metric in first.metrics if metric.gate.noise}
    most = {name: max(_typical(name, run, first) for run in again) for name in gates}
    what, matters = [f"{ROUNDINGS} other roundings of the weights"], {}
    for each in _variations(how, torch.device(device)):
        on_run()
        try:
            with _threads(each.threads):
                run = measure(device, each.how)
        except (ValueError, TypeError) as error:  # a method need not work with every attention
            matters[f"{each.what} ({' '.join(str(error).split())[:100]})"] = math.inf
            continue
        moved = {name: _typical(name, run, first) for name in most}
        if beyond := [moved[name] for name, gate in gates.items() if moved[name] > _MATTERS * max(most[name], gate)]:
            matters[each.what] = max(beyond)
            continue
        again.append(run)
        what.append(each.what)
    shifts = {name: [shift_of(run.tensors[name], first.tensors[name]) for run in again] for name in most}
    values = {metric.name: [_distance(metric, run) for run in again] for metric in first.metrics}
    return Seen(len(again), tuple(what), matters, shifts, values)


def _typical(name: str, run: Measured, first: Measured) -> float:
    return shift_of(run.tensors[name], first.tensors[name]).typical


def _distance(metric: Metric, run: Measured) -> float:
    now = next((other.value for other in run.metrics if other.name == metric.name), None)
    if isinstance(metric.value, str) or isinstance(now, str) or now is None:
        return 0.0 if now == metric.value else math.inf
    return abs(now - metric.value)


# Gates


def with_gates(measured: Measured, seen: Seen, fixed: Sequence[str] = ()) -> Measured:
    """Widen gates as far as noise asks for; a gate that covers it stays as it is.

    Args:
        measured: metrics with the gates that hold for any method.
        seen: of `measure_noise`.
        fixed: kinds of metrics whose thresholds somebody has declared: those stay.

    Returns:
        The same values, judged by gates that let pass twice the most that was seen.
    """
    return replace(measured, metrics=tuple(_widened(metric, seen, metric.kind in fixed) for metric in measured.metrics))


def _widened(metric: Metric, seen: Seen, fixed: bool) -> Metric:
    gate, far = metric.gate, SAFETY * max(seen.values[metric.name], default=0.0)
    if gate.noise and (shifts := seen.shifts[metric.name]):
        sigma = math.sqrt(float(np.mean([shift.mean**2 for shift in shifts])))
        typical, worst = (SAFETY * max(getattr(shift, name) for shift in shifts) for name in ("typical", "worst"))
        wider = {
            "sigma": max(gate.noise.sigma, rounded_up(sigma)),
            "typical": max(gate.noise.typical, rounded_up(typical)),
            "worst": rounded_up(worst) if worst > ANY_WINDOW else None,
        }
        if wider != gate.noise.model_dump(include={*wider}):
            noise = gate.noise.model_copy(update={**wider, "runs": seen.runs, "power": None})
            gate = gate.model_copy(update={"noise": noise})
    elif fixed or not 0 < far < math.inf or isinstance(metric.value, str):
        pass
    elif gate.rule == "within":
        gate = gate.model_copy(update={"threshold": max(gate.threshold or 0.0, rounded_up(far))})
    elif gate.rule == "exact" and metric.value:
        gate = Gate(rule="exact_here", threshold=rounded_up(far / abs(metric.value)))
    return metric.model_copy(update={"gate": gate})


def rounded_up(number: float) -> float:
    """Round `number` up to 1, 2 or 5 times a power of ten, so that gates do not differ for nothing; 0 below 0.

    >>> [rounded_up(number) for number in (0, 0.00012, 0.2, 3)]
    [0.0, 0.0002, 0.2, 5.0]
    """
    if number <= 0:
        return 0.0
    power = math.floor(math.log10(number))
    return next(bound for step in (1, 2, 5, 10) if (bound := float(f"{step}e{power}")) >= number)


def with_gates_of(golden: Golden, measured: Measured, most: float = math.inf) -> Measured:
    """Keep the gates of a golden where they still fit.

    So a golden that is recorded again is judged as before, unless its method has become noisier, or far quieter.

    Args:
        golden: what was accepted.
        measured: what is to replace it, with gates of its own.
        most: a golden's gate stays if it lets pass what the new one does, and at most this many times that.

    Returns:
        The same values; metrics that the golden lacks have their own gates.
    """
    metrics = []
    for metric in measured.metrics:
        old = golden.metric(metric.name)
        keep = old is not None and _covers(old.gate, metric.gate, most)
        metrics.append(metric.model_copy(update={"gate": old.gate}) if old and keep else metric)
    return replace(measured, metrics=tuple(metrics))


def _covers(old: Gate, new: Gate, most: float) -> bool:
    if (old.rule, new.rule) == ("exact_here", "exact"):
        return True
    if old.rule != new.rule or (old.noise is None) != (new.noise is None):
        return False
    return all(now <= was <= most * now for was, now in zip(_bounds(old), _bounds(new), strict=True))


def _bounds(gate: Gate) -> list[float]:
    noise = [gate.noise.sigma, gate.noise.typical, gate.noise.worst or ANY_WINDOW] if gate.noise else []
    return [gate.threshold or 0.0, *noise]


# What they let pass


@dataclass(frozen=True)
class Passes:
    """Hold what a gate lets pass between environments.

    metric   its name, and what of it
    noise    the most that was seen, in `unit`
    passes   what is let pass
    does     what the method itself does, beside the full cache; None where that is not known
    """

    metric: str
    most: float
    passes: float
    unit: str
    does: float | None = None


def passes(measured: Measured, seen: Seen) -> list[Passes]:
    """Say of each metric of `measured` whose gate has a bound what it lets pass, beside the noise that was `seen`."""
    said, full = [], measured.tensors.get("nll/full")
    for metric in measured.metrics:
        gate, name = metric.gate, metric.name
        if gate.noise:
            shifts, (window, mean) = seen.shifts[name], _does(metric, measured.tensors, full)
            typical = max(shift.typical for shift in shifts)
            said.append(Passes(f"{name}, a typical window", typical, gate.noise.typical, "nats/token", window))
            slack = RULES[gate.rule].slack(metric)
            said.append(Passes(f"{name}, mean", max(abs(shift.mean) for shift in shifts), slack, "nats/token", mean))
        elif gate.rule == "within":
            assert not isinstance(metric.value, str)
            said.append(Passes(name, max(seen.values[name]), gate.threshold or 0.0, "of the tokens", 1 - metric.value))
        elif gate.rule in ("exact_here", "near") and not isinstance(metric.value, str) and metric.value:
            far = max(seen.values[name]) / abs(metric.value)
            said.append(Passes(name, far, gate.threshold or 0.0, "of itself"))
    return said


def _does(metric: Metric, tensors: Tensors, full: Any) -> tuple[float | None, float | None]:
    """What the method does to a typical window's tokens, and to their mean."""
    tokens = tensors[metric.name]
    if metric.name == "nll/full" or (metric.kind == "nll" and full is None):
        return None, None
    shift = shift_of(tokens, np.zeros_like(tokens) if metric.kind == "kl" else full)
    return shift.typical, abs(shift.mean)
