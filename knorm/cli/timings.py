"""Tables and lines of timings, as the terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from knorm.cli.figures import _NAMES, _SHOWN, Pairs
from knorm.cli.tables import print_text

if TYPE_CHECKING:
    from knorm.bench.commits import Found
    from knorm.bench.policies import Row
    from knorm.policy import Policy

_STYLES = {"PASS": "green", "FAIL": "bold red", "INCONCLUSIVE": "yellow"}


def times_table(rows: Sequence[Row]) -> Table:
    """Make a table with a line for each arm: its times."""
    table = _table("method", "TTFT ms", "TPOT ms", "median ms", "p99 ms", "tokens/s")
    for row in rows:
        t = row.times
        times = [f"{1000 * x:.2f}" for x in (t.ttft, t.tpot, t.tpot_median, t.tpot_p99)]
        table.add_row(row.name, *times, f"{t.throughput:.1f}")
    return table


def counters_table(rows: Sequence[Row]) -> Table:
    """Make a table with a line for each arm: its memory, and what it does in whole numbers."""
    steps = rows[0].counters.steps
    cuda = rows[0].counters.step_launches is not None
    columns = ["cache KiB", *(["peak MiB"] if cuda else []), "tokens kept", "operators: prompt", f"{steps} steps"]
    table = _table("method", *columns, *(["launches: prompt", f"{steps} steps"] if cuda else []))
    for row in rows:
        c = row.counters
        cells = [row.name, f"{c.cache_bytes / 1024:,.0f}", *([f"{(row.peak or 0) / 2**20:.1f}"] if cuda else [])]
        cells += [_per_layer(c.retained), f"{c.prompt_operators:,}", f"{c.step_operators:,}"]
        table.add_row(*cells, *([f"{c.prompt_launches:,}", f"{c.step_launches:,}"] if cuda else []))
    return table


def _table(first: str, *columns: str) -> Table:
    """Make an empty table of names and numbers; names are folded rather than numbers cut."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold", min_width=10)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _per_layer(retained: Sequence[int]) -> str:
    """Tokens of each layer: [220, 31, 31, 31] is "220, 3 x 31"."""
    groups: list[list[int]] = []
    for tokens in retained:
        if groups and groups[-1][0] == tokens:
            groups[-1][1] += 1
        else:
            groups.append([tokens, 1])
    return ", ".join(f"{times} x {tokens}" if times > 1 else str(tokens) for tokens, times in groups)


def comparisons_table(pairs: Pairs) -> Table:
    """Make a table with a line for each method and metric: slowdown, interval, what it could see, verdict."""
    level = next((1 - 2 * c.alpha for _, compared in pairs for c in compared.values()), 0.98)
    table = _table("method", "of", "slowdown", f"{level:.2%} interval", "could see", "verdict")
    for column, justify in ((1, "left"), (5, "left")):
        table.columns[column].justify = justify  # type: ignore[assignment]
    for name, compared in pairs:
        for metric in _SHOWN:
            c = compared[metric]
            verdict = Text(c.verdict, _STYLES[c.verdict]) if metric != "throughput" else Text("-")
            between = f"{100 * c.low - 100:+.1f} to {100 * c.high - 100:+.1f}%"
            table.add_row(name, _NAMES[metric], f"{c.ratio - 1:+.1%}", between, f"{c.mde:.1%}", verdict)
    return table


def show_verdict(
    console: Console, verdict: str, pairs: Pairs, setting: Mapping[str, Any], unit: str = "blocks"
) -> None:
    """Show the verdict of the run, what it means, and what INCONCLUSIVE needs."""
    margin, alpha, power = setting["margin"], setting["alpha"], setting["power"]
    slower = [f"{_NAMES[m]} at {n} by {c.ratio - 1:.1%}" for n, compared in pairs for m, c in compared.items()
              if c.verdict == "FAIL" and m != "throughput"]  # fmt: skip
    unsure = [(c.more, c.blocks, f"{_NAMES[m]} at {n}") for n, compared in pairs for m, c in compared.items()
              if c.verdict == "INCONCLUSIVE" and m != "throughput"]  # fmt: skip
    said = ""
    if verdict == "PASS":
        said = f"PASS: no TTFT or TPOT is slower by {margin:.1%} or more"
    elif slower:
        said = f"FAIL: slower: {', '.join(slower)}"
    elif verdict == "FAIL":
        said = "FAIL: counters rose"
    if said:
        print_text(console, Text(said, _STYLES[verdict]))
    for more, blocks, what in unsure:
        words = f"INCONCLUSIVE: {what}: the noise is too large for {blocks} {unit}; about {more} more would decide"
        print_text(console, Text(words, _STYLES["INCONCLUSIVE"]))
    words = (
        "Intervals are the wider of Student's and a bootstrap's. All verdicts together are wrongly FAIL at most "
        f"{alpha:.0%} of the time; 'could see': found in {power:.0%}."
    )
    print_text(console, Text(words, "dim"))


def show_counters(
    console: Console, policies: Sequence[Policy], counted: Found, rises: Sequence[Sequence[str]], judged: bool
) -> None:
    """Show what each commit does, in whole numbers, and what rose."""
    print_text(console, Text("\nExact counters" + ("" if judged else ", shown only")))
    for policy, old, new, rise in zip(policies, counted.old, counted.new, rises, strict=True):
        launches = (
            f", {new.prompt_launches:,} + {new.step_launches:,} launches" if new.step_launches is not None else ""
        )
        line = (
            f"{policy.keep_ratio}: {_per_layer(new.retained)} tokens, {new.cache_bytes:,} bytes, operators "
            f"{new.prompt_operators:,} in the prompt pass + {new.step_operators:,} in {new.steps} steps{launches}"
        )
        same = "; the same" if new == old else "; fewer than before" if not rise else ""
        print_text(console, Text(line + same))
        for words in rise:
            style = _STYLES["FAIL"] if judged else _STYLES["INCONCLUSIVE"]
            hint = " (intended? --allow-counters)" if judged else ""
            print_text(console, Text(f"  {words}{hint}", style))
