"""`knorm verify`: the main job, a verdict a line."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from knorm.cli.options import COMMON, HOLDS, REFUTED, make_console, waiting, with_options
from knorm.cli.outputs import write_json


@click.command()
@with_options(*COMMON)
def verify(json: Path | None, quiet: bool) -> None:
    """Check knorm itself on the embedded model.

    Its laws, one pass against the loop, perplexity curves and goldens.
    """
    from rich.text import Text

    with waiting("Loading PyTorch and transformers"):
        from knorm.cli.tables import curve_table, show_suspicions
        from knorm.models import hush
        from knorm.verify import verify as run

        hush()
    console, verdicts = make_console(quiet), []
    for verdict in run():
        verdicts.append(verdict)
        line = Text.assemble(
            ("holds    ", "green")
            if verdict.holds and verdict.compared
            else ("n/a      ", "yellow")
            if verdict.holds
            else ("REFUTED  ", "bold red"),
            f"{verdict.claim} ",
            (f"[{verdict.evidence}; {verdict.seconds:.1f} s]", "dim"),
        )
        console.print(line, soft_wrap=not console.is_terminal)  # a log has no edge
        if verdict.rows:
            console.print(curve_table(verdict.rows))
            show_suspicions(console, verdict.doubts)
            console.print("")
    refuted = sum(not verdict.holds for verdict in verdicts)
    for verdict in verdicts:
        if not verdict.holds:
            console.print(Text(f"refuted: {verdict.claim}", "bold red"), soft_wrap=not console.is_terminal)
    console.print(
        f"{sum(v.holds and v.compared for v in verdicts)} hold, {refuted} refuted, "
        f"in {sum(v.seconds for v in verdicts):.0f} s",
        style="bold red" if refuted else "bold green",
    )
    write_json(json, {"verdicts": [asdict(verdict) for verdict in verdicts]})
    sys.exit(REFUTED if refuted else HOLDS)
