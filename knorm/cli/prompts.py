"""Options of `knorm bench`: what is generated from, and how long it is measured."""

from __future__ import annotations

from dataclasses import dataclass

import click

from knorm.cli.numbers import Above, AtLeast, Numbers
from knorm.cli.options import bundled
from knorm.limits import BLOCKS

_NOISE = "fewer cannot tell noise from change"


@dataclass(frozen=True)
class PromptOptions:
    """Describe the prompts."""

    text: str
    prompt_characters: tuple[int, ...]
    prompt_tokens: tuple[int, ...] | None
    new_tokens: tuple[int, ...]
    batch: int


prompt_options = bundled(
    PromptOptions,
    "prompt_options",
    click.option(
        "--text", default="encyclopedia,narrative", show_default=True, help="Texts of the prompts, which take turns."
    ),
    click.option(
        "--prompt-characters",
        type=Numbers(1),
        default="512,1024",
        show_default=True,
        help="Lengths of the prompts in characters, each at least 1.",
    ),
    click.option("--prompt-tokens", type=Numbers(1), help="Lengths in tokens instead, each at least 1."),
    click.option(
        "--new-tokens",
        type=Numbers(2),
        default="50,100",
        show_default=True,
        help="New tokens after each prompt, at least 2: the time per token is that of those after the first.",
    ),
    click.option("--batch", type=AtLeast(1), default=1, show_default=True, help="Sequences generated at a time."),
)


@dataclass(frozen=True)
class TimingOptions:
    """Describe how long to measure, and against what."""

    threads: int
    seconds: float
    blocks: int | None
    margin: float | None
    strict: bool
    against: str | None
    rounds: int
    allow_counters: bool
    reported: bool


timing_options = bundled(
    TimingOptions,
    "timing_options",
    click.option(
        "--threads",
        type=AtLeast(1),
        default=1,
        show_default=True,
        help="Threads of PyTorch on a CPU; more than one wait for each other.",
    ),
    click.option(
        "--seconds",
        type=Above("seconds"),
        default=25.0,
        show_default=True,
        help=f"Time to measure; {BLOCKS} blocks have to fit in twice that time.",
    ),
    click.option(
        "--blocks",
        type=AtLeast(1),
        show_default="with --against 2",
        help=f"Number of blocks, in place of --seconds, at least {BLOCKS}; with --against, in each round, at least 1.",
    ),
    click.option(
        "--margin",
        type=Above("a slowdown in per cent"),
        show_default="5 on a CPU, 2.5 on CUDA",
        help="Slowdown in per cent that is acceptable, below 1000.",
    ),
    click.option("--strict", is_flag=True, help="Exit with code 1 for INCONCLUSIVE too."),
    click.option("--against", metavar="REF", help="Compare with another commit of this project, in fresh processes."),
    click.option(
        "--rounds",
        type=AtLeast(BLOCKS, _NOISE),
        default=8,
        show_default=True,
        help="With --against: number of fresh pairs of processes.",
    ),
    click.option("--allow-counters", is_flag=True, help="With --against: show the counters without judging them."),
    click.option("--reported", is_flag=True, help="Show published TTFT, TPOT and tokens/s too, and judge each claim."),
)
