"""What the commands share: exit codes, options, the console, results as JSON."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from knorm import __version__

HOLDS, REFUTED, WRONG_USAGE, BROKEN = 0, 1, 2, 3


def make_console(quiet: bool) -> Any:
    """Where a command prints."""
    from rich.console import Console

    console = Console(quiet=quiet, highlight=False)
    if not console.is_terminal:
        console.width = 140  # a log has no edge
    return console


def environment() -> dict[str, str]:
    """What results depend on."""
    packages = ("torch", "transformers", "numpy")
    return {
        "knorm": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{p: metadata.version(p) for p in packages},
    }


def check_device(name: str) -> str:
    """A device that is there: refused otherwise, before anything is loaded."""
    if name == "cpu":
        return name
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


def file_option(flag: str, text: str) -> Any:
    """An option that names a file to write."""
    return click.option(flag, type=click.Path(path_type=Path), metavar="FILE", callback=_writable, help=text)


COMMON = (
    file_option("--json", "Write the results as JSON."),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
)


MODEL = (
    click.option(
        "--model", default="embedded", show_default=True, help="embedded, a folder, or organisation/name@commit."
    ),
    click.option("--dtype", type=click.Choice(["float32", "float64", "bfloat16", "float16"]), default="float32"),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ..."),
)
SCORING = (
    click.option("--protect-first", default=0, show_default=True, help="Tokens at the start never evicted."),
    click.option("--protect-recent", default=0, show_default=True, help="Newest tokens never evicted."),
    click.option(
        "--score", type=click.Choice(["low_norm", "high_norm", "random"]), default="low_norm", show_default=True
    ),
    click.option("--seed", default=0, show_default=True, help="Of the random score."),
)


def with_options(*options: Any) -> Any:
    """Several options at once."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def progress_bar(quiet: bool) -> Any:
    """On a terminal's stderr, gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    errors = Console(stderr=True)
    return Progress(*columns, console=errors, transient=True, disable=quiet or not errors.is_terminal)


class Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]
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


def write_json(file: Path | None, result: dict[str, Any]) -> None:
    """A result and its environment, as strict JSON, where a file is named."""
    if file is not None:
        text = json.dumps({"environment": environment(), **result}, indent=1, allow_nan=False)
        file.write_text(text + "\n", encoding="utf-8")
