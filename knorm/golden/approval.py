"""A person's acceptance: which candidates may replace their goldens, and what has to be permitted for it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from shlex import quote

from knorm.git import git
from knorm.golden.files import Damaged, make
from knorm.golden.format import Golden, Measured, Tensors
from knorm.golden.gates import Results, gate_changes, judge
from knorm.golden.store import Checkout, Store

Candidate = tuple[Golden, Tensors]
_METRICS = r"(?:([a-z0-9][a-z0-9_-]*):|(?![a-z0-9][a-z0-9_-]*:))(.+)"  # a case, if one is named, and a pattern


@dataclass(frozen=True)
class Permission:
    """Hold what a person allows some metrics of one case.

    text      as it was typed
    case      whose metrics; None: those of the only golden that is accepted
    metrics   their names, as a pattern
    percent   by how much they may be worse; None: they may be judged by another gate, or be gone
    """

    text: str
    case: str | None
    metrics: str
    percent: float | None

    @property
    def option(self) -> str:
        """Name the option that gives it."""
        return "--allow-gate" if self.percent is None else "--allow-worse"

    @property
    def flag(self) -> str:
        """Write it for a shell."""
        return f"{self.option} {quote(self.text)}"


def parse_permissions(allow_worse: Iterable[str] = (), allow_gate: Iterable[str] = ()) -> list[Permission]:
    """Read permissions as they are typed.

    Args:
        allow_worse: `CASE:METRIC=PERCENT`, or `METRIC=PERCENT` where one golden is accepted.
        allow_gate: `CASE:METRIC`, or `METRIC` where one golden is accepted.

    Raises:
        ValueError: one is neither; it says what it should be.

    Returns:
        A permission for each text.

    Example:
        >>> parse_permissions(["prefill:nll/*=2"])[0].percent
        2.0
    """
    permissions = []
    for text in allow_worse:
        if not (parts := re.fullmatch(rf"{_METRICS}=(\d+(?:\.\d+)?)", text)):
            raise ValueError(f"--allow-worse {text}, but should be CASE:METRIC=PERCENT, e.g. 'prefill:nll/0.5=2'")
        permissions.append(Permission(text, parts[1], parts[2], float(parts[3])))
    for text in allow_gate:
        if not (parts := re.fullmatch(_METRICS, text)):
            raise ValueError(f"--allow-gate {text}, but should be CASE:METRIC, e.g. 'prefill:nll/*'")
        permissions.append(Permission(text, parts[1], parts[2], None))
    return permissions


@dataclass(frozen=True)
class Problem:
    """Say why a candidate is refused.

    text    in one line
    flags   what solves it, all of them
    stale   case and device class of the candidates that have to be recorded again
    """

    text: str
    flags: tuple[str, ...] = ()
    stale: tuple[tuple[str, str], ...] = ()


class Refused(ValueError):
    """Refuse candidates, with all of their `problems` at once; nothing was accepted."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n  ".join(["nothing was accepted:", *(problem.text for problem in self.problems)]))

    def command(self, names: Sequence[str], reason: str, given: Iterable[Permission], option: str) -> str | None:
        """Write the one command that goes on from here, to be pasted.

        Args:
            names: cases and files that were to be accepted.
            reason: the reason that was given.
            given: the permissions that were given.
            option: the `--golden-dir` that was given, with a space before it.

        Returns:
            The same acceptance with every permission that it lacks; or the recording of what has to be recorded again;
            None where neither would do.
        """
        if stale := [golden for problem in self.problems for golden in problem.stale]:
            kinds = {"cpu" if device.startswith("cpu-") else "cuda" for _, device in stale}
            device = "" if "cpu" in kinds else " --device cuda"
            cases = dict.fromkeys(case for case, it in stale if it.startswith("cpu-") or device)
            return f"knorm golden record {' '.join(cases)}{device}{option}"
        if any(not problem.flags for problem in self.problems):
            return None
        missing = (flag for problem in self.problems for flag in problem.flags)
        flags = dict.fromkeys([_reason_flag(reason), *(permission.flag for permission in given), *missing])
        return f"knorm golden accept {' '.join(map(quote, names))} {' '.join(flags)}{option}"


def approve(
    store: Store,
    candidates: Sequence[Candidate],
    reason: str,
    *,
    now: Checkout,
    permissions: Sequence[Permission] = (),
    codes: Mapping[str, str] | None = None,
) -> list[Golden]:
    """Make the goldens that candidates become: all of them, or none. Writes nothing.

    Args:
        store: where their goldens are.
        candidates: one for each golden.
        reason: why the change is intended.
        now: the checkout that they are accepted in.
        permissions: what may be worse, and what may be judged by another gate.
        codes: by case, the hash of the code under test, where that is not knorm's alone.

    Returns:
        A golden for each candidate, in their order.

    Raises:
        ValueError: a permission names no case that is accepted.
        Refused: the reason is empty, the tree is dirty, or a candidate is of other code or of another commit, has a
            metric that is worse and not allowed to be, or one that is gone or judged by another gate without
            permission.
    """
    _check_cases(permissions, candidates)
    problems: list[Problem] = []
    if not (why := _one_line(reason)):
        text = '--reason is empty, but should say why the change is intended, e.g. "sinks are protected"'
        problems.append(Problem(text, (_reason_flag(reason),)))
    if not now.clean:
        everything = tuple((golden.case, golden.device_class) for golden, _ in candidates)
        text = f"the tree has changes outside {store.folder.name}/: commit them, record again, then accept"
        problems.append(Problem(text, stale=everything))
    goldens = []
    for candidate, tensors in candidates:
        here = replace(now, code=(codes or {}).get(candidate.case, now.code))
        problems += _origin_problems(store, candidate, here)
        before = None
        try:
            before = store.read(candidate.case, candidate.device_class)
        except FileNotFoundError:
            pass
        except Damaged as damaged:
            problems.append(Problem(str(damaged)))
        if before:
            problems += _permission_problems(before, (candidate, tensors), permissions)
        goldens.append((candidate, tensors, before[0] if before else None))
    if problems:
        raise Refused(problems)
    return [_approved(*parts, why) for parts in goldens]


def _one_line(reason: str) -> str:
    """Write a reason in one line; empty where it is nothing that can be read."""
    reason = " ".join(reason.split())
    return reason if reason.isprintable() else ""


def _reason_flag(reason: str) -> str:
    return f"--reason {quote(_one_line(reason))}"


def _approved(candidate: Golden, tensors: Tensors, before: Golden | None, reason: str) -> Golden:
    """Give a candidate its reason, and the anchors of the golden before it."""
    same = before is not None and before.configuration == candidate.configuration
    anchors = {metric.name: metric.anchor for metric in before.metrics} if before and same else {}
    metrics = tuple(m.model_copy(update={"anchor": anchors.get(m.name, m.value)}) for m in candidate.metrics)
    return make(
        candidate.case, candidate.device_class, candidate.configuration, Measured(metrics, tensors),
        candidate.environment, candidate.provenance.model_copy(update={"reason": reason}),
    )  # fmt: skip


def _check_cases(permissions: Iterable[Permission], candidates: Sequence[Candidate]) -> None:
    cases = sorted({golden.case for golden, _ in candidates})
    for permission in permissions:
        if permission.case is None and len(candidates) > 1:
            example = f"{permission.option} {quote(f'{cases[0]}:{permission.text}')}"
            raise ValueError(f"{permission.flag} names no case, but {len(candidates)} goldens are accepted: {example}")
        if permission.case is not None and permission.case not in cases:
            raise ValueError(f"{permission.flag}: {permission.case} is not accepted here, but {', '.join(cases)}")


def _permission_problems(before: Candidate, after: Candidate, permissions: Iterable[Permission]) -> list[Problem]:
    """List what a candidate would need permission for and has not."""
    golden = after[0].case, after[0].device_class
    mine = [permission for permission in permissions if permission.case in (None, after[0].case)]
    worse: dict[str, float] = {}
    for finding in judge(Results.of(*before), Results.of(*after)):
        limits = [p.percent for p in mine if p.percent is not None and fnmatchcase(finding.metric, p.metrics)]
        if finding.worse > max(limits, default=0.0):
            worse[finding.metric] = finding.worse
    others = [permission.metrics for permission in mine if permission.percent is None]
    changed: dict[str, list[str]] = {}
    for metric, change in gate_changes(before[0], after[0]).items():
        if not any(fnmatchcase(metric, pattern) for pattern in others):
            changed.setdefault(change, []).append(metric)
    problems, name = [], "/".join(golden)
    if worse:
        words = ", ".join(f"{metric} is {percent:.3g}% worse" for metric, percent in worse.items())
        limits_of = (f"{golden[0]}:{escape(m)}={_rounded_up(percent)}" for m, percent in worse.items())
        flags = tuple(f"--allow-worse {quote(text)}" for text in limits_of)
        problems.append(Problem(f"{name}: {words}", flags))
    for change, metrics in changed.items():
        words = f"{', '.join(metrics)} {'is' if len(metrics) == 1 else 'are'} {change}"
        flags = tuple(f"--allow-gate {quote(f'{golden[0]}:{escape(metric)}')}" for metric in metrics)
        problems.append(Problem(f"{name}: {words}", flags))
    return problems


def _rounded_up(percent: float) -> str:
    """Write per cent with one digit, never less than they are."""
    tenths = math.ceil(percent * 10)
    return f"{(tenths + (tenths / 10 < percent)) / 10:.1f}"


def _origin_problems(store: Store, candidate: Golden, now: Checkout) -> list[Problem]:
    """Compare the tree that a candidate was recorded in with the one that it is accepted in."""
    origin, golden, problems = candidate.provenance, (candidate.case, candidate.device_class), []
    name = "/".join(golden)
    if not origin.clean:
        text = f"{name}: the candidate is of a tree with changes outside golden/: commit, record again"
        problems.append(Problem(text, stale=(golden,)))
    if origin.code != now.code:
        text = f"{name}: the candidate was made by other code than this (commit {origin.commit[:12]}, here "
        problems.append(Problem(f"{text}{now.commit[:12]}): record it again at this commit", stale=(golden,)))
    elif origin.commit != now.commit:
        try:
            changed = git(store.folder, "diff", "--name-only", origin.commit, now.commit, "--", ":/", ":(exclude).")
        except ValueError:
            changed = "unknown here"
        if changed:
            text = f"{name}: the candidate was made at another commit, {origin.commit[:12]}, but this is "
            text += f"{now.commit[:12]} ({changed.splitlines()[0]}): record it again"
            problems.append(Problem(text, stale=(golden,)))
    return problems
