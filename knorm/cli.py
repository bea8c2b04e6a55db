"""The commands. Everything heavy is imported when a command needs it."""

from __future__ import annotations

import json
import os
import platform
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from knorm import __version__

HOLDS, REFUTED, WRONG_USAGE = 0, 1, 2


def _console(quiet: bool) -> Any:
    from rich.console import Console

    console = Console(quiet=quiet, highlight=False)
    if not console.is_terminal:
        console.width = 140  # a log has no edge
    return console


def _environment() -> dict[str, str]:
    packages = ("torch", "transformers", "numpy")
    return {
        "knorm": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{p: metadata.version(p) for p in packages},
    }


def _hush_transformers() -> None:
    """It would draw a bar for each weights file, also into a log, and warn of what load_model refuses."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _device(name: str) -> str:
    """A device that is there: refused otherwise, before anything is loaded."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}, but should be cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}, but should be cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}, but PyTorch sees no CUDA device: drop the flag, or install a CUDA build")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}, but there are only devices 0 to {torch.cuda.device_count() - 1}")
    return name


def _writable(_context: click.Context, parameter: click.Parameter, file: Path | None) -> Path | None:
    """Find out before the work, not after it, that a result cannot be written."""
    if file is not None:
        if file.is_dir() or not file.parent.is_dir():
            problem = "it is a folder" if file.is_dir() else f"there is no folder {file.parent}"
            raise click.BadParameter(f"cannot write {file}: {problem}", param=parameter)
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise click.BadParameter(f"cannot write {file}: no permission", param=parameter)
    return file


def _file(flag: str, text: str) -> Any:
    return click.option(flag, type=click.Path(path_type=Path), metavar="FILE", callback=_writable, help=text)


_common = (
    _file("--json", "Write the results as JSON."),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
)


def _with(*options: Any) -> Any:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class _Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Numbers separated by commas, kept as they are written."""

    name = "N[,N...]"

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.kind(part.strip()) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} should be numbers separated by commas, e.g. 0,1", param, ctx)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(context: click.Context, verbose: bool) -> None:
    """Is a compressed KV cache correct, and did anything move?

    Exit code 0: all holds. 1: something was refuted or moved. 2: wrong usage.
    """
    context.obj = verbose


@cli.command()
@_with(*_common)
def verify(json: Path | None, quiet: bool) -> None:
    """Check knorm itself on the embedded model: laws, one pass against the loop, the perplexity curve."""
    from rich.text import Text

    from knorm.report import curve_table
    from knorm.verify import verify as run

    _hush_transformers()
    console, verdicts = _console(quiet), []
    for verdict in run():
        verdicts.append(verdict)
        line = Text.assemble(
            ("holds    ", "green") if verdict.holds else ("REFUTED  ", "bold red"),
            f"{verdict.claim} ",
            (f"[{verdict.evidence}; {verdict.seconds:.1f} s]", "dim"),
        )
        console.print(line, soft_wrap=not console.is_terminal)  # a log has no edge
        if verdict.rows:
            console.print(curve_table(verdict.rows), "")
    refuted = sum(not verdict.holds for verdict in verdicts)
    console.print(
        f"{len(verdicts) - refuted} hold, {refuted} refuted, in {sum(v.seconds for v in verdicts):.0f} s",
        style="bold red" if refuted else "bold green",
    )
    _write(json, {"verdicts": [{**v.__dict__, "rows": [r.__dict__ for r in v.rows]} for v in verdicts]})
    sys.exit(REFUTED if refuted else HOLDS)


@cli.command()
@click.option("--model", default="embedded", show_default=True, help="embedded, a folder, or organisation/name@commit.")
@click.option(
    "--text",
    default="narrative",
    show_default=True,
    help="narrative, encyclopedia, wikitext2, pg19, a .txt, .parquet or .jsonl, or hub:name@commit:files.parquet.",
)
@click.option("--column", default="text", show_default=True, help="The column of a .parquet or .jsonl.")
@click.option("--window", default=512, show_default=True, help="Tokens per window.")
@click.option("--windows", default=8, show_default=True, help="Windows of the text, from its start.")
@click.option(
    "--keep-ratio",
    type=_Numbers(str),
    default="1.0,0.95,0.9,0.8,0.7,0.5,0.3,0.1",
    show_default=True,
    help="A row each.",
)
@click.option("--prune-after", type=int, help="Tokens a cache must hold to be compressed.  [128 if streaming, else 0]")
@click.option("--skip-layers", type=_Numbers(int), default="", help="Layers never compressed, e.g. 0,1.")
@click.option("--protect-first", default=0, show_default=True, help="Tokens at the start never evicted.")
@click.option("--protect-recent", default=0, show_default=True, help="Newest tokens never evicted.")
@click.option("--score", type=click.Choice(["low_norm", "high_norm", "random"]), default="low_norm", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the random score.")
@click.option(
    "--protocol",
    type=click.Choice(["prefill", "streaming"]),
    help="Compress once, after the prompt, or after every token.  [prefill with --prompt-length, else streaming]",
)
@click.option("--prompt-length", type=int, help="Tokens of the first call; only those after it are scored.  [1]")
@click.option("--dtype", type=click.Choice(["float32", "float64", "bfloat16", "float16"]), default="float32")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option("--batch", default=8, show_default=True, help="Windows at a time.")
@click.option("--stream", is_flag=True, help="Run the loop too, and compare.")
@_file("--plot", "Draw the curve (.png, .svg, .pdf).")
@_with(*_common)
def ppl(json: Path | None, plot: Path | None, quiet: bool, **given: Any) -> None:
    """Perplexity of a text at each ratio, exactly, from one forward pass each."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from knorm.evaluation import cut_windows, evaluate
    from knorm.models import load_model, load_text
    from knorm.perplexity import NEAR_TIE
    from knorm.policy import Policy
    from knorm.report import curve_table, plot_curve

    console = _console(quiet)
    prompted = given["prompt_length"] is not None
    protocol: Any = given["protocol"] or ("prefill" if prompted else "streaming")
    prune_after = given["prune_after"]
    if prune_after is None:
        prune_after = 128 if protocol == "streaming" else 0
    if protocol == "prefill" and not prompted:
        raise ValueError("a prefill compresses once, after the prompt: give --prompt-length, or --protocol streaming")
    prompt_length = given["prompt_length"] if prompted else 1
    if not given["keep_ratio"]:
        raise ValueError("--keep-ratio is empty, but should be ratios in (0, 1], e.g. 1.0,0.5")
    names = ("skip_layers", "protect_first", "protect_recent", "score", "seed")
    options = {name: given[name] for name in names}
    policies = [Policy(ratio, prune_after=prune_after, protocol=protocol, **options) for ratio in given["keep_ratio"]]
    if given["batch"] < 1:
        raise ValueError(f"--batch {given['batch']}, but should be at least 1")
    if plot and plot.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {plot}, but should end in .png, .svg or .pdf")
    device = _device(given["device"])
    _hush_transformers()
    model, tokenizer = load_model(given["model"], dtype=getattr(torch, given["dtype"]), device=device)
    windows = cut_windows(tokenizer, load_text(given["text"], given["column"]), given["window"], given["windows"])

    count, length = windows.input_ids.shape
    steps = len(policies) * -(-count // given["batch"])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=quiet or not errors.is_terminal) as progress:
        task = progress.add_task("windows x ratios", total=steps)
        rows = []
        for policy in policies:
            progress.update(task, description=f"ratio {policy.keep_ratio}")
            rows.append(
                evaluate(
                    model,
                    windows,
                    policy,
                    prompt_length=prompt_length,
                    stream=given["stream"],
                    batch=given["batch"],
                    on_batch=lambda: progress.advance(task),
                )
            )
    text = f"{given['model']} on {given['text']}: {count} windows of {length} tokens"
    title = f"{text},\n{protocol}, prune_after {prune_after}"
    if policies[0].skip_layers:
        title += f", layers {', '.join(map(str, policies[0].skip_layers))} skipped"
    console.print(curve_table(rows, title.replace("\n", " ")))
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
    if plot:
        plot_curve(rows, title, plot)
    policy_fields = {"protocol": protocol, "prune_after": prune_after, "prompt_length": prompt_length, **options}
    settings = {name: given[name] for name in ("model", "text", "window", "windows", "dtype", "device", "batch")}
    _write(json, {**settings, "policy": policy_fields, "holds": holds, "rows": [row.__dict__ for row in rows]})
    sys.exit(HOLDS if holds else REFUTED)


def _write(file: Path | None, result: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps({"environment": _environment(), **result}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run a command; wrong input is one line and exit code 2, a traceback with -v."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (ValueError, TypeError, OSError) as error:
        if {"-v", "--verbose"} & set(sys.argv[1:2]):
            traceback.print_exc()
            sys.exit(WRONG_USAGE)
        click.echo(f"knorm: {error}", err=True)
        sys.exit(WRONG_USAGE)
