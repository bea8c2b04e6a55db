"""`knorm sweep`: many models, methods, budgets and texts, as one plan that can be run again."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from knorm.cli.numbers import Above, AtLeast
from knorm.cli.options import BROKEN, COMMON, HOLDS, REFUTED, make_console, waiting, with_options
from knorm.cli.outputs import WRITTEN, file_option, write_json
from knorm.files import file_size
from knorm.paths import resolved

if TYPE_CHECKING:
    from rich.console import Console

    from knorm.cli.swept import Ready
    from knorm.sweep.drive import Engine
    from knorm.sweep.plan import Plan

ENGINES = ("local", "ray")


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--on",
    "engine",
    type=click.Choice(ENGINES),
    default="local",
    show_default=True,
    help="Where cells run: in processes of this machine, or as tasks of a Ray cluster (extra ray).",
)
@click.option("--workers", type=AtLeast(1), help="Cells that run at a time.  [one a GPU, or a core]")
@click.option(
    "--dry-run", is_flag=True, help="Show the cells, what they will take and what they can tell; run nothing."
)
@click.option("--retry", is_flag=True, help="Do the cells again that failed.")
@click.option(
    "--expire",
    type=Above("seconds"),
    default=60.0,
    show_default=True,
    help="Seconds without a sign of life after which a process' cells are anybody's.",
)
@file_option("--parquet", "Write the rows as a parquet file (extra data).")
@with_options(*COMMON)
def sweep(
    plan: Path,
    out: Path,
    engine: str,
    workers: int | None,
    dry_run: bool,
    retry: bool,
    expire: float,
    parquet: Path | None,
    json: Path | None,
    quiet: bool,
) -> None:
    """Measure the cells of PLAN, and keep the results in OUT.

    The same command again does what is left: after an interruption, or when methods, budgets or windows were added to
    the plan. Any number of processes may run it on one folder at the same time: they share the cells.
    """
    if parquet:
        from knorm.cli.swept import check_parquet

        check_parquet(parquet, json)
    with waiting("Reading the plan"):
        ready = _ready(plan, out, expire, engine, workers)

    console = make_console(quiet)
    if dry_run:
        from knorm.cli.swept import show_plan

        write_json(json, show_plan(console, ready), "plan")
        return
    _run(ready, out, retry=retry, quiet=quiet)
    sys.exit(_show(console, ready, out, json, parquet))


def _ready(file: Path, out: Path, expire: float, engine: str, workers: int | None) -> Ready:
    """Read the plan, load its methods, name its cells. Raises ValueError for what cannot be run."""
    from knorm.cli.swept import Ready
    from knorm.sweep.cells import study_of
    from knorm.sweep.folder import Folder
    from knorm.sweep.plan import read_plan

    whole = resolved(file)  # before the folder is another
    folder, where = Folder(resolved(out), expire), whole.parent
    targets = dict(folder.known().get("targets", {}))
    file_size(file)  # refuses what is no file, in the words that it was given
    with contextlib.chdir(where):
        plan = read_plan(whole, file)
        study = study_of(plan, _device(plan, where, engine), targets)
        cells = {cell.name(): cell for cell in study.cells()}
    rows = study.rows()
    folder.refuse_other(rows)
    return Ready(file, where, study, cells, rows, folder, targets, engine, workers)


def _device(plan: Plan, where: Path, engine: str) -> str:
    """Return the kind of device that cells run on: with "auto", a GPU where there is one."""
    asked = plan.device
    if engine == "ray":
        from knorm.sweep.cluster import connect, has_gpus

        connect(plan, where)
        there = has_gpus()
    elif asked == "cpu":
        return "cpu"
    else:
        import torch

        there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise ValueError('the plan has device = "cuda", but there is no CUDA device: write "auto" or "cpu"')
    return "cpu" if asked == "cpu" or not there else "cuda"


def _run(ready: Ready, out: Path, *, retry: bool, quiet: bool) -> None:
    """Do the cells that are left: first all that can run side by side, then those that want a device alone."""
    from knorm.cli.swept import reporting
    from knorm.sweep.drive import drive

    folder = ready.folder
    alone = {name: cell for name, cell in ready.cells.items() if cell.measure == "latency"}
    phases = {name: cell for name, cell in ready.cells.items() if name not in alone}, alone
    states = folder.states()
    left = {name for name in ready.cells if name not in states or (retry and states[name] == "failed")}
    if left or folder.known().get("study") != ready.stored():  # else nothing is written: results may lie read-only
        folder.begin(ready.rows, ready.targets, ready.study.axes(), ready.stored())
    for cells in phases:
        if not left & {*cells}:
            continue
        if out not in WRITTEN:
            WRITTEN.append(out)  # told where it is interrupted: what is finished stays
        with _stopping(), _engine(ready, alone=cells is alone) as engine, reporting(quiet) as report:
            drive(folder, cells, engine, retry=retry, report=report)


@contextlib.contextmanager
def _engine(ready: Ready, *, alone: bool) -> Iterator[Engine]:
    threads = ready.study.plan.threads
    engine: Engine
    if ready.engine == "ray":
        from knorm.sweep.cluster import Cluster

        engine = Cluster(ready.study, ready.where, alone=alone, workers=ready.workers)
    else:
        from knorm.sweep.local import Pool, places

        most = places(ready.study.device, threads)
        workers = 1 if alone and ready.study.device == "cpu" else ready.workers or most
        engine = Pool(workers, ready.study.device, threads=threads, folder=ready.where)
    try:
        yield engine
    finally:
        engine.close()


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Stop as at Ctrl-C when a batch system ends the job, so that no claim is left behind."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(console: Console, ready: Ready, out: Path, json: Path | None, parquet: Path | None) -> int:
    """Show and write what there is; return the exit code."""
    from knorm.cli.swept import show_table, table_fields, write_parquet
    from knorm.sweep.table import join

    table = join(ready.folder, ready.cells, rows=not console.quiet or bool(json or parquet))
    show_table(console, ready, table)
    if json or parquet:
        fields = table_fields(ready.stored(), table)
        write_json(json, fields)
        if parquet:
            write_parquet(parquet, fields["rows"])
    if table.faults:
        cell, trace = table.faults[0]
        click.echo(
            f"knorm: a fault of knorm's own, in {cell.measure} of {cell.method.label}:\n{trace.rstrip()}", err=True
        )
        return BROKEN
    if console.quiet and table.failures:
        cell, reason = table.failures[0]
        where = f"{cell.method.label} on {cell.model}" if cell.model else cell.method.label
        count = f"{len(table.failures)} cells failed, the first" if table.failures[1:] else "a cell failed"
        click.echo(f"knorm: {count} {where}: {reason}", err=True)
    return REFUTED if table.failures or table.refuted else HOLDS
