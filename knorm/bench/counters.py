"""Exact counters beside time: operators and kernel launches, from PyTorch's profiler. They gate where no time can.

Imports nothing of knorm at run time: `knorm bench --against` counts older commits with this code.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from knorm.bench.latency import Arm, Stored

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces its starts and stops on stderr
COUNTED = 32  # decode steps: a streaming policy does not compress in each


@dataclass(frozen=True)
class Counters:
    """Count what a generation does, in whole numbers; they are equal in every run of the same code and versions.

    retained           tokens per layer at the end
    cache_bytes        of keys and values at the end
    steps              decode steps that were counted
    prompt_operators   PyTorch operators that the prompt pass calls; step_operators: all the steps. What an operator
                       calls in turn is left out: it depends on the CPU and its threads
    prompt_launches    CUDA kernels that the prompt pass launched; step_launches: all the steps. None on a CPU
    """

    retained: tuple[int, ...]
    cache_bytes: int
    steps: int
    prompt_operators: int
    step_operators: int
    prompt_launches: int | None
    step_launches: int | None


def count(arm: Arm, index: int, stored: Stored) -> Counters:
    """Count what one arm does from one prompt.

    Args:
        arm: to run.
        index: of the prompt.
        stored: what arm.alone found there, which warmed up what loads late.

    Returns:
        Tokens, bytes, operators and, on CUDA, kernel launches.
    """
    steps = min(COUNTED, arm.prompts[index].new_tokens - 1)
    first = _count(lambda: arm.prompt(index), arm.cuda)
    rest = _count(lambda: arm.steps(steps), arm.cuda)
    return Counters(stored.retained, stored.nbytes, steps, first[0], rest[0], first[1], rest[1])


def _count(work: Callable[[], Any], cuda: bool) -> tuple[int, int | None]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Profiler clears events")  # torch 2.11: said of every profile
        with profile(activities=activities) as profiled:
            work()
    raw: Any = profiled.profiler  # its own events(), which builds a tree of objects, takes a hundred times as long
    events = raw.kineto_results.events()
    launches = sum("LaunchKernel" in event.name() for event in events)  # the runtime's and the driver's
    return _outermost(event for event in events if event.name().startswith("aten::")), launches if cuda else None


def _outermost(events: Iterable[Any]) -> int:
    """How many events lie in no other of their thread."""
    count, thread, end = 0, None, 0
    spans = ((e.start_thread_id(), e.start_ns(), e.start_ns() + e.duration_ns()) for e in events)
    for where, start, until in sorted(spans, key=lambda span: (*span[:2], -span[2])):
        if where != thread or start >= end:
            count, thread, end = count + 1, where, until
    return count


def risen(now: Counters, before: Counters) -> list[str]:
    """Say what differs (tokens or bytes) or rose (operators or launches); the versions of PyTorch must be equal.

    Args:
        now: counters of the new code.
        before: those of the old.

    Returns:
        A line for each; none where nothing did.
    """
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
