"""Scales of the frontier's axes: where values stand, and which are written beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LINEAR = 0.01  # nats: up to here a signed axis is nearly linear


@dataclass(frozen=True)
class Tick:
    """Hold a place on an axis, in the figure's units, and what is written there."""

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
        """Return where a value stands; one beyond an end stands at that end."""
        share = (mapped(value, self.kind) - self.low) / (self.high - self.low)
        return round(self.start + min(1.0, max(0.0, share)) * (self.stop - self.start), 1)


def mapped(value: float, kind: str) -> float:
    """Map a value as an axis does.

    >>> mapped(100, "log"), mapped(-0.09, "signed"), mapped(3.0, "linear")
    (2.0, -1.0, 3.0)
    """
    if kind == "log":
        return math.log10(value)
    if kind == "signed":
        return math.copysign(math.log10(1 + abs(value) / LINEAR), value)
    return value


def log_axis(values: Sequence[float], start: float, stop: float) -> tuple[Axis, list[Tick]]:
    """Make an axis of whole decades that holds all values, which are positive."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    low, high = min(low, high - 1), max(high, low + 1)
    axis = Axis(low, high, start, stop, "log")
    step = max(1, (high - low) // 6)
    return axis, [Tick(axis.place(10.0**power), f"{10.0**power:g}") for power in range(low, high + 1, step)]


def signed_axis(values: Sequence[float], start: float, stop: float) -> tuple[Axis, list[Tick]]:
    """Make an axis that holds losses and gains of all sizes, and 0."""
    low, high = (mapped(end, "signed") for end in (min(0.0, *values), max(0.0, *values)))
    margin = 0.05 * max(high - low, 0.1)
    axis = Axis(low - margin, high + margin, start, stop, "signed")
    sizes = [LINEAR * 10**power for power in range(6)]
    candidates = [-x for x in reversed(sizes)] + [0.0, *sizes]
    shown = [x for x in candidates if axis.low <= mapped(x, "signed") <= axis.high]
    return axis, [Tick(axis.place(x), f"{x:+g}" if x else "0") for x in shown]


def linear_axis(most: float, start: float, stop: float) -> tuple[Axis, list[float]]:
    """Make an axis from 0 that holds a value, with round numbers on it."""
    most = most or 1.0
    step = 10 ** math.floor(math.log10(most / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if most / (step * factor) <= 6)
    axis = Axis(0, most * 1.05, start, stop)
    return axis, [step * n for n in range(int(most * 1.0001 / step) + 1)]
