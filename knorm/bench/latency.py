"""Latency in one process: arms that generate in turns, mirrored, so that what drifts meets all of them alike.

An arm is one way to keep the cache. A block is one generation of each: prompt passes A B C C B A, then decode steps, a
few at a time, A B C, C B A, and so on. A block's log-ratio of an arm to the first is free of linear drift.

Imports only what older commits have too: `knorm bench --against` measures them with this code.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from knorm.cache import KnormCache, attention_through, cache_keyword
from knorm.policy import Policy

SEGMENT = 5  # decode steps of an arm before the next one's turn
PASSES = 2  # of each prompt, forwards and backwards, in a block
INTERRUPTED = 1.5  # times its usual length: what takes longer was interrupted by something else
SELDOM = 0.05  # of all steps: where more are interrupted, that is how this machine is
METRICS = ("ttft", "tpot", "throughput")


@dataclass(frozen=True)
class Prompt:
    """Hold what is generated from: `ids`, int64 [batch, tokens] on the model's device, and how many `new_tokens`."""

    ids: Tensor
    new_tokens: int


@dataclass(frozen=True)
class Stored:
    """Hold what an arm's cache stores after a generation that ran alone.

    retained   tokens per layer
    nbytes     of keys and values
    peak       bytes allocated at most while decoding, over what was before the generation; None but on CUDA
    """

    retained: tuple[int, ...]
    nbytes: int
    peak: int | None


class Turns(Protocol):
    """Define what a block needs of an arm, here or in another process."""

    def prompt(self, index: int) -> float:
        """Start a generation from prompt `index`, with an empty cache; return seconds until its first token."""

    def steps(self, count: int) -> list[float]:
        """Run the next `count` decode steps; return the seconds of each."""


class Arm:
    """Generate greedily in segments, each step timed.

    On CUDA each step lies between two events, and the device is waited for at the ends of a segment only.

    Args:
        model: a causal language model of transformers, in eval mode.
        prompts: what is generated from, by index.
        policy: of the cache; None for transformers' own, uncompressed.
        after_step: called inside the timed part of each decode step: an injected delay.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Prompt], policy: Policy | None, after_step: Callable[[], None] | None = None
    ) -> None:
        self.model, self.prompts, self.policy, self.after_step = model, prompts, policy, after_step
        self.keyword = cache_keyword(model)
        self.cuda = model.device.type == "cuda"
        self.cache: Any = None
        self.token: Tensor

    def prompt(self, index: int) -> float:
        """Return seconds from prompt `index` to its first new token, argmax and the first compression included."""
        self.cache = DynamicCache() if self.policy is None else KnormCache(self.policy)
        self.token = self.prompts[index].ids
        return self._timed(1, None, logits_to_keep=1)[0]

    def steps(self, count: int) -> list[float]:
        """Return seconds of each of `count` decode steps."""
        return self._timed(count, self.after_step)

    @torch.no_grad()
    def _timed(self, count: int, after: Callable[[], None] | None, **options: Any) -> list[float]:
        options |= {"use_cache": True, self.keyword: self.cache}
        if self.cuda:
            torch.cuda.synchronize(self.model.device)
        marks = [self._mark()]
        for _ in range(count):
            self.token = self.model(self.token, **options).logits.argmax(-1)
            if after is not None:
                after()
            marks.append(self._mark())
        return self._between(marks)

    def _between(self, marks: list[Any]) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize(self.model.device)
            return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]
        return [b - a for a, b in pairwise(marks)]

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.model.device))
        return event

    def alone(self, index: int) -> Stored:
        """Generate from prompt `index` without the others; return what its cache holds then, and on CUDA the peak."""
        self.cache, device = None, self.model.device
        before = 0
        if self.cuda:
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
        self.prompt(index)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        self.steps(self.prompts[index].new_tokens - 1)
        return self.stored(torch.cuda.max_memory_allocated(device) - before if self.cuda else None)

    def stored(self, peak: int | None = None) -> Stored:
        """Return what the cache holds after the last generation, beside its `peak` memory in bytes."""
        layers = [(layer.keys, layer.values) for layer in self.cache.layers]
        nbytes = sum(x.nbytes for both in layers for x in both)
        return Stored(tuple(keys.shape[2] for keys, _ in layers), nbytes, peak)


@dataclass(frozen=True)
class Sample:
    """Hold one arm's times in one block: for each prompt, seconds of the `first` passes and of the decode `steps`."""

    first: tuple[tuple[float, ...], ...]
    steps: tuple[tuple[float, ...], ...]

    def seconds(self, metric: str) -> list[float]:
        """Return seconds by `metric`, one number a prompt: "ttft", "tpot" or "throughput".

        They are the seconds to the first token, the mean of a step, and the seconds of all tokens. The mean counts the
        steps that compress; the median over steps would not see them.
        """
        first = [statistics.median(passes) for passes in self.first]
        if metric == "ttft":
            return first
        if metric == "tpot":
            return [statistics.fmean(steps) for steps in self.steps]
        return [a + sum(steps) for a, steps in zip(first, self.steps, strict=True)]


def run_block(arms: Sequence[Turns], new_tokens: Sequence[int], flip: bool = False) -> list[Sample]:
    """Run one generation of each arm from each prompt, in turns.

    Args:
        arms: what takes turns.
        new_tokens: of each prompt.
        flip: start with the last arm, as every other block does.

    Returns:
        A Sample for each arm.
    """
    forwards = [*range(len(arms))]
    orders = (forwards[::-1], forwards) if flip else (forwards, forwards[::-1])
    first: list[list[list[float]]] = [[] for _ in arms]
    steps: list[list[list[float]]] = [[] for _ in arms]
    with no_collection():
        for index, tokens in enumerate(new_tokens):
            for arm in forwards:
                first[arm].append([])
                steps[arm].append([])
            for order in orders * PASSES:
                for arm in order:
                    first[arm][index].append(arms[arm].prompt(index))
            for turn, done in enumerate(range(0, tokens - 1, SEGMENT)):
                for arm in orders[turn % 2]:
                    steps[arm][index] += arms[arm].steps(min(SEGMENT, tokens - 1 - done))
    return [Sample(tuple(map(tuple, a)), tuple(map(tuple, b))) for a, b in zip(first, steps, strict=True)]


def without_interruptions(samples: Sequence[Sequence[Sample]]) -> tuple[list[list[Sample]], int]:
    """Cut steps of `samples` [block][arm] to 1.5 times their usual length; return them and how many took longer.

    Usual is the median over blocks of the same arm, prompt and step: which steps compress is the same in every block,
    so those that do keep their full length. Where more than SELDOM would be cut, none is: the medians vary with them.
    """
    count, steps, calm = 0, 0, [list(block) for block in samples]
    for arm in range(len(samples[0])):
        for name in ("first", "steps"):
            for prompt in range(len(samples[0][0].first)):
                times = torch.tensor([getattr(block[arm], name)[prompt] for block in samples], dtype=torch.float64)
                most = INTERRUPTED * times.quantile(0.5, dim=0)
                count, steps = count + int((times > most).sum()), steps + times.numel()
                for block, row in zip(calm, times.minimum(most).tolist(), strict=True):
                    parts = getattr(block[arm], name)
                    block[arm] = replace(block[arm], **{name: (*parts[:prompt], tuple(row), *parts[prompt + 1 :])})
    return calm if count <= SELDOM * steps else [list(block) for block in samples], count


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector from running inside."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def log_ratio(sample: Sample, baseline: Sample, metric: str) -> float:
    """Compare two arms in one block.

    Args:
        sample: of the arm.
        baseline: of the arm that it is compared with.
        metric: as Sample.seconds has it.

    Returns:
        The natural logarithm of how many times as long the arm took, mean over prompts.
    """
    both = zip(sample.seconds(metric), baseline.seconds(metric), strict=True)
    return statistics.fmean(math.log(mine / theirs) for mine, theirs in both)


def measure(
    arms: Sequence[Any],
    new_tokens: Sequence[int],
    *,
    blocks: int | None = None,
    seconds: float = 30.0,
    least: int = 8,
    warm_up: int = 1,
    on_block: Callable[[], None] = lambda: None,
    run: Callable[..., list[Sample]] = run_block,
) -> list[list[Sample]]:
    """Run blocks of all arms. How many there are never depends on how they come out.

    Args:
        arms: what takes turns.
        new_tokens: of each prompt, 2 or more.
        blocks: how many; None for as many as fit `seconds`, by what the warm-up took.
        seconds: what all blocks may take together.
        least: blocks that are run even where they take longer than that.
        warm_up: generations of all arms from the first prompt that are run before, in turns, and discarded.
        on_block: called after each block.
        run: runs one block of the arms, as run_block does.

    Returns:
        Samples [block][arm].

    Raises:
        ValueError: after the warm-up, where `least` blocks would take over twice `seconds`.
    """
    gc.collect()  # once: in a block it is off, and between blocks it has little to do
    for _ in range(max(1, warm_up)):
        begin = time.perf_counter()
        run(arms, new_tokens[:1])
    spent = (time.perf_counter() - begin) * sum(new_tokens) / new_tokens[0]
    if blocks is None and least * spent > 2 * seconds:
        raise ValueError(
            f"too few blocks: {least} of them would take {least * spent:.0f} s on this machine as it is, but seconds "
            f"are {seconds:g}: wait until nothing else runs, or give --seconds {math.ceil(least * spent / 2)} or more, "
            "fewer policies, or shorter prompts"
        )
    count = max(least, int(seconds / spent)) if blocks is None else blocks
    samples = []
    for number in range(count):
        samples.append(run(arms, new_tokens, flip=bool(number % 2)))
        on_block()
    return samples


def attending(model: Any) -> Any:
    """Open a context in which `model` attends through PyTorch's SDPA, as every arm does."""
    return attention_through(model, None)


# What must hold before a clock is started


def check_alone(device: str | torch.device) -> None:
    """Refuse to time where other processes share `device`: ValueError under pytest-xdist, or on a GPU in use."""
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        raise ValueError(
            f"timing under pytest-xdist ({worker}): its workers share the cores, so no time would be this code's. "
            "Run it alone: pytest -n 0"
        )
    if torch.device(device).type == "cuda" and (others := _others(torch.device(device).index or 0)):
        raise ValueError(
            f"{device} is used by {others}: no time would be this code's. Wait for them, or choose another with "
            "--device cuda:N"
        )


def _others(index: int) -> str:
    """Who else computes on a GPU, in words; empty where nobody does, or where nvidia-smi cannot tell."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    which = visible[index].strip() if index < len(visible) else str(index)
    mine = torch.cuda.is_initialized()  # in a container our own process has another number: so they are counted
    processes = _ask(which, "--query-compute-apps=pid")
    if processes is not None and len(processes) > mine:
        others = len(processes) - mine
        return "another process" if others == 1 else f"{others} other processes"
    busy = None if mine else _ask(which, "--query-gpu=utilization.gpu")  # after our own work it would be ours
    if busy and busy[0].isdigit() and int(busy[0]) > 5:
        return f"others, {busy[0]}% of the time"
    return ""


def _ask(which: str, query: str) -> list[str] | None:
    try:
        command = ["nvidia-smi", "-i", which, query, "--format=csv,noheader,nounits"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [line.strip() for line in said.splitlines() if line.strip()]


def check_fits(model: Any, prompts: Mapping[str, Prompt]) -> None:
    """Refuse `prompts`, by name, that `model` cannot generate from.

    Raises ValueError for a prompt that is too short, or with its new tokens longer than the model's context; and
    where the uncompressed cache alone takes more memory than the device has at all.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    for name, prompt in prompts.items():
        length = prompt.ids.shape[1]
        total = length + prompt.new_tokens
        if prompt.new_tokens < 2:
            raise ValueError(
                f"{prompt.new_tokens} new tokens, but should be at least 2: TPOT is of those after the first"
            )
        if length < 1:
            raise ValueError(f"{name}: the prompt has no tokens: give more characters")
        if most is not None and total > most:
            raise ValueError(
                f"{name}: {length} tokens of prompt and {prompt.new_tokens} new ones are {total}, "
                f"but the model's context is {most}: give a shorter prompt, or fewer new tokens"
            )
        need, there = _cache_bytes(model, prompt), _memory(model.device)
        if there is not None and need > there:
            raise ValueError(
                f"{name}: the uncompressed cache of {len(prompt.ids):,} sequences of {total} tokens "
                f"takes {need / 2**30:,.1f} GiB, but {model.device} has {there / 2**30:,.1f} GiB: give a smaller "
                "batch, a shorter prompt, or fewer new tokens"
            )


def _cache_bytes(model: Any, prompt: Prompt) -> int:
    """Compute the bytes of keys and values at the end; 0 where the configuration lacks the usual names."""
    config, (batch, length) = model.config.get_text_config(), prompt.ids.shape
    layers, heads, hidden = (
        getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    if not (layers and heads and hidden) or getattr(config, "multi_query", False):
        return 0
    width = getattr(config, "head_dim", None) or hidden // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * layers * heads * width * batch * (length + prompt.new_tokens - 1) * model.dtype.itemsize)


def _memory(device: torch.device) -> int | None:
    """All that the device has; None where Python cannot tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


@contextmanager
def memory_in_one_line(device: str) -> Iterator[None]:
    """Turn running out of memory on `device` into a ValueError of one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"out of memory on {device}: give a shorter prompt, a smaller batch or --dtype bfloat16 ({first})"
        ) from None
