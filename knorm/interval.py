"""Student's interval of a mean: of one number a window, since tokens of a window are not independent."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats


def interval(numbers: Any, level: float = 0.95) -> tuple[float | None, float | None]:
    """Of the mean of numbers [windows]: low, high; None, None for one window."""
    values = np.asarray(numbers, dtype=np.float64)
    if len(values) < 2:
        return None, None
    reach = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()) - reach, float(values.mean()) + reach
