"""`knorm page`: one static page of what was found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from knorm.cli.options import make_console, visible
from knorm.cli.outputs import check_page, force_option, write_page

if TYPE_CHECKING:
    from rich.console import Console

    from knorm.page.form import Page


@click.command()
@click.argument("results", nargs=-1, required=True, metavar="[RESULTS]...", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--title", help="Of the page; by default that of the first page among RESULTS.")
@click.option(
    "--without", multiple=True, metavar="NAME", help="Take the results of this name out of a page. May be repeated."
)
@force_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def page(results: tuple[Path, ...], out: Path, title: str | None, without: tuple[str, ...], quiet: bool) -> None:
    """Show RESULTS as one static page, OUT/index.html.

    Its data is written to OUT/results.json. RESULTS: files that --json of check, ppl, explain or sweep wrote, folders
    of sweeps, and pages, to which the others are added. The page has the laws as a matrix with counterexamples, the
    costs as a frontier, and the text with what each token lost. It loads nothing, and can be read without a script.
    """
    check_page(out)
    from knorm.page.render import check_jinja, render

    check_jinja()
    from knorm.cli.paged import page_of
    from knorm.cli.results import read_results

    read = read_results(results, without)
    parts = page_of(read, title)
    html = render(parts)
    write_page(out, html, parts.model_dump(mode="json"))
    _report(make_console(quiet), out / "index.html", parts, len(html.encode()))


def _report(console: Console, file: Path, parts: Page, size: int) -> None:
    """Say what was written, and what is not yet in it."""
    from rich.text import Text

    from knorm.cli.tables import print_text

    for source in parts.sources:
        if source.missing:
            said = f"{source.name}: {source.missing:,} of {source.cells:,} cells have no result yet"
            print_text(console, Text(visible(said)), soft_wrap=True)
    counts = (
        (sum(len(matrix.methods) for matrix in parts.matrices), "methods in the matrix"),
        (sum(len(frontier.points) for frontier in parts.frontiers), "points on frontiers"),
        (sum(len(timing.rows) for timing in parts.timings), "methods timed"),
        (sum(part.per_token is not None for part in parts.explained), "texts"),
    )
    said = ", ".join(f"{count} {what}" for count, what in counts if count)
    print_text(console, Text(visible(f"{file}: {said or 'curves'}; {size:,} bytes")), soft_wrap=True)
