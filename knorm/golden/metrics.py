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
    """Make the metric of token NLLs or KLs, nats: their mean; a tensor [windows, tokens] of this name belongs to it."""
    gate = Gate(rule="tokens", threshold=MEAN_SHIFT if threshold is None else threshold, noise=noise)
    return _metric(name, mean, kind, "nats/token", "lower", gate)


def share(name: str, value: float, unit: str, *, threshold: float | None = None) -> Metric:
    """Make the metric of a share of the tokens, which may differ by the threshold."""
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
    """Make the metric of a whole number, or of one for each layer, which has to be equal where its rule speaks.

    With a threshold it may differ by that share, everywhere.
    """
    gate = Gate(rule="near", threshold=threshold) if threshold else Gate(rule=rule)
    return _metric(name, number, kind, unit, direction, gate)


def fingerprint(name: str, text: str, *, kind: Kind = "selection", of: str = "", rule: str = "exact") -> Metric:
    """Make the metric of a sha256, or of several, of what has to be equal bit for bit where its rule speaks."""
    return _metric(name, text, kind, f"sha256 {of}".strip(), "same", Gate(rule=rule))


def ppl_ratio(name: str, value: float) -> Metric:
    """Make the metric of a perplexity over that at ratio 1.0 in the same run."""
    return _metric(name, value, "ratio", "PPL / PPL at 1.0", "lower", Gate(rule="at_most", threshold=PPL_RATIO))


def memory_ratio(name: str, value: float, base: str) -> Metric:
    """Make the metric of peak memory over that of `base` in the same run: "at 1.0", "uncompressed"."""
    return _metric(
        name, value, "memory", f"bytes / bytes {base}", "lower", Gate(rule="at_most", threshold=MEMORY_RATIO)
    )


def time_ratio(name: str, value: float, margin: float) -> Metric:
    """Make the metric of a time over the uncompressed cache's; beside it belongs a tensor [blocks, 1] of log-ratios."""
    return _metric(name, value, "ratio", "s / s uncompressed", "lower", Gate(rule="timing", threshold=margin))


def _metric(name: str, value: float | str, kind: Kind, unit: str, direction: Direction, gate: Gate) -> Metric:
    return Metric(name=name, value=value, anchor=value, kind=kind, unit=unit, direction=direction, gate=gate)
