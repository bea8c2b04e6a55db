"""The rules that gates name, a class each: where a rule speaks, how it judges, and how much worse it lets pass."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from knorm.golden.format import Gate, Metric, Noise
from knorm.golden.shift import Shift, shift_of
from knorm.statistics import ALPHA, MARGIN
from knorm.statistics import compare as compare_times

Array = np.ndarray[Any, Any]
Where = Literal["same", "versions", "elsewhere"]

EVERYWHERE: tuple[Where, ...] = ("same", "versions", "elsewhere")
MEAN_ABSOLUTE = 1e-4  # nats a token, in the same environment
ANY_WINDOW = 0.05  # nats a token, of one window's tokens in another: four times what near-ties did to any single token
_SIGMAS = 5  # of mean shift, before it is looked at


@dataclass(frozen=True)
class Pair:
    """Hold one metric, accepted and measured again.

    before, now   the metric then and now; it is judged by the gate of `before`
    old, new      its tensors then and now; None where there are none
    where         how near the two environments are
    peers         how many metrics of the golden the same rule judges: they share its error rate
    """

    before: Metric
    now: Metric
    old: Array | None
    new: Array | None
    where: Where
    peers: int = 1


@dataclass(frozen=True)
class Judgement:
    """Hold what a rule says of a pair: verdict, evidence, and `low` and `high` of the difference if it has them."""

    verdict: Literal["holds", "moved", "inconclusive"]
    evidence: str = ""
    low: float | None = None
    high: float | None = None


# The rules, a class each


class Rule(ABC):
    """Define how the metrics of one kind of gate are judged.

    name      as the gate in a file names it
    speaks    in which environments its verdict counts; in the others a difference is shown
    tensors   what its tensors hold, where it cannot judge without them: "tokens", "blocks"
    numbers   it judges numbers only
    """

    name: ClassVar[str]
    speaks: ClassVar[tuple[Where, ...]] = EVERYWHERE
    tensors: ClassVar[str] = ""
    numbers: ClassVar[bool] = False

    @abstractmethod
    def judge(self, pair: Pair) -> Judgement:
        """Judge the metric of `pair` as if its gate spoke in this environment."""

    def slack(self, before: Metric) -> float:
        """Return by how much the metric may become worse than `before` without permission, in its own unit."""
        return 0.0


class Exact(Rule):
    """Require the same value, everywhere."""

    name = "exact"

    def judge(self, pair: Pair) -> Judgement:
        """Compare the values; name the first position that differs where there are tensors."""
        if pair.before.value == pair.now.value:
            return Judgement("holds")
        if pair.old is None or pair.new is None:
            return Judgement("moved", "differs")
        return Judgement("moved", _first_difference(pair.old, pair.new))


class SameEnvironment(Exact):
    """Require the same value in the golden's own environment."""

    name = "same_environment"
    speaks = ("same",)


class SameVersions(Exact):
    """Require the same value with the golden's torch and transformers."""

    name = "same_versions"
    speaks = ("same", "versions")


class AtMost(Rule):
    """Require a value of at most the golden's x (1 + threshold), everywhere."""

    name = "at_most"
    numbers = True

    def judge(self, pair: Pair) -> Judgement:
        """Compare the values."""
        was, value = float(pair.before.value), float(pair.now.value)
        if value <= was + self.slack(pair.before):
            return Judgement("holds")
        if not was or not math.isfinite(value):
            return Judgement("moved", f"is {value:g}, not at most {was:g}")
        limit = pair.before.gate.threshold or 0.0
        return Judgement("moved", f"is {(value - was) / abs(was):.2%} above the golden, at most {limit:.2%}")

    def slack(self, before: Metric) -> float:
        """Return the threshold's share of the golden value."""
        return abs(float(before.value)) * (before.gate.threshold or 0.0)


class Within(Rule):
    """Require a value that differs from the golden's by at most the threshold, in the metric's unit, everywhere."""

    name = "within"
    numbers = True

    def judge(self, pair: Pair) -> Judgement:
        """Compare the values."""
        was, value, limit = float(pair.before.value), float(pair.now.value), self.slack(pair.before)
        if abs(value - was) <= limit:
            return Judgement("holds")
        return Judgement("moved", f"is {value:g}, not {was:g}" + (f" within {limit:.2g}" if limit else ""))

    def slack(self, before: Metric) -> float:
        """Return the threshold."""
        return before.gate.threshold or 0.0


class Near(Within):
    """Require a value that differs from the golden's by at most the threshold's share of it, everywhere."""

    name = "near"

    def slack(self, before: Metric) -> float:
        """Return the threshold's share of the golden value."""
        return abs(float(before.value)) * (before.gate.threshold or 0.0)


class ExactHere(Near):
    """Require the same value in the golden's own environment; elsewhere one within the threshold's share of it."""

    name = "exact_here"

    def judge(self, pair: Pair) -> Judgement:
        """Compare the values by the bound of this environment."""
        if pair.where != "same" or pair.before.value == pair.now.value:
            return super().judge(pair)
        return Judgement("moved", f"is {pair.now.value}, not {pair.before.value}, in the same environment")


class Close(Rule):
    """Require numbers that differ from the golden's by at most the threshold's share of their largest, everywhere."""

    name = "close"
    tensors = "numbers"
    numbers = True

    def judge(self, pair: Pair) -> Judgement:
        """Compare the tensors, number by number."""
        assert pair.old is not None
        assert pair.new is not None
        if pair.old.shape != pair.new.shape:
            return Judgement("moved", f"shape {[*pair.new.shape]}, but the golden has {[*pair.old.shape]}")
        if not pair.old.size:
            return Judgement("holds")
        old, new = pair.old.astype(np.float64), pair.new.astype(np.float64)
        difference = np.abs(new - old)
        at = np.unravel_index(difference.argmax(), difference.shape)
        limit = (pair.before.gate.threshold or 0.0) * float(np.abs(old).max())
        if difference[at] <= limit:
            return Judgement("holds")
        where = f" at {[int(index) for index in at]}" if at else ""
        return Judgement("moved", f"is {new[at]:.7g}{where}, not {old[at]:.7g} within {limit:.2g}")


class Tokens(Rule):
    """Require values of tokens [windows, tokens] in nats, NLL or KL, within the noise that was measured.

    In the same environment: no token by more than noise.largest, all by at most 1e-4 on average. In another one of the
    same device class: the mean by at most the slack, unless its interval, clustered by window, contains 0; the typical
    window's tokens by at most noise.typical (near-ties of a window or two may flip); any window's by ANY_WINDOW.
    """

    name = "tokens"
    tensors = "tokens"
    numbers = True

    def judge(self, pair: Pair) -> Judgement:
        """Compare the tokens by the bounds of this environment."""
        assert pair.old is not None
        assert pair.new is not None
        if pair.new.shape != pair.old.shape or pair.new.ndim != 2 or not pair.new.size:
            shapes = f"{[*pair.new.shape]} windows and tokens, but the golden has {[*pair.old.shape]}"
            return Judgement("moved", shapes)
        if not np.isfinite(pair.new).all():
            return Judgement(
                "moved", f"the value of window {np.argwhere(~np.isfinite(pair.new))[0].tolist()} is not finite"
            )
        noise = _noise(pair.before.gate)
        shift = shift_of(pair.new, pair.old, noise.alpha)
        why = _moved_here(shift, noise) if pair.where == "same" else self._moved_elsewhere(shift, pair.before)
        low, high = (bound if math.isfinite(bound) else None for bound in (shift.low, shift.high))
        return Judgement("moved" if why else "holds", why, low, high)

    def slack(self, before: Metric) -> float:
        """Return the mean shift that environments alone may cause: the threshold, or 5 standard deviations."""
        return max(before.gate.threshold or 0.0, _SIGMAS * _noise(before.gate).sigma)

    def _moved_elsewhere(self, shift: Shift, before: Metric) -> str:
        typical = _noise(before.gate).typical
        if abs(shift.mean) > self.slack(before) and not shift.low <= 0 <= shift.high:
            return f"the mean moved by {shift.mean:+.1e} nats ({shift.low:+.1e} to {shift.high:+.1e})"
        if shift.typical > typical:
            return f"the typical window's tokens moved by {shift.typical:.1e} nats, at most {typical:.0e} elsewhere"
        most = _noise(before.gate).worst or ANY_WINDOW
        if shift.worst > most:
            return f"one window's tokens moved by {shift.worst:.1e} nats, at most {most:g} (most at {shift.place})"
        return ""


class Timing(Rule):
    """Require that a ratio of times has not been shown to rise, in the golden's own environment.

    Its tensors are the log-ratios of blocks [blocks, 1]. It moved where it rose, by the threshold or more for all one
    knows; the metrics of a golden share the error rate.
    """

    name = "timing"
    speaks = ("same",)
    tensors = "blocks"
    numbers = True

    def judge(self, pair: Pair) -> Judgement:
        """Compare the log-ratios of the blocks, then and now."""
        assert pair.old is not None
        assert pair.new is not None
        margin = pair.before.gate.threshold or MARGIN["cpu"]
        for blocks in (pair.old, pair.new):
            if blocks.ndim != 2 or blocks.shape[1] != 1:
                return Judgement("moved", f"blocks of shape {[*blocks.shape]}, but should be [blocks, 1]")
        old, new = pair.old[:, 0].tolist(), pair.new[:, 0].tolist()
        try:
            compared = compare_times(new, margin=margin, alpha=ALPHA / pair.peers, golden=old)
        except ValueError as error:
            return Judgement("moved", str(error))
        was = float(pair.before.value)
        low, high = compared.low - 1, compared.high - 1
        bounds = was * low, was * high
        rise = f"{compared.ratio - 1:+.1%} ({low:+.1%} to {high:+.1%}, could see {compared.mde:.1%})"
        if compared.verdict == "PASS":
            return Judgement("holds", rise, *bounds)
        if compared.verdict == "FAIL":
            return Judgement("moved", f"the ratio rose: {rise}, at most {margin:.1%}", *bounds)
        return Judgement("inconclusive", f"{rise}: about {compared.more} more blocks would decide", *bounds)

    def slack(self, before: Metric) -> float:
        """Return the threshold's share of the golden ratio."""
        return abs(float(before.value)) * (before.gate.threshold or 0.0)


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Exact(), SameEnvironment(), SameVersions(), ExactHere(), Tokens(), AtMost(), Within(), Near(), Close(), Timing()
    )
}  # fmt: skip


def _noise(gate: Gate) -> Noise:
    return gate.noise or Noise(runs=0, sigma=0.0, largest=0.0, typical=0.0, alpha=0.01, power=None)


def _moved_here(shift: Shift, noise: Noise) -> str:
    if shift.absolute > MEAN_ABSOLUTE:
        return f"tokens moved by {shift.absolute:.1e} nats on average, most at {shift.place} ({shift.largest:.1e})"
    if shift.largest > noise.largest:
        return f"{shift.place} moved by {shift.largest:.1e} nats, at most {noise.largest:.0e} in the same environment"
    return ""


def _first_difference(old: Array, new: Array) -> str:
    if old.shape != new.shape:
        return f"shape {[*new.shape]}, but the golden has {[*old.shape]}"
    if (old == new).all():
        return "differs"
    if not old.ndim:
        return f"{new.item()}, but the golden has {old.item()}"
    at = np.argwhere((old != new).any(-1))[0]
    return f"positions {new[tuple(at)].tolist()} at {at.tolist()}, but the golden has {old[tuple(at)].tolist()}"
