"""Tables and lines of results, as the terminal shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from textwrap import wrap
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from knorm.cli.options import visible

if TYPE_CHECKING:
    from knorm.evaluation.curve import Row
    from knorm.evaluation.doubts import Suspicion
    from knorm.evaluation.facts import Recall
    from knorm.evaluation.sums import Damage
    from knorm.evaluation.ways import Evaluation
    from knorm.golden.gates import Finding
    from knorm.golden.history import Entry
    from knorm.golden.noise import Passes, Seen
    from knorm.golden.verify import Outcome
    from knorm.methods.budget import Budget
    from knorm.sweep.table import DamageRow


LETTERS = "Methods that share a letter cannot be told apart by KL (95%, paired by window)."
_ROUNDING = 1e-9  # of means over windows
UNCHANGED = "no token's prediction changed: was the cache ever read?"


def curve_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """Make a table with a line for each ratio."""
    from knorm.evaluation.curve import NEWEST

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    columns = ["ratio", "PPL", "± s.e.", "bits/byte", "accuracy", "mean cache", "final", f"newest {NEWEST}", "s"]
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.keep_ratio,
            f"{row.ppl:.2f}",
            "-" if row.standard_error is None else f"{row.standard_error:.2f}",
            f"{row.bits_per_byte:.3f}",
            f"{row.accuracy:.1%}",
            f"{row.mean_cache:.1f}",
            f"{row.final_cache:.1f}",
            "-" if row.recent is None else f"{row.recent:.1f}",
            f"{row.seconds:.2f}",
        )
    return table


def loop_table(rows: Sequence[Row]) -> Table:
    """Make a table with a line for each ratio at which the loop was run too."""
    table = Table(title="\nThe loop", title_justify="left", box=None, pad_edge=False)
    for column in ("ratio", "PPL", "largest difference", "evictions differ", "s", "one pass is faster"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.stream_seconds is not None:
            table.add_row(
                row.keep_ratio,
                f"{row.stream_ppl:.2f}",
                f"{row.stream_difference:.1e}",
                str(row.stream_evictions),
                f"{row.stream_seconds:.2f}",
                f"{row.stream_seconds / row.seconds:.0f}x",
            )
    return table


def print_text(console: Console, text: Text, soft_wrap: bool = False) -> None:
    """Print a line of text, whatever it holds."""
    text.plain = visible(text.plain)  # a target's words may hold what no terminal takes, or what rewrites a verdict
    console.print(text, soft_wrap=soft_wrap or not console.is_terminal)  # a log has no edge


def show_suspicions(console: Console, doubts: Sequence[Suspicion]) -> None:
    """Show what does not make sense in a curve, with its cause or the command that would show it."""
    for doubt in doubts:
        print_text(console, Text.assemble(("SUSPICIOUS  ", "bold yellow"), f"{doubt.what}: {doubt.then}"))


def show_methods(
    console: Console,
    rows: Sequence[Evaluation],
    failed: Mapping[str, str],
    title: str,
    recalls: Mapping[str, Recall],
    *,
    prompt_length: int,
    verbose: bool,
) -> None:
    """Show what each method costs, how it was run, and which cannot be told apart."""
    from knorm.evaluation.distinct import NOISE, letters
    from knorm.page.words import legible

    first = rows[0]
    print_text(console, Text(title))
    full = first.bytes_full / first.tokens_before
    said = f"Full cache: PPL {math.exp(float(first.per_token.nll_full.mean())):.3f}, "
    said += "" if math.isnan(full) else f"{full:,.0f} bytes per token, "
    print_text(console, Text(f"{said}{first.tokens_before:.0f} tokens seen by a query\n"))
    apart = letters([row.per_token.kl for row in rows], max(NOISE, 2 * first.damage.kl))
    lines = [
        evaluation_line(row, letter)
        for row, letter in zip(rows, apart if legible(apart) else [""] * len(rows), strict=True)
    ]
    console.print(damage_table(lines))
    if any(apart) and legible(apart):
        print_text(console, Text(LETTERS, "dim"))
    print_text(console, Text(""))
    for row in rows:
        note = row.how + (f"; {row.check}" if row.check else "")
        print_wrapped(console, f"{row.label}: {note}", "dim")
        if row is not first and unread(row, row.budget, prompt_length):
            print_wrapped(console, f"  {UNCHANGED}", "bold yellow")
        if verbose:
            print_wrapped(console, f"  {_tails(row)}", "dim")
    for reason in failed.values():
        print_wrapped(console, f"FAILED  {reason}", "bold red")
    if recalls:
        _show_recalls(console, recalls)


def unread(row: Evaluation | DamageRow, budget: Budget | None, prompt_length: int) -> bool:
    """Tell whether a method's cache may never have been read: no prediction changed, though something had to.

    Something had to where less than the prompt was to be kept, where queries see fewer tokens than the full cache's,
    and where fewer bytes are stored. A cache that keeps everything, as transformers' DynamicCache, changes nothing.
    """
    seen = min(float(head) for layer in row.tokens_seen for head in layer)
    fewer = seen < row.tokens_before * (1 - _ROUNDING) or row.bytes_stored < row.bytes_full * (1 - _ROUNDING)
    asked = budget is not None and budget.ratio(prompt_length) < 1
    return not row.changed and (asked or fewer)


def damage_table(lines: Sequence[tuple[str, ...]]) -> Table:
    """Make a table of what methods cost, of the lines of damage_line."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("method, budget", overflow="fold", min_width=14)
    for column in ("PPL", "ΔNLL", "±", "KL", "top", "B/token", "seen", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def evaluation_line(row: Evaluation, letter: str) -> tuple[str, ...]:
    """Write what a `row` costs as the cells of a line, with its `letter`; a lower bound on KL says so."""
    line = damage_line(row.label, row.damage, row.bytes_per_token, float(row.tokens_seen.mean()), letter)
    return (*line[:4], f"≥{line[4]}", *line[5:]) if row.kl_at_least else line


def damage_line(label: str, damage: Damage, bytes_per_token: float, seen: float, letter: str) -> tuple[str, ...]:
    """Write what a method costs as the cells of a line: its label, losses, memory, and the letters of its equals."""
    half = "-" if damage.delta_nll_high is None else f"{damage.delta_nll_high - damage.delta_nll:.3f}"
    losses = f"{damage.ppl:.2f}", f"{damage.delta_nll:+.3f}", half, _small(damage.kl), f"{damage.same_top:.1%}"
    stored = "-" if math.isnan(bytes_per_token) else f"{bytes_per_token:.0f}"
    return label, *losses, stored, f"{seen:.0f}", letter


def print_wrapped(console: Console, text: str, style: str = "") -> None:
    """Print a line of text; what does not fit goes on below, indented."""
    lines = wrap(text, console.width, subsequent_indent="    ", drop_whitespace=True, break_on_hyphens=False)
    for line in lines:
        print_text(console, Text(line, style), soft_wrap=True)


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.4f}" if value >= 0.001 else f"{value:.0e}"


def _tails(row: Evaluation) -> str:
    d = row.damage
    median, high, higher, most = map(_small, (d.kl_median, d.kl_99, d.kl_999, d.kl_largest))
    kl = f"KL median {median}, 99% {high}, 99.9% {higher}, largest {most}"
    seen = ", ".join(f"{float(layer.mean()):.0f}" for layer in row.tokens_seen)
    return f"{kl}; delta-p {d.delta_p:+.2%}, RMS {d.delta_p_rms:.2%}; seen by layer: {seen}"


def _show_recalls(console: Console, recalls: Mapping[str, Recall]) -> None:
    print_text(console, Text("\nNames that the story gives early and needs late:"))
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("method, budget", overflow="fold")
    for column in ("PPL of the names", "likeliest", "PPL of the rest"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, recall in recalls.items():
        table.add_row(name, f"{recall.ppl:.2f}", f"{recall.accuracy:.1%}", f"{recall.others:.2f}")
    console.print(table)


_OUTCOMES = {
    "holds": ("holds         ", "green"),
    "moved": ("MOVED         ", "bold red"),
    "missing": ("MISSING       ", "bold red"),
    "damaged": ("DAMAGED       ", "bold red"),
    "orphan": ("ORPHAN        ", "bold red"),
    "not compared": ("not compared  ", "yellow"),
    "inconclusive": ("INCONCLUSIVE  ", "yellow"),
}
_ROWS = 12  # of a table at most


def show_outcome(console: Console, outcome: Outcome) -> None:
    """Show the outcome of a golden in a line; below it, the metrics that moved."""
    where = f" ({outcome.device_class})" if outcome.device_class else ""
    spent = f"; {outcome.seconds:.1f} s" if outcome.seconds else ""
    line = Text.assemble(_OUTCOMES[outcome.verdict], f"{outcome.case}{where} ", (f"[{outcome.evidence}{spent}]", "dim"))
    print_text(console, line)
    if outcome.verdict == "moved" and outcome.findings:
        console.print(findings_table(outcome.findings))


def findings_table(findings: Sequence[Finding]) -> Table:
    """Make a table of the metrics that moved: golden, measured, first accepted, and why."""
    moved = [finding for finding in findings if finding.verdict == "moved"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("    metric", "golden", "measured", "first accepted"):
        table.add_column(column, justify="left" if "metric" in column else "right", overflow="fold")
    table.add_column("moved", ratio=1)
    for f in moved[:_ROWS]:
        table.add_row(f"    {f.metric}", *map(_value, (f.golden, f.measured, f.anchor)), Text(f.evidence))
    if moved[_ROWS:]:
        table.add_row(f"    ... {len(moved) - _ROWS} more")
    return table


def _value(value: int | float | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:.7g}" if isinstance(value, float) else str(value)[:26] + ("..." if len(str(value)) > 26 else "")


_VERDICTS = {
    "holds": "within its gate",
    "moved": "moved",
    "shown": "not gated between these environments",
    "inconclusive": "inconclusive: too noisy",
}


def changes_table(changes: Sequence[Finding], title: str) -> Table:
    """Show what a candidate would change: old, new, difference with its interval; count what it would not."""
    changed = [change for change in changes if change.verdict != "holds" or change.golden != change.measured]
    same = len(changes) - len(changed)
    table = Table(title=f"{title}: {len(changed)} of {len(changes)} metrics differ", box=None, pad_edge=False)
    table.title_justify = "left"
    for column in ("metric", "first accepted", "golden", "candidate", "difference", "interval"):
        table.add_column(column, justify="left" if column == "metric" else "right", overflow="fold")
    table.add_column("")
    for c in changed:
        between = "-" if c.low is None or c.high is None else f"{c.low:+.2e} to {c.high:+.2e}"
        difference = "-" if c.difference is None else f"{c.difference:+.3g}"
        numbers = map(_value, (c.anchor, c.golden, c.measured))
        table.add_row(c.metric, *numbers, difference, between, _VERDICTS[c.verdict])
    table.caption = f"{same} are the same" if same and changed else None
    return table


def show_noise(console: Console, seen: Seen, gates: Sequence[Passes]) -> None:
    """Show the noise of a case, and what the gates made of it let pass."""
    said = (
        f"{seen.runs} runs in which nothing that matters differs ({', '.join(seen.what)}), and what the gates let pass:"
    )
    print_text(console, Text(said))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("    metric", "noise", "lets pass", "the method does", ""):
        table.add_column(column, justify="left" if column in ("    metric", "") else "right", overflow="fold")
    for gate in gates:
        does = "-" if gate.does is None else f"{gate.does:.1e}"
        table.add_row(f"    {gate.metric}", f"{gate.most:.1e}", f"{gate.passes:.1e}", does, gate.unit)
    console.print(table)
    for what, nats in seen.matters.items():
        moved = "it cannot be run so" if math.isinf(nats) else f"it moves a typical window by {nats:.1e} nats a token"
        print_text(console, Text(f"    {what} matters: {moved}"))


def show_goldens(console: Console, rows: Sequence[tuple[str, ...]]) -> None:
    """Show each case with what it pins; below it a line for each golden: device class, when and at which commit.

    Args:
        console: to print to.
        rows: case, device class, day, commit, reason and what the case pins; those of a case follow each other. Without
            a commit, the day is a word and the reason says what is wrong.
    """
    wide = max((len(device) for _, device, *_ in rows), default=0)
    for case, lines in groupby(rows, key=lambda row: row[0]):
        for number, (_, device, day, commit, reason, what) in enumerate(lines):
            if not number:
                print_wrapped(console, case if what == "-" else f"{case}: {what}", "bold")
            if commit == "-":
                words = " ".join(word for word in (device, day, reason) if word != "-")
                print_wrapped(console, f"    {words}", "yellow" if day == "-" else "bold red")
            else:
                print_text(console, Text(f"    {device:{wide}}  {day}  {commit}"))


_METRICS_SHOWN = 5


def history_table(entries: Sequence[Entry], names: Sequence[str], title: str) -> Table:
    """Show accepted goldens, the oldest first: when, why, and each metric's value with its change from the anchor."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("recorded", "commit", "reason", *names[:_METRICS_SHOWN]):
        table.add_column(column, overflow="fold", justify="right" if column in names else "left")
    for entry in entries:
        made = entry.golden.provenance
        cells = [made.date[:10], (entry.commit or "")[:12] or "not committed", made.reason]
        for name in names[:_METRICS_SHOWN]:
            metric = entry.golden.metric(name)
            cells.append("-" if metric is None else f"{_value(metric.value)}{_drift(metric.value, metric.anchor)}")
        table.add_row(*map(Text, cells))
    if len(names) > _METRICS_SHOWN:
        table.caption = f"{len(names) - _METRICS_SHOWN} more metrics changed: --metric NAME shows them"
    return table


def _drift(value: int | float | str, anchor: int | float | str) -> str:
    if isinstance(value, str) or isinstance(anchor, str) or not anchor or value == anchor:
        return ""
    return f" ({(value - anchor) / abs(anchor):+.2%})"
