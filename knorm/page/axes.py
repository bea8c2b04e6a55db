"""Scales of the frontier's axes: where values stand, and which are written beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LINEAR = 0.01  # nats: up to here a signed axis is nearly linear


@dataclass(frozen=True)
class Tick:
    """Hold a place on an axis, in the figure's units, and the words that are written there."""

    place: float
    words: str


@dataclass(frozen=True)
class Axis:
    """Place values between two ends of a figure.

    Attributes:
        low: value at `start`; high: at `stop`; both as the kind of the axis maps them.
        start: place of the low end; stop: of the high end.
        kind: "linear", "log" or "signed": logarithmic on both sides of 0, nearly linear near it.
    """

    low: float
    high: float
    start: float
    stop: float
    kind: str = "linear"

    def place(self, value: float) -> float:
        """Return where `value` stands, to a tenth of a unit; one beyond an end stands at that end.

        On a logarithmic axis it should be positive: others raise ValueError.
        """
        share = (mapped(value, self.kind) - self.low) / (self.high - self.low)
        return round(self.start + min(1.0, max(0.0, share)) * (self.stop - self.start), 1)


def mapped(value: float, kind: str) -> float:
    """Return `value` as an axis of this `kind` maps it: "log", "signed", or "linear", which leaves it as it is.

    The logarithm is that to base 10, and wants a positive value. "signed" takes that of 1 + |value| / LINEAR, with the
    sign of the value: 0 stays 0.

    Example:
        >>> mapped(100, "log"), mapped(-0.09, "signed"), mapped(3.0, "linear")
        (2.0, -1.0, 3.0)
    """
    if kind == "log":
        return math.log10(value)
    if kind == "signed":
        return math.copysign(math.log10(1 + abs(value) / LINEAR), value)
    return value


def log_axis(values: Sequence[float], start: float, stop: float) -> tuple[Axis, list[Tick]]:
    """Make an axis of whole decades that holds all values.

    Args:
        values: at least one, all positive.
        start: place of the low end, in the figure's units; an axis may run upwards, to smaller places.
        stop: place of the high end.

    Returns:
        The axis, of one decade at least; and its ticks at powers of ten, 12 at most, the lowest first.
    """
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    low, high = min(low, high - 1), max(high, low + 1)
    axis = Axis(low, high, start, stop, "log")
    step = max(1, (high - low) // 6)
    return axis, [Tick(axis.place(10.0**power), f"{10.0**power:g}") for power in range(low, high + 1, step)]


def signed_axis(values: Sequence[float], start: float, stop: float) -> tuple[Axis, list[Tick]]:
    """Make an axis that holds losses and gains of all sizes, and 0.

    Args:
        values: at least one, in nats, of either sign.
        start: place of the low end, in the figure's units; an axis may run upwards, to smaller places.
        stop: place of the high end.

    Returns:
        The axis, with a margin beyond the outermost values; and those of its ticks at 0 and at 0.01, 0.1, ... 1000 nats
        on both sides that lie on it, the lowest first.
    """
    low, high = (mapped(end, "signed") for end in (min(0.0, *values), max(0.0, *values)))
    margin = 0.05 * max(high - low, 0.1)
    axis = Axis(low - margin, high + margin, start, stop, "signed")
    sizes = [LINEAR * 10**power for power in range(6)]
    candidates = [-x for x in reversed(sizes)] + [0.0, *sizes]
    shown = [x for x in candidates if axis.low <= mapped(x, "signed") <= axis.high]
    return axis, [Tick(axis.place(x), f"{x:+g}" if x else "0") for x in shown]


def linear_axis(most: float, start: float, stop: float) -> tuple[Axis, list[float]]:
    """Make an axis from 0 that holds a value, with round numbers on it.

    Args:
        most: the largest value, not negative; 0 is taken for 1.
        start: place of 0, in the figure's units.
        stop: place of the high end, which lies 5% beyond the largest value.

    Returns:
        The axis; and 0 and the multiples of a round step up to the largest value, 7 numbers at most.
    """
    most = most or 1.0
    step = 10 ** math.floor(math.log10(most / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if most / (step * factor) <= 6)
    axis = Axis(0, most * 1.05, start, stop)
    return axis, [step * n for n in range(int(most * 1.0001 / step) + 1)]
