"""Which of several runs differ from each other, for certain: pairs compared window by window."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knorm.statistics import half_width

NOISE = 1e-8  # nats: KL that rounding alone can make


def letters(values: Sequence[ArrayLike], least: float = 0.0) -> list[str]:
    """Give runs letters, so that two runs share one where they cannot be told apart (a compact letter display).

    Two runs are apart where Student's 95% interval of their mean difference, paired by window, excludes zero.

    Args:
        values: for each run the same quantity, [windows, tokens].
        least: differences of the means up to this are noise.

    Returns:
        A string of letters for each run, "a" for the run with the lowest mean; all empty for fewer than two windows.

    Source: Piepho, An algorithm for a letter-based representation of all-pairwise comparisons, 2004.

    Example:
        >>> noise = np.array([[0.0], [0.1], [-0.1]])
        >>> letters([noise, noise * 2, noise + 5])
        ['a', 'a', 'b']
    """
    means = [np.asarray(value, dtype=np.float64).mean(1) for value in values]
    order = sorted(range(len(means)), key=lambda run: float(means[run].mean()))
    if len(means) < 2 or len(means[0]) < 2:
        return [""] * len(means)
    groups, table = [set(order)], np.stack(means)
    for place, first in enumerate(order):
        apart = _apart(table[first] - table, least)
        for second in order[place + 1 :]:
            if apart[second]:
                groups = _without_pair(groups, first, second)
    groups.sort(key=lambda group: [order.index(run) for run in sorted(group, key=order.index)])
    return ["".join(_letter(i) for i, group in enumerate(groups) if run in group) for run in range(len(means))]


def _apart(differences: NDArray[np.float64], least: float) -> list[bool]:
    """Tell which rows of differences [runs, windows] have a mean that is certainly not 0, and beyond noise."""
    means = np.abs(differences.mean(1))
    apart: list[bool] = ((means > half_width(differences)) & (means > least)).tolist()
    return apart


def _without_pair(groups: list[set[int]], first: int, second: int) -> list[set[int]]:
    """Split the groups that hold both, and drop those that lie within another."""
    split = [
        part
        for group in groups
        for part in ([group - {first}, group - {second}] if {first, second} <= group else [group])
    ]
    return [g for i, g in enumerate(split) if not any(g < h or (g == h and j < i) for j, h in enumerate(split))]


def _letter(index: int) -> str:
    return ascii_lowercase[index % 26] * (1 + index // 26)
