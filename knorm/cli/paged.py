"""From results that were read to the parts of a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from knorm.cli.joined import by_family, joined, noise_of
from knorm.cli.results import Read
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
TITLE = "KV-cache compression: is it correct, and what does it cost?"


def page_of(results: Sequence[Read], title: str | None = None) -> Page:
    """Join results into a page.

    Args:
        results: in the order in which they were given; those of a page are all that it was made of.
        title: of the page; None for that of the first page among the results, or TITLE.

    Returns:
        Its parts.

    Raises:
        ValueError: results in which there is nothing to show.
    """
    pages = [_page(read) for read in results]
    page = joined(pages, title or next((page.title for page in pages if page.title), TITLE))
    if not (page.matrices or page.frontiers or page.timings or page.curves or page.explained):
        names = ", ".join(read.name for read in results)
        raise ValueError(f"{names}: there is nothing to show in it, no law was tried and no method measured")
    return page


def _page(read: Read) -> Page:
    """Make a page of one result; one that was read is what it is."""
    if read.form == "knorm-page":
        page: Page = read.result
        return page
    return Page(
        title="",
        sources=[*read.sources],
        matrices=_matrices(read),
        frontiers=_frontiers(read),
        timings=_timings(read),
        curves=[_fitting(read, _curve, read.result)] if read.form == "knorm-ppl" else [],
        explained=[_fitting(read, _explained, read.result)] if read.form.startswith("knorm-explain") else [],
    )


def _fitting(read: Read, make: Callable[..., T], *arguments: Any) -> T:
    """Make a part; raise ValueError, naming the results, for numbers that no page can show."""
    try:
        return make(*arguments)
    except ValidationError as error:
        raise ValueError(f"{read.name} holds what no page can show: {first_error(error)}") from None


def _planned(plan: dict[str, Any], name: str, otherwise: T) -> T:
    """Return what a plan says, where it is of the kind that it should be."""
    value = plan.get(name, otherwise)
    return value if type(value) is type(otherwise) else otherwise


def _matrices(read: Read) -> list[Matrix]:
    """Put verdicts of one suite revision into one matrix, and those of another into another."""
    found: dict[str, tuple[list[Law], list[MethodVerdicts]]] = {}
    for suite, method, rows in _fitting(read, _tried, read):
        laws, methods = found.setdefault(suite, ([], []))
        methods.append(method)
        laws += [_fitting(read, partial(Law, check=row.check, law=row.law, family=row.family)) for row in rows]
    return [Matrix(suite=suite, laws=by_family(laws), methods=methods) for suite, (laws, methods) in found.items()]


def _tried(read: Read) -> list[tuple[str, MethodVerdicts, list[Any]]]:
    """Return (suite, verdicts, the rows that they are from) of each method."""
    result, found = read.result, []
    if read.form == "knorm-check":
        for target in result.targets:
            verdicts = MethodVerdicts(
                name=target.name, source=0, seed=result.seed, profile=result.profile, device=result.device,
                not_run=target.not_run, results=[_judged(row) for row in target.results],
            )  # fmt: skip
            found.append((result.suite, verdicts, target.results))
    elif read.form == "knorm-sweep":
        for target in result.laws:
            verdicts = MethodVerdicts(
                name=target.method, source=0, seed=target.seed, profile=_planned(result.plan, "profile", ""),
                device=result.device, not_run=None, results=[_judged(row) for row in target.results],
            )  # fmt: skip
            found.append((target.suite, verdicts, target.results))
    return found


def _judged(row: Any) -> Judged:
    return Judged(**{name: getattr(row, name) for name in Judged.model_fields})


def _frontiers(read: Read) -> list[Frontier]:
    """Put methods into one figure that ran on the same windows with the same prompt."""
    points: dict[tuple[Any, ...], list[Point]] = {}
    result, beside = read.result, list[Point]()
    if read.form == "knorm-ppl-methods":
        key = (
            result.model, result.dtype, result.text, result.column, result.window,
            result.rows[0].windows if result.rows else 0, result.prompt_length, 0,
        )  # fmt: skip
        for row in result.rows:
            points.setdefault(key, []).append(_fitting(read, _point, row, result.device, True, ""))
        for row in result.engine.beside if result.engine else ():
            beside.append(_fitting(read, _point, row, result.device, True, ""))
    elif read.form == "knorm-sweep":
        plan = result.plan
        for row in result.rows:
            key = (
                row.model, row.dtype, row.text, _planned(plan, "column", "text"), row.window,
                _planned(plan, "windows", row.windows), row.prompt_length, row.seed,
            )  # fmt: skip
            points.setdefault(key, []).append(_fitting(read, _point, row, row.device, row.complete, row.letters))
    names = ("model", "dtype", "text", "column", "window", "windows", "prompt_length", "seed")
    return [
        _fitting(
            read,
            partial(
                Frontier, **dict(zip(names, key, strict=True)), noise_kl=noise_of(found), points=found, beside=beside
            ),
        )
        for key, found in points.items()
    ]


def _point(row: Any, device: str, complete: bool, letters: str) -> Point:
    same = {name for name in Point.model_fields if hasattr(row, name)} - {"complete", "letters", "device"}
    fields: dict[str, Any] = {name: getattr(row, name) for name in same}
    layers = row.tokens_seen
    seen = sum(map(sum, layers)) / max(1, sum(map(len, layers)))
    fields |= {"ppl": _finite(row.ppl), "mean_seen": seen}
    return Point(**fields, source=0, control=row.method == CONTROL, device=device, complete=complete, letters=letters)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _timings(read: Read) -> list[Timing]:
    """Put methods into one table that were timed with the same prompt on one kind of device."""
    tables: dict[tuple[Any, ...], list[TimedRow]] = {}
    names = ("model", "dtype", "text", "prompt_length", "new_tokens", "seed", "device_class", "threads")
    named = {"device", "device_class"}  # the first cell's
    versions = {name: version for name, version in read.sources[0].versions.items() if name not in named}
    for cell in read.result.timed if read.form == "knorm-sweep" else ():
        row, compared = _fitting(read, _timed, read, cell)
        key = (*(getattr(cell, name) for name in names), compared.margin, compared.alpha)
        tables.setdefault(key, []).append(row)
    return [
        _fitting(
            read,
            partial(Timing, **dict(zip((*names, "margin", "alpha"), key, strict=True)), versions=versions, rows=rows),
        )
        for key, rows in tables.items()
    ]


def _timed(read: Read, cell: Any) -> tuple[TimedRow, Any]:
    """Return the row of a method that was timed, and one of its comparisons: margin and alpha are the same in both."""
    full, *rows = cell.rows or [None]
    if len(rows) != 1 or not {"ttft", "tpot"} <= {*rows[0].comparisons}:
        raise ValueError(
            f"{read.name} holds what no page can show: the timing of {cell.method} should have two rows, the "
            "uncompressed cache and the method, compared by ttft and tpot"
        )
    (row,) = rows

    def pace(metric: str) -> Pace:
        compared = row.comparisons[metric]
        same = {name: getattr(compared, name) for name in ("ratio", "low", "high", "mde", "verdict")}
        return Pace(ms=1000 * getattr(row, metric).seconds, ms_full=1000 * getattr(full, metric).seconds, **same)

    compared = row.comparisons["ttft"]
    made = TimedRow(
        source=0, method=cell.method, first_token=pace("ttft"), output_token=pace("tpot"), blocks=compared.blocks,
        verdict=cell.verdict,
    )  # fmt: skip
    return made, compared


def _curve(result: Any) -> CurveShown:
    policy = result.policy
    skipped = f", layers {', '.join(map(str, policy.skip_layers))} skipped" if policy.skip_layers else ""
    told = f"{policy.protocol}, prune_after {policy.prune_after}, score {policy.score}{skipped}"
    rows = [
        CurvePoint(**{name: getattr(row, name) for name in CurvePoint.model_fields} | {"ppl": _finite(row.ppl)})
        for row in result.rows
    ]
    return CurveShown(
        source=0, model=result.model, text=result.text, window=result.window, windows=result.windows,
        policy_told=told, rows=rows,
    )  # fmt: skip


def _explained(result: Any) -> Explained:
    policy = getattr(result, "policy", None)
    prompt = policy.prompt_length if policy is not None else result.prompt_length
    return Explained(
        source=0, model=result.model, text=result.text, method=getattr(result, "method", "knorm"),
        keep_ratio=result.keep_ratio, keep_tokens=getattr(result, "keep_tokens", None), windows=result.windows,
        prompt_length=prompt or 0, nll=result.nll, nll_full=result.nll_full, tokens=result.tokens,
        conclusions=result.conclusions,
        interventions=[
            Change(**{name: getattr(effect, name) for name in Change.model_fields}) for effect in result.effects
        ],
        per_token=result.per_token,
    )  # fmt: skip
