"""What `knorm ppl` and `knorm explain` work on: the model, text and policies that their options name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from knorm.cli.numbers import AtLeast
from knorm.cli.options import ModelOptions, PolicyOptions, bundled, check_outputs, waiting
from knorm.policy import Policy
from knorm.sources import find_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from knorm.evaluation.runner import Runner


@dataclass(frozen=True)
class TextOptions:
    """Name a text, the windows it is cut into, and how many are run at a time."""

    text: str
    column: str
    window: int
    windows: int
    batch: int


text_options = bundled(
    TextOptions,
    "text_options",
    click.option(
        "--text",
        default="narrative",
        show_default=True,
        help="narrative, encyclopedia, wikitext2, pg19, a .txt, .parquet or .jsonl, or hub:name@commit:files.parquet.",
    ),
    click.option("--column", default="text", show_default=True, help="The column of a .parquet or .jsonl."),
    click.option("--window", type=AtLeast(2), default=512, show_default=True, help="Tokens per window."),
    click.option(
        "--windows", type=AtLeast(1), default=8, show_default=True, help="How many windows of the text, from its start."
    ),
    click.option("--batch", type=AtLeast(1), default=8, show_default=True, help="Windows that run at a time."),
)


@dataclass(frozen=True)
class Setting:
    """Hold what `ppl` and `explain` work on, all of it checked before any of it is evaluated.

    Attributes:
        runner: the model, the windows and their prompt.
        tokenizer: of the model.
        policies: one for each ratio.
        title: all that in a line.
        fields: the same as JSON has it.
    """

    runner: Runner
    tokenizer: PreTrainedTokenizerFast
    policies: list[Policy]
    title: str
    fields: dict[str, Any]


def load_setting(
    policy_options: PolicyOptions,
    text_options: TextOptions,
    model_options: ModelOptions,
    *,
    json: Path | None,
    plot: Path | None,
) -> Setting:
    """Load the model and the text, once all options are known to work, the cheapest to find first.

    Args:
        policy_options: the policies.
        text_options: the text and its windows.
        model_options: the model.
        json: the results' file, if one is asked for.
        plot: the figure's file, likewise.

    Returns:
        All that `ppl` and `explain` work on.

    Raises:
        ValueError: options that cannot work.
    """
    policies = policy_options.policies()
    check_outputs(json, plot)
    find_text(text_options.text)
    model_options.check()

    with waiting():
        from knorm.evaluation.runner import Runner
        from knorm.evaluation.windows import cut_windows
        from knorm.models import load_text
        from knorm.perplexity import check_run

        model, tokenizer = model_options.load()
        text = load_text(text_options.text, text_options.column)
        windows = cut_windows(tokenizer, text, text_options.window, text_options.windows)
    prompt_length = 1 if policy_options.prompt_length is None else policy_options.prompt_length
    for policy in policies:
        check_run(model, windows.input_ids, policy, prompt_length)
    count, length = windows.input_ids.shape
    first = policies[0]
    many = "1 window" if count == 1 else f"{count} windows"
    title = f"{model_options.model} on {text_options.text}: {many} of {length} tokens, {first.protocol}, "
    title += f"prune_after {first.prune_after}"
    if skipped := first.skip_layers:
        title += f", layer{'s' if skipped[1:] else ''} {', '.join(map(str, skipped))} skipped"
    shared = {name: value for name, value in first.as_json().items() if name != "keep_ratio"}
    fields = asdict(model_options) | asdict(text_options) | {"policy": shared | {"prompt_length": prompt_length}}
    runner = Runner(model, windows, prompt_length, text_options.batch)
    return Setting(runner, tokenizer, policies, title, fields)
