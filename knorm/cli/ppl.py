"""`knorm ppl`: what does compression cost in quality?"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from knorm.cli.options import (
    COMMON,
    HOLDS,
    MODEL,
    REFUTED,
    SCORING,
    Numbers,
    file_option,
    make_console,
    progress_bar,
    with_options,
    write_json,
)
from knorm.cli.setting import _CURVE, _policy_options, _setting, _text_options


@click.command()
@with_options(*_text_options)
@click.option("--keep-ratio", type=Numbers(str), default=_CURVE, show_default=True, help="A row each.")
@with_options(*_policy_options, *SCORING, *MODEL)
@click.option("--stream", is_flag=True, help="Run the loop too, and compare.")
@click.option(
    "--reported",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Judge somebody else's table instead: .csv or .json with keep_ratio and ppl (or ppl_before, ppl_after).",
)
@file_option("--plot", "Draw the curve (.png, .svg, .pdf).")
@with_options(*COMMON)
def ppl(json: Path | None, plot: Path | None, quiet: bool, reported: Path | None, **given: Any) -> None:
    """Perplexity of a text at each ratio, exactly, from one forward pass each."""
    console = make_console(quiet)
    if reported:
        if plot or given["stream"]:
            raise ValueError("--reported judges a table and measures nothing: drop --plot and --stream")
        if json and json.resolve() == reported.resolve():
            raise ValueError(f"--json {json} would overwrite the table that --reported reads: give another file")
        _judge(reported, json, console)
    from knorm.cli.figures import plot_curve
    from knorm.cli.tables import curve_table, show_suspicions
    from knorm.evaluation.curve import evaluate
    from knorm.evaluation.doubts import judge_measured, measure_empty, measure_with
    from knorm.perplexity import NEAR_TIE

    setting = _setting(given, given["keep_ratio"], plot, json)
    on = (setting.model, setting.windows)
    rows = []
    with progress_bar(quiet) as progress:
        count = -(-len(setting.windows.input_ids) // given["batch"])
        task = progress.add_task("windows x ratios", total=len(setting.policies) * count)
        for policy in setting.policies:
            progress.update(task, description=f"ratio {policy.keep_ratio}")
            rows.append(
                evaluate(
                    *on,
                    policy,
                    prompt_length=setting.prompt_length,
                    stream=given["stream"],
                    batch=given["batch"],
                    on_batch=lambda: progress.advance(task),
                )
            )
    console.print(curve_table(rows, setting.title))
    holds = True
    if given["stream"]:
        difference, gap = max(r.stream_difference or 0.0 for r in rows), max(r.stream_gap or 0.0 for r in rows)
        evictions = sum(r.stream_evictions or 0 for r in rows)
        console.print(
            f"One pass against the loop: {evictions} evictions differ, norms within {gap:.1e} where they first do; "
            f"under the loop's schedule, tokens within {difference:.1e}."
        )
        if given["dtype"] in ("float32", "float64"):
            holds = difference <= 1e-4 and gap <= NEAR_TIE
        else:
            console.print(f"Equality is claimed for float32 and float64, not for {given['dtype']}.")
    again = {"prompt_length": setting.prompt_length, "batch": given["batch"]}
    doubts = judge_measured(
        rows, setting.policies, measure_with(*on, **again), prompt_length=setting.prompt_length,
        nll_empty=measure_empty(*on, **again),
    )  # fmt: skip
    show_suspicions(console, doubts)
    if plot:
        plot_curve(rows, setting.title, plot)
    found = {"holds": holds, "suspicious": [asdict(doubt) for doubt in doubts], "rows": [asdict(row) for row in rows]}
    write_json(json, {**setting.fields, **found})
    sys.exit(HOLDS if holds else REFUTED)


def _judge(reported: Path, json: Path | None, console: Any) -> None:
    """Somebody else's table: exit 1 where it is suspicious."""
    from knorm.cli.tables import show_suspicions
    from knorm.evaluation.doubts import judge_reported, read_reported

    doubts = judge_reported(read_reported(reported))
    show_suspicions(console, doubts)
    if not doubts:
        console.print(f"Nothing in {reported} is suspicious by itself; `knorm ppl` measures it.")
    write_json(json, {"reported": str(reported), "suspicious": [asdict(doubt) for doubt in doubts]})
    sys.exit(REFUTED if doubts else HOLDS)
