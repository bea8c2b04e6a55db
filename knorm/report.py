"""Tables and results for the terminal (rich) and figures (matplotlib)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from knorm.cases import Change, Outcome
    from knorm.evaluation import Row
    from knorm.explain import Explanation
    from knorm.golden import Finding
    from knorm.sanity import Suspicion


def curve_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """A line per ratio; the loop's columns where it was run."""
    from knorm.evaluation import NEWEST

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
    from knorm.evaluation import NEWEST

    rows = sorted(rows, key=lambda row: Fraction(row.keep_ratio))
    ratios = [float(Fraction(row.keep_ratio)) for row in rows]
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


_HEADS = {
    "holds": ("holds    ", "green"),
    "refuted": ("REFUTED  ", "bold red"),
    "expected failure": ("expected ", "yellow"),
    "unexpectedly holds": ("HOLDS THOUGH EXPECTED TO FAIL  ", "bold red"),
    "untested": ("untested ", "yellow"),
    "does not apply": ("n/a      ", "dim"),
}


def show_result(console: Console, result: Mapping[str, Any], verbose: bool = False) -> None:
    """A line for what came of a check (the fields of laws.Result); below it all about a refuted one.

    A law that does not apply is shown only where `verbose`.
    """
    if result["verdict"] == "does not apply" and not verbose:
        return
    line = Text.assemble(_HEADS[result["verdict"]], f"{result['law']} ", (f"[{_evidence(result)}]", "dim"))
    print_text(console, line)
    if result["verdict"] != "refuted":
        return
    print_text(console, Text(indent(result["counterexample"], " " * 4)))
    if result["given"]:
        print_text(console, Text(f"    given: {result['given']}"))
    if result["snippet"]:
        code = Text(f"\n{indent(result['snippet'], ' ' * 8)}\n")
        print_text(console, code, soft_wrap=True)  # it is to be copied: no line may be broken


def print_text(console: Console, text: Text, soft_wrap: bool = False) -> None:
    """A line of text, whatever it holds."""
    text.plain = text.plain.encode("utf-8", "replace").decode()  # a target's words may hold what no terminal takes
    console.print(text, soft_wrap=soft_wrap or not console.is_terminal)  # a log has no edge


def _evidence(result: Mapping[str, Any]) -> str:
    verdict, tried = result["verdict"], result["examples"]
    if verdict == "does not apply":
        return f"{result['check']}: {result['reason']}"
    found = f"example {tried}" if verdict in ("refuted", "expected failure") else f"{tried} examples"
    why = result["reason"] or ("no drawn case was answered" if verdict == "untested" else "")
    parts = [why, found if tried else "", f"{result['seconds']:.1f} s"]
    return f"{result['check']}: {'; '.join(part for part in parts if part)}"


def show_summary(console: Console, results: Sequence[Mapping[str, Any]], traits: Mapping[str, Any]) -> None:
    """What more could be promised, and how many laws hold."""
    verdicts = [result["verdict"] for result in results]
    words = [word for r in results if r["verdict"] == "does not apply" for word in re.findall(r"\w+", r["reason"])]
    names = list(dict.fromkeys(word for word in words if word in traits))
    if count := verdicts.count("does not apply"):
        laws = "1 law does" if count == 1 else f"{count} laws do"
        more = f"; promise more with --trait: {', '.join(names)}" if names else ""
        print_text(console, Text(f"{laws} not apply{more}", "dim"))
    wrong = verdicts.count("refuted") + verdicts.count("unexpectedly holds")
    said = [f"{verdicts.count('holds')} hold", f"{verdicts.count('refuted')} refuted"]
    for verdict, words_for in (
        ("expected failure", "failed as expected"),
        ("unexpectedly holds", "held though expected to fail"),
    ):
        said += [f"{verdicts.count(verdict)} {words_for}"] if verdict in verdicts else []
    said += [f"{verdicts.count('untested')} untested", f"{count} do not apply"]
    style = "bold red" if wrong else "bold yellow" if "untested" in verdicts else "bold green"
    print_text(console, Text(f"{', '.join(said)}, in {sum(r['seconds'] for r in results):.0f} s", style))


def plot_curves(curves: Mapping[str, Sequence[Row]], title: str, file: Path) -> None:
    """Perplexity against ratio for several policies, and beside it how many of the newest tokens each had cached."""
    from knorm.evaluation import NEWEST

    figure, (left, right) = new_figure((11, 5), columns=2)
    for name, rows in curves.items():
        ratios = [float(Fraction(row.keep_ratio)) for row in rows]
        left.plot(ratios, [row.ppl for row in rows], marker="o", label=name)
        right.plot(ratios, [math.nan if row.recent is None else row.recent for row in rows], marker="o")
    left.set(ylabel="perplexity", yscale="log", xlabel="keep_ratio")
    left.legend(fontsize="small")
    right.set(ylabel=f"newest {NEWEST} still cached", xlabel="keep_ratio", ylim=(0, NEWEST + 0.5))
    finish_figure(figure, (left, right), title, file)


def plot_recall(found: Mapping[str, Sequence[tuple[str, Any]]], title: str, file: Path) -> None:
    """Perplexity of the facts' own tokens against ratio, and beside it that of all other tokens (facts.Recall)."""
    figure, (left, right) = new_figure((11, 5), columns=2)
    for name, results in found.items():
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


def new_figure(size: tuple[float, float], columns: int) -> tuple[Any, Any]:
    """A figure of matplotlib and its axes. Raises ValueError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install 'knorm[plot]'") from None
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, columns)


def finish_figure(figure: Any, axes: Sequence[Any], title: str, file: Path) -> None:
    """Title, grid and plain numbers; then the file."""
    figure.suptitle(title, fontsize="medium")
    for each in axes:
        each.grid(alpha=0.3)
        if each.get_yscale() == "log":
            for axis_format in (each.yaxis.set_major_formatter, each.yaxis.set_minor_formatter):
                axis_format("{x:g}")
    figure.savefig(file, dpi=120)


def check_plot(file: Path) -> None:
    """Raises ValueError, before the work, for a figure that could not be drawn after it."""
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {file}, but should end in .png, .svg or .pdf")
    new_figure((1, 1), 1)


def show_suspicions(console: Console, doubts: Sequence[Suspicion]) -> None:
    """What does not make sense in a curve, and what was found or is to be run."""
    for doubt in doubts:
        print_text(console, Text.assemble(("SUSPICIOUS  ", "bold yellow"), f"{doubt.what}: {doubt.then}"))


def show_explanation(console: Console, found: Explanation, title: str) -> None:
    """The interventions, ranked; the tokens that got worse; the verdict."""
    nll = (("the run", found.nll), ("full cache", found.nll_full), ("no cache", found.nll_empty))
    said = ", ".join(f"{name} {math.exp(value):.2f}" for name, value in nll)
    print_text(console, Text(f"{title}\nPerplexity: {said}; {found.tokens} tokens in {found.windows} windows\n"))
    table = Table(box=None, pad_edge=False)
    for column in ("change", "95% interval", "recovers"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what it proves")
    for e in found.effects:
        between = "-" if e.low is None or e.high is None else f"{e.low:+.3f} to {e.high:+.3f}"
        table.add_row(f"{e.change:+.4f}", between, "-" if e.recovered is None else f"{e.recovered:.0%}", Text(e.proves))
    console.print(table)
    worst = Table(title="\nTokens that got worse most", title_justify="left", box=None, pad_edge=False)
    for column in ("window", "position", "token", "NLL full", "NLL", "evicted, most attended", "position", "attention"):
        worst.add_column(column, justify="left" if column in ("token", "evicted, most attended") else "right")
    for t in found.worst:
        worst.add_row(
            str(t.window), str(t.position), Text(repr(t.token)), f"{t.nll_full:.2f}", f"{t.nll:.2f}",
            Text(repr(t.evicted)), str(t.evicted_position), f"{t.attention:.0%}",
        )  # fmt: skip
    console.print(worst)
    print_text(console, Text("\n" + "\n".join(found.verdict), "bold"))


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
    """A line for what became of a golden; below it the metrics that moved."""
    where = f" ({outcome.device_class})" if outcome.device_class else ""
    spent = f"; {outcome.seconds:.1f} s" if outcome.seconds else ""
    line = Text.assemble(_OUTCOMES[outcome.verdict], f"{outcome.case}{where} ", (f"[{outcome.evidence}{spent}]", "dim"))
    print_text(console, line)
    if outcome.verdict == "moved" and outcome.findings:
        console.print(findings_table(outcome.findings))


def findings_table(findings: Sequence[Finding]) -> Table:
    """The metrics that moved: golden, measured, first accepted, and why."""
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


def changes_table(changes: Sequence[Change], title: str) -> Table:
    """What a candidate would change: old, new, difference with its interval; what did not change is counted."""
    changed = [change for change in changes if change.before != change.after]
    same = len(changes) - len(changed)
    table = Table(title=f"{title}: {len(changed)} of {len(changes)} metrics differ", box=None, pad_edge=False)
    table.title_justify = "left"
    for column in ("metric", "first accepted", "golden", "candidate", "difference", "interval over windows"):
        table.add_column(column, justify="left" if column == "metric" else "right", overflow="fold")
    table.add_column("")
    for c in changed:
        between = "-" if c.low is None or c.high is None else f"{c.low:+.2e} to {c.high:+.2e}"
        difference = "-" if c.difference is None else f"{c.difference:+.3g}"
        table.add_row(
            c.metric,
            _value(c.anchor),
            _value(c.before),
            _value(c.after),
            difference,
            between,
            "moved" if c.significant else "within its gate",
        )
    table.caption = f"{same} are the same" if same and changed else None
    return table


def goldens_table(rows: Sequence[tuple[str, ...]]) -> Table:
    """The goldens there are: case, device class, since when, commit, why, and what it pins."""
    table = Table(box=None, pad_edge=False)
    for column in ("case", "device class", "accepted", "commit", "reason", "pins"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
