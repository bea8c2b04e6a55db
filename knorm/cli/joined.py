"""Pages joined into one: what can be compared stands together, in the order in which it was given."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

from knorm.evaluation.distinct import NOISE
from knorm.page.form import (
    CurveShown,
    Explained,
    Frontier,
    Law,
    Matrix,
    MethodVerdicts,
    Page,
    Point,
    TimedRow,
    Timing,
)  # fmt: skip

Row = TypeVar("Row", MethodVerdicts, Point, TimedRow, CurveShown, Explained)
Table = TypeVar("Table", Matrix, Frontier, Timing)


def joined(pages: Sequence[Page], title: str) -> Page:
    """Join pages: verdicts by suite, points by windows and prompt, times by prompt and environment.

    Args:
        pages: in the order in which they were given.
        title: of the page.

    Returns:
        A page whose sources are those of all pages, one after the other.
    """
    moved, first = [], 0
    for page in pages:
        moved.append(_moved(page, {at: first + at for at in range(len(page.sources))}))
        first += len(page.sources)
    return Page(
        title=title,
        sources=[source for page in pages for source in page.sources],
        matrices=_matrices([matrix for page in moved for matrix in page.matrices]),
        frontiers=_frontiers([frontier for page in moved for frontier in page.frontiers]),
        timings=[
            same[0].model_copy(update={"rows": [row for timing in same for row in timing.rows]})
            for same in _alike([timing for page in moved for timing in page.timings], "rows")
        ],
        curves=[curve for page in moved for curve in page.curves],
        explained=[part for page in moved for part in page.explained],
    )


def left_of(page: Page, without: Collection[str]) -> Page:
    """Leave results out of a page.

    Args:
        page: it is not changed.
        without: names of sources.

    Returns:
        The page of the other sources, and of what is from them.
    """
    left = [at for at, source in enumerate(page.sources) if source.name not in without]
    moved = _moved(page, {at: place for place, at in enumerate(left)})
    return joined([moved.model_copy(update={"sources": [page.sources[at] for at in left]})], page.title)


def noise_of(points: Iterable[Point]) -> float:
    """Return the KL up to which nothing is told apart: twice what any of the controls shows, as letters have it."""
    return max([NOISE, *(2 * point.kl for point in points if point.control)])


def by_family(laws: Iterable[Law]) -> list[Law]:
    """Put laws of one family side by side, families in the order in which they came; each law once."""
    families: dict[str, dict[str, Law]] = {}
    for law in laws:
        families.setdefault(law.family, {}).setdefault(law.check, law)
    return [law for family in families.values() for law in family.values()]


def _moved(page: Page, places: dict[int, int]) -> Page:
    """Give what is from each source its new place; leave out what is from the others, and tables that become empty."""

    def mine(rows: list[Row]) -> list[Row]:
        return [row.model_copy(update={"source": places[row.source]}) for row in rows if row.source in places]

    def filled(tables: list[Table], name: str) -> list[Table]:
        found = ((table, mine(getattr(table, name))) for table in tables)
        return [table.model_copy(update={name: rows}) for table, rows in found if rows]

    frontiers = [frontier.model_copy(update={"beside": mine(frontier.beside)}) for frontier in page.frontiers]
    tables = {"matrices": filled(page.matrices, "methods"), "frontiers": filled(frontiers, "points")}
    rows = {"curves": mine(page.curves), "explained": mine(page.explained)}
    return page.model_copy(update={**tables, "timings": filled(page.timings, "rows"), **rows})


def _alike(tables: Sequence[Table], *own: str) -> list[list[Table]]:
    """Put tables together that are the same but for the fields `own`."""
    found: dict[str, list[Table]] = {}
    for table in tables:
        found.setdefault(table.model_dump_json(exclude={*own}), []).append(table)
    return list(found.values())


def _matrices(matrices: Sequence[Matrix]) -> list[Matrix]:
    made = []
    for same in _alike(matrices, "laws", "methods"):
        methods = [method for matrix in same for method in matrix.methods]
        tried = {result.check for method in methods for result in method.results}
        laws = by_family(law for matrix in same for law in matrix.laws if law.check in tried)
        made.append(Matrix(suite=same[0].suite, laws=laws, methods=methods))
    return made


def _frontiers(frontiers: Sequence[Frontier]) -> list[Frontier]:
    made = []
    for same in _alike(frontiers, "noise_kl", "points", "beside"):
        points, beside = (
            [point for frontier in same for point in getattr(frontier, name)] for name in ("points", "beside")
        )
        made.append(same[0].model_copy(update={"noise_kl": noise_of(points), "points": points, "beside": beside}))
    return made
