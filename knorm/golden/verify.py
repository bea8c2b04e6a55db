"""Measure cases and compare them with their goldens; measure them again and make candidates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import count

import torch

from knorm import __version__
from knorm.golden.cases import CASES, Case, find_case
from knorm.golden.environment import How, device_class, environment
from knorm.golden.files import make
from knorm.golden.format import Environment, Golden, Measured, Provenance, Tensors, differences, environment_changes
from knorm.golden.gates import Finding, Results, gate_changes, judge
from knorm.golden.noise import Seen, measure_noise, with_gates, with_gates_of
from knorm.golden.store import Checkout, Store
from knorm.limits import RUNS

_QUIETER = 10.0  # times: a gate that is so much wider than its method's noise asks for is made anew


@dataclass(frozen=True)
class Outcome:
    """Hold the verdict on a case on one `device_class`, which took so many `seconds`.

    verdict    "holds"; "moved", "missing", "damaged" or "orphan": a failure; "not compared": no golden of this device
               class at all; "inconclusive": too noisy to say
    evidence   in one line
    findings   per metric, where anything was compared
    """

    case: str
    device_class: str
    verdict: str
    evidence: str
    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Tell whether somebody has to act."""
        return self.compared and self.verdict != "holds"

    @property
    def compared(self) -> bool:
        """Tell whether a golden exists, or should, and its gates could decide."""
        return self.verdict not in ("not compared", "inconclusive")


def verify_goldens(
    store: Store,
    cases: list[str] | None = None,
    device: str = "cpu",
    how: How | None = None,
    *,
    catalogue: Mapping[str, Case] | None = None,
    on_step: Callable[[float], None] = lambda made: None,
) -> Iterator[Outcome]:
    """Measure each case and compare it with its golden of exactly this device class; by default all of the device's.

    Orphans are looked for where all cases are. Nothing is written. Raises ValueError for an unknown case.

    Args:
        store: their goldens.
        cases: names; by default all.
        device: to measure on.
        how: another way to run each than its own.
        catalogue: the cases that there are; by default knorm's own.
        on_step: is told how many cases are measured, a part of one included.

    Yields:
        The outcome of each case.
    """
    known = CASES if catalogue is None else catalogue
    chosen = [find_case(name, known) for name in cases] if cases is not None else list(known.values())
    kind, mine = torch.device(device).type, device_class(device)
    measured = 0
    for case in chosen:
        if cases is None and (case.timed or (case.optional and (case.id, mine) not in store.files)):
            continue
        if kind in case.devices:
            yield verify_case(case, store, device, mine, _told(how or case.how, on_step, measured))
            measured += 1
        elif cases is not None:
            yield Outcome(case.id, mine, "not compared", f"is measured on {' and '.join(case.devices)} only")
    if cases is None:
        for name in store.orphans([*known]):
            yield Outcome(
                name, "", "orphan", f"{store.folder.name}/{name} belongs to no case: remove it, or bring the case back"
            )


def _told(how: How, on_step: Callable[[float], None], made: int) -> How:
    """Run as `how` says, after so many measurements, and tell how many are made with the part of this one."""
    return replace(how, on_step=lambda share: on_step(made + share))


def verify_case(case: Case, store: Store, device: str, mine: str, how: How) -> Outcome:
    """Measure one case and compare it with its golden.

    Args:
        case: to measure.
        store: its goldens.
        device: to measure on.
        mine: the device's class.
        how: the way to run it.

    Returns:
        The outcome; nothing is written.
    """
    with _threads_of(case, device):
        return _verify_case(case, store, device, mine, how)


@contextmanager
def _threads_of(case: Case, device: str) -> Iterator[None]:
    before = torch.get_num_threads()
    if case.one_thread and torch.device(device).type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment_of(case: Case, device: str, how: How | None) -> Environment:
    """Collect what a case's numbers may depend on here.

    Args:
        case: the case; one that names its environment has that.
        device: to measure on.
        how: the way to run it; None for the usual one.

    Returns:
        The environment, with versions of the packages that the case's method comes from.
    """
    if case.environment is not None:
        return case.environment
    here = environment(device, how)
    return here.model_copy(update={"packages": {**case.packages}}) if case.packages else here


def _verify_case(case: Case, store: Store, device: str, mine: str, how: How) -> Outcome:
    begin = time.perf_counter()
    recording = f"knorm golden record {case.recorded or case.id} --device {device}{store.option}"
    try:
        golden, tensors = store.read(case.id, mine)
    except FileNotFoundError:
        if case.optional:
            said = f"none accepted for {mine}; with its weights at hand: {recording}"
            return Outcome(case.id, mine, "not compared", said)
        if mine not in store.device_classes:
            there = ", ".join(sorted(store.device_classes)) or "none"
            return Outcome(case.id, mine, "not compared", f"no golden of device class {mine} (there are: {there})")
        said = f"no golden, but {mine} has others: {recording}"
        return Outcome(case.id, mine, "missing", said)
    except ValueError as damaged:
        return Outcome(case.id, mine, "damaged", str(damaged))
    configuration = case.configuration()
    if changed := differences(golden.configuration, configuration):
        more = f" ({len(changed)} differences)" if changed[1:] else ""
        return Outcome(case.id, mine, "moved", f"its configuration changed: {changed[0]}{more}: record it again")
    here = environment_of(case, device, how)
    try:
        measured = case.measure(device, how)
    except ValueError as error:
        if case.optional:  # its weights are not at hand, or the machine is not its own
            return Outcome(case.id, mine, "not compared", str(error))
        return Outcome(case.id, mine, "moved", f"it cannot be measured any more: {error}")
    findings = tuple(judge(Results.of(golden, tensors), Results(measured.metrics, measured.tensors, here)))
    seconds = time.perf_counter() - begin
    moved = [finding for finding in findings if finding.verdict == "moved"]
    if moved:
        evidence = f"{moved[0].metric}: {moved[0].evidence}"
        more = f" ({len(moved)} of {len(findings)} metrics)"
        return Outcome(case.id, mine, "moved", evidence + more, findings, seconds)
    if unsure := [finding for finding in findings if finding.verdict == "inconclusive"]:
        evidence = f"{unsure[0].metric}: {unsure[0].evidence} ({len(unsure)} of {len(findings)} metrics)"
        return Outcome(case.id, mine, "inconclusive", evidence, findings, seconds)
    elsewhere = environment_changes(golden.environment, here)
    where = f"in another environment ({', '.join(elsewhere)})" if elsewhere else "in the same environment"
    shown = [finding.metric for finding in findings if finding.verdict == "shown"]
    differ = f"; {len(shown)} differ, which is not gated there: {', '.join(shown)}" if shown else ""
    said = f"{len(findings) - len(shown)} metrics hold {where}{differ}"
    return Outcome(case.id, mine, "holds", said, findings, seconds)


@dataclass(frozen=True)
class Recorded:
    """Hold what `record` makes: a `golden` to be, what was `measured`, and the noise that was `seen`; None without."""

    golden: Golden
    measured: Measured
    seen: Seen | None = None


def record(
    case: Case,
    device: str,
    now: Checkout,
    runs: int = RUNS,
    how: How | None = None,
    *,
    before: tuple[Golden, Tensors] | None = None,
    unmoved: bool = False,
    on_step: Callable[[float], None] = lambda done: None,
) -> Recorded | None:
    """Measure a case `runs` times, which have to agree, and make a candidate of it. Writes nothing.

    Where its gates are to come from its own noise, it is measured as often as that takes.

    Args:
        case: to measure.
        device: to measure on.
        now: the checkout that it is measured in.
        runs: at least three.
        how: another way to run it than its own.
        before: the golden and its tensors, whose gates are kept where they fit the noise.
        unmoved: make a candidate although one run shows that nothing moved from the golden.
        on_step: is told how many runs are made, a part of one included; those of the noise come on top.

    Returns:
        The candidate and what was measured; None where nothing moved.

    Raises:
        ValueError: fewer than three runs, or runs that disagree.
    """
    if runs < RUNS:
        raise ValueError(f"--runs {runs}, but should be at least {RUNS}: one run cannot show that runs agree")
    if torch.device(device).type not in case.devices:
        raise ValueError(f"{case.id} is measured on {' and '.join(case.devices)} only, not on {device}")
    with _threads_of(case, device):
        return _record(case, device, now, runs, how or case.how, before, unmoved, on_step)


def _record(
    case: Case,
    device: str,
    now: Checkout,
    runs: int,
    how: How,
    before: tuple[Golden, Tensors] | None,
    unmoved: bool,
    on_step: Callable[[float], None],
) -> Recorded | None:
    here, configuration = environment_of(case, device, how), case.configuration()
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    provenance = Provenance(
        knorm=__version__, commit=now.commit, clean=now.clean, code=now.code_of(case.sources), date=date, runs=runs,
        reason="",
    )  # fmt: skip
    made = partial(make, case.id, device_class(device), configuration, environment=here, provenance=provenance)
    plain = first = case.measure(device, _told(how, on_step, 0))
    same = before[0] if before and before[0].configuration == configuration and case.own_noise else None
    if same:
        first = with_gates_of(same, plain)
    golden = made(measured=first)
    if before and not unmoved and not _differs(before, (golden, first.tensors)):
        return None
    for number in range(1, runs):
        on_step(number)
        again = case.measure(device, _told(how, on_step, number))
        findings = judge(Results.of(golden, first.tensors), Results(again.metrics, again.tensors, here))
        if moved := [finding for finding in findings if finding.verdict == "moved"]:
            raise ValueError(f"{case.id}: runs disagree, nothing was recorded: {moved[0].metric} {moved[0].evidence}")
        if unsure := [finding for finding in findings if finding.verdict == "inconclusive"]:
            said = f"{unsure[0].metric} {unsure[0].evidence}"
            raise ValueError(f"{case.id}: too noisy to record, nothing was: {said}. Leave the machine to it")
    if not case.own_noise:
        return Recorded(golden, first)
    done = count(runs)
    seen = measure_noise(case.measure, device, how, plain, lambda: on_step(next(done)))
    noisy = with_gates(plain, seen, case.fixed)
    noisy = with_gates_of(same, noisy, _QUIETER) if same else noisy
    return Recorded(made(measured=noisy), noisy, seen)


def _differs(old: tuple[Golden, Tensors], new: tuple[Golden, Tensors]) -> bool:
    """Tell whether there is anything to accept: another configuration, other gates, or a metric that does not hold."""
    if old[0].configuration != new[0].configuration or gate_changes(old[0], new[0]):
        return True
    return any(finding.verdict not in ("holds", "shown") for finding in changes(old, new))


def changes(old: tuple[Golden, Tensors] | None, new: tuple[Golden, Tensors]) -> list[Finding]:
    """Judge what a candidate would change, metric by metric, as `verify` would.

    Args:
        old: what was accepted, with its tensors; None of a new golden, in which everything is new.
        new: the candidate, with its tensors.

    Returns:
        A finding for each metric.
    """
    before = Results.of(*old) if old else Results((), {}, new[0].environment)
    return judge(before, Results.of(*new))
