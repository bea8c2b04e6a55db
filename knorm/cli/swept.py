"""What `knorm sweep` shows and writes: a plan before it runs, progress, and the table."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from knorm.cli.outputs import MADE_BY, replace_file
from knorm.cli.tables import LETTERS, UNCHANGED, damage_line, damage_table, print_text, print_wrapped, unread
from knorm.paths import resolved

if TYPE_CHECKING:
    from knorm.methods.budget import Budget
    from knorm.sweep.cells import Cell, Chosen, Study
    from knorm.sweep.drive import Progress
    from knorm.sweep.estimate import Estimate
    from knorm.sweep.folder import Folder
    from knorm.sweep.plan import Plan
    from knorm.sweep.table import DamageRow, Table

_LOG_EVERY = 30.0  # seconds between lines of progress, where there is no terminal
_MOST_LINES = 40  # of a plan
_MOST_ROWS = 400  # of a table


@dataclass(frozen=True)
class Ready:
    """Hold a study with its cells by name, and the folder of their results.

    Attributes:
        name: of the plan's file, as it was given.
        where: the folder that paths in the plan are seen from.
        rows: the names of its rows.
        targets: what loading the targets told.
        workers: cells that run at a time.
    """

    name: Path
    where: Path
    study: Study
    cells: dict[str, Cell]
    rows: set[str]
    folder: Folder
    targets: dict[str, Any]
    engine: str
    workers: int | None

    def stored(self) -> dict[str, Any]:
        """Return what the folder keeps of the study, so that it can be read without the plan."""
        plan = self.study.plan.model_dump(mode="json")
        return {"plan": plan, "device": self.study.device, "left_out": _left_out(self), "cells": [*self.cells]}


def lasting(seconds: float) -> str:
    """Write a duration for people.

    >>> lasting(5), lasting(125), lasting(7300)
    ('5 s', '2 min 5 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextlib.contextmanager
def reporting(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Show progress with rate, failures and time left: a bar on a terminal, else a line now and then, on stderr."""
    errors = Console(stderr=True)
    if quiet or not errors.is_terminal:
        said = time.monotonic()

        def line(progress: Progress) -> None:
            nonlocal said
            if not quiet and time.monotonic() - said >= _LOG_EVERY:
                said = time.monotonic()
                click.echo(f"{progress.finished} of {progress.total} cells: {_state(progress)}", err=True)

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=errors, transient=True
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda progress: bar.update(
            task, total=progress.total, completed=progress.finished, description=_state(progress)
        )


def _state(progress: Progress) -> str:
    if progress.waiting:
        return "the rest is being done by other processes"
    left = "" if progress.left is None else f", {lasting(progress.left)} left"
    rate = f"{progress.rate:.1f} a second" if progress.rate >= 1 else f"{60 * progress.rate:.1f} a minute"
    failed = f", {progress.failed} failed" if progress.failed else ""
    return f"{rate if progress.done else 'starting'}{failed}{left}"


def show_plan(console: Console, ready: Ready) -> dict[str, Any]:
    """Show the cells of a plan, what they will take and can tell; return what --json holds."""
    from knorm.sweep.estimate import estimate
    from knorm.sweep.table import join

    table, states = join(ready.folder, ready.cells), ready.folder.states()
    left = {name: cell for name, cell in ready.cells.items() if name not in states}
    workers = ready.workers or _places(ready)
    found = estimate(ready.study.plan, left.values(), table)
    alone = [cell for cell in left.values() if cell.measure == "latency"] if _one_by_one(ready) else []
    timed = estimate(ready.study.plan, alone, table).seconds or 0.0
    workers = 1 if alone and len(alone) == len(left) else workers
    wall = timed + ((found.seconds or 0.0) - timed) / workers
    rows: dict[tuple[Any, ...], list[str]] = {}
    for name, cell in ready.cells.items():
        rows.setdefault(cell.row, []).append(name)
    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("measure", "model", "text", "method, budget"):
        grid.add_column(column, overflow="fold")
    grid.add_column("cells", justify="right", no_wrap=True)
    grid.add_column("done", justify="right", no_wrap=True)
    for names in [*rows.values()][:_MOST_LINES]:
        cell = ready.cells[names[0]]
        words = map(Text, (cell.measure, cell.model, cell.text, cell.method.label))
        grid.add_row(*words, str(len(names)), str(sum(name in states for name in names)))
    console.print(grid)
    if len(rows) > _MOST_LINES:
        console.print(f"... and {len(rows) - _MOST_LINES:,} more rows: --json FILE has all cells")
    _show_left_out(console, ready)
    done = len(ready.cells) - len(left)
    head = f"\n{ready.name}: {len(ready.cells):,} cells in {len(rows):,} rows, {done:,} done"
    print_text(console, Text(f"{head}; {len(left):,} to do, {workers} at a time on {ready.study.device}"))
    for line in _expected(found, len(left), wall, ready.study.plan):
        print_wrapped(console, line)
    return {
        "plan": ready.study.plan.model_dump(), "device": ready.study.device, "workers": workers,
        "cells": len(ready.cells), "done": done,
        "seconds": found.seconds, "memory": found.memory, "smallest_difference": found.smallest,
        "measured_rows": found.measured, "left_out": _left_out(ready),
        "planned": [
            {"name": name, "state": states.get(name, "to do"), **_named(cell)} for name, cell in ready.cells.items()
        ],
    }  # fmt: skip


def _places(ready: Ready) -> int:
    if ready.engine == "ray":
        from knorm.sweep import cluster

        return cluster.places(ready.study)
    from knorm.sweep import local

    return local.places(ready.study.device, ready.study.plan.threads)


def _one_by_one(ready: Ready) -> bool:
    """Tell whether cells that are timed run one after the other, however many workers there are."""
    return ready.engine != "ray" and ready.study.device == "cpu"


def _expected(found: Estimate, left: int, wall: float, plan: Plan) -> Iterator[str]:
    """Say what the rest will take, and what differences the plan's windows can tell."""
    if not left:
        yield "Time: none, all is done"
    elif found.seconds is None:
        yield "Time: unknown until cells of this model are done"
    else:
        like = f"; {found.unknown} cells are taken to be like others" if found.unknown else ""
        yield f"Time: about {lasting(wall)}, {lasting(found.seconds)} of work{like}"
        if found.untimed:
            yield f"To which comes the time of {found.untimed} cells, of models or measures of which none is done yet"
    if found.memory:
        yield f"Memory: at most {found.memory / 2**30:.1f} GiB for each worker so far"
    if "damage" not in plan.measure:
        return
    if found.smallest is None:
        yield "With one window no difference can be told from noise"
        return
    low, middle, high = found.smallest
    span = f" ({low:.2g} to {high:.2g} over {found.measured} rows)" if found.measured > 1 else ""
    guess = "" if found.measured else ", if they differ as the embedded model's do"
    yield f"Smallest ΔNLL that {plan.windows} windows tell from 0, 19 times of 20: {middle:.2g} nats{span}{guess}"


def _left_out(ready: Ready) -> list[dict[str, str]]:
    return [{"method": chosen.label, "model": model, "reason": why} for chosen, model, why in ready.study.left_out]


def _show_left_out(console: Console, ready: Ready) -> None:
    models: dict[tuple[str, str], list[str]] = {}
    for chosen, model, why in ready.study.left_out:
        models.setdefault((model, why), []).append(chosen.label)
    for (model, why), labels in models.items():
        print_wrapped(console, f"Left out on {model}: {', '.join(labels)} ({why})", "dim")


def _named(cell: Cell) -> dict[str, Any]:
    """Return what a person calls a cell by."""
    return {
        "measure": cell.measure, "method": cell.method.label, "model": cell.model, "dtype": cell.dtype,
        "text": cell.text, "prompt_length": cell.prompt_length, "window": cell.window, "first_window": cell.first,
        "last_window": cell.last, "seed": cell.seed,
    }  # fmt: skip


def show_table(console: Console, ready: Ready, table: Table) -> None:
    """Show the rows of each model and text, what failed, and how much of the plan it is."""
    from knorm.page.words import legible
    from knorm.sweep.table import apart, groups

    if console.quiet:
        return
    lettered, shown = False, 0
    for rows in groups(table.damage).values():
        shown += len(rows)
        if shown > _MOST_ROWS:
            break
        letters = apart(rows)
        letters = letters if legible(letters) else [""] * len(rows)
        _show_group(console, rows, letters)
        lettered |= any(letters)
    if lettered:
        print_text(console, Text(LETTERS, "dim"))
    if shown > _MOST_ROWS:
        print_text(console, Text(f"{len(table.damage):,} rows are too many to show: --json FILE has all"))
    _show_laws(console, table)
    _show_generations(console, table)
    _show_failures(console, table)
    _show_left_out(console, ready)
    bad = len(table.failures) + len(table.faults)
    missing = table.cells - table.done - bad
    said = f"{table.done:,} of {table.cells:,} cells are done"
    said += f", {bad:,} failed: --retry does them again" if bad else ""
    print_text(console, Text(said + (f", {missing:,} are missing" if missing else "")))


def _show_group(console: Console, rows: Sequence[DamageRow], letters: Sequence[str]) -> None:
    first, full = rows[0], rows[0].bytes_full / rows[0].tokens_before
    cell = first.cell
    windows = f"{first.planned} window{'s' if first.planned > 1 else ''} of {cell.window} tokens"
    seed = f", seed {cell.seed}" if cell.seed else ""
    title = f"{cell.model} ({cell.dtype}) on {cell.text}: {windows}, prompt {cell.prompt_length}{seed}"
    print_text(console, Text(title))
    said = f"Full cache: PPL {math.exp(min(first.nll_full, 700)):.3f}, {full:,.0f} bytes per token"
    print_text(console, Text(f"{said}, {first.tokens_before:.0f} tokens seen by a query\n"))
    lines = [
        damage_line(row.label if row.whole else f"{row.label} [{len(row.windows)} of {row.planned} windows]",
                    row.damage, row.bytes_per_token, row.seen, letter)
        for row, letter in zip(rows, letters, strict=True)
    ]  # fmt: skip
    console.print(damage_table(lines))
    for row in rows[1:]:
        if unread(row, _budget(row.cell.method), cell.prompt_length):
            print_wrapped(console, f"{row.label}: {UNCHANGED}", "bold yellow")
    print_text(console, Text(""))


def _budget(chosen: Chosen) -> Budget | None:
    from knorm.methods.budget import Budget

    own = chosen.keep_ratio is None and chosen.keep_tokens is None
    return None if own else Budget(chosen.keep_ratio, chosen.keep_tokens)


def _show_laws(console: Console, table: Table) -> None:
    if not table.laws:
        return
    for cell, values in table.laws:
        verdicts = [result["verdict"] for result in values["results"]]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("holds", "refuted", "untested") if v in verdicts)
        print_wrapped(console, f"Laws of {cell.method.target}{_seeded(cell)}: {counts}")
        for result in values["results"]:
            if result["verdict"] == "refuted":
                print_wrapped(console, f"  REFUTED  {result['check']}: {result['counterexample']}", "red")
    print_text(console, Text(""))


def _seeded(cell: Cell) -> str:
    return f", seed {cell.seed}" if cell.seed else ""


def _show_generations(console: Console, table: Table) -> None:
    """Show counters and latency, a line for each cell."""
    for cell, values in table.counters:
        where = f"{cell.model}, prompt {cell.prompt_length} + {cell.new_tokens}: {cell.method.label}"
        said = f"{values['prompt_operators']:,} operators for the prompt, {values['step_operators']:,} for "
        print_wrapped(console, f"{where}: {said}{values['steps']} steps, {values['cache_bytes']:,} bytes of cache")
    for cell, values in table.latency:
        compared = values["rows"][1]["comparisons"]
        ratios = ", ".join(f"{metric} {compared[metric]['ratio']:.2f}x" for metric in ("ttft", "tpot"))
        where = f"{cell.model}, prompt {cell.prompt_length} + {cell.new_tokens}: {cell.method.label}"
        print_wrapped(console, f"{where}: {ratios} of the uncompressed cache's: {values['verdict']}")
    if table.counters or table.latency:
        print_text(console, Text(""))


def _show_failures(console: Console, table: Table) -> None:
    """Show what failed, a line for each method, model and reason."""
    grouped: dict[tuple[str, str, str], int] = {}
    for cell, reason in table.failures:
        key = cell.method.label, cell.model, reason
        grouped[key] = grouped.get(key, 0) + 1
    for (label, model, reason), count in grouped.items():
        where = f" on {model}" if model else ""
        print_wrapped(console, f"FAILED  {label}{where}{f', {count} cells' if count > 1 else ''}: {reason}", "bold red")


def table_fields(study: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """Return what --json holds: nothing that a second run of the same cells would not give again.

    Args:
        study: of Ready.stored, or as the folder keeps it.
        table: its results, joined.
    """
    from knorm.sweep.table import apart, groups, row_fields

    letters = {
        id(row): letter for rows in groups(table.damage).values() for row, letter in zip(rows, apart(rows), strict=True)
    }
    return {
        "plan": study["plan"], "device": study["device"], "cells": table.cells, "done": table.done,
        "rows": [row_fields(row, letters[id(row)]) for row in table.damage],
        "laws": [{**_named(cell), **values} for cell, values in table.laws],
        "counted": [
            {**_named(cell), "new_tokens": cell.new_tokens, "counters": values} for cell, values in table.counters
        ],
        "timed": [
            {**_named(cell), "new_tokens": cell.new_tokens, "threads": cell.threads, **values}
            for cell, values in table.latency
        ],
        "failures": [{**_named(cell), "reason": reason, "fault": False} for cell, reason in table.failures]
        + [{**_named(cell), "reason": trace.strip().splitlines()[-1], "fault": True} for cell, trace in table.faults],
        "left_out": study["left_out"],
    }  # fmt: skip


def check_parquet(file: Path, json: Path | None) -> None:
    """Raise ValueError, before the work, where the rows could not be written."""
    if json and resolved(json) == resolved(file):
        raise ValueError(f"--json and --parquet are both {json}, but should be two files")
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ValueError("--parquet needs the package pyarrow: pip install 'knorm[data]'") from None


def write_parquet(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows as one table."""
    import pyarrow
    import pyarrow.parquet

    from knorm.cli.schemas.swept import SweptRow

    checked = [SweptRow.model_validate(row).model_dump(mode="json") for row in rows]
    table = pyarrow.Table.from_pylist(checked).replace_schema_metadata({"made by": MADE_BY})
    replace_file(file, lambda beside: pyarrow.parquet.write_table(table, beside))
