"""What `knorm ppl` and `knorm explain` work on: options, and the model, text and policies that they name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from knorm.cli.options import Numbers, check_device

_text_options = (
    click.option(
        "--text",
        default="narrative",
        show_default=True,
        help="narrative, encyclopedia, wikitext2, pg19, a .txt, .parquet or .jsonl, or hub:name@commit:files.parquet.",
    ),
    click.option("--column", default="text", show_default=True, help="The column of a .parquet or .jsonl."),
    click.option("--window", default=512, show_default=True, help="Tokens per window."),
    click.option("--windows", default=8, show_default=True, help="Windows of the text, from its start."),
)
_policy_options = (
    click.option(
        "--prune-after", type=int, help="Tokens a cache must hold to be compressed.  [128 if streaming, else 0]"
    ),
    click.option("--skip-layers", type=Numbers(int), default="", help="Layers never compressed, e.g. 0,1."),
    click.option(
        "--protocol",
        type=click.Choice(["prefill", "streaming"]),
        help="Compress once, after the prompt, or after every token.  [prefill with --prompt-length, else streaming]",
    ),
    click.option("--prompt-length", type=int, help="Tokens of the first call; only those after it are scored.  [1]"),
    click.option("--batch", default=8, show_default=True, help="Windows at a time."),
)
_CURVE = "1.0,0.95,0.9,0.8,0.7,0.5,0.3,0.1"


@dataclass(frozen=True)
class _Setting:
    """What `ppl` and `explain` work on, all of it checked before any of it is evaluated."""

    model: Any
    tokenizer: Any
    windows: Any
    policies: list[Any]
    prompt_length: int
    title: str
    fields: dict[str, Any]


def _setting(given: dict[str, Any], ratios: tuple[str, ...], plot: Path | None, json: Path | None) -> _Setting:
    import torch

    from knorm.evaluation.windows import cut_windows
    from knorm.models import hush, load_model, load_text
    from knorm.perplexity import check_run
    from knorm.policy import Policy

    prompted = given["prompt_length"] is not None
    protocol: Any = given["protocol"] or ("prefill" if prompted else "streaming")
    prune_after = given["prune_after"]
    if prune_after is None:
        prune_after = 128 if protocol == "streaming" else 0
    if protocol == "prefill" and not prompted:
        raise ValueError("a prefill compresses once, after the prompt: give --prompt-length, or --protocol streaming")
    prompt_length = given["prompt_length"] if prompted else 1
    if not ratios:
        raise ValueError("--keep-ratio is empty, but should be ratios in (0, 1], e.g. 1.0,0.5")
    options = {name: given[name] for name in ("skip_layers", "protect_first", "protect_recent", "score", "seed")}
    policies = [Policy(ratio, prune_after=prune_after, protocol=protocol, **options) for ratio in ratios]
    if given["batch"] < 1:
        raise ValueError(f"--batch {given['batch']}, but should be at least 1")
    if json and plot and json.resolve() == plot.resolve():
        raise ValueError(f"--json and --plot are both {json}, but should be two files")
    if plot:
        from knorm.cli.figures import check_plot

        check_plot(plot)
    device = check_device(given["device"])
    hush()
    model, tokenizer = load_model(given["model"], dtype=getattr(torch, given["dtype"]), device=device)
    windows = cut_windows(tokenizer, load_text(given["text"], given["column"]), given["window"], given["windows"])
    for policy in policies:
        check_run(model, windows.input_ids, policy, prompt_length)
    count, length = windows.input_ids.shape
    many = "1 window" if count == 1 else f"{count} windows"
    title = f"{given['model']} on {given['text']}: {many} of {length} tokens, {protocol}, "
    title += f"prune_after {prune_after}"
    if policies[0].skip_layers:
        skipped = policies[0].skip_layers
        title += f", layer{'s' if skipped[1:] else ''} {', '.join(map(str, skipped))} skipped"
    fields = {name: given[name] for name in ("model", "text", "window", "windows", "dtype", "device", "batch")}
    fields["policy"] = {"protocol": protocol, "prune_after": prune_after, "prompt_length": prompt_length, **options}
    return _Setting(model, tokenizer, windows, policies, prompt_length, title, fields)
