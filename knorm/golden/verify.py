"""Measure cases and compare them with their goldens; measure them again and make candidates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from knorm import __version__
from knorm.golden.cases import CASES, Case, find_case
from knorm.golden.environment import How, device_class, environment
from knorm.golden.files import make
from knorm.golden.format import Golden, Measured, Provenance, Tensors, differing, environment_changes
from knorm.golden.gates import Finding, Results, judge
from knorm.golden.store import Checkout, Store

RUNS = 3  # that agree, at least, before anything is recorded


@dataclass(frozen=True)
class Outcome:
    """Hold the verdict on a case.

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
    store: Store, cases: list[str] | None = None, device: str = "cpu", how: How | None = None
) -> Iterator[Outcome]:
    """Measure each case and compare it with its golden of exactly this device class; by default all of the device's.

    Orphans are looked for where all cases are. Nothing is written. Raises ValueError for an unknown case.
    """
    chosen = [find_case(name) for name in cases] if cases is not None else list(CASES.values())
    kind, mine = torch.device(device).type, device_class(device)
    for case in chosen:
        if cases is None and (case.timed or (case.optional and (case.id, mine) not in store.files)):
            continue
        if kind in case.devices:
            yield verify_case(case, store, device, mine, how or How())
        elif cases is not None:
            yield Outcome(case.id, mine, "not compared", f"is measured on {' and '.join(case.devices)} only")
    if cases is None:
        for name in store.orphans([*CASES]):
            yield Outcome(
                name, "", "orphan", f"{store.folder.name}/{name} belongs to no case: remove it, or bring the case back"
            )


def verify_case(case: Case, store: Store, device: str, mine: str, how: How) -> Outcome:
    """Measure one case and compare it."""
    begin = time.perf_counter()
    recording = f"knorm golden record {case.id} --device {device}{store.option}"
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
    if changed := differing(golden.configuration, configuration):
        name = changed[0]
        evidence = (
            f"its configuration changed: {name} was {golden.configuration.get(name)}, is {configuration.get(name)}"
        )
        return Outcome(case.id, mine, "moved", f"{evidence}: record it again")
    here = environment(device, how)
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


def record(case: Case, device: str, now: Checkout, runs: int = RUNS, how: How | None = None) -> tuple[Golden, Measured]:
    """Measure a case `runs` times, which have to agree, and make a candidate of it. Writes nothing.

    Raises ValueError for fewer than three runs, and where runs disagree.
    """
    if runs < RUNS:
        raise ValueError(f"--runs {runs}, but should be at least {RUNS}: one run cannot show that runs agree")
    if torch.device(device).type not in case.devices:
        raise ValueError(f"{case.id} is measured on {' and '.join(case.devices)} only, not on {device}")
    here, mine, configuration = environment(device, how), device_class(device), case.configuration()
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    provenance = Provenance(
        knorm=__version__, commit=now.commit, clean=now.clean, code=now.code, date=date, runs=runs, reason=""
    )
    first = case.measure(device, how or How())
    golden = make(case.id, mine, configuration, first, here, provenance)
    for _ in range(runs - 1):
        again = case.measure(device, how or How())
        findings = judge(Results.of(golden, first.tensors), Results(again.metrics, again.tensors, here))
        if moved := [finding for finding in findings if finding.verdict == "moved"]:
            raise ValueError(f"{case.id}: runs disagree, nothing was recorded: {moved[0].metric} {moved[0].evidence}")
        if unsure := [finding for finding in findings if finding.verdict == "inconclusive"]:
            said = f"{unsure[0].metric} {unsure[0].evidence}"
            raise ValueError(f"{case.id}: too noisy to record, nothing was: {said}. Leave the machine to it")
    return golden, first


def changes(old: tuple[Golden, Tensors] | None, new: tuple[Golden, Tensors]) -> list[Finding]:
    """Judge what a candidate would change, metric by metric, as `verify` would; of a new golden everything is new."""
    before = Results.of(*old) if old else Results((), {}, new[0].environment)
    return judge(before, Results.of(*new))
