"""Forms of `knorm sweep`."""

from __future__ import annotations

from typing import Any

from knorm.cli.schemas.parts import Count, Part, Result, said
from knorm.cli.schemas.quality import DamageFields
from knorm.cli.schemas.timing import ArmRow, CounterFields
from knorm.cli.schemas.verdicts import LawRow


class SweptRow(DamageFields):
    """Hold what a method costs on one model and text, on the windows of all its cells that are done."""

    model: str
    dtype: str
    device: str
    text: str
    window: Count = said("tokens of a window")
    prompt_length: Count
    seed: int
    complete: bool = said("false: some of the plan's windows are missing")
    letters: str = said("rows of one model, text, prompt and seed that share one cannot be told apart by KL")


class CellFields(Part):
    """Name a cell as a person does."""

    measure: str = said("damage, laws, counters or latency")
    method: str = said("with its budget")
    model: str = said("empty for laws, which have models of their own")
    dtype: str
    text: str
    prompt_length: Count
    window: Count
    first_window: Count = said("of those that are the cell's")
    last_window: Count = said("the one after the last")
    seed: int


class LawsOfTarget(CellFields):
    """Hold what became of the laws of one target."""

    suite: str
    results: list[LawRow]


class Generated(CellFields):
    """Name a cell in which a model generates."""

    new_tokens: Count = said("generated after the prompt")


class Counted(Generated):
    """Hold what one generation does."""

    counters: CounterFields


class TimedCell(Generated):
    """Hold how a method was timed beside the uncompressed cache."""

    threads: Count
    device_class: str = said("the exact kind of device, as cpu-x86_64 or nvidia-h200")
    rows: list[ArmRow]
    verdict: str


class Failure(CellFields):
    """Say why a cell has no result."""

    reason: str
    fault: bool = said("true: knorm itself broke off, and nothing is said of the method")


class LeftOut(Part):
    """Say why a method was not run on a model."""

    method: str
    model: str
    reason: str


class PlannedCell(CellFields):
    """Hold a cell of a plan."""

    name: str = said("digest of everything that its result depends on")
    state: str = said("done, failed or to do")


class Swept(Result):
    """Hold what `knorm sweep` found: nothing that running the same cells again would not give again."""

    plan: dict[str, Any] = said("as it was read, with what it leaves out")
    device: str
    cells: Count
    done: Count
    rows: list[SweptRow]
    laws: list[LawsOfTarget]
    counted: list[Counted]
    timed: list[TimedCell]
    failures: list[Failure]
    left_out: list[LeftOut]


class Planned(Result):
    """Hold what `knorm sweep --dry-run` shows."""

    plan: dict[str, Any]
    device: str
    workers: Count
    cells: Count
    done: Count
    seconds: float | None = said("of work that is left, in all workers together; null where no cell tells")
    memory: int | None = said("bytes that a worker had at most")
    smallest_difference: tuple[float, float, float] | None = said(
        "least, median and largest over the rows: change of the mean NLL that the windows can tell from 0, in nats"
    )
    measured_rows: Count = said("rows that this is from; 0: an assumption")
    left_out: list[LeftOut]
    planned: list[PlannedCell]
