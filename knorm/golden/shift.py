"""How far token NLLs moved: the mean with its interval, and the bounds of windows and tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from knorm.statistics import interval


@dataclass(frozen=True)
class Shift:
    """Hold how token NLLs [windows, tokens] differ from others, in nats.

    mean          of all tokens; low, high: its interval at one-sided alpha each, clustered by window
    absolute      mean absolute difference; typical: its median over windows, the lower of two; worst: of any window
    largest       of any token, and where
    """

    mean: float
    low: float
    high: float
    absolute: float
    typical: float
    worst: float
    largest: float
    where: tuple[int, ...]

    @property
    def place(self) -> str:
        """Name the token that moved most."""
        return f"window {self.where[0]}, token {self.where[1]}"


def shift_of(measured: np.ndarray[Any, Any], golden: np.ndarray[Any, Any], alpha: float = 0.01) -> Shift:
    """Measure how far tokens moved.

    Args:
        measured: NLLs or KLs in nats, float [windows, tokens]; what is not finite is infinitely far.
        golden: those that it is compared with, of the same shape.
        alpha: chance, at each end, that the mean's interval misses the truth.

    Returns:
        The shift, measured minus golden.

    Example:
        >>> shift_of(np.array([[1.0, 2.5], [3.0, 4.0]]), np.array([[1.0, 2.0], [3.0, 4.0]])).place
        'window 0, token 1'
    """
    difference = measured.astype(np.float64) - golden.astype(np.float64)
    difference = np.where(np.isnan(difference), np.inf, difference)
    means = difference.mean(1)
    mean = float(means.mean())
    low, high = interval(means, 1 - 2 * alpha) if np.isfinite(means).all() else (None, None)
    at = tuple(int(i) for i in np.unravel_index(np.abs(difference).argmax(), difference.shape))
    absolute = np.abs(difference).mean(1)
    largest = float(np.abs(difference).max())
    typical, worst = float(np.sort(absolute)[(len(absolute) - 1) // 2]), float(absolute.max())
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return Shift(mean, low, high, float(absolute.mean()), typical, worst, largest, at)
