"""The plan of a sweep: what is to be measured, as a file says it. Nothing heavy is loaded here."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from knorm.files import read_text
from knorm.limits import BLOCKS
from knorm.methods.written import Budgets
from knorm.policy import Policy
from knorm.sources import find_model, find_text

Measure = Literal["damage", "laws", "counters", "latency"]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]
MOST_CELLS = 1_000_000
_MOST_BYTES = 2**20
_OF_A_PLAN = ("keep_ratio", "seed", "protocol")  # fields of a policy that other keys of the plan give

Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]


class Misplanned(ValueError):
    """Say everything that is wrong with a plan, before anything is measured.

    `where` names the plan's file; each of the `problems` becomes a line that begins with it.
    """

    def __init__(self, where: Path | str, problems: Iterator[str] | list[str]) -> None:
        super().__init__("\n".join(f"{where}: {problem}" for problem in problems))


class Entry(Budgets):
    """Hold one method of a plan that is written as a table.

    Attributes:
        target: as on every command line, "kvpress:*" included.
        kind: where it does not follow from the target's parameters (docs/targets.md).
        keep_ratio: budgets of this method alone, in place of the plan's; keep_tokens: the same in tokens.
        policy: of the target "knorm": fields of Policy, such as protect_recent.
    """

    target: Name
    kind: str | None = None
    policy: dict[str, Any] = Field(default_factory=dict)

    @field_validator("policy")
    @classmethod
    def _of_knorm(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if given and info.data.get("target") != "knorm":
            raise ValueError("is for the target knorm alone: other targets take (arguments)")
        for name in given:
            if name in _OF_A_PLAN:
                raise ValueError(f"has {name}, which the plan gives: keep_ratio, and seeds; a prefill after the prompt")
            if name not in Policy.__dataclass_fields__:
                known = [field for field in Policy.__dataclass_fields__ if field not in _OF_A_PLAN]
                raise ValueError(f"has {name!r}, but there are {', '.join(known)}")
        try:
            Policy(**given)
        except TypeError as error:
            raise ValueError(f"has {error}") from None
        return given


class Plan(Budgets):
    """Hold what is to be measured: each of `measure`, for each model, method, budget, text, prompt length, dtype, seed.

    Attributes:
        models: as --model; of a folder or a file, as seen from the plan's folder, as targets and texts are.
        methods: targets, or tables with a target (Entry).
        keep_ratio: budgets, each a share of the cache; keep_tokens: in tokens. Methods that have a budget of their own
            keep it; without either, others keep half.
        texts: as --text; column: of a .parquet or .jsonl.
        window: tokens of a window; windows: how many, from the text's start.
        windows_per_cell: how many windows a cell has: what is lost where one is killed.
        prompt_lengths: tokens of the prompt, after which methods act; by default half a window.
        dtypes: of the weights.
        seeds: of methods that draw at random.
        batch: windows that run at a time.
        how: as `knorm ppl --how`.
        measure: damage (as `knorm ppl`), laws (as `knorm check`), counters and latency (as `knorm bench`).
        device: "cpu" or "cuda"; "auto" is cuda where there is one.
        threads: of a worker.
        limit: seconds that one cell may take.
        profile: of the laws.
        new_tokens: that are generated after the prompt for counters and latency; blocks: of latency.
    """

    models: list[Name] = Field(default_factory=lambda: ["embedded"])
    methods: list[Entry]
    texts: list[Name] = Field(default_factory=lambda: ["narrative"])
    column: str = "text"
    window: int = Field(default=512, ge=4)
    windows: Positive = 8
    windows_per_cell: Positive = 4
    prompt_lengths: list[Positive] = Field(default_factory=list)
    dtypes: list[Dtype] = Field(default_factory=lambda: ["float32"])  # type: ignore[arg-type]
    seeds: list[int] = Field(default_factory=lambda: [0])
    batch: Positive = 1
    how: Literal["auto", "schedule", "two calls", "loop"] = "auto"
    measure: list[Measure] = Field(default_factory=lambda: ["damage"])  # type: ignore[arg-type]
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Positive = 1
    limit: float = Field(default=3600, gt=0)
    profile: Literal["quick", "thorough"] = "quick"
    new_tokens: int = Field(default=33, ge=2)
    blocks: int = Field(default=16, ge=BLOCKS)

    @field_validator("methods", mode="before")
    @classmethod
    def _tables(cls, given: Any) -> Any:
        return [{"target": one} if isinstance(one, str) else one for one in given] if isinstance(given, list) else given

    @field_validator("models", "methods", "texts", "dtypes", "seeds", "measure", "prompt_lengths")
    @classmethod
    def _several(cls, given: list[Any], info: ValidationInfo) -> list[Any]:
        if not given:
            raise ValueError("is empty: the plan has no cells")
        if twice := next((one for one in given if given.count(one) > 1), None):
            name = twice.target if isinstance(twice, Entry) else twice
            raise ValueError(f"has {name!r} twice")
        return given

    @model_validator(mode="after")
    def _fits(self) -> Plan:
        if self.windows_per_cell % self.batch and self.windows_per_cell < self.windows:
            raise ValueError(
                f"windows_per_cell is {self.windows_per_cell}, but should be a multiple of batch = {self.batch}: a "
                "batch is never cut in two"
            )
        for prompt in self.prompts:
            if prompt > self.window - 2:
                raise ValueError(
                    f"prompt_lengths has {prompt}, but should have at most window - 2 = {self.window - 2}: only tokens "
                    "after the prompt are scored"
                )
        return self

    @property
    def prompts(self) -> list[int]:
        """Return the prompt lengths."""
        return self.prompt_lengths or [self.window // 2]

    def blocks_of_windows(self) -> list[tuple[int, int]]:
        """Return the first window and the one after the last of each cell: the same ones if there are more later."""
        size = self.windows_per_cell
        return [(first, min(first + size, self.windows)) for first in range(0, self.windows, size)]


def read_plan(file: Path, name: Path | None = None) -> Plan:
    """Read a plan, and find the models and texts that it names.

    Args:
        file: TOML, in UTF-8; paths in it are seen from its folder, which should be the current one.
        name: of the file in messages; by default its path.

    Returns:
        The plan.

    Raises:
        Misplanned: a file that is no plan; every problem in a line.
        ValueError: a file that cannot be read.

    Example:
        >>> read_plan(Path("plan.toml"))  # doctest: +SKIP
        Plan(...)
    """
    try:
        table = tomllib.loads(read_text(file, _MOST_BYTES))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise Misplanned(name or file, [f"is not TOML: {error}"]) from None
    try:
        plan = Plan.model_validate(table)
    except ValidationError as error:
        raise Misplanned(name or file, _problems(error)) from None
    problems = []
    for find, named in ((find_model, plan.models), (find_text, plan.texts)):
        for one in named:
            try:
                find(one)
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise Misplanned(name or file, problems)
    return plan


def _problems(error: ValidationError) -> Iterator[str]:
    """Write each error in a line: the key, what it is, and what it should be."""
    for one in error.errors():
        place = [str(part) for part in one["loc"]]
        within = re.match(r"methods\.(\d+)\.", ".".join(place) + ".")
        known: Mapping[str, Any] = Entry.model_fields if within and len(place) > 2 else Plan.model_fields
        key = ".".join(place)
        if one["type"] == "extra_forbidden":
            near = get_close_matches(place[-1], known, 1, 0.5)
            yield f"unknown key {key!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
        elif one["type"] == "missing":
            yield f"{key} is missing" + (", as methods = ['knorm']" if key == "methods" else "")
        elif one["type"] == "value_error":
            said = str(one["ctx"]["error"])
            yield said if key and said.startswith(place[-1]) else f"{key} {said}".strip()
        elif one["type"] == "literal_error":
            near = get_close_matches(str(one["input"]), re.findall(r"'([^']*)'", one["ctx"]["expected"]), 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"{key} is {one['input']!r}, but should be {one['ctx']['expected']}{hint}"
        else:
            yield f"{key} is {one['input']!r}: {one['msg'][0].lower()}{one['msg'][1:]}"
