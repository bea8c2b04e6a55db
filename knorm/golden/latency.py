"""What the goldens of latency pin: ratios to the uncompressed cache in the same run, and exact counters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import count as numbers
from typing import Any

import numpy as np
import torch

from knorm.bench.counters import Counters, count
from knorm.bench.latency import Arm, Prompt, attending, check_alone
from knorm.bench.methods import bench_methods
from knorm.bench.policies import GATED, Bench, bench, make_prompts
from knorm.golden.format import Measured, Metric
from knorm.golden.metrics import count as counted
from knorm.golden.metrics import memory_ratio, time_ratio
from knorm.methods.method import Method
from knorm.policy import Policy
from knorm.statistics import MARGIN

POLICIES = {
    "streaming-0.9": Policy(0.9, 32, (0,), protocol="streaming"),
    "streaming-0.5": Policy(0.5, 32, (0,), protocol="streaming"),
    "prefill-0.5": Policy(0.5),
}
TEXTS, CHARACTERS = ("encyclopedia", "narrative"), (512, 1024)
NEW_TOKENS = {"cpu": [50, 100], "cuda": [20, 20]}
BLOCKS = {"cpu": 16, "cuda": 96}  # on CUDA a prompt pass is mostly launches, whose times scatter more
COUNTED_TOKENS = 17  # new ones, after the first prompt

# What each is measured on, besides the model and its texts
TIMED_SHAPE = {"characters": [*CHARACTERS], "new_tokens": NEW_TOKENS, "blocks": BLOCKS}
COUNTED_SHAPE = {"characters": CHARACTERS[0], "new_tokens": COUNTED_TOKENS}


def measure_latency(model: Any, tokenizer: Any, on_step: Callable[[float], None] = lambda share: None) -> Measured:
    """Measure the ratios of TTFT and TPOT to those of the uncompressed cache in the same run.

    Args:
        model: a causal language model of transformers, on the device to measure.
        tokenizer: of the model.
        on_step: is told after each block what share of the measurement is made, from 0 to 1.

    Returns:
        The ratios, which are gated; each with its blocks' log-ratios, float64 [blocks, 1].

    Raises:
        ValueError: the device is not this process' alone.
    """
    device = model.device.type
    check_alone(model.device)
    prompts = make_prompts(tokenizer, TEXTS, CHARACTERS, NEW_TOKENS[device], device=str(model.device))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other, and for whatever else runs
    try:
        blocks, done = BLOCKS[device], numbers(1)
        times = bench(
            model, prompts, POLICIES.values(), margin=MARGIN[device], blocks=blocks,
            on_block=lambda: on_step(next(done) / blocks),
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    return _ratios([*POLICIES], times, MARGIN[device])


def measure_methods(
    model: Any,
    tokenizer: Any,
    prompts: Mapping[str, Prompt],
    methods: Sequence[Method],
    names: Sequence[str],
    margin: float | None = None,
    on_step: Callable[[float], None] = lambda share: None,
) -> Measured:
    """Measure any methods' ratios of TTFT and TPOT to those of the uncompressed cache in the same run.

    Args:
        model: a causal language model of transformers, on the device to measure.
        tokenizer: of the model.
        prompts: what is generated from, by name.
        methods: each is timed in turns with the uncompressed cache.
        names: of their metrics.
        margin: the slowdown, as a share, that the gate lets pass; by default the device's.
        on_step: as in measure_latency.

    Returns:
        The ratios, which are gated; each with its blocks' log-ratios, float64 [blocks, 1].

    Raises:
        ValueError: the device is not this process' alone.
    """
    device = model.device.type
    check_alone(model.device)
    blocks, done, limit = BLOCKS[device], numbers(1), MARGIN[device] if margin is None else margin
    times = bench_methods(
        model, prompts, methods, tokenizer, margin=limit, blocks=blocks, on_block=lambda: on_step(next(done) / blocks)
    )
    return _ratios(names, times, limit)


def _ratios(names: Sequence[str], times: Bench, margin: float) -> Measured:
    metrics: list[Metric] = []
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, row in zip(names, times.rows[1:], strict=True):
        for metric in GATED:
            label = f"{metric}/{name}" if name else metric
            tensors[label] = np.asarray(row.logs[metric])[:, None]
            metrics.append(time_ratio(label, float(np.exp(tensors[label].mean())), margin))
        if row.peak and times.rows[0].peak:
            label = f"peak_memory/{name}" if name else "peak_memory"
            metrics.append(memory_ratio(label, row.peak / times.rows[0].peak, "uncompressed"))
    return Measured(tuple(metrics), tensors)


def measure_counters(model: Any, tokenizer: Any) -> Measured:
    """Count what the uncompressed cache and each policy do from one prompt.

    Args:
        model: a causal language model of transformers, on the device to count on.
        tokenizer: of the model.

    Returns:
        Tokens, bytes, operators and, on CUDA, kernel launches.
    """
    (prompt,) = make_prompts(tokenizer, TEXTS[:1], CHARACTERS[:1], (COUNTED_TOKENS,), device=str(model.device)).values()
    metrics: list[Metric] = []
    with attending(model), torch.no_grad():
        for name, policy in {"uncompressed": None, **POLICIES}.items():
            arm = Arm(model, [prompt], policy)
            metrics += _counts(name, count(arm, 0, arm.alone(0)))
    return Measured(tuple(metrics))


def _counts(name: str, counters: Counters) -> Iterable[Metric]:
    operators = partial(counted, rule="same_versions", direction="lower")
    launches = partial(counted, rule="same_environment", direction="lower")
    yield counted(f"retained/{name}", ", ".join(map(str, counters.retained)), "tokens per layer")
    yield counted(f"cache_bytes/{name}", counters.cache_bytes, "bytes", kind="memory", direction="lower")
    yield operators(f"prompt_operators/{name}", counters.prompt_operators, "operators")
    yield operators(f"step_operators/{name}", counters.step_operators, f"operators / {counters.steps} steps")
    if counters.prompt_launches is not None and counters.step_launches is not None:
        yield launches(f"prompt_launches/{name}", counters.prompt_launches, "kernels")
        yield launches(f"step_launches/{name}", counters.step_launches, f"kernels / {counters.steps} steps")
