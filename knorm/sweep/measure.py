"""Measure one cell, in whatever process: what it loads stays loaded for the next one."""

from __future__ import annotations

import base64
import resource
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from knorm.engines.boxed import model_file
from knorm.engines.conditions import Place, engine_target
from knorm.engines.process import EngineError
from knorm.engines.ways import EngineWays
from knorm.evaluation.damage import sums_of
from knorm.evaluation.ways import Evaluation, Ways
from knorm.evaluation.windows import Windows, cut_windows
from knorm.golden.environment import device_class
from knorm.methods.door import method
from knorm.methods.known import version_of
from knorm.methods.method import Method, MethodError
from knorm.methods.policies import PolicyMethod
from knorm.methods.targets import is_engine
from knorm.models import hush, load_model, load_text
from knorm.paths import PACKAGE
from knorm.policy import Policy
from knorm.sweep.cells import CONTROL, Cell, Chosen, cell_of, outcome
from knorm.sweep.inputs import code_digest, model_digest, target_digest, text_digest, versions


class Unusable(ValueError):
    """Say that this machine has not what the plan was made with, or a text less than the plan asks for."""


def measure_cell(fields: Mapping[str, Any], hint: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Measure a cell; what its method raises is a result, and so is a fault of knorm's own.

    Args:
        fields: of Cell.as_json; paths are seen from the current folder.
        hint: how the cell's row is run, if that is known: {"how": ..., "checked": ...}.

    Returns:
        What a result file holds.

    Raises:
        Unusable: weights, texts, sources or versions here are not the plan's, or a text has too few windows.
    """
    hush()
    cell = cell_of(fields)
    _check_inputs(cell)
    torch.set_num_threads(cell.threads)
    begin, cuda = time.perf_counter(), cell.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    failed, fault, values = None, None, None
    try:
        values = _MEASURES[cell.measure](cell, hint)
    except Unusable:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        failed = f"out of memory: {_line(error)}; a smaller batch or fewer windows may fit"
    except Exception as error:
        failed = _line(error) if isinstance(error, MethodError | EngineError) or _said_by_knorm(error) else None
        fault = None if failed else traceback.format_exc()
    if values is not None and (fault := values.pop("fault", None)):
        values = None
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return outcome(
        fields, values, failed=failed, fault=fault, seconds=time.perf_counter() - begin, memory=peak or _memory(),
        environment=_environment(cell.device),
    )  # fmt: skip


def _environment(device: str) -> dict[str, str]:
    kvpress = version_of("kvpress")
    own = {**versions(device), "device_class": device_class(device)}
    return own if kvpress is None else {**own, "kvpress": kvpress}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _memory() -> int:
    """Return the most bytes that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _check_inputs(cell: Cell) -> None:
    """Raise Unusable where this machine's files, code or versions are not those that the cell is named by."""
    wanted = cell.inputs
    here: dict[str, Any] = {"code": code_digest, "versions": lambda: versions(cell.device)}
    here["model"], here["text"] = lambda: model_digest(cell.model), lambda: text_digest(cell.text)
    here["target"] = lambda: "" if cell.method.target == CONTROL else target_digest(cell.method.target)
    names = {"code": "knorm", "model": f"model {cell.model}", "text": f"text {cell.text}", "target": cell.method.target}
    for name, value in wanted.items():
        try:
            found = here[name]()
        except (ValueError, OSError) as error:
            raise Unusable(f"a worker lacks what the plan needs: {_line(error)}") from None
        if found != value and name == "versions":
            differ = [
                f"{key} {found.get(key)} in place of {value[key]}" for key in value if found.get(key) != value[key]
            ]
            raise Unusable(f"a worker has {', '.join(differ)}: give all workers the same")
        if found != value:
            raise Unusable(f"a worker has another {names[name]} than this process: give all workers the same")


def _said_by_knorm(error: Exception) -> bool:
    """Tell whether knorm raised an error in words, for its user; any other that it lets through is its own fault."""
    if not isinstance(error, ValueError | TypeError):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Path(frame.filename).is_relative_to(PACKAGE) and (frame.line or "").startswith("raise ")


@lru_cache(maxsize=1)
def _loaded(model: str, dtype: str, device: str) -> tuple[Any, Any]:
    _ways.cache_clear()  # what holds the model before
    return load_model(model, dtype=getattr(torch, dtype), device=device)


@lru_cache(maxsize=4)
def _windows(model: str, text: str, column: str, window: int, last: int, dtype: str, device: str) -> Windows:
    """Cut a text's windows up to `last`; one that is too short is refused."""
    windows = cut_windows(_loaded(model, dtype, device)[1], load_text(text, column), window, last)
    count, length = windows.input_ids.shape
    if count < last or length < window:
        raise Unusable(
            f"{text} has no {last} windows of {window} tokens for {model}, but {count} of {length}: ask for fewer"
        )
    return windows


@lru_cache(maxsize=2)
def _ways(
    model: str, dtype: str, device: str, text: str, column: str, window: int, first: int, last: int,
    prompt: int, batch: int, seed: int,
) -> Ways:  # fmt: skip
    loaded, tokenizer = _loaded(model, dtype, device)
    windows = _windows(model, text, column, window, last, dtype, device)
    ends = None if windows.byte_ends is None else windows.byte_ends[first:last]
    part = Windows(windows.input_ids[first:last], ends)
    return Ways(loaded, part, prompt, batch=batch, tokenizer=tokenizer, seed=seed)


def _ways_of(cell: Cell, first: int, last: int) -> Ways:
    _loaded(cell.model, cell.dtype, cell.device)
    return _ways(
        cell.model, cell.dtype, cell.device, cell.text, cell.column, cell.window, first, last, cell.prompt_length,
        cell.batch, cell.seed,
    )  # fmt: skip


def method_of(chosen: Chosen, seed: int) -> Method:
    """Make the method of a cell.

    Args:
        chosen: target and budget.
        seed: of knorm's own, where its score is random.

    Returns:
        The method.
    """
    if chosen.target == "knorm":
        return PolicyMethod("knorm", Policy(chosen.keep_ratio or "0.5", seed=seed, **chosen.policy))
    return method(chosen.target, kind=chosen.kind, keep_ratio=chosen.keep_ratio, keep_tokens=chosen.keep_tokens)


def _damage(cell: Cell, hint: Mapping[str, Any] | None) -> dict[str, Any]:
    """Run a method on the cell's windows, in the way that is right on the first windows of the text."""
    if is_engine(cell.model):
        return _of_engine(cell)
    ways = _ways_of(cell, cell.first, cell.last)
    if cell.method.target == CONTROL:
        return _sums(ways.control())
    made, how, checked = method_of(cell.method, cell.seed), cell.how, ""
    if how == "auto" and cell.first > 0:
        way = hint or _way(cell, made)
        how, checked = way["how"], way["checked"]
    run = ways.evaluate(made, how)  # type: ignore[arg-type]
    return _sums(run) | ({"checked": checked} if checked else {})


def _of_engine(cell: Cell) -> dict[str, Any]:
    """Run an engine's cache, or its full one, on the cell's windows, beside its full cache."""
    host = engine_target(cell.model)
    name = host.model
    model, _ = _loaded(name, cell.dtype, cell.device)
    windows = _windows(name, cell.text, cell.column, cell.window, cell.last, cell.dtype, cell.device)
    part = Windows(windows.input_ids[cell.first : cell.last])
    with model_file(name, model, host.settings.form) as file:
        how: Any = "loop" if cell.how == "auto" else cell.how
        ways = EngineWays(model, part, cell.prompt_length, file=file, how=how)
        if cell.method.target == CONTROL:
            return _sums(ways.control(engine_target(cell.model)))
        return _sums(ways.alone(engine_target(cell.method.target)))


def _way(cell: Cell, made: Method) -> dict[str, str]:
    first = _ways_of(cell, 0, cell.batch).evaluate(made, "auto")
    return {"how": first.how, "checked": first.check}


def _sums(run: Evaluation) -> dict[str, Any]:
    """Return what joins with the sums of other windows to the row of all."""
    sums = sums_of(run.per_token)
    columns = {name: values.tolist() for name, values in sums._asdict().items() if name != "tokens"}
    return {
        "how": run.how, "checked": run.check, "changed": run.changed, "sums": columns,
        "scored": run.per_token.kl.shape[1],
        "kl": base64.b64encode(run.per_token.kl.double().contiguous().numpy().tobytes()).decode(),
        "tokens_seen": run.tokens_seen.tolist(), "tokens_before": run.tokens_before,
        "bytes_stored": run.bytes_stored, "bytes_full": run.bytes_full,
    }  # fmt: skip


def _laws(cell: Cell, _hint: Mapping[str, Any] | None) -> dict[str, Any]:
    """Run `knorm check` on the cell's target, in a process of its own."""
    from contextlib import closing

    from knorm.laws.engine_run import EngineChecks
    from knorm.laws.names import suite_revision
    from knorm.laws.process.protocol import Request
    from knorm.laws.process.supervisor import Supervisor

    own = cell.method.target == "knorm"
    profile: Any = cell.profile
    request = Request(
        target="knorm:compress" if own else cell.method.target, kind=cell.method.kind, like="knorm" if own else None,
        profile=profile, seed=cell.seed, device=cell.device, quiet=True,
    )  # fmt: skip
    checks = EngineChecks(request, Place()) if is_engine(request.target) else Supervisor(request)
    with closing(checks.results()) as heard:
        results = [asdict(result) for result in heard]
    faults = [f"{result['check']}: {result['counterexample']}" for result in results if result["fault"]]
    return {"suite": suite_revision(), "results": results, "fault": "\n".join(faults) or None}


def _prompts(cell: Cell) -> tuple[Any, Any, dict[str, Any]]:
    from knorm.bench.latency import check_fits
    from knorm.bench.policies import make_prompts

    model, tokenizer = _loaded(cell.model, cell.dtype, cell.device)
    prompts = make_prompts(
        tokenizer, [cell.text], [cell.prompt_length], [cell.new_tokens], characters=False, batch=1, device=model.device
    )
    check_fits(model, prompts)
    return model, tokenizer, prompts


def _counters(cell: Cell, _hint: Mapping[str, Any] | None) -> dict[str, Any]:
    """Count what a generation with the method does, in whole numbers."""
    from knorm.bench.counters import count
    from knorm.bench.methods import MethodArm

    model, tokenizer, prompts = _prompts(cell)
    arm = MethodArm(model, [*prompts.values()], method_of(cell.method, cell.seed), tokenizer)
    try:
        return asdict(count(arm, 0, arm.alone(0)))
    finally:
        arm.close()


def _latency(cell: Cell, _hint: Mapping[str, Any] | None) -> dict[str, Any]:
    """Time a method in turns with the uncompressed cache; nothing else may run on the device."""
    from knorm.bench.latency import check_alone, memory_in_one_line
    from knorm.bench.methods import bench_methods
    from knorm.bench.policies import as_fields
    from knorm.statistics import MARGIN

    check_alone(cell.device)
    with memory_in_one_line(cell.device):
        model, tokenizer, prompts = _prompts(cell)
        made = method_of(cell.method, cell.seed)
        measured = bench_methods(
            model, prompts, [made], tokenizer, margin=MARGIN[cell.device], blocks=cell.blocks, seconds=1.0,
            on_block=lambda: None,
        )  # fmt: skip
    return {"rows": [as_fields(row) for row in measured.rows], "verdict": measured.verdict}


_MEASURES = {"damage": _damage, "laws": _laws, "counters": _counters, "latency": _latency}
