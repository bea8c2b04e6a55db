"""Makers of the metrics that cases measure: what a metric is decides its kind, unit, direction and gate."""

from __future__ import annotations

from typing import Literal

from knorm.golden.format import Gate, Metric, Noise

MEAN_SHIFT = 2e-6  # nats a token: smaller shifts are nobody's concern
PPL_RATIO = 1e-4  # relative, of PPL at a ratio to PPL at 1.0
MEMORY_RATIO = 0.02  # relative, of peak memory to that without compression

SAME_TOP = 0.005  # of the tokens: so many near-ties between the two likeliest may fall otherwise

Kind = Literal["count", "selection", "schedule", "nll", "kl", "share", "ratio", "memory", "value"]
Direction = Literal["lower", "higher", "same"]


def tokens(name: str, mean: float, noise: Noise, *, kind: Kind = "nll", threshold: float | None = None) -> Metric:
    """Make the metric of token NLLs or KLs. A tensor [windows, tokens] of this name belongs to it.

    Args:
        name: of the metric.
        mean: of all tokens, in nats.
        noise: where the gate's bounds come from.
        kind: "nll" or "kl".
        threshold: the shift of the mean, in nats a token, that is nobody's concern; None for 2e-6.

    Returns:
        A metric whose gate judges tokens window by window.
    """
    gate = Gate(rule="tokens", threshold=MEAN_SHIFT if threshold is None else threshold, noise=noise)
    return _metric(name, mean, kind, "nats/token", "lower", gate)


def share(name: str, value: float, unit: str, *, threshold: float | None = None) -> Metric:
    """Make the metric of a share of the tokens, of which more is better.

    Args:
        name: of the metric.
        value: the share, 0 to 1.
        unit: what it is a share of, in words.
        threshold: by how much it may differ either way; None for 0.005.

    Returns:
        A metric whose gate is "within".
    """
    gate = Gate(rule="within", threshold=SAME_TOP if threshold is None else threshold)
    return _metric(name, value, "share", unit, "higher", gate)


def count(
    name: str,
    number: int | str,
    unit: str,
    *,
    rule: str = "exact",
    kind: Kind = "count",
    direction: Direction = "same",
    threshold: float | None = None,
) -> Metric:
    """Make the metric of a whole number, or of one for each layer.

    Args:
        name: of the metric.
        number: what was counted; for several layers as text, with blanks between.
        unit: what of.
        rule: of the gate: the number has to be equal where it speaks.
        kind: of the metric.
        direction: which way is better.
        threshold: with one, the number may differ by that share, everywhere, and `rule` is not asked.

    Returns:
        The metric, with that gate.
    """
    gate = Gate(rule="near", threshold=threshold) if threshold else Gate(rule=rule)
    return _metric(name, number, kind, unit, direction, gate)


def fingerprint(name: str, text: str, *, kind: Kind = "selection", of: str = "", rule: str = "exact") -> Metric:
    """Make the metric of what has to be equal bit for bit.

    Args:
        name: of the metric.
        text: its sha256, or several with blanks between.
        kind: of the metric.
        of: what was hashed, in words, for the unit.
        rule: of the gate: the text has to be equal where it speaks.

    Returns:
        The metric, with that gate.
    """
    return _metric(name, text, kind, f"sha256 {of}".strip(), "same", Gate(rule=rule))


def ppl_ratio(name: str, value: float) -> Metric:
    """Make the metric `name` of a perplexity over that at ratio 1.0 in the same run: `value` may rise by 1e-4 of it."""
    return _metric(name, value, "ratio", "PPL / PPL at 1.0", "lower", Gate(rule="at_most", threshold=PPL_RATIO))


def memory_ratio(name: str, value: float, base: str) -> Metric:
    """Make the metric of peak memory over that of another run in the same process.

    Args:
        name: of the metric.
        value: bytes over bytes.
        base: the other run: "at 1.0", "uncompressed".

    Returns:
        A metric that may rise by 2%.
    """
    return _metric(
        name, value, "memory", f"bytes / bytes {base}", "lower", Gate(rule="at_most", threshold=MEMORY_RATIO)
    )


def time_ratio(name: str, value: float, margin: float) -> Metric:
    """Make the metric of a time over the uncompressed cache's. A tensor [blocks, 1] of log-ratios belongs to it.

    Args:
        name: of the metric.
        value: seconds over seconds.
        margin: slowdown against the golden, as a share, that it may have.

    Returns:
        A metric whose gate compares blocks.
    """
    return _metric(name, value, "ratio", "s / s uncompressed", "lower", Gate(rule="timing", threshold=margin))


def _metric(name: str, value: float | str, kind: Kind, unit: str, direction: Direction, gate: Gate) -> Metric:
    return Metric(name=name, value=value, anchor=value, kind=kind, unit=unit, direction=direction, gate=gate)
