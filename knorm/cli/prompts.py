"""Options of `knorm bench`: what is generated from, and how long it is measured."""

from __future__ import annotations

from dataclasses import dataclass

import click

from knorm.cli.options import Numbers, bundled


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
        type=Numbers(int),
        default="512,1024",
        show_default=True,
        help="Lengths of the prompts in characters.",
    ),
    click.option("--prompt-tokens", type=Numbers(int), help="Lengths in tokens instead of characters."),
    click.option(
        "--new-tokens", type=Numbers(int), default="50,100", show_default=True, help="New tokens after each prompt."
    ),
    click.option("--batch", default=1, show_default=True, help="Sequences generated at a time."),
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
        default=1,
        show_default=True,
        help="Threads of PyTorch on a CPU; more than one wait for each other.",
    ),
    click.option(
        "--seconds", default=25.0, show_default=True, help="Time to measure; 8 blocks have to fit in twice that time."
    ),
    click.option(
        "--blocks",
        type=int,
        help="Number of blocks, in place of --seconds; with --against, in each round.  [at least 8; 2]",
    ),
    click.option("--margin", type=float, help="Slowdown in per cent that is acceptable.  [5 on a CPU, 2.5 on CUDA]"),
    click.option("--strict", is_flag=True, help="Exit with code 1 for INCONCLUSIVE too."),
    click.option("--against", metavar="REF", help="Compare with another commit of this project, in fresh processes."),
    click.option("--rounds", default=8, show_default=True, help="With --against: number of fresh pairs of processes."),
    click.option("--allow-counters", is_flag=True, help="With --against: show the counters without judging them."),
    click.option("--reported", is_flag=True, help="Show published TTFT, TPOT and tokens/s too, and judge each claim."),
)
