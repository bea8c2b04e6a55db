"""Is one arm slower than another? A verdict from the log-ratios of blocks in which both ran in turns.

The mean log-ratio gets two intervals, Student's and a bootstrap's, and both have to agree. Beside every ratio stands
the smallest slowdown that the run could have detected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from scipy.special import stdtrit

from knorm.limits import BLOCKS

ALPHA = 0.01  # one-sided: how often a verdict that nothing changed may be FAIL
POWER = 0.95  # with which the smallest detectable slowdown is stated
LEAST = BLOCKS
MARGIN = {"cpu": 0.05, "cuda": 0.025}  # half of the slowdown that is to be caught: tools/bench_latency_power.py
_RESAMPLES = 9999

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]


@dataclass(frozen=True)
class Comparison:
    """Say how much slower an arm is: times over the baseline's, 1.05 is 5% slower.

    ratio            geometric mean over blocks
    low, high        its bounds, each at one-sided alpha: the wider of t and bootstrap
    t, bootstrap     the two intervals
    mde              smallest slowdown, as a share, that would have been found slower at alpha with a power of 95%
    margin, alpha    of the verdict
    blocks           how many; effective: what they are worth, being correlated with their neighbours
    more             blocks that would make INCONCLUSIVE impossible at this noise; 0 for another verdict
    """

    ratio: float
    low: float
    high: float
    t: tuple[float, float]
    bootstrap: tuple[float, float]
    mde: float
    margin: float
    alpha: float
    blocks: int
    effective: float
    verdict: Verdict
    more: int


def effective_blocks(logs: Sequence[float]) -> float:
    """Return what n blocks are worth: n (1 - r) / (1 + r), at least 2; r: correlation with the next, if positive.

    The variance of the mean of a first-order autoregressive series (Bartlett 1946), which drifting clocks resemble.

    Args:
        logs: log-ratios in the order in which they were measured.

    Returns:
        The number of independent blocks that are worth as much.

    Example:
        >>> effective_blocks([1, -1, 1, -1])
        4.0
    """
    values = np.asarray(logs, dtype=np.float64)
    centred = values - values.mean()
    total = float((centred**2).sum())
    r = max(0.0, float((centred[1:] * centred[:-1]).sum()) / total) if total > 0 else 0.0
    return max(2.0, len(values) * (1 - r) / (1 + r))


def compare(
    logs: Sequence[float], *, margin: float, alpha: float = ALPHA, golden: Sequence[float] | None = None
) -> Comparison:
    """Judge log-ratios, one a block: logarithm of the arm's time over the baseline's.

    Args:
        logs: the log-ratios, at least 8.
        margin: slowdown, as a share, that is acceptable.
        alpha: probability of a false FAIL, and of a false PASS.
        golden: log-ratios of an accepted run: then the verdict is on how much the ratio rose since (Welch).

    Returns:
        The comparison. Its verdict is PASS where the upper bound lies below the margin, FAIL where the lower one lies
        above 0 and the margin is not excluded, else INCONCLUSIVE.

    Raises:
        ValueError: fewer than 8 blocks, or one that is not finite.

    Example:
        >>> compare([0.2, 0.21] * 8, margin=0.05).verdict
        'FAIL'
    """
    samples = [np.asarray(part, dtype=np.float64) for part in (logs, golden) if part is not None]
    for values in samples:
        if len(values) < LEAST:
            raise ValueError(
                f"{len(values)} blocks, but should be at least {LEAST}: fewer cannot tell noise from change"
            )
        if not np.isfinite(values).all():
            raise ValueError("a block's log-ratio is not finite: a clock stood still")
    worth = [effective_blocks(values.tolist()) for values in samples]
    variances = [float(values.var(ddof=1)) / n for values, n in zip(samples, worth, strict=True)]
    error = math.sqrt(sum(variances))
    freedom = worth[0] - 1
    if len(samples) == 2 and error:
        freedom = error**4 / sum(v**2 / (n - 1) for v, n in zip(variances, worth, strict=True))
    mean = float(samples[0].mean() - (samples[1].mean() if golden is not None else 0.0))
    reach, power = (float(stdtrit(freedom, level)) for level in (1 - alpha, POWER))
    student = (mean - reach * error, mean + reach * error)
    widen = max(math.sqrt(len(values) / n) for values, n in zip(samples, worth, strict=True))
    resampled = _bootstrap(samples, mean, alpha, widen)
    low, high = min(student[0], resampled[0]), max(student[1], resampled[1])
    limit = math.log1p(margin)
    verdict: Verdict = "PASS" if high < limit else "FAIL" if low > 0 else "INCONCLUSIVE"
    more = 0
    if verdict == "INCONCLUSIVE":  # with bounds nearer to each other than 0 and the margin, it cannot be
        more = max(1, math.ceil(len(samples[0]) * ((high - low) / limit) ** 2) - len(samples[0]))
    share = (math.exp(student[0]), math.exp(student[1])), (math.exp(resampled[0]), math.exp(resampled[1]))
    return Comparison(
        math.exp(mean), math.exp(low), math.exp(high), *share, math.expm1((reach + power) * error), margin, alpha,
        len(samples[0]), worth[0], verdict, more,
    )  # fmt: skip


def _bootstrap(samples: list[Any], mean: float, alpha: float, widen: float) -> tuple[float, float]:
    """Percentile bounds of the mean (of the difference of means); widened as correlated blocks ask for."""

    def statistic(*parts: Any, axis: int = -1) -> Any:
        means = [values.mean(axis) for values in parts]
        return means[0] - means[1] if means[1:] else means[0]

    from scipy import stats  # takes longer to load than all the rest here

    result = stats.bootstrap(
        samples,
        statistic,
        confidence_level=1 - 2 * alpha,
        n_resamples=_RESAMPLES,
        method="percentile",  # BCa is undefined where blocks are alike
        vectorized=True,
        batch=1000,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return mean - widen * (mean - float(result.low)), mean + widen * (float(result.high) - mean)


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """Join verdicts: FAIL if there is one, else INCONCLUSIVE if there is one, else PASS.

    Args:
        verdicts: any number.

    Returns:
        The verdict.

    Example:
        >>> overall(["PASS", "INCONCLUSIVE"])
        'INCONCLUSIVE'
    """
    kinds = set(verdicts)
    return "FAIL" if "FAIL" in kinds else "INCONCLUSIVE" if "INCONCLUSIVE" in kinds else "PASS"


def check_share(name: str, value: float) -> float:
    """Return `value`, a margin as a share. Raises ValueError outside (0, 10); messages call it `name`, in per cent."""
    if not 0 < value < 10:
        raise ValueError(f"{name} {100 * value:g}, but should be a slowdown in per cent above 0, e.g. {name} 5")
    return value


def interval(numbers: Any, level: float = 0.95) -> tuple[float | None, float | None]:
    """Compute Student's interval of the mean of numbers, one for each window: tokens of a window are not independent.

    Args:
        numbers: [windows].
        level: of the interval.

    Returns:
        Its lower and its upper end; None, None for one window.

    Example:
        >>> interval([1.0])
        (None, None)
    """
    values = np.asarray(numbers, dtype=np.float64)
    if len(values) < 2:
        return None, None
    reach = float(half_width(values, level))
    return float(values.mean()) - reach, float(values.mean()) + reach


def half_width(numbers: Any, level: float = 0.95) -> Any:
    """Compute half of the width of Student's interval of means.

    Args:
        numbers: [..., windows], at least two windows.
        level: of the interval.

    Returns:
        The half width of each row, [...].

    Example:
        >>> half_width([[1.0, 2.0], [1.0, 1.0]]).round(2).tolist()
        [6.35, 0.0]
    """
    values = np.asarray(numbers, dtype=np.float64)
    count = values.shape[-1]
    return _student(level, count - 1) * values.std(axis=-1, ddof=1) / math.sqrt(count)


@lru_cache(maxsize=256)
def _student(level: float, freedom: int) -> float:
    return float(stdtrit(freedom, (1 + level) / 2))


def smallest_difference(deviation: float, count: int, level: float = 0.95, power: float = POWER) -> float:
    """Compute the smallest mean difference that an interval of numbers, one for each window, is likely to tell from 0.

    Args:
        deviation: standard deviation of the windows' differences.
        count: of windows, at least 2.
        level: of the interval.
        power: the probability that it excludes 0, where the mean difference is the one returned.

    Returns:
        The difference, in the unit of the deviation.

    Example:
        >>> round(smallest_difference(1.0, 100), 3)
        0.364
    """
    reach, more = (float(stdtrit(count - 1, share)) for share in ((1 + level) / 2, power))
    return (reach + more) * deviation / math.sqrt(count)
