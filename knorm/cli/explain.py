"""`knorm explain`: why did perplexity move?"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from knorm.cli.options import (
    COMMON,
    CURVE,
    EXPLAINED,
    HOLDS,
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


@click.command()
@text_options
@policy_options(EXPLAINED, "The ratio to explain.", several=False)
@model_options
@click.option(
    "--newest", default=16, show_default=True, help="How many of the newest tokens one intervention protects."
)
@click.option(
    "--positions",
    type=click.Choice(["seen", "stored"]),
    default="seen",
    show_default=True,
    help="Take positions from the tokens seen, or, as an unaware loop does, from those stored.",
)
@click.option("--worst", default=8, show_default=True, help="How many of the tokens that got worse to show.")
@file_option("--plot", "Draw perplexity and recency against ratio (.png, .svg, .pdf).")
@with_options(*COMMON)
def explain(
    text_options: TextOptions,
    policy_options: PolicyOptions,
    model_options: ModelOptions,
    newest: int,
    positions: str,
    worst: int,
    plot: Path | None,
    json: Path | None,
    quiet: bool,
) -> None:
    """Why did perplexity move? One thing about the run is changed at a time, and the run evaluated again."""
    if newest < 1 or worst < 1:
        raise ValueError(f"--newest {newest} and --worst {worst}, but should be at least 1")
    console = make_console(quiet)
    setting = load_setting(policy_options, text_options, model_options, json=json, plot=plot)

    from knorm.cli.figures import plot_curves
    from knorm.cli.tables import show_explanation
    from knorm.evaluation.explain import curves_around, explain

    runner, (policy,) = setting.runner, setting.policies
    with progress_bar(quiet) as progress:
        task = progress.add_task("evaluations", total=None)

        def step(name: str) -> None:
            progress.update(task, advance=1, description=name)

        stored = positions == "stored"
        explanation = explain(
            runner, setting.tokenizer, policy, newest=newest, worst=worst, stored=stored, on_step=step
        )
        curves = curves_around(runner, policy, CURVE.keep_ratio.split(","), on_step=step) if plot else {}
    show_explanation(console, explanation, f"{setting.title}, keep_ratio {policy.keep_ratio}")
    if plot:
        plot_curves(curves, setting.title, plot)
    write_json(json, {**setting.fields, "keep_ratio": str(policy.keep_ratio), **asdict(explanation)})
    sys.exit(HOLDS)
