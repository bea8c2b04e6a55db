"""Exact counters beside time: operators and kernel launches, from PyTorch's profiler. They gate where no time can.

Imports nothing of knorm at run time: `knorm bench --against` counts older commits with this code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from knorm.latency import Arm, Stored

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces its starts and stops on stderr
COUNTED = 16  # decode steps: a streaming policy does not compress in each


@dataclass(frozen=True)
class Counters:
    """What a generation does, in whole numbers; the same on every run of the same code and versions.

    retained           tokens per layer at the end
    cache_bytes        of keys and values at the end
    steps              decode steps that were counted
    prompt_operators   PyTorch operators that the prompt pass calls; step_operators: all the steps. What an operator
                       calls in turn is left out: it depends on the CPU and its threads
    prompt_launches    CUDA kernels that were launched; None but on CUDA
    """

    retained: tuple[int, ...]
    cache_bytes: int
    steps: int
    prompt_operators: int
    step_operators: int
    prompt_launches: int | None
    step_launches: int | None


def count(arm: Arm, index: int, stored: Stored) -> Counters:
    """Counters of one arm from one prompt; stored: what arm.alone found there, which warmed up what loads late."""
    steps = min(COUNTED, arm.prompts[index].new_tokens - 1)
    first = _count(lambda: arm.prompt(index), arm.cuda)
    rest = _count(lambda: arm.steps(steps), arm.cuda)
    return Counters(stored.retained, stored.nbytes, steps, first[0], rest[0], first[1], rest[1])


def _count(work: Callable[[], Any], cuda: bool) -> tuple[int, int | None]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities, acc_events=True) as found:
        work()
    events: Any = found.events()
    outermost = [e for e in events if _operator(e) and not _operator(e.cpu_parent)]
    launches = [e for e in events if "LaunchKernel" in e.name]  # the runtime's and the driver's
    return len(outermost), len(launches) if cuda else None


def _operator(event: Any) -> bool:
    return event is not None and event.name.startswith("aten::")


def risen(now: Counters, before: Counters) -> list[str]:
    """In words: tokens or bytes that differ, operators or launches that rose. Of the same versions of PyTorch only."""
    said = []
    if now.retained != before.retained:
        said.append(f"tokens retained per layer were {[*before.retained]}, are {[*now.retained]}")
    if now.cache_bytes != before.cache_bytes:
        said.append(f"bytes of the cache were {before.cache_bytes:,}, are {now.cache_bytes:,}")
    if now.steps != before.steps:
        return [*said, f"{before.steps} steps were counted, now {now.steps}"]
    for name, what in (
        ("prompt_operators", "operators of the prompt pass"),
        ("step_operators", f"operators of {now.steps} decode steps"),
        ("prompt_launches", "kernels launched in the prompt pass"),
        ("step_launches", f"kernels launched in {now.steps} decode steps"),
    ):
        was, number = getattr(before, name), getattr(now, name)
        if was is not None and number is not None and number > was:
            said.append(f"{what} rose from {was:,} to {number:,}")
    return said
