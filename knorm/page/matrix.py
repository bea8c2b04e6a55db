"""A matrix as it is drawn: laws that some method does not simply obey as columns, and all verdicts below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from knorm.page.form import Judged, Law, Matrix, MethodVerdicts
from knorm.page.words import counted, loud, word_of


@dataclass(frozen=True)
class Row:
    """Hold one method as it is drawn.

    Attributes:
        method: whose verdicts they are.
        counts: of its verdicts, in words.
        cells: a verdict for each column of the grid; None where the check was not tried.
        loud: verdicts that call for reading; held: that a law holds.
        unasked: why laws do not apply, with the verdicts of those laws.
    """

    method: MethodVerdicts
    counts: str
    cells: list[Judged | None]
    loud: list[Judged]
    held: list[Judged]
    unasked: list[tuple[str, list[Judged]]]


@dataclass(frozen=True)
class Grid:
    """Hold a matrix as it is drawn.

    Attributes:
        matrix: whose verdicts they are.
        families: (family, its columns), and `columns`: all of them.
        folded: laws that hold for every method that they are asked of.
        never: laws that are asked of none.
        rows: one for each method.
        counts: of all verdicts.
    """

    matrix: Matrix
    families: list[tuple[str, list[Law]]]
    columns: list[Law]
    folded: list[Law]
    never: list[Law]
    rows: list[Row]
    counts: str


def grid_of(matrix: Matrix) -> Grid:
    """Choose the columns of `matrix`, and put each verdict in its place; laws and methods keep their order.

    A law is a column if some method does not simply obey it. A verdict on a check that is none of the matrix's laws
    raises KeyError.
    """
    words: dict[str, set[str]] = {law.check: set() for law in matrix.laws}
    for method in matrix.methods:
        for result in method.results:
            words[result.check].add(word_of(result))
    columns = [law for law in matrix.laws if any(map(loud, words[law.check]))]
    quiet = [law for law in matrix.laws if law not in columns]
    return Grid(
        matrix,
        [(family, [*laws]) for family, laws in groupby(columns, key=lambda law: law.family)],
        columns,
        [law for law in quiet if "holds" in words[law.check]],
        [law for law in quiet if "holds" not in words[law.check]],
        [_row(method, columns) for method in matrix.methods],
        counted(result for method in matrix.methods for result in method.results),
    )


def _row(method: MethodVerdicts, columns: Sequence[Law]) -> Row:
    by_check = {result.check: result for result in method.results}
    words = {result.check: word_of(result) for result in method.results}
    return Row(
        method,
        counted(method.results),
        [by_check.get(law.check) for law in columns],
        [result for result in method.results if loud(words[result.check])],
        [result for result in method.results if words[result.check] == "holds"],
        _by_reason(result for result in method.results if words[result.check] == "not asked"),
    )


def _by_reason(results: Iterable[Judged]) -> list[tuple[str, list[Judged]]]:
    """Put verdicts of one reason together, reasons in the order in which they came."""
    found: dict[str, list[Judged]] = {}
    for result in results:
        why = f"needs {', '.join(result.needs)}" if result.needs else result.reason or ""
        found.setdefault(why, []).append(result)
    return [*found.items()]
