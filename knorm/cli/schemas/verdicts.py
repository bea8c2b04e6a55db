"""Forms of `knorm check`, `knorm golden` and `knorm init`."""

from __future__ import annotations

from typing import Any

from knorm.cli.schemas.parts import Count, Part, Result, said


class LawRow(Part):
    """Hold what became of one check."""

    check: str = said("the check's name")
    law: str = said("the sentence that it tried to refute")
    family: str
    verdict: str = said("holds, refuted, expected failure, unexpectedly holds, untested or does not apply")
    examples: Count = said("cases that were tried")
    answered: Count = said("of these, those on which the law had something to say")
    evicted: Count = said("of these, those in which something was evicted")
    fault: bool = said("knorm itself broke off: nothing is said of the target")
    seconds: float
    counterexample: str | None = said("the sentence with the evidence, of the smallest case that refutes the law")
    given: str | None = said("that case, in words")
    snippet: str | None = said("Python that shows it")
    reason: str | None = said("why the check does not apply or is untested, or why a failure was expected")
    needs: list[str] = said("traits that keep it from applying")


class CheckedTarget(Part):
    """Hold what became of one target."""

    name: str = said("the target, or the name under which a project declares it")
    target: str
    traits: dict[str, Any] | None = said("what it promises, by the names of docs/targets.md; null where not loaded")
    not_run: str | None = said("why it was not tried")
    results: list[LawRow]


class Checked(Result):
    """Hold what `knorm check TARGET...` finds."""

    suite: str = said("revision of the laws and of what draws their cases")
    profile: str
    seed: int
    device: str
    targets: list[CheckedTarget]


Value = int | float | str


class Finding(Part):
    """Hold the verdict on one metric of a golden."""

    metric: str
    verdict: str = said("holds, moved, shown or inconclusive")
    golden: Value | None = said("what was accepted")
    measured: Value | None = said("what was measured")
    anchor: Value | None = said("the first value that was ever accepted")
    evidence: str
    difference: float | None = said("measured minus golden, in the metric's unit")
    low: float | None = said("lower end of its interval")
    high: float | None
    worse: float = said("per cent by which the metric is worse than its gate lets pass")


class OutcomeRow(Part):
    """Hold the verdict on one case."""

    case: str
    device_class: str
    verdict: str = said("holds, moved, missing, damaged, orphan, not compared or inconclusive")
    evidence: str
    findings: list[Finding]
    seconds: float


class GoldensVerified(Result):
    """Hold what `knorm golden verify` finds."""

    device: str
    outcomes: list[OutcomeRow]


class GoldenRow(Part):
    """Describe one golden, or a case without."""

    case: str
    device_class: str
    accepted: str = said("date of the accepted golden; DAMAGED, ORPHAN or - where there is none")
    commit: str | None
    reason: str | None
    pins: str = said("what the case pins, in words")


class GoldensListed(Result):
    """Hold what `knorm golden list` shows."""

    goldens: list[GoldenRow]


class PassesRow(Part):
    """Hold what a gate lets pass between environments."""

    metric: str = said("its name, and what of it")
    most: float = said("the most that noise did")
    passes: float = said("what the gate lets pass")
    unit: str
    does: float | None = said("what the method itself does, beside the full cache")


class NoiseSeen(Part):
    """Hold the noise of a declared case, and the gates that were made of it."""

    repetitions: Count = said("runs in which nothing that matters differed")
    varied: list[str] = said("what differed")
    matters: dict[str, float | None] = said("what mattered after all: nats a token, null where it did not run")
    bounds: list[PassesRow] = said("what gates let pass")


class Recorded(Result):
    """Hold what `knorm golden record` made."""

    device: str
    written: list[str] = said("the candidates")
    noise: dict[str, NoiseSeen] = said("of each declared case among them")


class Differences(Result):
    """Hold what `knorm golden diff` shows: the findings of each candidate, by case/device class."""

    changes: dict[str, list[Finding]]


class Accepted(Result):
    """Hold what `knorm golden accept` put in place."""

    written: list[str] = said("the goldens")
    reason: str | None


class LogEntry(Part):
    """Hold one accepted golden."""

    commit: str | None = said("that brought it; null where it is not committed yet")
    recorded: str = said("when it was measured, UTC")
    recorded_at: str = said("commit at which it was measured")
    reason: str | None
    values: dict[str, Value | None]
    anchors: dict[str, Value | None]


class GoldenLog(Result):
    """Hold what `knorm golden log` shows, the oldest first."""

    case: str
    device_class: str
    entries: list[LogEntry]


class Initialised(Result):
    """Hold what `knorm init` wrote."""

    target: str
    also_seen: list[str] = said("further methods that were seen")
    expected_failures: dict[str, str] = said("laws that the method breaks today, with the evidence")
    written: list[str]
