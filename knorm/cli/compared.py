"""`knorm ppl TARGET ...`: what any methods cost in quality, and for what memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from knorm.cli.options import ModelOptions, PolicyOptions, make_console, progress_bar, waiting
from knorm.cli.setting import TextOptions

if TYPE_CHECKING:
    from rich.console import Console

    from knorm.evaluation.ways import Evaluation, How, Ways
    from knorm.methods.budget import Budget
    from knorm.methods.method import Method


@dataclass(frozen=True)
class Asked:
    """Hold what the command line says about methods.

    Attributes:
        targets: as they were written.
        ratios: of --keep-ratio; None where it was not given.
        tokens: of --keep-tokens; None where it was not given.
        kind: of --as.
        how: the way to run them.
        facts: whether recall of the narrative's facts is asked for.
    """

    targets: tuple[str, ...]
    ratios: tuple[str, ...] | None
    tokens: tuple[int, ...] | None
    kind: str | None
    how: How
    facts: bool


def methods_of(asked: Asked, policy_options: PolicyOptions) -> list[Method]:
    """Make a method for each target and budget.

    Args:
        asked: what the command line says about methods.
        policy_options: of knorm's own method.

    Returns:
        The methods, in the order of targets, then budgets.

    Raises:
        ValueError: a target that does not exist, or takes no budget of this kind.
    """
    from knorm.methods.budget import TakesNoBudget
    from knorm.methods.door import with_budgets
    from knorm.methods.policies import PolicyMethod
    from knorm.methods.targets import expanded

    if asked.ratios is not None and asked.tokens is not None:
        raise ValueError("--keep-ratio and --keep-tokens are two budgets: give one of them")
    budgets: list[dict[str, Any]] = [{"keep_ratio": ratio} for ratio in asked.ratios or ()]
    budgets += [{"keep_tokens": tokens} for tokens in asked.tokens or ()]
    made: list[Method] = []
    for pattern in asked.targets:
        for target in expanded(pattern):
            if target == "knorm":
                if asked.tokens is not None:
                    raise TakesNoBudget("knorm keeps a share of the cache: give --keep-ratio, not --keep-tokens")
                options = replace(policy_options, keep_ratio=asked.ratios or ("0.5",))
                made += [PolicyMethod("knorm", policy) for policy in options.policies()]
            else:  # one of the many that a pattern stands for may have a budget of its own
                made += with_budgets(target, asked.kind, budgets, optional=pattern != target)
    if not made:
        raise ValueError(f"{', '.join(asked.targets)} stands for nothing")
    return made


def compare_methods(
    asked: Asked,
    policy_options: PolicyOptions,
    text_options: TextOptions,
    model_options: ModelOptions,
    *,
    given: frozenset[str],
    plot: Path | None,
    quiet: bool,
    verbose: bool,
) -> tuple[bool, dict[str, Any]]:
    """Measure, show and draw; True where every method ran, and the results as JSON has them."""
    from knorm.methods.method import MethodError

    prompt = text_options.window // 2 if policy_options.prompt_length is None else policy_options.prompt_length
    policy_options = replace(policy_options, prompt_length=prompt)
    methods = methods_of(asked, policy_options)
    console = make_console(quiet)
    model_options = fitting_model(methods, model_options, given, console)
    batch = text_options.batch if "batch" in given else 1
    ways, title = prepared(text_options, model_options, prompt, batch)

    rows, failed = [], {}
    with progress_bar(quiet) as progress:
        task = progress.add_task("methods", total=len(methods) + 1)
        rows.append(ways.control())
        for method in methods:
            progress.update(task, advance=1, description=method.name)
            try:
                rows.append(ways.evaluate(method, asked.how))
            except MethodError as error:
                if len(methods) == 1:
                    raise
                failed[method.name] = str(error)
    from knorm.cli.tables import show_methods

    recalls = _recalled(methods, ways) if asked.facts else {}
    show_methods(console, rows, failed, title, recalls, prompt_length=prompt, verbose=verbose)
    if plot:
        from knorm.cli.figures import plot_frontier

        plot_frontier(rows, title, plot)
    fields = {
        **asdict(model_options), **asdict(text_options), "batch": batch, "prompt_length": prompt,
        "rows": [row_fields(row) for row in rows], "failed": failed,
        "facts": {name: asdict(recall) for name, recall in recalls.items()},
    }  # fmt: skip
    return not failed, fields


def fitting_model(
    methods: Sequence[Method], model_options: ModelOptions, given: frozenset[str], console: Console
) -> ModelOptions:
    """Choose a model that the methods support, and say so, where none is asked for.

    Args:
        methods: that will be opened on it.
        model_options: as asked for.
        given: the parameters that the command line gives.
        console: to print to.

    Returns:
        The model to load.
    """
    from knorm.methods.presses import PressMethod

    if "model" in given or not any(isinstance(method, PressMethod) for method in methods):
        return model_options
    console.print("Presses support no GPT-NeoX: the model is embedded-llama, unless --model names another.")
    return replace(model_options, model="embedded-llama")


def prepared(text_options: TextOptions, model_options: ModelOptions, prompt: int, batch: int) -> tuple[Ways, str]:
    """Load the model and the text.

    Args:
        text_options: the text and its windows.
        model_options: the model.
        prompt: tokens of the first call.
        batch: windows at a time.

    Returns:
        The ways to run methods on them, and a title.

    Raises:
        ValueError: options that cannot work.
    """
    with waiting():
        from knorm.evaluation.ways import Ways
        from knorm.evaluation.windows import cut_windows
        from knorm.models import load_text

        model, tokenizer = model_options.load()
        text = load_text(text_options.text, text_options.column)
    windows = cut_windows(tokenizer, text, text_options.window, text_options.windows)
    ways = Ways(model, windows, prompt, batch=batch, tokenizer=tokenizer)
    count, length = windows.input_ids.shape
    many = "1 window" if count == 1 else f"{count} windows"
    return ways, f"{model_options.model} on {text_options.text}: {many} of {length} tokens, prompt {prompt}"


def _recalled(methods: Sequence[Method], ways: Ways) -> dict[str, Any]:
    from knorm.evaluation.facts import fact_windows, recall_of
    from knorm.methods.method import MethodError

    facts, recalls = fact_windows(ways.tokenizer, ways.ids.shape[1]), {}  # type: ignore[arg-type]
    for method in methods:
        try:
            recalls[method.label] = recall_of(ways.model, facts, method, tokenizer=ways.tokenizer, batch=ways.batch)
        except MethodError:
            continue  # said already
    return recalls


def row_fields(row: Evaluation) -> dict[str, Any]:
    """Return an Evaluation as JSON has it."""
    return {
        "method": row.method,
        **budget_fields(row.budget),
        "how": row.how,
        "checked": row.check,
        "changed": row.changed,
        **asdict(row.damage),
        "bytes_per_token": _known(row.bytes_per_token),
        "bytes_per_token_full": _known(row.bytes_full / row.tokens_before),
        "tokens_seen": row.tokens_seen.tolist(),
        "tokens_before": row.tokens_before,
        "seconds": row.seconds,
        "kl_at_least": row.kl_at_least,
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def budget_fields(budget: Budget | None) -> dict[str, Any]:
    """Return a budget as JSON has it: a share or a number of tokens; neither where a method has its own."""
    return {"keep_ratio": budget and budget.keep_ratio, "keep_tokens": budget and budget.keep_tokens}


def explicit(context: click.Context) -> frozenset[str]:
    """Return the names of the parameters that the command line gives."""
    source = click.core.ParameterSource.COMMANDLINE
    return frozenset(name for name in context.params if context.get_parameter_source(name) == source)
