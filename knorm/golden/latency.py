"""What the goldens of latency pin: ratios to the uncompressed cache in the same run, and exact counters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch

from knorm.bench.counters import Counters, count
from knorm.bench.latency import Arm, attending, check_alone
from knorm.bench.policies import GATED, bench, make_prompts
from knorm.golden.format import Gate, Measured, Metric
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


def measure_latency(model: Any, tokenizer: Any) -> Measured:
    """Ratios of TTFT and TPOT to those of the uncompressed cache, with each block's log-ratio [blocks, 1].

    Raises ValueError where the device is not this process' alone.
    """
    device = model.device.type
    check_alone(model.device)
    prompts = make_prompts(tokenizer, TEXTS, CHARACTERS, NEW_TOKENS[device], device=str(model.device))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other, and for whatever else runs
    try:
        found = bench(model, prompts, POLICIES.values(), margin=MARGIN[device], blocks=BLOCKS[device])
    finally:
        torch.set_num_threads(threads)
    metrics: list[Metric] = []
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, row in zip(POLICIES, found.rows[1:], strict=True):
        for metric in GATED:
            label = f"{metric}/{name}"
            tensors[label] = np.asarray(row.logs[metric])[:, None]
            gate = Gate(rule="timing", threshold=MARGIN[device])
            metrics.append(_metric(label, float(np.exp(tensors[label].mean())), "ratio", "s / s uncompressed", gate))
        if row.peak and found.rows[0].peak:
            peak, gate = row.peak / found.rows[0].peak, Gate(rule="at_most", threshold=0.02)
            metrics.append(_metric(f"peak_memory/{name}", peak, "memory", "bytes / bytes uncompressed", gate))
    return Measured(tuple(metrics), tensors)


def measure_counters(model: Any, tokenizer: Any) -> Measured:
    """Tokens retained, bytes, operators and, on CUDA, kernel launches of the uncompressed cache and each policy."""
    (prompt,) = make_prompts(tokenizer, TEXTS[:1], CHARACTERS[:1], (COUNTED_TOKENS,), device=str(model.device)).values()
    metrics: list[Metric] = []
    with attending(model), torch.no_grad():
        for name, policy in {"uncompressed": None, **POLICIES}.items():
            arm = Arm(model, [prompt], policy)
            metrics += _counts(name, count(arm, 0, arm.alone(0)))
    return Measured(tuple(metrics))


def _counts(name: str, found: Counters) -> Iterable[Metric]:
    exact, versions, here = (
        Gate(rule="exact"),
        Gate(rule="same_versions"),
        Gate(rule="same_environment"),
    )
    yield _metric(f"retained/{name}", ", ".join(map(str, found.retained)), "count", "tokens per layer", exact, "same")
    yield _metric(f"cache_bytes/{name}", found.cache_bytes, "memory", "bytes", exact)
    yield _metric(f"prompt_operators/{name}", found.prompt_operators, "count", "operators", versions)
    yield _metric(f"step_operators/{name}", found.step_operators, "count", f"operators / {found.steps} steps", versions)
    if found.prompt_launches is not None and found.step_launches is not None:
        yield _metric(f"prompt_launches/{name}", found.prompt_launches, "count", "kernels", here)
        yield _metric(f"step_launches/{name}", found.step_launches, "count", f"kernels / {found.steps} steps", here)


def _metric(
    name: str,
    value: int | float | str,
    kind: Literal["count", "ratio", "memory"],
    unit: str,
    gate: Gate,
    direction: Literal["lower", "same"] = "lower",
) -> Metric:
    return Metric(name=name, unit=unit, direction=direction, kind=kind, value=value, anchor=value, gate=gate)
