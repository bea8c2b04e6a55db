"""Golden results: what was measured once and accepted by a person; and did anything move since?

A golden is golden/<case>/<device class>.json, readable and diffable; beside it lies a .safetensors file, named by its
content, with the NLL of each token. A candidate is one file with both. Nothing here measures: see cases.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.numpy import load, save
from scipy import stats

SCHEMA = 1
REPORTED = "reported"  # the folder of published numbers, which are nobody's golden
MEAN_ABSOLUTE = 1e-4  # nats a token, in the same environment
ANY_WINDOW = 0.05  # nats a token, of one window's tokens in another: four times what near-ties did to any single token
_SIGMAS = 5  # of mean shift, before it is looked at
_PACKAGE = Path(__file__).parent
_TEMPORARY, _LOCK, _CANDIDATE = ".tmp", ".lock", ".candidate"
_LOCK_SECONDS = 10.0

Tensors = Mapping[str, np.ndarray[Any, Any]]


class Damaged(ValueError):
    """A golden that cannot be trusted: which file, which field, and how to get it back."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Noise(_Strict):
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


class Gate(_Strict):
    """How a metric is judged.

    rule        "exact": equal everywhere. "same_environment": equal there, elsewhere shown. "tokens": see judge_tokens.
                "at_most": not above the golden value x (1 + threshold). "shown": never fails
    threshold   relative for "at_most"; nats a token of mean shift for "tokens"; else None
    noise       where it came from
    """

    rule: Literal["exact", "same_environment", "tokens", "at_most", "shown"]
    threshold: float | None = None
    noise: Noise | None = None


class Metric(_Strict):
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


class Environment(_Strict):
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


class Provenance(_Strict):
    """Where a golden comes from: the commit and a hash of knorm's sources, when, how many agreeing runs, and why."""

    knorm: str
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")
    clean: bool
    code: str = Field(pattern=r"^[0-9a-f]{64}$")
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
    runs: int = Field(ge=3)
    reason: str


class Golden(_Strict):
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


def _pack(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
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
        "tensors": digest(_pack(measured.tensors)) if measured.tensors else None,
        "environment": environment.model_dump(mode="json"),
        "provenance": provenance.model_dump(mode="json"),
    }
    return _parse(json.dumps(fields | {"seal": _seals(fields)}), case)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise Damaged(f"field {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _no_constant(name: str) -> Any:
    raise Damaged(f"a value is {name}, but should be finite")


def _parse(text: str, name: str) -> Golden:
    """A golden from JSON. Raises Damaged, naming the field, for anything but what `make` and `accept` write."""
    try:
        fields = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except Damaged as damaged:
        raise Damaged(f"{name}: {damaged}") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} is truncated or no JSON ({error})") from None
    version = fields.get("schema_version") if isinstance(fields, dict) else None
    if version != SCHEMA:
        raise Damaged(f"{name}: field 'schema_version' is {version!r}, but this knorm reads {SCHEMA}: update knorm")
    try:
        golden = Golden.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(f"{name}: field '{'.'.join(map(str, first['loc']))}': {first['msg'].lower()}") from None
    names = [metric.name for metric in golden.metrics]
    if len({*names}) < len(names):
        raise Damaged(f"{name}: field 'metrics' has {next(n for n in names if names.count(n) > 1)!r} twice")
    if golden.tensors is None and (bare := [m.name for m in golden.metrics if m.gate.rule == "tokens"]):
        raise Damaged(f"{name}: field 'tensors' is null, but {bare[0]} is judged by its tokens")
    if edited := [key for key, seal in _seals(fields).items() if golden.seal.get(key) != seal]:
        raise Damaged(f"{name}: field {edited[0]!r} was edited by hand")
    return golden


# Comparison


@dataclass(frozen=True)
class Finding:
    """What became of one metric: "holds", "moved", or "shown" where the gate does not fail; and the evidence."""

    metric: str
    verdict: Literal["holds", "moved", "shown"]
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
    means, count = difference.mean(1), len(difference)
    mean = float(means.mean())
    reach = math.inf
    if count > 1 and math.isfinite(mean):
        reach = float(stats.t.isf(alpha, count - 1) * means.std(ddof=1) / math.sqrt(count))
    at = tuple(int(i) for i in np.unravel_index(np.abs(difference).argmax(), difference.shape))
    each = np.abs(difference).mean(1)
    largest = float(np.abs(difference).max())
    typical, worst = float(np.median(each)), float(each.max())
    return Shift(mean, mean - reach, mean + reach, float(each.mean()), typical, worst, largest, at)


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
    found = []
    for metric in measured.metrics:
        before = golden.metric(metric.name)
        if before is None:
            found.append(Finding(metric.name, "moved", None, _finite(metric.value), None, "is new: record it again"))
            continue
        why = why_moved(before, metric, tensors, measured.tensors, same)
        fails = before.gate.rule != "shown" and (same or before.gate.rule != "same_environment")
        verdict: Any = "holds" if why is None else "moved" if fails else "shown"
        found.append(Finding(metric.name, verdict, before.value, _finite(metric.value), before.anchor, why or ""))
    for name in sorted({m.name for m in golden.metrics} - {m.name for m in measured.metrics}):
        before = golden.metric(name)
        assert before is not None
        found.append(
            Finding(name, "moved", before.value, None, before.anchor, "is not measured any more: record it again")
        )
    return found


def _finite(value: int | float | str) -> int | float | str:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value  # as JSON can hold it


def why_moved(before: Metric, now: Metric, old: Tensors, new: Tensors, same: bool) -> str | None:
    """Why a metric moved by the gate it was accepted with; None if it did not."""
    if before.gate.rule == "tokens":
        if before.name not in old or now.name not in new:
            return "has no tokens to compare"
        return judge_tokens(before.gate, new[now.name], old[before.name], same)
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
    if before.gate.rule == "at_most":
        slack = abs(float(before.value)) * (before.gate.threshold or 0.0)
    if change <= slack:
        return 0.0
    return 100 * change / abs(float(before.value)) if before.value else math.inf


# Where they are kept


@dataclass(frozen=True)
class Checkout:
    """The state of the sources: commit, clean (nothing changed outside golden/), hash of the package's code."""

    commit: str
    clean: bool
    code: str


def hash_of_code(package: Path = _PACKAGE) -> str:
    """A hash of knorm's sources: a candidate is accepted only where the same code is."""
    files = sorted(package.rglob("*.py"))
    lines = [f"{file.relative_to(package).as_posix()} {digest(file.read_bytes())}" for file in files]
    return digest("\n".join(lines).encode())


def _git(folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, env=environment
        )
    except FileNotFoundError:
        raise ValueError("git is not installed, but a golden names the commit it was measured at") from None
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split()) or "no such thing"
        raise ValueError(f"git {arguments[0]} failed in {folder}: {said}") from None
    return done.stdout.strip()


def checkout(folder: Path) -> Checkout:
    """The state of the checkout that a golden folder lies in.

    An exported tree without git (a CUDA runner's) names its commit in KNORM_COMMIT; its code is compared on acceptance.
    Raises ValueError where neither is there, and where the folder is the checkout itself.
    """
    try:
        top = Path(_git(folder, "rev-parse", "--show-toplevel")).resolve()
    except ValueError as error:
        if commit := os.environ.get("KNORM_COMMIT"):
            if not re.fullmatch(r"[0-9a-f]{40}", commit):
                raise ValueError(f"KNORM_COMMIT={commit}, but should be the 40 digits of a commit") from None
            return Checkout(commit, True, hash_of_code())
        raise ValueError(
            f"{folder} is in no git checkout, whose commit a golden names: give --golden-dir; or, for an export, "
            f"KNORM_COMMIT=... ({error})"
        ) from None
    inside = folder.resolve().relative_to(top).as_posix()
    if inside == ".":
        raise ValueError(f"--golden-dir {folder} is a whole checkout, but should be a folder of goldens in it")
    try:
        commit = _git(top, "rev-parse", "--verify", "-q", "HEAD")
    except ValueError:
        raise ValueError(f"{top} has no commit yet, which a golden names: commit first") from None
    dirty = _git(top, "status", "--porcelain", "--", ".", f":(exclude,literal){inside}")
    return Checkout(commit, not dirty, hash_of_code())


def default_folder() -> Path:
    """The goldens of the checkout that knorm runs from, else those that were installed with it."""
    source = _PACKAGE.parent / "golden"
    return source if (_PACKAGE.parent / "pyproject.toml").exists() and source.is_dir() else _PACKAGE / "goldens"


class Store:
    """A folder of goldens. Raises ValueError where there is none. Only `write_candidate` and `accept` write."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()
        if not self.folder.is_dir():
            raise ValueError(
                f"no goldens in {self.folder}: give --golden-dir the folder that holds <case>/<class>.json"
            )

    @cached_property
    def files(self) -> dict[tuple[str, str], Path]:
        """(case, device class) -> its file."""
        found = sorted(self.folder.glob("*/*.json"))
        return {(f.parent.name, f.stem): f for f in found if f.parent.name != REPORTED and f.name[0] != "."}

    @property
    def device_classes(self) -> set[str]:
        """Those that any case has a golden of."""
        return {device for _, device in self.files}

    def file(self, case: str, device_class: str) -> Path:
        return self.folder / case / f"{device_class}.json"

    def read(self, case: str, device_class: str) -> tuple[Golden, Tensors]:
        """A golden and its tensors. Raises Damaged, naming file and field; FileNotFoundError where there is none."""
        file = self.file(case, device_class)
        back = f"; get it back: git checkout -- {self.folder}/{case}"
        try:
            golden = _parse(file.read_text(encoding="utf-8"), f"{case}/{file.name}")
        except FileNotFoundError:
            raise
        except UnicodeDecodeError:
            raise Damaged(f"{case}/{file.name} is no text{back}") from None
        except OSError as error:
            raise Damaged(f"{case}/{file.name} cannot be read ({error.strerror}){back}") from None
        except Damaged as damaged:
            raise Damaged(f"{damaged}{back}") from None
        for name, inside, outside in (("case", golden.case, case), ("device_class", golden.device_class, device_class)):
            if inside != outside:
                raise Damaged(f"{case}/{file.name}: field {name!r} is {inside!r}: a copy of another golden; remove it")
        if golden.tensors is None:
            return golden, {}
        beside = self._tensors_file(golden)
        if not beside.is_file():
            raise Damaged(f"{case}/{beside.name} is missing, which field 'tensors' names{back}")
        data = beside.read_bytes()
        if digest(data) != golden.tensors:
            raise Damaged(f"{case}/{beside.name} is damaged: its sha256 is not that of field 'tensors'{back}")
        return golden, load(data)

    def _tensors_file(self, golden: Golden) -> Path:
        return self.folder / golden.case / f"{golden.device_class}-{(golden.tensors or '')[:12]}.safetensors"

    def orphans(self, cases: Sequence[str]) -> list[str]:
        """What lies there and belongs to no case: folders with goldens in them, and goldens beside the folders."""
        folders = {file.parent.name for ending in ("json", "safetensors") for file in self.folder.glob(f"*/*.{ending}")}
        loose = [file.name for file in self.folder.glob("*.json")]
        return sorted(folders - {REPORTED, *cases}) + sorted(loose)

    def leftovers(self) -> list[Path]:
        """What an interrupted write of a golden left behind; the next accept of that golden removes it."""
        return [file for case, device in self.files for file in self._stale(case, device)]

    def _stale(self, case: str, device_class: str) -> list[Path]:
        """Files of one golden's own names that it does not own; none where it cannot be read."""
        file = self.file(case, device_class)
        try:
            golden = _parse(file.read_text(encoding="utf-8"), file.name)
        except (OSError, ValueError):
            return []
        name = re.escape(device_class)
        own = re.compile(rf"{name}-[0-9a-f]{{12}}\.safetensors|\.{name}[.-][\w.-]*\.\d+{re.escape(_TEMPORARY)}")
        found = sorted(f for f in file.parent.iterdir() if own.fullmatch(f.name) and f.is_file() and not f.is_symlink())
        return [f for f in found if f != self._tensors_file(golden)]

    # Candidates

    def candidates(self) -> list[Path]:
        """The candidates that wait beside their goldens."""
        return sorted(self.folder.glob(f"*/*{_CANDIDATE}"))

    def write_candidate(self, golden: Golden, tensors: Tensors) -> Path:
        """Write a candidate beside the golden it would replace; the golden stays as it is."""
        file = self.folder / golden.case / f"{golden.device_class}{_CANDIDATE}"
        with self._locked():
            _write(file, _pack(tensors or {"none": np.zeros(1)}, {"golden": golden.text()}))
        return file

    def approve(
        self, candidate: Golden, tensors: Tensors, reason: str, *, now: Checkout, allow_worse: Mapping[str, float]
    ) -> Golden:
        """The golden that a candidate becomes. Writes nothing.

        reason        why the change is intended
        now           the checkout that it is accepted in
        allow_worse   pattern of metrics -> per cent that they may be worse

        Raises ValueError for an empty reason, a candidate of other code or of another commit, a dirty tree, a metric
        that is worse or gone and not allowed to be, and a gate that was loosened without a word of it in the reason.
        """
        name, reason = f"{candidate.case}/{candidate.device_class}", " ".join(reason.split())
        if not reason or not reason.isprintable():
            raise ValueError('--reason is empty, but should say why the change is intended, e.g. "sinks are protected"')
        self._check_origin(candidate, now, name)
        metrics = candidate.metrics
        if self.file(candidate.case, candidate.device_class).exists():
            before, _ = self.read(candidate.case, candidate.device_class)
            _refuse_worse(before, candidate, allow_worse, name)
            if (changed := gate_changes(before, candidate)) and "gate" not in reason:
                raise ValueError(f"{name}: {changed[0]}: if that is intended, the reason has to speak of the gate")
            same = before.configuration == candidate.configuration
            anchors = {metric.name: metric.anchor for metric in before.metrics if same}
            metrics = tuple(m.model_copy(update={"anchor": anchors.get(m.name, m.value)}) for m in metrics)
        provenance = candidate.provenance.model_copy(update={"reason": reason})
        return make(
            candidate.case, candidate.device_class, candidate.configuration, Measured(metrics, tensors),
            candidate.environment, provenance,
        )  # fmt: skip

    def accept(self, golden: Golden, tensors: Tensors, candidate: Path | None = None) -> Path:
        """Write what was approved in place of the golden, and remove the candidate it came from if that lies here."""
        with self._locked():
            if tensors:
                _write(self._tensors_file(golden), _pack(tensors))
            file = self.file(golden.case, golden.device_class)
            _write(file, golden.text().encode())  # here, and at no other point, the golden changes
            here = [candidate] if candidate and candidate.resolve().parent == file.parent.resolve() else []
            with suppress(OSError):  # the golden is accepted, whatever becomes of these
                for stale in (*self._stale(golden.case, golden.device_class), *here):
                    stale.unlink(missing_ok=True)
        self.__dict__.pop("files", None)
        return file

    def _check_origin(self, candidate: Golden, now: Checkout, name: str) -> None:
        origin = candidate.provenance
        if not origin.clean:
            raise ValueError(f"{name}: the candidate is of a tree with changes outside golden/: commit, record again")
        if not now.clean:
            raise ValueError(
                f"the tree has changes outside {self.folder.name}/: commit them, record again, then accept"
            )
        if origin.code != now.code:
            raise ValueError(
                f"{name}: the candidate was made by other code than this (commit {origin.commit[:12]}, here "
                f"{now.commit[:12]}): record it again at this commit"
            )
        if origin.commit != now.commit:
            try:
                other = _git(self.folder, "diff", "--name-only", origin.commit, now.commit, "--", ":/", ":(exclude).")
            except ValueError:
                other = "unknown here"
            if other:
                raise ValueError(
                    f"{name}: the candidate was made at another commit, {origin.commit[:12]}, but this is "
                    f"{now.commit[:12]} ({other.splitlines()[0]}): record it again"
                )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with FileLock(self.folder / _LOCK, timeout=_LOCK_SECONDS):
                yield
        except Timeout:
            raise ValueError(
                f"another `knorm golden` has been writing to {self.folder} for {_LOCK_SECONDS:g} s: wait for it"
            ) from None
        except PermissionError as error:
            raise ValueError(f"cannot write to {self.folder}: {error.strerror}") from None


def read_candidate(file: Path) -> tuple[Golden, Tensors]:
    """A candidate and its tensors. Raises Damaged, in one line, for a file that is none or not whole."""
    if not file.is_file():
        raise ValueError(f"there is no candidate {file}: knorm golden record makes one")
    try:
        with safe_open(file, "np") as stream:
            text = (stream.metadata() or {}).get("golden", "")
        tensors = load(file.read_bytes())
    except Exception as error:  # whatever safetensors raises for dtypes that NumPy lacks
        raise Damaged(f"{file.name} is no candidate, or truncated ({error}): record it again") from None
    golden = _parse(text, file.name)
    tensors = tensors if golden.tensors else {}
    if golden.tensors and digest(_pack(tensors)) != golden.tensors:
        raise Damaged(f"{file.name}: its tensors are not those of field 'tensors': record it again")
    return golden, tensors


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


def _refuse_worse(before: Golden, now: Golden, allow_worse: Mapping[str, float], name: str) -> None:
    worse = []
    for metric in now.metrics:
        old = before.metric(metric.name)
        percent = worse_by(old, metric) if old else 0.0
        allowed = [limit for pattern, limit in allow_worse.items() if fnmatchcase(metric.name, pattern)]
        if percent > max(allowed, default=0.0):
            worse.append((metric.name, percent))
    if worse:
        said = ", ".join(f"{metric} is {percent:.3g}% worse" for metric, percent in worse)
        flags = " ".join(f"--allow-worse '{metric}={math.ceil(min(p, 1e9) * 10) / 10:.1f}'" for metric, p in worse)
        raise ValueError(f"{name}: {said}: if that is intended, {flags}")


def parse_allowance(text: str) -> tuple[str, float]:
    """METRIC=PERCENT as on a command line. Raises ValueError for anything else."""
    found = re.fullmatch(r"(.+)=(\d+(?:\.\d+)?)", text)
    if not found:
        raise ValueError(f"--allow-worse {text}, but should be METRIC=PERCENT, e.g. 'nll/0.5=2'")
    return found[1], float(found[2])


def _write(file: Path, data: bytes) -> None:
    """Atomically: whoever looks finds the old file or the new one, whole, whenever this is killed."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}{_TEMPORARY}")
    try:
        file.parent.mkdir(exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"cannot write {file}: {error.strerror}; it is as it was") from None
