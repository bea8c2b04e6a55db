"""Policies against the uncompressed cache, in one process: times, memory, exact counters, and a verdict each."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import Any

import torch

from knorm.bench.counters import Counters, count
from knorm.bench.latency import (
    METRICS,
    Arm,
    Prompt,
    Sample,
    Stored,
    attending,
    check_fits,
    log_ratio,
    measure,
    without_interruptions,
)
from knorm.models import load_text
from knorm.policy import Policy
from knorm.statistics import ALPHA, Comparison, Verdict, compare, overall

WARM_UP = 1
GATED = ("ttft", "tpot")  # throughput says the same as both together


@dataclass(frozen=True)
class Times:
    """Hold what one arm took: each is the median over blocks, then the mean over prompts.

    ttft         seconds to the first token
    tpot         seconds of a decode step, mean over steps; tpot_median, tpot_p99: over all steps of all blocks
    throughput   tokens a second, of all sequences of the batch
    """

    ttft: float
    tpot: float
    tpot_median: float
    tpot_p99: float
    throughput: float


def summarise(samples: Sequence[Sample], prompts: Sequence[tuple[int, int]]) -> Times:
    """Summarise one arm's `samples`, one a block; `prompts` are (sequences, new tokens) of each."""
    medians = {m: [statistics.median(column) for column in zip(*(s.seconds(m) for s in samples), strict=True)]
               for m in METRICS}  # fmt: skip
    pooled = [torch.tensor([step for s in samples for step in s.steps[i]]).double() for i in range(len(prompts))]
    quantile = {q: statistics.fmean(float(steps.quantile(q)) for steps in pooled) for q in (0.5, 0.99)}
    speed = [batch * new / total for (batch, new), total in zip(prompts, medians["throughput"], strict=True)]
    return Times(
        statistics.fmean(medians["ttft"]), statistics.fmean(medians["tpot"]), quantile[0.5], quantile[0.99],
        statistics.fmean(speed),
    )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Hold what one arm took.

    Attributes:
        name: as tables have it.
        policy: None for the uncompressed cache, and for a method.
        times: over all blocks.
        counters: of one generation.
        peak: bytes allocated at most while decoding; None on a CPU.
        logs: by metric, a log-ratio to the uncompressed cache for each block; empty for that itself.
        comparisons: by metric, the verdict on them.
    """

    name: str
    policy: Policy | None
    times: Times
    counters: Counters
    peak: int | None
    logs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict | None:
        """On TTFT and TPOT; None for the baseline."""
        return overall(self.comparisons[metric].verdict for metric in GATED) if self.comparisons else None


@dataclass(frozen=True)
class Bench:
    """Hold what a run gave.

    Attributes:
        rows: one for each arm, the uncompressed one first.
        samples: [block][arm], as measured.
        interrupted: steps that took over 1.5 times their usual time; where they are few, they count as that
            (latency.without_interruptions).
        warm_up: generations of each arm that were run before, and discarded.
        seconds: how long it measured, warm-up included.
    """

    rows: tuple[Row, ...]
    samples: tuple[tuple[Sample, ...], ...]
    interrupted: int
    warm_up: int
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """Join the verdicts of all policies."""
        return overall(row.verdict for row in self.rows if row.verdict)


def name_of(policy: Policy | None) -> str:
    """Name an arm as tables do: by the ratio of its `policy`, or as "uncompressed" for None."""
    return "uncompressed" if policy is None else str(policy.keep_ratio)


def make_prompts(
    tokenizer: Any,
    texts: Sequence[str],
    lengths: Sequence[int],
    new_tokens: Sequence[int],
    *,
    characters: bool = True,
    batch: int = 1,
    device: str = "cpu",
) -> dict[str, Prompt]:
    """Make prompts from the starts of texts, which take turns; every sequence of a batch is the same.

    Args:
        tokenizer: of the model.
        texts: what models.load_text takes.
        lengths: of each prompt, in characters or in tokens.
        new_tokens: of each prompt, or one number for all.
        characters: False if the lengths are in tokens.
        batch: sequences of each prompt.
        device: where the tokens lie.

    Returns:
        Prompts by name, whose ids are int64 [batch, tokens].

    Raises:
        ValueError: lengths that are none, and a text that is too short.
    """
    if not lengths or not texts or len(new_tokens) not in (1, len(lengths)):
        raise ValueError(
            f"prompts of {[*lengths]} from {len(texts)} texts with {[*new_tokens]} new tokens, but there should be a "
            "text, a prompt, and one number of new tokens for all prompts or one for each: see --text, "
            "--prompt-characters and --new-tokens"
        )
    if batch < 1 or min(lengths) < 1:
        raise ValueError(f"--batch {batch} and prompts of {[*lengths]}, but both should be at least 1")
    new = new_tokens if len(new_tokens) > 1 else [*new_tokens] * len(lengths)
    prompts = {}
    unit = "characters" if characters else "tokens"
    for name, length, tokens in zip(cycle(texts), lengths, new, strict=False):
        text = load_text(name)
        text = text[:length] if characters else text[: 20 * length]  # no token is longer than that on average
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
        ids = ids if characters else ids[:, :length]
        if (len(text) if characters else ids.shape[1]) < length:
            raise ValueError(f"{name} has no {length} {unit}: give a shorter prompt or another --text")
        prompts[f"{name}, {length} {unit}"] = Prompt(ids.expand(batch, -1).to(device), tokens)
    if len(prompts) < len(lengths):
        raise ValueError(f"prompts of {[*lengths]} {unit}: two are the same, but each should be another")
    return prompts


def bench(
    model: Any,
    prompts: Mapping[str, Prompt],
    policies: Iterable[Policy],
    *,
    margin: float,
    alpha: float = ALPHA,
    blocks: int | None = None,
    seconds: float = 30.0,
    on_block: Callable[[], None] = lambda: None,
) -> Bench:
    """Time every policy and the uncompressed cache in turns.

    Args:
        model: a causal language model of transformers.
        prompts: by name.
        policies: an arm for each.
        margin: slowdown, as a share, that a policy may have.
        alpha: of all verdicts together: each gets its part.
        blocks: as latency.measure takes them.
        seconds: as latency.measure takes them.
        on_block: called after each block.

    Returns:
        Times, counters and verdicts of each arm, the uncompressed one first.

    Raises:
        ValueError: a prompt that does not fit, and fewer than 8 blocks.
    """
    check_fits(model, prompts)
    all_prompts, new = list(prompts.values()), [prompt.new_tokens for prompt in prompts.values()]
    arms = [Arm(model, all_prompts, policy) for policy in (None, *policies)]
    longest = max(range(len(new)), key=lambda index: all_prompts[index].ids.shape[1])
    with attending(model):
        begin = time.perf_counter()
        raw = measure(arms, new, blocks=blocks, seconds=seconds, warm_up=WARM_UP, on_block=on_block)
        spent = time.perf_counter() - begin
        held = longest == len(new) - 1 and not arms[0].cuda  # the peak on CUDA is of a generation alone
        stored = [arm.stored() if held else arm.alone(longest) for arm in arms]
        counters = [count(arm, longest, state) for arm, state in zip(arms, stored, strict=True)]
    kinds = [arm.policy for arm in arms]
    names = [name_of(policy) for policy in kinds]
    return compared_rows(names, kinds, raw, all_prompts, stored, counters, margin, alpha, spent)


def compared_rows(
    names: Sequence[str],
    policies: Sequence[Policy | None],
    raw: Sequence[Sequence[Sample]],
    prompts: Sequence[Prompt],
    stored: Sequence[Stored],
    counters: Sequence[Counters],
    margin: float,
    alpha: float,
    spent: float,
) -> Bench:
    """Compare each arm with the first.

    Args:
        names: of the arms.
        policies: of the arms; None where an arm has none.
        raw: samples [block][arm].
        prompts: what each generation began with.
        stored: what each arm's cache held in the end.
        counters: of each arm.
        margin: slowdown, as a share, that an arm may have.
        alpha: of all verdicts together: each gets its part.
        spent: seconds that the measurement took.

    Returns:
        A row for each arm, and the samples.
    """
    samples, interrupted = without_interruptions(raw)
    shapes = [(prompt.ids.shape[0], prompt.new_tokens) for prompt in prompts]
    alpha_each = alpha / (len(GATED) * max(1, len(names) - 1))
    rows = []
    for index, name in enumerate(names):
        logs: dict[str, tuple[float, ...]] = {}
        if index:
            logs = {m: tuple(log_ratio(block[index], block[0], m) for block in samples) for m in METRICS}
        verdicts = {metric: compare(values, margin=margin, alpha=alpha_each) for metric, values in logs.items()}
        times = summarise([block[index] for block in samples], shapes)
        rows.append(Row(name, policies[index], times, counters[index], stored[index].peak, logs, verdicts))
    return Bench(tuple(rows), tuple(map(tuple, raw)), interrupted, WARM_UP, spent)


def advice(measured: Bench) -> list[str]:
    """Say of each arm whose TTFT is a FAIL what that costs, and when it is made up.

    Args:
        measured: all arms, the uncompressed one first.

    Returns:
        A line for each arm.
    """
    said = []
    base = measured.rows[0].times
    for row in measured.rows[1:]:
        if row.comparisons["ttft"].verdict != "FAIL":
            continue
        more, less = row.times.ttft - base.ttft, base.tpot - row.times.tpot
        line = f"{row.name}: the first token waits {1000 * more:.1f} ms for the prompt's cache to be compressed"
        if row.comparisons["tpot"].ratio < 1 and less > 0 and more > 0:
            line += f"; faster steps make that up after {math.ceil(more / less) + 1} new tokens"
        elif row.policy is not None:
            line += "; steps are no faster here, so only memory is saved"
        if row.policy is not None and row.policy.protocol == "streaming":
            line += ". With --prune-after above the prompt's length it does not wait"
        said.append(line)
    return said


def as_fields(row: Row) -> dict[str, Any]:
    """Return a row as JSON has it.

    Args:
        row: of one arm.

    Returns:
        Times in seconds, and each metric with its ratio to the baseline and the slowdown that it could see.
    """
    times, compared = row.times, {metric: asdict(comparison) for metric, comparison in row.comparisons.items()}
    return {
        "method": row.name,
        "policy": None if row.policy is None else row.policy.as_json(),
        "ttft": {"seconds": times.ttft},
        "tpot": {"seconds": times.tpot, "median": times.tpot_median, "p99": times.tpot_p99},
        "tokens_per_second": times.throughput,
        "comparisons": compared,
        "verdict": row.verdict,
        "peak_memory": row.peak,
        "counters": asdict(row.counters),
        "log_ratios": {metric: [*values] for metric, values in row.logs.items()},
    }
