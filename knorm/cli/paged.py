"""From results that were read to the parts of a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from knorm.cli.results import Read
from knorm.evaluation.distinct import NOISE
from knorm.page.form import (
    Change,
    CurvePoint,
    CurveShown,
    Explained,
    Frontier,
    Judged,
    Law,
    Matrix,
    MethodVerdicts,
    Pace,
    Page,
    Point,
    TimedRow,
    Timing,
)
from knorm.strict import first_error
from knorm.sweep.cells import CONTROL

T = TypeVar("T")


def page_of(results: Sequence[Read], title: str) -> Page:
    """Join results into a page.

    Args:
        results: in the order in which they were given.
        title: of the page.

    Returns:
        Its parts.

    Raises:
        ValueError: results in which there is nothing to show.
    """
    page = Page(
        title=title,
        sources=[read.source for read in results],
        matrices=_matrices(results),
        frontiers=_frontiers(results),
        timings=_timings(results),
        curves=[_fitting(read, _curve, at, read.result) for at, read in enumerate(results) if read.form == "knorm-ppl"],
        explained=[
            _fitting(read, _explained, at, read.result)
            for at, read in enumerate(results)
            if read.form.startswith("knorm-explain")
        ],
    )
    if not (page.matrices or page.frontiers or page.timings or page.curves or page.explained):
        names = ", ".join(read.source.name for read in results)
        raise ValueError(f"{names}: there is nothing to show in it, no law was tried and no method measured")
    return page


def _fitting(read: Read, make: Callable[..., T], *arguments: Any) -> T:
    """Make a part; raise ValueError, naming the results, for numbers that no page can show."""
    try:
        return make(*arguments)
    except ValidationError as error:
        raise ValueError(f"{read.source.name} holds what no page can show: {first_error(error)}") from None


def _planned(plan: dict[str, Any], name: str, otherwise: T) -> T:
    """Return what a plan says, where it is of the kind that it should be."""
    value = plan.get(name, otherwise)
    return value if type(value) is type(otherwise) else otherwise


def _matrices(results: Sequence[Read]) -> list[Matrix]:
    """Put verdicts of one suite revision into one matrix, and those of another into another."""
    methods: dict[str, list[MethodVerdicts]] = {}
    laws: dict[str, dict[str, Law]] = {}
    for at, read in enumerate(results):
        for suite, method, rows in _fitting(read, _tried, at, read):
            methods.setdefault(suite, []).append(method)
            for row in rows:
                laws.setdefault(suite, {}).setdefault(
                    row.check, Law(check=row.check, law=row.law, family=row.family)
                )  # fmt: skip
    return [Matrix(suite=suite, laws=_by_family(laws.get(suite, {}).values()), methods=methods[suite])
            for suite in methods]  # fmt: skip


def _tried(at: int, read: Read) -> list[tuple[str, MethodVerdicts, list[Any]]]:
    """Return (suite, verdicts, the rows that they are from) of each method."""
    result, found = read.result, []
    if read.form == "knorm-check":
        for target in result.targets:
            verdicts = MethodVerdicts(
                name=target.name, source=at, seed=result.seed, profile=result.profile, device=result.device,
                not_run=target.not_run, results=[_judged(row) for row in target.results],
            )  # fmt: skip
            found.append((result.suite, verdicts, target.results))
    elif read.form == "knorm-sweep":
        for target in result.laws:
            verdicts = MethodVerdicts(
                name=target.method, source=at, seed=target.seed, profile=_planned(result.plan, "profile", ""),
                device=result.device, not_run=None, results=[_judged(row) for row in target.results],
            )  # fmt: skip
            found.append((target.suite, verdicts, target.results))
    return found


def _judged(row: Any) -> Judged:
    return Judged(**{name: getattr(row, name) for name in Judged.model_fields})


def _by_family(laws: Iterable[Law]) -> list[Law]:
    """Put laws of one family side by side, families in the order in which they came."""
    families: dict[str, list[Law]] = {}
    for law in laws:
        families.setdefault(law.family, []).append(law)
    return [law for family in families.values() for law in family]


def _frontiers(results: Sequence[Read]) -> list[Frontier]:
    """Put methods into one figure that ran on the same windows with the same prompt, in whatever environment."""
    points: dict[tuple[Any, ...], list[Point]] = {}
    for at, read in enumerate(results):
        result = read.result
        if read.form == "knorm-ppl-methods":
            key = (
                result.model, result.dtype, result.text, result.column, result.window,
                result.rows[0].windows if result.rows else 0, result.prompt_length, 0,
            )  # fmt: skip
            for row in result.rows:
                points.setdefault(key, []).append(_fitting(read, _point, at, row, result.device, True, ""))
        elif read.form == "knorm-sweep":
            plan = result.plan
            for row in result.rows:
                key = (
                    row.model, row.dtype, row.text, _planned(plan, "column", "text"), row.window,
                    _planned(plan, "windows", row.windows), row.prompt_length, row.seed,
                )  # fmt: skip
                point = _fitting(read, _point, at, row, row.device, row.complete, row.letters)
                points.setdefault(key, []).append(point)
    names = ("model", "dtype", "text", "column", "window", "windows", "prompt_length", "seed")
    return [
        _fitting(
            results[found[0].source],
            partial(Frontier, **dict(zip(names, key, strict=True)), noise_kl=_noise(found), points=found),
        )
        for key, found in points.items()
    ]


def _noise(points: Iterable[Point]) -> float:
    """Return the KL up to which nothing is told apart: twice what any of the controls shows, as letters have it."""
    return max([NOISE, *(2 * point.kl for point in points if point.control)])


def _point(at: int, row: Any, device: str, complete: bool, letters: str) -> Point:
    same = {name for name in Point.model_fields if hasattr(row, name)} - {"complete", "letters", "device"}
    fields: dict[str, Any] = {name: getattr(row, name) for name in same}
    layers = row.tokens_seen
    seen = sum(map(sum, layers)) / max(1, sum(map(len, layers)))
    fields |= {"ppl": _finite(row.ppl), "mean_seen": seen}
    return Point(**fields, source=at, control=row.method == CONTROL, device=device, complete=complete, letters=letters)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _timings(results: Sequence[Read]) -> list[Timing]:
    """Put methods into one table that were timed with the same prompt on one kind of device with the same versions."""
    tables: dict[tuple[Any, ...], list[TimedRow]] = {}
    names = ("model", "dtype", "text", "prompt_length", "new_tokens", "seed", "device_class", "threads")
    for at, read in enumerate(results):
        named = {"device", "device_class"}  # the first cell's
        versions = {name: version for name, version in read.source.versions.items() if name not in named}
        for cell in read.result.timed if read.form == "knorm-sweep" else ():
            row, compared = _fitting(read, _timed, at, read, cell)
            key = (*(getattr(cell, name) for name in names), compared.margin, compared.alpha, (*versions.items(),))
            tables.setdefault(key, []).append(row)
    return [
        _fitting(
            results[rows[0].source],
            partial(
                Timing, **dict(zip((*names, "margin", "alpha"), key, strict=False)), versions=dict(key[-1]), rows=rows
            ),
        )
        for key, rows in tables.items()
    ]


def _timed(at: int, read: Read, cell: Any) -> tuple[TimedRow, Any]:
    """Return the row of a method that was timed, and one of its comparisons: margin and alpha are the same in both."""
    full, *rows = cell.rows or [None]
    if len(rows) != 1 or not {"ttft", "tpot"} <= {*rows[0].comparisons}:
        raise ValueError(
            f"{read.source.name} holds what no page can show: the timing of {cell.method} should have two rows, the "
            "uncompressed cache and the method, compared by ttft and tpot"
        )
    (row,) = rows

    def pace(metric: str) -> Pace:
        compared = row.comparisons[metric]
        same = {name: getattr(compared, name) for name in ("ratio", "low", "high", "mde", "verdict")}
        return Pace(ms=1000 * getattr(row, metric).seconds, ms_full=1000 * getattr(full, metric).seconds, **same)

    compared = row.comparisons["ttft"]
    made = TimedRow(
        source=at, method=cell.method, first_token=pace("ttft"), output_token=pace("tpot"), blocks=compared.blocks,
        verdict=cell.verdict,
    )  # fmt: skip
    return made, compared


def _curve(at: int, result: Any) -> CurveShown:
    policy = result.policy
    skipped = f", layers {', '.join(map(str, policy.skip_layers))} skipped" if policy.skip_layers else ""
    told = f"{policy.protocol}, prune_after {policy.prune_after}, score {policy.score}{skipped}"
    rows = [
        CurvePoint(**{name: getattr(row, name) for name in CurvePoint.model_fields} | {"ppl": _finite(row.ppl)})
        for row in result.rows
    ]
    return CurveShown(
        source=at, model=result.model, text=result.text, window=result.window, windows=result.windows,
        policy_told=told, rows=rows,
    )  # fmt: skip


def _explained(at: int, result: Any) -> Explained:
    policy = getattr(result, "policy", None)
    prompt = policy.prompt_length if policy is not None else result.prompt_length
    return Explained(
        source=at, model=result.model, text=result.text, method=getattr(result, "method", "knorm"),
        keep_ratio=result.keep_ratio, keep_tokens=getattr(result, "keep_tokens", None), windows=result.windows,
        prompt_length=prompt or 0, nll=result.nll, nll_full=result.nll_full, tokens=result.tokens,
        conclusions=result.conclusions,
        interventions=[
            Change(**{name: getattr(effect, name) for name in Change.model_fields}) for effect in result.effects
        ],
        per_token=result.per_token,
    )  # fmt: skip
