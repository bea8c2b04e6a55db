"""Figures of results, drawn with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knorm.cli.outputs import MADE_BY, replace_file

if TYPE_CHECKING:
    from knorm.evaluation.curve import Row
    from knorm.evaluation.explain import Explanation
    from knorm.evaluation.ways import Evaluation
    from knorm.golden.history import Entry
    from knorm.statistics import Comparison


def plot_curve(rows: Sequence[Row], title: str, file: Path) -> None:
    """Draw perplexity against ratio, with its standard error, above how many of the newest tokens were cached."""
    figure, (above, below) = new_figure((7, 6), rows=2, sharex=True, height_ratios=(2, 1))
    rows = sorted(rows, key=lambda row: Fraction(row.keep_ratio))
    ratios = [float(Fraction(row.keep_ratio)) for row in rows]
    above.errorbar(ratios, [r.ppl for r in rows], [r.standard_error or 0 for r in rows], marker="o", capsize=3)
    above.set(ylabel="perplexity (± standard error)")
    if ratios[-1] == 1:
        above.axhline(rows[-1].ppl, color="gray", linestyle=":", label="full cache")
        above.legend(fontsize="small")
    _draw_recent(below, rows, marker="s", color="tab:orange")
    finish_figure(figure, (above, below), title, file)


def _draw_recent(axes: Any, rows: Sequence[Row], **style: Any) -> None:
    """Draw how many of the newest tokens were cached against ratio; no marker is cut at an edge."""
    from knorm.evaluation.curve import NEWEST

    recent = [math.nan if row.recent is None else row.recent for row in rows]
    axes.plot([float(Fraction(row.keep_ratio)) for row in rows], recent, **style)
    axes.set(ylabel=f"newest {NEWEST} still cached", xlabel="keep_ratio", ylim=(-0.8, NEWEST + 0.8))


def _draw_curves(above: Any, below: Any, curves: Mapping[str, Sequence[Row]]) -> None:
    """Draw perplexity against ratio for several policies, and how many of the newest tokens each had cached."""
    for name, rows in curves.items():
        above.plot([float(Fraction(r.keep_ratio)) for r in rows], [r.ppl for r in rows], marker="o", label=name)
        _draw_recent(below, rows, marker="o")
    above.set(ylabel="perplexity", yscale="log", xlabel="keep_ratio")


def plot_curves(curves: Mapping[str, Sequence[Row]], title: str, file: Path) -> None:
    """Draw the curves of several policies."""
    figure, (left, right) = new_figure((11, 5), columns=2)
    _draw_curves(left, right, curves)
    left.legend(fontsize="small")
    finish_figure(figure, (left, right), title, file)


def plot_explanation(
    explanation: Explanation, curves: Mapping[str, Sequence[Row]], ratio: str, title: str, file: Path
) -> None:
    """Draw what each change does, ranked, with its interval; beside it the curve, with the explained ratio marked."""
    effects = explanation.effects
    figure, (ranked, above, below) = new_figure((13, max(5.0, 0.34 * len(effects) + 1.2)), columns=3)
    for place, effect in enumerate(effects):
        low, high = (effect.change if end is None else end for end in (effect.low, effect.high))
        reach = [[effect.change - low], [high - effect.change]]
        sure = effect.low is not None and not low <= 0 <= high
        ranked.errorbar([effect.change], [place], xerr=reach, marker="o" if sure else "s", capsize=3,
                        color="tab:blue" if sure else "gray", markerfacecolor=None if sure else "white")  # fmt: skip
    ranked.plot([], [], marker="o", linestyle="", color="tab:blue", label="interval without 0")
    ranked.plot(
        [], [], marker="s", linestyle="", color="gray", markerfacecolor="white", label="interval with 0, or none"
    )
    ranked.axvline(0, color="gray", linewidth=1)
    ranked.set_yticks(range(len(effects)), [effect.name for effect in effects], fontsize="small")
    ranked.invert_yaxis()
    ranked.set(xlabel="change of NLL, nats per token (less is better)")
    ranked.legend(fontsize="x-small")
    _draw_curves(above, below, curves)
    for axes in (above, below):
        axes.axvline(float(Fraction(ratio)), color="black", linestyle="--", linewidth=1, label=f"explained: {ratio}")
    above.legend(fontsize="small")
    finish_figure(figure, (ranked, above, below), title, file)


def plot_frontier(rows: Sequence[Evaluation], title: str, file: Path) -> None:
    """Draw KL from the full cache against bytes per token; what lies in the band cannot be told from the full cache."""
    figure, axes = new_figure((9, 6), columns=1)
    control, *methods = rows
    floor = max(control.damage.kl, 1e-6)
    for number, row in enumerate(methods):
        damage = row.damage
        kl, low, high = (max(x or 0, floor) for x in (damage.kl, damage.kl_low, damage.kl_high or damage.kl))
        style = {"marker": "osD^vP*X"[number % 8], "capsize": 3, "label": row.label}
        axes.errorbar([row.bytes_per_token], [kl], [[kl - min(low, kl)], [max(high, kl) - kl]], linestyle="", **style)
    full = control.bytes_full / control.tokens_before
    axes.axvline(full, color="gray", linestyle=":", label="full cache")
    axes.set(xlabel="bytes of cache per token", ylabel="KL(full || compressed), nats per token", yscale="log")
    axes.axhspan(axes.get_ylim()[0], floor, color="gray", alpha=0.2, label="the full cache run again, and less")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    finish_figure(figure, [axes], title, file)


def plot_history(entries: Sequence[Entry], names: Sequence[str], title: str, file: Path) -> None:
    """Draw metrics of a golden over its acceptances, each relative to what was accepted first."""
    figure, axes = new_figure((9, 5), columns=1)
    for name in names:
        points = []
        for place, entry in enumerate(entries):
            metric = entry.golden.metric(name)
            if metric and not isinstance(metric.value, str) and not isinstance(metric.anchor, str) and metric.anchor:
                points.append((place, 100 * (metric.value - metric.anchor) / abs(metric.anchor)))
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(0, color="gray", linestyle=":")
    reasons = [f"{e.golden.provenance.date[:10]}\n{e.golden.provenance.reason[:30]}" for e in entries]
    axes.set_xticks(range(len(entries)), reasons, rotation=30, ha="right", fontsize="x-small")
    axes.set(ylabel="change from what was accepted first, %")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    finish_figure(figure, [axes], title, file)


def plot_recall(recalls: Mapping[str, Sequence[tuple[str, Any]]], title: str, file: Path) -> None:
    """Perplexity of the facts' own tokens against ratio, and beside it that of all other tokens (facts.Recall)."""
    figure, (left, right) = new_figure((11, 5), columns=2)
    for name, results in recalls.items():
        if len(results) == 1:
            for axes, value in ((left, results[0][1].ppl), (right, results[0][1].others)):
                axes.axhline(value, linestyle=":", color="gray", label=name)
            continue
        ratios = [float(Fraction(ratio)) for ratio, _ in results]
        left.plot(ratios, [r.ppl for _, r in results], marker="o", label=name)
        right.plot(ratios, [r.others for _, r in results], marker="o")
    high = left.get_ylim()[1]
    left.set(ylabel="perplexity of the names", yscale="log", xlabel="keep_ratio")
    right.set(ylabel="perplexity of all other tokens", yscale="log", xlabel="keep_ratio")
    for axes in (left, right):  # one scale: what moves is to be seen
        axes.set_ylim(10, max(200, high))
    left.legend(fontsize="small")
    finish_figure(figure, (left, right), title, file)


def new_figure(size: tuple[float, float], *, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Make a figure of matplotlib and its axes. Raises ValueError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install 'knorm[plot]'") from None
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def finish_figure(figure: Any, axes: Sequence[Any], title: str, file: Path) -> None:
    """Title, grid and plain numbers; then the file."""
    figure.suptitle(title, fontsize="medium")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_yscale() == "log":
            low, high = axis.get_ylim()
            axis.yaxis.set_major_formatter("{x:g}")
            if high < 50 * low:  # over more decades, numbers between the powers of ten would not fit
                axis.yaxis.set_minor_formatter("{x:g}")
    save_figure(figure, file)


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure whole or not at all, marked as knorm's own, which may overwrite it the next time."""
    mark = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}[file.suffix]
    replace_file(file, lambda beside: figure.savefig(beside, dpi=120, metadata={mark: MADE_BY}))


def check_plot(file: Path) -> None:
    """Raises ValueError, before the work, for a figure that could not be drawn after it."""
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {file}, but should end in .png, .svg or .pdf")
    new_figure((1, 1))


_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "throughput": "1 / throughput"}
_SHOWN = ("ttft", "tpot", "throughput")

Pairs = Sequence[tuple[str, Mapping[str, "Comparison"]]]


_MARKS = {"PASS": ("o", "tab:green"), "FAIL": ("X", "tab:red"), "INCONCLUSIVE": ("s", "tab:orange")}
_UNJUDGED = ("D", "gray")


def plot_slowdowns(pairs: Pairs, title: str, margin: float, file: Path) -> None:
    """Draw each slowdown with its interval and verdict, and the margin; throughput is shown and not judged."""
    figure, axes = new_figure((8, 1.6 + 0.45 * 3 * len(pairs)))
    lines = [(metric, name, compared[metric]) for name, compared in pairs for metric in _SHOWN]
    for place, (metric, _, c) in enumerate(lines):
        centre = 100 * (c.ratio - 1)
        reach = [[centre - 100 * (c.low - 1)], [100 * (c.high - 1) - centre]]
        marker, colour = _UNJUDGED if metric == "throughput" else _MARKS[c.verdict]
        axes.errorbar([centre], [place], xerr=reach, marker=marker, capsize=4, color=colour)
    axes.axvline(0, color="gray", linewidth=1)
    axes.axvline(100 * margin, color="gray", linestyle="--", linewidth=1, label=f"margin {margin:.1%}")
    seen = {c.verdict for metric, _, c in lines if metric != "throughput"}
    for verdict, (marker, colour) in {**_MARKS, "not judged": _UNJUDGED}.items():
        if verdict in seen or verdict == "not judged":
            axes.plot([], [], marker=marker, linestyle="", color=colour, label=verdict)
    axes.set_yticks(range(len(lines)), [f"{_NAMES[metric]}, {name}" for metric, name, _ in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set(xlabel="slowdown, %")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    finish_figure(figure, [axes], title, file)
