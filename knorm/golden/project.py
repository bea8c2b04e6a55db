"""The project that one stands in: what its knorm.toml, or [tool.knorm] in pyproject.toml, declares.

Everything that can be seen without importing PyTorch is refused here, one line a problem.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from knorm.files import read_text
from knorm.methods.written import Budgets
from knorm.paths import REPORTED, resolved

CONFIG, PYPROJECT = "knorm.toml", "pyproject.toml"
METRICS = ("nll", "kl", "same_top", "counts", "bytes")
LATENCY = "latency"  # by a clock, in a case of its own
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_MOST_BYTES = 2**20
_TWICE = re.compile(r"Cannot declare \('?(?:.*'(case|check)', )'([^']*)'\) twice(?: \(at (line \d+))?")

MetricName = Literal["nll", "kl", "same_top", "counts", "bytes", "latency"]
Device = Literal["cpu", "cuda"]


class Declared(Budgets):
    """Hold one case as it is declared.

    Attributes:
        target: the method, as on every command line: "mypress.presses:MyPress(window_size=16)", "mine.py:compress".
        kind: the method's kind, where it does not follow from its parameters (docs/targets.md).
        keep_ratio: budgets, each a share of the cache, as they are written.
        keep_tokens: budgets, each a number of tokens. With neither, the method has a budget of its own.
        model: as --model; by default embedded-llama for a press, else embedded.
        text: as --text; column: of a .parquet or .jsonl.
        window: tokens of a window; windows: how many.
        prompt_length: tokens of the prompt, after which a method acts; by default half a window.
        batch: windows that run at a time.
        how: as `knorm ppl --how`.
        metrics: which of METRICS are pinned; or "latency" alone: TTFT and TPOT over those of the uncompressed cache.
        thresholds: by metric, in place of the gates' own: nats per token for nll and kl, a share of tokens for
            same_top, a relative change for counts and bytes, a slowdown for latency.
        devices: what kinds of device measure the case.
        what: what the case pins, in a few words.
    """

    target: str = Field(min_length=1)
    kind: str | None = None
    model: str | None = None
    text: str = "narrative"
    column: str = "text"
    window: int = Field(default=256, ge=2)
    windows: int = Field(default=4, ge=1)
    prompt_length: int | None = Field(default=None, ge=1)
    batch: int = Field(default=1, ge=1)
    how: Literal["auto", "schedule", "two calls", "loop"] = "auto"
    metrics: list[MetricName] = Field(default_factory=lambda: [*METRICS], min_length=1)  # type: ignore[arg-type]
    thresholds: dict[MetricName, float] = Field(default_factory=dict)
    devices: list[Device] = Field(default_factory=lambda: ["cpu", "cuda"], min_length=1)  # type: ignore[arg-type]
    what: str = ""

    @property
    def prompt(self) -> int:
        """Return the tokens of the prompt."""
        return self.window // 2 if self.prompt_length is None else self.prompt_length

    @property
    def timed(self) -> bool:
        """Tell whether a clock measures the case."""
        return LATENCY in self.metrics

    @property
    def texts(self) -> int:
        """Return how many windows are used: of a case that a clock measures one, if nobody says otherwise."""
        return 1 if self.timed and "windows" not in self.model_fields_set else self.windows

    @field_validator("thresholds")
    @classmethod
    def _bounds(cls, given: dict[str, float]) -> dict[str, float]:
        for name, bound in given.items():
            if bound < 0:
                raise ValueError(f"has {name} = {bound}, but should not be negative")
        return given

    @model_validator(mode="after")
    def _fits(self) -> Declared:
        if self.prompt >= self.window:
            raise ValueError(
                f"prompt_length is {self.prompt}, but should be below window = {self.window}: only tokens after the "
                "prompt are scored"
            )
        if self.timed and self.metrics != [LATENCY]:
            raise ValueError(
                "metrics has latency, but a clock needs the machine to itself: give it a case of its own, "
                'metrics = ["latency"]'
            )
        if self.timed and self.prompt > self.window - 2:
            raise ValueError(f"prompt_length is {self.prompt}, but latency needs two tokens after it")
        if unused := [name for name in self.thresholds if name not in self.metrics]:
            raise ValueError(f"thresholds names {unused[0]}, which is not among its metrics")
        return self


class DeclaredCheck(BaseModel):
    """Hold one target that `knorm check` is to try, as it is declared.

    Attributes:
        target: as on every command line.
        kind: its kind, where that does not follow from its parameters (docs/targets.md).
        like: "knorm" for a target that promises all that knorm's own core does.
        traits: what it promises, by name.
        select: names of checks or families; by default all that apply.
        expected_failures: check -> why it may fail; one that holds is reported.
        expected_untested: check -> why it may stay untested.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    target: str = Field(min_length=1)
    kind: str | None = None
    like: Literal["knorm"] | None = None
    traits: dict[str, Any] = Field(default_factory=dict)
    select: list[str] | None = Field(default=None, min_length=1)
    expected_failures: dict[str, str] = Field(default_factory=dict)
    expected_untested: dict[str, str] = Field(default_factory=dict)

    @field_validator("traits")
    @classmethod
    def _plain(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name, value in given.items():
            if not isinstance(value, bool | int | float | str) and not _listed(value):
                raise ValueError(
                    f"has {name} = {value!r}, but should have true, false, a number, a text, [0, 1] or "
                    '["float16", "float32"]'
                )
        return given

    @field_validator("expected_failures", "expected_untested")
    @classmethod
    def _with_reasons(cls, given: dict[str, str]) -> dict[str, str]:
        if without := next((name for name, reason in given.items() if not reason.strip()), None):
            raise ValueError(f"has {without} without a reason")
        return given


_NAMED: Mapping[str, type[BaseModel]] = {"case": Declared, "check": DeclaredCheck}


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    golden_dir: str = "golden"
    case: dict[str, Declared] = Field(default_factory=dict)
    check: dict[str, DeclaredCheck] = Field(default_factory=dict)

    @field_validator("golden_dir")
    @classmethod
    def _inside(cls, folder: str) -> str:
        parts = Path(folder).parts
        if not parts or Path(folder).is_absolute() or ".." in parts or parts == (".",):
            raise ValueError(f"is {folder!r}, but should be a folder below the one of this file")
        return folder


@dataclass(frozen=True)
class Project:
    """Hold what a project declares.

    Attributes:
        file: the configuration that declares it.
        golden_dir: the folder of its goldens, which may not exist yet.
        cases: its cases by name.
        checks: the targets that the laws are asked of, by name.
    """

    file: Path
    golden_dir: Path
    cases: Mapping[str, Declared]
    checks: Mapping[str, DeclaredCheck] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """Return the folder that targets, models and texts are looked for in."""
        return self.file.parent


class Misdeclared(ValueError):
    """Say which `problems` the cases have that the file `where` declares, a line for each; nothing was measured."""

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        lines = [f"{where}: {problem}" for problem in self.problems]
        super().__init__("\n".join(lines))


def find_project(start: Path) -> Project | None:
    """Find the project that a folder lies in: the first with a configuration, from the folder upwards.

    The search ends at the top of a git checkout: goldens name its commit.

    Args:
        start: a folder.

    Returns:
        The project; None where no knorm.toml and no pyproject.toml with [tool.knorm] is found.

    Raises:
        Misdeclared: a configuration that cannot be read, or declares what it should not, one line a problem.

    Example:
        >>> find_project(Path("/")) is None
        True
    """
    start = resolved(start)
    for folder in (start, *start.parents):
        own, shared = folder / CONFIG, folder / PYPROJECT
        table = _tool(shared) if shared.is_file() else None
        if own.is_file():
            if table is not None:
                raise Misdeclared(CONFIG, [f"{PYPROJECT} beside it has [tool.knorm] too: keep one of them"])
            return _project(own, _parsed(own), CONFIG)
        if table is not None:
            return _project(shared, table, f"{PYPROJECT}, [tool.knorm]")
        if (folder / ".git").exists():
            return None
    return None


def _tool(file: Path) -> Mapping[str, Any] | None:
    """Return [tool.knorm] of a pyproject.toml; what else is in it, and wrong, is not knorm's concern."""
    text = read_text(file, _MOST_BYTES)
    if not re.search(r"^\s*\[+\s*tool\s*\.\s*knorm\b", text, re.MULTILINE):
        return None
    table = _parsed(file).get("tool", {}).get("knorm")
    return table if isinstance(table, dict) else None


def _parsed(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(file, _MOST_BYTES))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        if twice := _TWICE.search(str(error)):
            raise Misdeclared(
                file.name, [f"two {twice[1] or 'case'}s are named {twice[2]!r} ({twice[3] or 'at the end'})"]
            ) from None
        raise Misdeclared(file.name, [f"is not TOML: {error}"]) from None


def _project(file: Path, table: Mapping[str, Any], where: str) -> Project:
    problems = []
    for kind in _NAMED:
        names = table.get(kind)
        for name in names if isinstance(names, dict) else ():
            if not NAME.fullmatch(name) or name == REPORTED:
                said = "is reserved" if name == REPORTED else "should be at most 64 of a-z, 0-9, - and _"
                problems.append(f"{kind} {name!r}: the name {said}")
    try:
        declared = _File.model_validate(table)
    except ValidationError as error:
        problems += _problems(error)
    if problems:
        raise Misdeclared(where, problems)
    return Project(file, file.parent / declared.golden_dir, declared.case, declared.check)


def _problems(error: ValidationError) -> Iterator[str]:
    """Write each error in a line: the case, the key, what it is, and what it should be."""
    for one in error.errors():
        place = [str(part) for part in one["loc"]]
        case = f"{place[0]} {place[1]}: " if place[0] in _NAMED and place[1:] else ""
        key = ".".join(place[2:] if case else place)
        known = _NAMED[place[0]].model_fields if case else _File.model_fields
        if one["type"] == "extra_forbidden":
            near = get_close_matches(key, known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            yield f"{case}unknown key {key!r}; {hint}"
        elif one["type"] == "missing":
            yield f"{case}{key} is missing" + (", which names the method" if key == "target" else "")
        elif one["type"] == "value_error":
            said = str(one["ctx"]["error"])
            yield f"{case}{said if said.startswith(key.partition('.')[0]) else f'{key} {said}'}".replace("  ", " ")
        elif one["type"] == "literal_error":
            given = place[-2] if place[-1:] == ["[key]"] else one["input"]
            near = get_close_matches(str(given), [*METRICS, LATENCY], 1, 0.5)
            hint = f": did you mean {near[0]}?" if near else ""
            expected = one["ctx"]["expected"]
            yield f"{case}{place[2] if case else key} has {given!r}, but should have {expected}{hint}"
        else:
            yield f"{case}{key} is {one['input']!r}: {one['msg'][0].lower()}{one['msg'][1:]}"


def _listed(value: Any) -> bool:
    """Tell whether this is a list of whole numbers, or of names."""
    return isinstance(value, list) and any(all(type(item) is kind for item in value) for kind in (int, str))
