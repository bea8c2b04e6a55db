"""Declared cases of engines: their caches beside the same engine's full cache, measured as `knorm ppl` does."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from knorm import __version__
from knorm.engines.boxed import model_file
from knorm.engines.conditions import EngineTarget, engine_target
from knorm.engines.ways import SMALLER, EngineWays, with_settings
from knorm.evaluation.ways import Evaluation
from knorm.evaluation.windows import Windows
from knorm.golden.environment import How
from knorm.golden.project import Declared
from knorm.sources import EMBEDDED_MODELS

MEASURED = ("cpu",)  # where engines run


def check_declared(declared: Declared) -> EngineTarget:
    """Read the engine that a case declares.

    Args:
        declared: the case, whose target is an engine.

    Returns:
        Engine, model and settings.

    Raises:
        ValueError: what has no meaning for an engine, in one line.
    """
    target = engine_target(declared.target)
    given: dict[str, Any] = {
        "kind": declared.kind,
        "keep_ratio": declared.keep_ratio,
        "keep_tokens": declared.keep_tokens,
    }
    given |= {"model": declared.model, "batch above 1": declared.batch > 1, "latency among the metrics": declared.timed}
    if refused := [name for name, value in given.items() if value]:
        raise ValueError(f"{declared.target} is an engine, whose settings stand in the target: drop {refused[0]}")
    if declared.how == "schedule":
        raise ValueError(f"how is 'schedule', but {declared.target} has none: give 'two calls', 'loop' or 'auto'")
    if "cpu" not in declared.devices:
        raise ValueError(f"devices is {declared.devices}, but {declared.target} runs on a CPU")
    return target


def packages_of(target: EngineTarget) -> dict[str, str]:
    """Name the packages that the numbers of `target` depend on, with their versions."""
    return {"knorm": __version__, target.settings.distribution: target.version() or "not installed"}


def run_declared(
    root: Path, declared: Declared, target: EngineTarget, model: Any, windows: Windows, how: How
) -> tuple[EngineWays, Evaluation]:
    """Run an engine's cache on a case's windows.

    What should not matter differs as `how` says: another batch is a smaller one, more threads of PyTorch are more of
    the engine, and weights rounded otherwise are written to the file of a model in the box.

    Args:
        root: the folder that the model's file is seen from.
        declared: the case.
        target: its engine.
        model: the same model, as transformers runs it.
        windows: of the case's text.
        how: the way to run it.

    Returns:
        The ways, and the row.
    """
    settings = target.settings
    if how.batch != declared.batch:
        settings = settings.in_batches_of(SMALLER)
    settings = replace(settings, n_threads=max(settings.n_threads, torch.get_num_threads()))
    changed = how.model(model) if target.model in EMBEDDED_MODELS else model
    way: Any = how.way or ("loop" if declared.how == "auto" else declared.how)
    with contextlib.chdir(root), model_file(target.model, changed, target.settings.form) as file:
        ways = EngineWays(changed, windows, declared.prompt, file=file.resolve(), how=way)
        return ways, ways.alone(with_settings(target, settings))
