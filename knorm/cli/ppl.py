"""`knorm ppl`: what does compression cost in quality?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from knorm.cli.options import (
    COMMON,
    CURVE,
    HOLDS,
    REFUTED,
    ModelOptions,
    PolicyOptions,
    make_console,
    model_options,
    policy_options,
    progress_bar,
    with_options,
)
from knorm.cli.outputs import file_option, write_json
from knorm.cli.setting import TextOptions, load_setting, text_options

if TYPE_CHECKING:
    from rich.console import Console

    from knorm.evaluation.curve import Row


@click.command()
@text_options
@policy_options(CURVE, "A row each.")
@model_options
@click.option("--stream", is_flag=True, help="Run the loop too, and compare.")
@click.option(
    "--reported",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Judge somebody else's table instead: .csv or .json with keep_ratio and ppl (or ppl_before, ppl_after).",
)
@file_option("--plot", "Draw the curve (.png, .svg, .pdf).")
@with_options(*COMMON)
def ppl(
    text_options: TextOptions,
    policy_options: PolicyOptions,
    model_options: ModelOptions,
    stream: bool,
    reported: Path | None,
    plot: Path | None,
    json: Path | None,
    quiet: bool,
) -> None:
    """Perplexity of a text at each ratio, exactly, from one forward pass each."""
    console = make_console(quiet)
    if reported:
        if plot or stream:
            raise ValueError("--reported judges a table and measures nothing: drop --plot and --stream")
        if json and json.resolve() == reported.resolve():
            raise ValueError(f"--json {json} would overwrite the table that --reported reads: give another file")
        _judge(reported, json, console)
    setting = load_setting(policy_options, text_options, model_options, json=json, plot=plot)

    from knorm.cli.figures import plot_curve
    from knorm.cli.tables import curve_table, show_suspicions
    from knorm.evaluation.curve import measure_row
    from knorm.evaluation.doubts import judge_measured, nll_without_cache

    runner, policies, rows = setting.runner, setting.policies, []
    with progress_bar(quiet) as progress:
        count = -(-len(runner.windows.input_ids) // runner.batch)
        task = progress.add_task("windows x ratios", total=len(policies) * count)
        for policy in policies:
            progress.update(task, description=f"ratio {policy.keep_ratio}")
            rows.append(measure_row(runner, policy, stream=stream, on_batch=lambda: progress.advance(task)))
    console.print(curve_table(rows, setting.title))
    holds = _holds(rows, model_options.dtype, console) if stream else True
    doubts = judge_measured(runner, rows, policies, nll_empty=nll_without_cache(runner))
    show_suspicions(console, doubts)
    if plot:
        plot_curve(rows, setting.title, plot)
    result = {"holds": holds, "suspicious": [asdict(doubt) for doubt in doubts], "rows": [asdict(row) for row in rows]}
    write_json(json, {**setting.fields, **result})
    sys.exit(HOLDS if holds else REFUTED)


def _holds(rows: Sequence[Row], dtype: str, console: Console) -> bool:
    """Say how the one pass compares with the loop; False where they should be equal and are not."""
    difference, gap = max(r.stream_difference or 0.0 for r in rows), max(r.stream_gap or 0.0 for r in rows)
    evictions = sum(r.stream_evictions or 0 for r in rows)
    console.print(
        f"One pass against the loop: {evictions} evictions differ, norms within {gap:.1e} where they first do; "
        f"under the loop's schedule, tokens within {difference:.1e}."
    )
    if dtype in ("float32", "float64"):
        return all(row.agrees for row in rows)
    console.print(f"Equality is claimed for float32 and float64, not for {dtype}.")
    return True


def _judge(reported: Path, json: Path | None, console: Console) -> None:
    """Judge somebody else's table: exit 1 where it is suspicious."""
    from knorm.cli.tables import show_suspicions
    from knorm.evaluation.doubts import judge_reported, read_reported

    doubts = judge_reported(read_reported(reported))
    show_suspicions(console, doubts)
    if not doubts:
        console.print(f"Nothing in {reported} is suspicious by itself; `knorm ppl` measures it.")
    write_json(json, {"reported": str(reported), "suspicious": [asdict(doubt) for doubt in doubts]})
    sys.exit(REFUTED if doubts else HOLDS)
