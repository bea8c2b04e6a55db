"""`knorm golden log`: what was accepted over time, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from knorm.cli.options import COMMON, check_outputs, make_console, with_options
from knorm.cli.outputs import file_option, write_json


@click.command("log")
@click.argument("case")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    show_default="what changed",
    help="Metrics to show, e.g. 'nll/*'. May be repeated.",
)
@click.option("--device-class", metavar="NAME", show_default="the only one of the case", help="E.g. cpu-x86_64.")
@click.option(
    "--golden-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    show_default="the project's",
    help="Folder of the goldens.",
)
@file_option("--plot", "Draw each metric relative to what was accepted first (.png, .svg, .pdf).")
@with_options(*COMMON)
def golden_log(
    json: Path | None,
    quiet: bool,
    case: str,
    metrics: tuple[str, ...],
    device_class: str | None,
    golden_dir: Path | None,
    plot: Path | None,
) -> None:
    """Show what was accepted for CASE over time, and why.

    It is read from git. Each value stands with its difference from what was accepted first.
    """
    from knorm.golden.project import find_project

    check_outputs(json, plot)
    project = find_project(Path.cwd())
    from knorm.cli.tables import history_table
    from knorm.golden.history import history, moving
    from knorm.golden.store import Store

    ours = golden_dir is None and project is not None
    store = Store(project.golden_dir, ours=True) if ours and project else Store(golden_dir)
    known = sorted(device for name, device in store.files if name == case)
    if device_class is None and len(known) > 1:
        raise ValueError(f"{case} has goldens of {', '.join(known)}: give --device-class")
    chosen = device_class or (known[0] if known else None)
    if chosen is None:
        names = ", ".join(sorted({name for name, _ in store.files})) or "none"
        raise ValueError(f"{case} has no golden in {store.folder}; there are goldens of {names}")
    entries, unread = history(store, case, chosen)
    names_shown = moving(entries, metrics)
    console, title = make_console(quiet), f"{case} ({chosen}): accepted {len(entries)} times"
    console.print(history_table(entries, names_shown, title))
    if not names_shown:
        console.print("No metric ever changed: --metric names those to show all the same.")
    for commit in unread:
        console.print(f"not read: the golden of {commit}, which another knorm wrote, or nobody could", markup=False)
    if plot:
        from knorm.cli.figures import plot_history

        plot_history(entries, names_shown, title, plot)
    write_json(json, {"case": case, "device_class": chosen, "entries": [_fields(e, names_shown) for e in entries]})


def _fields(entry: Any, names: list[str]) -> dict[str, Any]:
    made, anchors = entry.golden.provenance, {metric.name: metric.anchor for metric in entry.golden.metrics}
    return {
        "commit": entry.commit,
        "recorded": made.date,
        "recorded_at": made.commit,
        "reason": made.reason,
        "values": {name: entry.value(name) for name in names},
        "anchors": {name: anchors.get(name) for name in names},
    }
