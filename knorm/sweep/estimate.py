"""What a plan will take, and what it will be able to tell, estimated from cells that are done."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from knorm.statistics import smallest_difference
from knorm.sweep.cells import CONTROL, Cell
from knorm.sweep.plan import Plan
from knorm.sweep.table import Table

# Standard deviation of the windows' mean change of a token's NLL, times the root of the tokens scored: the embedded
# model with half of its cache had 0.3 on the encyclopedia, 0.7 on the narrative. For a plan with nothing measured yet.
TYPICAL_DEVIATION = 0.5


@dataclass(frozen=True)
class Estimate:
    """Say what the rest of a plan will take.

    Attributes:
        seconds: of work, in all workers together; None where no cell tells.
        unknown: cells whose like has not been done yet, which are taken to be like others of their model.
        untimed: cells of models of which none is done; their seconds are not in.
        memory: the most bytes that a worker had; None where no cell tells.
        smallest: (least, median, largest) over the rows: the mean change of a token's NLL, in nats, that the plan's
            windows are likely to tell from none; None for one window.
        measured: how many rows that is from; 0: from TYPICAL_DEVIATION.
    """

    seconds: float | None
    unknown: int
    untimed: int
    memory: int | None
    smallest: tuple[float, float, float] | None
    measured: int


def estimate(plan: Plan, cells: Iterable[Cell], table: Table) -> Estimate:
    """Estimate from what is done.

    Args:
        plan: of the study.
        cells: those that are left.
        table: of those that are done.

    Returns:
        The estimate.
    """
    rates: dict[tuple[Any, ...], list[float]] = {}
    for cell, spent in table.seconds:
        for key in _alike(cell):
            rates.setdefault(key, []).append(spent / _size(cell))
    middle = {key: median(values) for key, values in rates.items()}
    seconds, unknown, untimed = 0.0, 0, 0
    for cell in cells:
        keys = _alike(cell)
        known = next((key for key in keys if key in middle), None)
        if known is None:
            untimed += 1
            continue
        unknown += known != keys[0]
        seconds += middle[known] * _size(cell)
    deviations = _deviations(table)
    smallest = None
    if plan.windows > 1:
        typical = [TYPICAL_DEVIATION / math.sqrt(plan.window - min(plan.prompts))]
        found = [smallest_difference(value, plan.windows) for value in deviations or typical]
        smallest = (min(found), median(found), max(found))
    return Estimate(seconds if middle else None, unknown, untimed, table.memory or None, smallest, len(deviations))


def _alike(cell: Cell) -> list[tuple[Any, ...]]:
    """Return what cells are alike by, the closest first."""
    model = (cell.measure, cell.model, cell.dtype)
    return [(*model, cell.method.label, cell.prompt_length, cell.window), (*model, cell.method.label), model]


def _size(cell: Cell) -> int:
    return max(1, cell.last - cell.first)


def _deviations(table: Table) -> list[float]:
    """Compute the standard deviation of the windows' mean changes, of each row that has at least two."""
    found = []
    for row in table.damage:
        if row.damage.delta_nll_high is not None and row.cell.method.target != CONTROL and row.changed:
            found.append(float(np.std(row.changes, ddof=1)))
    return [value for value in found if value > 0]
