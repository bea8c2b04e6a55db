"""`knorm explain`: why did perplexity move?"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from knorm.cli.compared import Asked, budget_fields, explicit, fitting_model, methods_of, prepared
from knorm.cli.numbers import AtLeast
from knorm.cli.options import (
    COMMON,
    CURVE,
    EXPLAINED,
    HOLDS,
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
from knorm.cli.setting import TextOptions, load_setting, text_options

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from knorm.evaluation.explain import Explanation


@click.command()
@click.argument("target", required=False)
@text_options
@policy_options(EXPLAINED, "The ratio to explain, in (0, 1]; of a TARGET 0.5, unless it has its own.", several=False)
@click.option("--keep-tokens", type=AtLeast(1), help="Budget in tokens, for a TARGET that takes one.")
@kind_option
@model_options
@click.option(
    "--newest",
    type=AtLeast(1),
    default=16,
    show_default=True,
    help="How many of the newest tokens one intervention protects.",
)
@click.option(
    "--positions",
    type=click.Choice(["seen", "stored"]),
    default="seen",
    show_default=True,
    help="Take positions from the tokens seen, or, as an unaware loop does, from those stored.",
)
@click.option(
    "--worst",
    type=AtLeast(1),
    default=8,
    show_default=True,
    help="How many of the tokens that got worse to show.",
)
@click.option(
    "--tokens",
    type=AtLeast(0),
    metavar="WINDOW",
    help="Tell each token of this window, from 0, in --json: its losses, and when each head evicted it.",
)
@file_option("--plot", "Draw the ranked changes, and the curve that they explain (.png, .svg, .pdf).")
@with_options(*COMMON)
@click.pass_context
def explain(
    context: click.Context,
    /,
    target: str | None,
    text_options: TextOptions,
    policy_options: PolicyOptions,
    keep_tokens: int | None,
    kind: str | None,
    model_options: ModelOptions,
    newest: int,
    positions: str,
    worst: int,
    tokens: int | None,
    plot: Path | None,
    json: Path | None,
    quiet: bool,
) -> None:
    """Why did perplexity move?

    One thing about the run is changed at a time, and the run evaluated again. Without a TARGET, the run is one of
    knorm's own policies. With one: what each query could see is recovered, from the keys that
    attention was given; then the newest tokens or the first are protected, the choice made at random, a layer spared. A
    method that keeps every token, as a quantised cache, gets exact keys, values or layers back. Targets are written as
    for knorm ppl.
    """
    given = explicit(context)
    if tokens is not None and json is None:
        raise ValueError("--tokens goes into --json: name a file there, which knorm page shows")
    if target not in (None, "knorm"):
        if plot or positions == "stored":
            raise ValueError("--plot and --positions stored are about knorm's own policies: drop them, or the TARGET")
        asked = _asked(str(target), policy_options, keep_tokens, kind, given)
        fields = _explain_target(
            asked, policy_options, text_options, model_options, given=given, newest=newest, worst=worst, tokens=tokens,
            json=json, quiet=quiet,
        )  # fmt: skip
        return write_json(json, fields, "method")
    if given & {"keep_tokens", "kind"}:
        raise ValueError("--keep-tokens and --as are about a TARGET other than knorm: give one, or drop them")
    setting = load_setting(policy_options, text_options, model_options, json=json, plot=plot)

    from knorm.cli.explained import show_explanation
    from knorm.cli.figures import plot_explanation
    from knorm.evaluation.explain import explain
    from knorm.evaluation.interventions import curves_around

    runner, (policy,) = setting.runner, setting.policies
    with progress_bar(quiet) as progress:
        step = partial(_step, progress, progress.add_task("evaluations", total=None))

        options: dict[str, Any] = {"newest": newest, "worst": worst, "tokens": tokens, "stored": positions == "stored"}
        explanation = explain(runner, setting.tokenizer, policy, **options, on_step=step)
        curves = curves_around(runner, policy, CURVE.keep_ratio.split(","), on_step=step) if plot else {}
    show_explanation(make_console(quiet), explanation, f"{setting.title}, keep_ratio {policy.keep_ratio}")
    if plot:
        plot_explanation(explanation, curves, str(policy.keep_ratio), setting.title, plot)
    write_json(json, {**setting.fields, "keep_ratio": str(policy.keep_ratio), **_fields(explanation)})
    sys.exit(HOLDS)


def _step(progress: Progress, task: TaskID, name: str) -> None:
    progress.update(task, advance=1, description=name)


def _asked(
    target: str, policy_options: PolicyOptions, keep_tokens: int | None, kind: str | None, given: frozenset[str]
) -> Asked:
    """Return what the command line says about one method."""
    tokens = None if keep_tokens is None else (keep_tokens,)
    ratios = (str(policy_options.keep_ratio),) if "keep_ratio" in given else None
    return Asked((target,), ratios, tokens, kind, "auto", False)


def _explain_target(
    asked: Asked,
    policy_options: PolicyOptions,
    text_options: TextOptions,
    model_options: ModelOptions,
    *,
    given: frozenset[str],
    newest: int,
    worst: int,
    tokens: int | None,
    json: Path | None,
    quiet: bool,
) -> dict[str, Any]:
    """Explain one method, show it, and return the result as JSON has it."""
    check_outputs(json, None)
    check_device(model_options.device)
    prompt = text_options.window // 2 if policy_options.prompt_length is None else policy_options.prompt_length
    methods = methods_of(asked, replace(policy_options, prompt_length=prompt))
    if len(methods) > 1:
        raise ValueError(f"target {asked.targets[0]!r} stands for {len(methods)} methods: explain one at a time")
    console = make_console(quiet)
    model_options = fitting_model(methods, model_options, given, console)
    batch = text_options.batch if "batch" in given else 1
    ways, title = prepared(text_options, model_options, prompt, batch)

    from knorm.cli.explained import show_method
    from knorm.evaluation.explain_methods import explain_method

    with progress_bar(quiet) as progress:
        task = progress.add_task("evaluations", total=None)

        def step(name: str) -> None:
            progress.update(task, advance=1, description=name)

        found = explain_method(ways, methods[0], newest=newest, worst=worst, tokens=tokens, on_step=step)
    show_method(console, found, title)
    fields = asdict(found) | budget_fields(found.budget)
    options = {**asdict(model_options), **asdict(text_options), "batch": batch, "prompt_length": prompt}
    fields["checked"] = fields.pop("check")
    del fields["budget"], fields["explanation"]
    return {**options, **_fields(found.explanation), **fields}


def _fields(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation as JSON has it."""
    fields = asdict(explanation)
    for token in fields["worst"]:
        token["evicted_token"] = token.pop("evicted")
    return fields | {"conclusions": fields.pop("verdict")}
