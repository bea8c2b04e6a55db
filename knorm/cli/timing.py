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
        "--prompt-characters", type=Numbers(int), default="512,1024", show_default=True, help="A prompt each."
    ),
    click.option("--prompt-tokens", type=Numbers(int), help="The same in tokens, instead."),
    click.option("--new-tokens", type=Numbers(int), default="50,100", show_default=True, help="New tokens per prompt."),
    click.option("--batch", default=1, show_default=True, help="Sequences at a time."),
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
    click.option("--threads", default=1, show_default=True, help="Of PyTorch on the CPU; more wait for each other."),
    click.option(
        "--seconds", default=25.0, show_default=True, help="Of measuring; at least 8 blocks have to fit twice that."
    ),
    click.option(
        "--blocks", type=int, help="Blocks instead of seconds; with --against in each round.  [8 at least; 2]"
    ),
    click.option("--margin", type=float, help="Slowdown in per cent that is no concern.  [5 on a CPU, 2.5 on CUDA]"),
    click.option("--strict", is_flag=True, help="Exit code 1 for INCONCLUSIVE too."),
    click.option("--against", metavar="REF", help="Compare with another commit of this project, in fresh processes."),
    click.option("--rounds", default=8, show_default=True, help="With --against: fresh pairs of processes."),
    click.option("--allow-counters", is_flag=True, help="With --against: show counters, do not judge them."),
    click.option(
        "--reported", is_flag=True, help="Show published TTFT, TPOT and tokens/s too, with a verdict per claim."
    ),
)
