"""The cases that a project declares: their methods loaded, and measured as `knorm ppl` and `knorm.evaluate` do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from knorm import __version__
from knorm.bench.latency import Prompt
from knorm.engines.conditions import EngineTarget
from knorm.evaluation.ways import Evaluation, Ways
from knorm.evaluation.ways import How as Way
from knorm.evaluation.windows import Windows, cut_windows
from knorm.golden.cases import NOISE, Case, digest_of
from knorm.golden.engine_cases import MEASURED, check_declared, packages_of, run_declared
from knorm.golden.environment import How
from knorm.golden.format import Measured, Metric, digest
from knorm.golden.latency import BLOCKS, measure_methods
from knorm.golden.metrics import SAME_TOP, count, fingerprint, share, tokens
from knorm.golden.project import Declared, Misdeclared, Project
from knorm.methods.door import method
from knorm.methods.functions import ClassMethod, FunctionMethod
from knorm.methods.kinds import signature_of
from knorm.methods.method import Method
from knorm.methods.targets import is_engine
from knorm.models import load_model, load_text
from knorm.paths import PACKAGE
from knorm.policy import exact_ratio
from knorm.sources import EMBEDDED_MODELS, find_model, find_text

Array = np.ndarray[Any, Any]
_KINDS = {
    "nll": "nll",
    "kl": "kl",
    "same_top": "share",
    "counts": "count",
    "bytes": "memory",
    "latency": "ratio",
}  # of the metrics
_NEAR_TIE = 1.5  # tokens whose likeliest may be another


def load_cases(project: Project, names: Iterable[str] | None = None) -> dict[str, Case]:
    """Make cases of what a project declares; every target is imported, nothing is measured.

    Args:
        project: of find_project.
        names: of the cases; by default all.

    Returns:
        The cases by name.

    Raises:
        Misdeclared: a target, a model or a text that is not there or does not fit; one line for each case.
    """
    cases, problems = {}, []
    for name in project.cases if names is None else names:
        try:
            cases[name] = _case(project, name, project.cases[name])
        except (ValueError, TypeError, OSError) as error:
            said = " ".join(str(error).split())
            problems.append(f"case {name}: {said}")
    if problems:
        raise Misdeclared(project.file.name, problems)
    return cases


def _case(project: Project, name: str, declared: Declared) -> Case:
    if is_engine(declared.target):
        return _engine_case(project, name, declared)
    with contextlib.chdir(project.root):  # targets, models and texts are written as seen from there
        methods = _methods(declared)
        model = declared.model or ("embedded-llama" if methods[0].kind == "press" else "embedded")
        find_model(model)
        find_text(declared.text)
    budgets = declared.keep_ratio or [f"{number} tokens" for number in declared.keep_tokens]
    what = declared.what or " ".join([declared.target, *([f"at {', '.join(budgets)}"] if budgets else [])])
    many = "1 window" if declared.batch == 1 else f"{declared.batch} windows"
    sources, packages = _origins(project, methods)
    return Case(
        name, what, partial(_configuration, declared, model),
        partial(_measure_times if declared.timed else _measure, project, declared, model, methods),
        devices=tuple(declared.devices), how=How(batch=declared.batch, numerics=f"{many} at a time"),
        one_thread=model in EMBEDDED_MODELS, packages=packages, sources=sources, own_noise=not declared.timed,
        timed=declared.timed,
        fixed=tuple(_KINDS[name] for name in declared.thresholds),
    )  # fmt: skip


def _engine_case(project: Project, name: str, declared: Declared) -> Case:
    with contextlib.chdir(project.root):
        target = check_declared(declared)
        find_text(declared.text)
    return Case(
        name, declared.what or declared.target, partial(_configuration, declared, target.model),
        partial(_measure_engine, project, declared, target), devices=MEASURED,
        how=How(batch=declared.batch, numerics=f"batches of {target.settings.batch} tokens"), one_thread=True,
        packages=packages_of(target), own_noise=True, fixed=tuple(_KINDS[name] for name in declared.thresholds),
    )  # fmt: skip


def _methods(declared: Declared) -> list[Method]:
    """Make a method for each budget."""
    budgets: list[dict[str, Any]] = [{"keep_ratio": ratio} for ratio in declared.keep_ratio]
    budgets += [{"keep_tokens": number} for number in declared.keep_tokens]
    methods = [method(declared.target, kind=declared.kind, **budget) for budget in budgets or [{}]]
    for each in methods:
        _check_call(each)
        if declared.how == "schedule" and each.policy is None:
            raise ValueError(f"how is 'schedule', but {each.name} has none: give 'two calls', 'loop' or 'auto'")
    return methods


def _check_call(made: Method) -> None:
    """Raise TypeError where a function or a class cannot be called as it will be: its signature may have changed."""
    if not isinstance(made, FunctionMethod) or not (signature := signature_of(made.target)):
        return
    leading: list[Any] = [] if isinstance(made, ClassMethod) else ["keys", "values"]
    named = dict(made.options)
    if made.word is not None and made.budget is not None:
        named[made.word] = 0.5
    elif made.budget is not None:
        leading.append(0.5)
    named |= {extra: None for extra in ("layer", "queries", "attention") if leading and extra in made.parameters}
    try:
        signature.bind(*leading, **named)
    except TypeError as error:
        given = ", ".join([*map(str, leading), *named])
        raise TypeError(f"{made.name}{signature} is called with ({given}): {error}") from None


def _origins(project: Project, methods: list[Method]) -> tuple[tuple[Path, ...], dict[str, str]]:
    """Tell the code under test from that of other packages, whose versions belong to the environment."""
    sources: dict[Path, None] = {}
    packages = {"knorm": __version__}
    for home in [each.home.resolve() for each in methods if each.home]:
        if home.is_relative_to(project.root) and not {"site-packages", "dist-packages"} & {*home.parts}:
            sources[home] = None
        elif not home.is_relative_to(PACKAGE):
            names = packages_distributions().get(home.stem, [home.stem])
            with contextlib.suppress(PackageNotFoundError):
                packages[names[0]] = version(names[0])
    return tuple(sources), {name: packages[name] for name in packages if name not in ("torch", "transformers")}


def _configuration(declared: Declared, model: str) -> dict[str, Any]:
    fields = declared.model_dump(exclude={"devices", "what"})
    if declared.timed:
        fields |= {"windows": declared.texts, "blocks": BLOCKS}
    return {**fields, "model": model, "prompt_length": declared.prompt, "dtype": "float32"}


@lru_cache(maxsize=2)
def _loaded(root: Path, model: str, device: str) -> tuple[Any, Any, str]:
    with contextlib.chdir(root):
        loaded, tokenizer = load_model(model, device=device)
    return loaded, tokenizer, digest_of(loaded)


@lru_cache(maxsize=4)
def _windows(
    root: Path, place: Path, model: str, device: str, text: str, column: str, window: int, windows: int
) -> Windows:
    with contextlib.chdir(root):
        content = load_text(text, column)
    return cut_windows(_loaded(place, model, device)[1], content, window, windows)


def _measure(project: Project, declared: Declared, name: str, methods: list[Method], device: str, how: How) -> Measured:
    """Metrics of a method at each budget on the same windows, beside the full cache.

    The way that "auto" takes is checked on the smallest budget, which acts most; the others go the same way.
    """
    root = Path() if name in EMBEDDED_MODELS else project.root
    model, tokenizer, weights = _loaded(root, name, device)
    text = declared.text, declared.column, declared.window, declared.windows
    windows = _windows(project.root, root, name, device, *text)
    ways = Ways(how.model(model), windows, declared.prompt, batch=how.batch, tokenizer=tokenizer)
    smallest = min(methods, key=_size)
    first = ways.evaluate(smallest, cast(Way, how.way or declared.how))
    way = cast(Way, first.how)
    runs = [first if each is smallest else ways.evaluate(each, way) for each in methods]
    suffixes = ["" if made.budget is None else f"/{made.budget}" for made in methods]
    return _measured(declared, weights, windows, [*zip(suffixes, runs, strict=True)], ways.model.device.type)


def _measure_engine(project: Project, declared: Declared, target: EngineTarget, device: str, how: How) -> Measured:
    """Metrics of an engine's cache, beside the same engine's full cache."""
    root = Path() if target.model in EMBEDDED_MODELS else project.root
    model, _, weights = _loaded(root, target.model, device)
    text = declared.text, declared.column, declared.window, declared.windows
    windows = _windows(project.root, root, target.model, device, *text)
    ways, run = run_declared(project.root, declared, target, model, windows, how)
    return _measured(declared, weights, windows, [("", run)], ways.model.device.type)


def _measured(
    declared: Declared, weights: str, windows: Windows, runs: list[tuple[str, Evaluation]], device: str
) -> Measured:
    """Join the metrics of runs on the same windows, each with what its names end with."""
    first = runs[0][1]
    metrics = [
        fingerprint("weights", weights, of="of the model"),
        fingerprint("tokens", digest(windows.input_ids.numpy().tobytes())[:16], of="of the windows"),
        count("way", first.how, "how it was run", rule="same_environment"),
    ]
    tensors: dict[str, Array] = {}
    if "nll" in declared.metrics:
        full = first.per_token.nll_full
        tensors["nll/full"] = full.float().numpy()
        metrics.append(tokens("nll/full", float(full.mean()), NOISE[device]))
    for suffix, run in runs:
        metrics += _of_run(run, suffix, declared, device, tensors)
    return Measured(tuple(metrics), tensors)


def _measure_times(
    project: Project, declared: Declared, name: str, methods: list[Method], device: str, how: How
) -> Measured:
    """Times of a method at each budget over those of the uncompressed cache, in turns; tokens are generated."""
    root = Path() if name in EMBEDDED_MODELS else project.root
    model, tokenizer, weights = _loaded(root, name, device)
    text = declared.text, declared.column, declared.window, declared.texts
    ids = _windows(project.root, root, name, device, *text).input_ids.to(model.device, torch.int64)
    new = declared.window - declared.prompt
    prompts = {
        f"window {place}": Prompt(row[None, : declared.prompt].expand(declared.batch, -1), new)
        for place, row in enumerate(ids, 1)
    }
    names = ["" if made.budget is None else str(made.budget) for made in methods]
    margin = declared.thresholds.get("latency")
    times = measure_methods(model, tokenizer, prompts, methods, names, margin, how.on_step)
    return Measured((fingerprint("weights", weights, of="of the model"), *times.metrics), times.tensors)


def _size(made: Method) -> float:
    budget = made.budget
    if budget is None:
        return 0.0
    return float(budget.keep_tokens or exact_ratio(budget.keep_ratio or 1))


def _of_run(
    run: Evaluation, suffix: str, declared: Declared, device: str, tensors: dict[str, Array]
) -> Iterator[Metric]:
    """Generate the metrics of one budget, those that are declared; values of tokens are put among the tensors."""
    noise, bounds = NOISE[device], declared.thresholds
    values = {"nll": run.per_token.nll, "kl": run.per_token.kl}
    for name in ("nll", "kl"):
        if name in declared.metrics:
            tensors[name + suffix] = values[name].float().numpy()
            mean = float(values[name].mean())
            yield tokens(name + suffix, mean, noise, kind=name, threshold=bounds.get(name))
    if "same_top" in declared.metrics:
        share_of = f"of {run.damage.tokens} tokens"
        threshold = bounds.get("same_top", max(SAME_TOP, _NEAR_TIE / run.damage.tokens))
        yield share(f"same_top{suffix}", run.damage.same_top, share_of, threshold=threshold)
    if "counts" in declared.metrics:
        queries = run.per_token.nll[:, :-1].numel() or 1  # those after the prompt; the last one predicts nothing
        seen = round(float(run.tokens_seen.sum()) * queries)
        unit = "tokens over queries, heads, layers"
        yield count(f"seen{suffix}", seen, unit, threshold=bounds.get("counts"))
        heads = digest(run.tokens_seen.contiguous().numpy().tobytes())[:16]
        yield fingerprint(f"seen_by_head{suffix}", heads, of="of layers and heads", rule="same_environment")
    if "bytes" in declared.metrics:
        stored, bound = round(run.bytes_stored), bounds.get("bytes")
        yield count(f"bytes{suffix}", stored, "bytes", kind="memory", direction="lower", threshold=bound)
