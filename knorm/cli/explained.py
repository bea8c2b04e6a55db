"""Tables of `knorm explain`: what each change to a run did, and the tokens that got worse."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from knorm.cli.tables import print_text, print_wrapped

if TYPE_CHECKING:
    from knorm.evaluation.explain import Explanation
    from knorm.evaluation.explain_methods import MethodExplanation


def show_explanation(console: Console, found: Explanation, title: str) -> None:
    """Show the interventions, ranked; the tokens that got worse; the verdict."""
    windows = "1 window" if found.windows == 1 else f"{found.windows} windows"
    nll = (("the run", found.nll), ("full cache", found.nll_full), ("no cache", found.nll_empty))
    said = ", ".join(f"{name} {math.exp(value):.2f}" for name, value in nll if value is not None)
    print_text(console, Text(f"{title}\nPerplexity: {said}; {found.tokens} tokens in {windows}\n"))
    by_kl = any(e.kl is not None for e in found.effects)
    table = Table(box=None, pad_edge=False)
    for column in ("change", "95% interval", *(["KL left"] if by_kl else []), "recovers"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what it proves")
    for e in found.effects:
        between = "-" if e.low is None or e.high is None else f"{e.low:+.3f} to {e.high:+.3f}"
        recovered = "-" if e.recovered is None else f"{e.recovered:.0%}"
        left = [] if e.kl is None else [f"{e.kl:.2g}"]
        table.add_row(f"{e.change:+.4f}", between, *left, recovered, Text(f"{e.kind}: {e.sentence}"))
    console.print(table)
    if found.worst:
        _show_worst(console, found)
    print_text(console, Text("\n" + "\n".join(found.verdict), "bold"))


def _show_worst(console: Console, found: Explanation) -> None:
    worst = Table(title="\nTokens that got worse most", title_justify="left", box=None, pad_edge=False)
    for column in ("window", "position", "token", "NLL full", "NLL", "evicted, most attended", "position", "attention"):
        worst.add_column(column, justify="left" if column in ("token", "evicted, most attended") else "right")
    for t in found.worst:
        worst.add_row(
            str(t.window), str(t.position), Text(repr(t.token)), f"{t.nll_full:.2f}", f"{t.nll:.2f}",
            Text(repr(t.evicted)), str(t.evicted_position), f"{t.attention:.0%}",
        )  # fmt: skip
    console.print(worst)


def show_method(console: Console, found: MethodExplanation, title: str) -> None:
    """Show what a method's queries saw, and why its predictions moved."""
    budget = "" if found.budget is None else f" {found.budget}"
    note = f"{found.how}; {found.check}" if found.check else found.how
    print_wrapped(console, f"{found.method}{budget}: {note}", "dim")
    print_wrapped(console, f"Recovered: {found.seen}.", "dim")
    show_explanation(console, found.explanation, title)
