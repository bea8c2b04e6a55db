"""`knorm explain`: why did perplexity move?"""

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
    SCORING,
    file_option,
    make_console,
    progress_bar,
    with_options,
    write_json,
)
from knorm.cli.setting import _CURVE, _policy_options, _setting, _text_options


@click.command()
@with_options(*_text_options)
@click.option("--keep-ratio", default="0.9", show_default=True, help="The one to explain.")
@with_options(*_policy_options, *SCORING, *MODEL)
@click.option("--newest", default=16, show_default=True, help="Newest tokens that one intervention protects.")
@click.option(
    "--positions",
    type=click.Choice(["seen", "stored"]),
    default="seen",
    show_default=True,
    help="Count from the tokens seen, or, as an unaware loop does, from those stored.",
)
@click.option("--worst", default=8, show_default=True, help="Tokens to show of those that got worse.")
@file_option("--plot", "Draw perplexity and recency against ratio (.png, .svg, .pdf).")
@with_options(*COMMON)
def explain(json: Path | None, plot: Path | None, quiet: bool, keep_ratio: str, **given: Any) -> None:
    """Why did perplexity move? One thing about the run is changed at a time, and the run evaluated again."""
    from knorm.cli.figures import plot_curves
    from knorm.cli.tables import show_explanation
    from knorm.evaluation.explain import curves_around, explain

    if given["newest"] < 1 or given["worst"] < 1:
        raise ValueError(f"--newest {given['newest']} and --worst {given['worst']}, but should be at least 1")
    console, setting = make_console(quiet), _setting(given, (keep_ratio,), plot, json)
    on, policy = (setting.model, setting.windows), setting.policies[0]
    again = {"prompt_length": setting.prompt_length, "batch": given["batch"]}
    with progress_bar(quiet) as progress:
        task = progress.add_task("evaluations", total=None)

        def step(name: str) -> None:
            progress.update(task, advance=1, description=name)

        found = explain(
            setting.model, setting.tokenizer, setting.windows, policy, newest=given["newest"], worst=given["worst"],
            stored=given["positions"] == "stored",
            on_step=step, **again,
        )  # fmt: skip
        curves = curves_around(*on, policy, _CURVE.split(","), on_step=step, **again) if plot else {}
    show_explanation(console, found, f"{setting.title}, keep_ratio {policy.keep_ratio}")
    if plot:
        plot_curves(curves, setting.title, plot)
    write_json(json, {**setting.fields, "keep_ratio": str(policy.keep_ratio), **asdict(found)})
    sys.exit(HOLDS)
