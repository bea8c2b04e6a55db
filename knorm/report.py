"""Tables for the terminal (rich) and figures (matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from knorm.evaluation import NEWEST, Row


def curve_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """A line per ratio; the loop's columns where it was run."""
    stream = any(row.stream_ppl is not None for row in rows)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    columns = ["ratio", "PPL", "± s.e.", "bits/byte", "accuracy", "mean cache", "final", f"newest {NEWEST}", "s"]
    columns += ["loop PPL", "max diff.", "evictions", "speed-up"] if stream else []
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        cells = [
            row.keep_ratio,
            f"{row.ppl:.2f}",
            "-" if row.standard_error is None else f"{row.standard_error:.2f}",
            f"{row.bits_per_byte:.3f}",
            f"{row.accuracy:.1%}",
            f"{row.mean_cache:.1f}",
            f"{row.final_cache:.1f}",
            "-" if row.recent is None else f"{row.recent:.1f}",
            f"{row.seconds:.2f}",
        ]
        if row.stream_ppl is not None and row.stream_seconds is not None:
            cells += [
                f"{row.stream_ppl:.2f}",
                f"{row.stream_difference:.1e}",
                str(row.stream_evictions),
                f"{row.stream_seconds / row.seconds:.0f}x",
            ]
        table.add_row(*cells)
    return table


def plot_curve(rows: Sequence[Row], title: str, file: Path) -> None:
    """Perplexity against ratio, with its standard error, above how many of the newest tokens were cached."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install 'knorm[plot]'") from None
    rows = sorted(rows, key=lambda row: float(row.keep_ratio))
    ratios = [float(row.keep_ratio) for row in rows]
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    above.errorbar(ratios, [r.ppl for r in rows], [r.standard_error or 0 for r in rows], marker="o", capsize=3)
    above.set(ylabel="perplexity (± standard error)")
    above.set_title(title, fontsize="medium", wrap=True)
    below.plot(ratios, [math.nan if r.recent is None else r.recent for r in rows], marker="s", color="tab:orange")
    below.set(ylabel=f"newest {NEWEST}\nstill cached", xlabel="keep_ratio", ylim=(0, NEWEST + 0.5))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
