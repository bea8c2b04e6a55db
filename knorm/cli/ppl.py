"""`knorm ppl`: what does compression cost in quality?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from knorm.cli.compared import Asked, compare_methods, explicit
from knorm.cli.engined import EngineOptions, compare_engines, engine_options, engines_among
from knorm.cli.numbers import Numbers
from knorm.cli.options import (
    COMMON,
    CURVE,
    HOLDS,
    REFUTED,
    ModelOptions,
    PolicyOptions,
    check_device,
    check_outputs,
    kind_option,
    make_console,
    model_options,
    policy_options,
    progress_bar,
    with_options,
)
from knorm.cli.outputs import file_option, write_json
from knorm.cli.setting import Setting, TextOptions, load_setting, text_options
from knorm.files import file_size
from knorm.paths import resolved

if TYPE_CHECKING:
    from rich.console import Console

    from knorm.evaluation.curve import Row
    from knorm.evaluation.ways import How


@click.command()
@click.argument("targets", nargs=-1, metavar="[TARGET]...")
@text_options
@policy_options(CURVE, "Ratios in (0, 1], a row for each; for a TARGET: 0.5, unless it has a budget of its own.")
@click.option(
    "--keep-tokens", type=Numbers(1), help="Budgets in tokens, each at least 1, for a TARGET that takes them."
)
@click.option(
    "--how",
    type=click.Choice(["auto", "schedule", "two calls", "loop"]),
    default="auto",
    show_default=True,
    help="The way a TARGET is run; auto takes the cheapest, and checks it.",
)
@kind_option
@click.option(
    "--facts",
    is_flag=True,
    help="Measure how well names are recalled that the embedded story gives early and needs late.",
)
@model_options
@click.option("--stream", is_flag=True, help="Run the loop too, and compare it with the one pass.")
@click.option(
    "--reported",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Judge a table that was measured elsewhere: .csv or .json with keep_ratio and ppl (or ppl_before, ppl_after).",
)
@engine_options
@file_option("--plot", "Draw the curve (.png, .svg, .pdf).")
@with_options(*COMMON)
@click.pass_context
def ppl(
    context: click.Context,
    /,
    targets: tuple[str, ...],
    keep_tokens: tuple[int, ...] | None,
    how: How,
    kind: str | None,
    facts: bool,
    text_options: TextOptions,
    policy_options: PolicyOptions,
    model_options: ModelOptions,
    engine_options: EngineOptions,
    stream: bool,
    reported: Path | None,
    plot: Path | None,
    json: Path | None,
    quiet: bool,
) -> None:
    """What does compression cost in quality, and for what memory?

    Without a TARGET: perplexity of knorm's own policies, exactly, from one forward pass each. With targets: each beside
    the full cache on the same tokens. A target is knorm, path/to/file.py:name, package.module:name,
    kvpress:SnapKVPress, transformers:QuantizedCache(backend="fp8"), or kvpress:* for all; or an engine with its
    model, as llama.cpp:model.gguf(type_k="q8_0"), beside the same engine's full cache; or a server's endpoint, as
    http://127.0.0.1:8000/v1#MODEL, beside --reference or --model.
    """
    console, given = make_console(quiet), explicit(context)
    if engines_among(targets, given):
        check_outputs(json, plot)
        whole, fields = _of_engines(
            targets, how, policy_options.prompt_length, text_options, model_options, engine_options, given,
            plot=plot, quiet=quiet, verbose=bool(context.obj),
        )  # fmt: skip
        write_json(json, fields, "methods")
        sys.exit(HOLDS if whole else REFUTED)
    if targets:
        ratios = policy_options.keep_ratio if "keep_ratio" in given else None
        asked = Asked(targets, tuple(ratios) if ratios else None, keep_tokens, kind, how, facts)
        _refuse(reported=reported, stream=stream)
        check_outputs(json, plot)
        check_device(model_options.device)
        whole, fields = compare_methods(
            asked, policy_options, text_options, model_options, given=given, plot=plot, quiet=quiet,
            verbose=bool(context.obj),
        )  # fmt: skip
        write_json(json, fields, "methods")
        sys.exit(HOLDS if whole else REFUTED)
    if asked_of := [flag for flag in ("keep_tokens", "how", "kind", "facts") if flag in given]:
        raise ValueError(f"--{asked_of[0].replace('_', '-')} is about a TARGET: give one, as knorm")
    if reported:
        if plot or stream:
            raise ValueError("--reported judges a table and measures nothing: drop --plot and --stream")
        if json and resolved(json) == resolved(reported):
            raise ValueError(f"--json {json} would overwrite the table that --reported reads: give another file")
        file_size(reported)  # before anything heavy is loaded
        _judge(reported, json, console)
    setting = load_setting(policy_options, text_options, model_options, json=json, plot=plot)
    holds, fields = _curve(setting, stream=stream, plot=plot, quiet=quiet)
    write_json(json, fields)
    sys.exit(HOLDS if holds else REFUTED)


def _of_engines(
    targets: tuple[str, ...],
    how: How,
    prompt_length: int | None,
    text: TextOptions,
    model: ModelOptions,
    engine: EngineOptions,
    given: frozenset[str],
    **shown: Any,
) -> tuple[bool, dict[str, Any]]:
    """Measure engines, or servers, which a model of transformers stands beside only where it is named."""
    from knorm.methods.targets import is_endpoint

    if not is_endpoint(targets[0]):
        return compare_engines(targets, how, prompt_length, text, model, engine, **shown)
    from knorm.cli.endpointed import compare_endpoints

    beside = model if "model" in given else None
    return compare_endpoints(targets, how, prompt_length, text, beside, engine, **shown)


def _curve(setting: Setting, *, stream: bool, plot: Path | None, quiet: bool) -> tuple[bool, dict[str, Any]]:
    """Measure and show knorm's own curve; returns False where the loop contradicts it, and what --json holds."""
    from knorm.cli.figures import plot_curve
    from knorm.cli.tables import curve_table, loop_table, show_suspicions
    from knorm.evaluation.curve import measure_row
    from knorm.evaluation.doubts import judge_measured, nll_without_cache

    console, runner, policies, rows = make_console(quiet), setting.runner, setting.policies, []
    with progress_bar(quiet) as progress:
        count = -(-len(runner.windows.input_ids) // runner.batch)
        task = progress.add_task("windows x ratios", total=len(policies) * count)
        for policy in policies:
            progress.update(task, description=f"ratio {policy.keep_ratio}")
            rows.append(measure_row(runner, policy, stream=stream, on_batch=lambda: progress.advance(task)))
    console.print(curve_table(rows, setting.title))
    if stream:
        console.print(loop_table(rows), "")
    holds = _holds(rows, setting.fields["dtype"], console) if stream else True
    doubts = judge_measured(runner, rows, policies, nll_empty=nll_without_cache(runner))
    show_suspicions(console, doubts)
    if plot:
        plot_curve(rows, setting.title, plot)
    result = {"holds": holds, "suspicious": [asdict(doubt) for doubt in doubts], "rows": [asdict(row) for row in rows]}
    return holds, {**setting.fields, **result}


def _refuse(*, reported: Path | None, stream: bool) -> None:
    if reported or stream:
        raise ValueError("--reported and --stream are about knorm's own curve: drop the TARGET, or them")


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
    write_json(json, {"table": str(reported), "suspicious": [asdict(doubt) for doubt in doubts]}, "reported")
    sys.exit(REFUTED if doubts else HOLDS)
