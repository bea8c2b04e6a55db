"""What windows add up to: sums of a comparison, and the damage that follows from them. PyTorch is not needed here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from knorm.statistics import interval


@dataclass(frozen=True)
class Damage:
    """Sum up what a method costs in quality; intervals are 95%, clustered by window, None for one window.

    Attributes:
        windows: how many.
        tokens: scored in all of them.
        nll: mean in nats per token.
        ppl: exp of it.
        delta_nll: mean difference from the full cache, paired by token.
        delta_nll_low: lower end of its interval; delta_nll_high: the upper.
        kl: mean KL(full || run), in nats per token.
        kl_low: lower end of its interval; kl_high: the upper.
        kl_median: of the tokens; kl_99 and kl_999: their 99% and 99.9% quantiles; kl_largest: the largest.
        accuracy: share of tokens that the run predicts as the likeliest.
        same_top: share of tokens for which both predict the same token as the likeliest.
        delta_p: mean change of the true token's probability; delta_p_rms: root of its mean square.
    """

    windows: int
    tokens: int
    nll: float
    ppl: float
    delta_nll: float
    delta_nll_low: float | None
    delta_nll_high: float | None
    kl: float
    kl_low: float | None
    kl_high: float | None
    kl_median: float
    kl_99: float
    kl_999: float
    kl_largest: float
    accuracy: float
    same_top: float
    delta_p: float
    delta_p_rms: float


class Sums(NamedTuple):
    """Hold what a comparison adds up to in each window, from which any windows' Damage follows.

    nll, nll_full, kl, same_top, correct, delta_p are sums over the window's tokens of what PerToken holds, delta_nll of
    nll - nll_full, delta_p_squared of its square: float64 [windows]. tokens is PerToken's kl, for its quantiles.
    """

    nll: NDArray[np.float64]
    nll_full: NDArray[np.float64]
    delta_nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    same_top: NDArray[np.float64]
    correct: NDArray[np.float64]
    delta_p: NDArray[np.float64]
    delta_p_squared: NDArray[np.float64]
    tokens: NDArray[np.float64]


def damage_of(sums: Sums) -> Damage:
    """Compute means, quantiles and intervals from the sums of windows, in their order.

    Args:
        sums: of all windows that are to be summed up, of equally many tokens each.

    Returns:
        What `summed` returns for the same windows at once, to the bit.
    """
    count, each = sums.tokens.size, sums.tokens.shape[1]
    low, high = interval(sums.delta_nll / each)
    kl_low, kl_high = interval(sums.kl / each)
    ordered = np.sort(sums.tokens, axis=None)
    at = [float(ordered[min(count - 1, math.ceil(share * count) - 1)]) for share in (0.5, 0.99, 0.999)]
    mean = float(sums.nll.sum()) / count
    return Damage(
        windows=len(sums.nll),
        tokens=count,
        nll=mean,
        ppl=math.exp(mean) if mean < 700 else math.inf,
        delta_nll=float(sums.delta_nll.sum()) / count,
        delta_nll_low=low,
        delta_nll_high=high,
        kl=float(sums.kl.sum()) / count,
        kl_low=kl_low,
        kl_high=kl_high,
        kl_median=at[0],
        kl_99=at[1],
        kl_999=at[2],
        kl_largest=float(ordered[-1]),
        accuracy=float(sums.correct.sum()) / count,
        same_top=float(sums.same_top.sum()) / count,
        delta_p=float(sums.delta_p.sum()) / count,
        delta_p_rms=math.sqrt(float(sums.delta_p_squared.sum()) / count),
    )
