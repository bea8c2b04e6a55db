"""`knorm init`: start to test and to pin one's own method, in one's own repository."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from knorm.cli.options import COMMON, make_console, with_options
from knorm.cli.outputs import write_json

if TYPE_CHECKING:
    from knorm.scaffold import Start


@click.command()
@click.argument("target", required=False)
@click.option(
    "--ci",
    type=click.Choice(["github", "gitlab", "none"]),
    show_default="gitlab where its file or remote is there, else github",
    help="Whose job to write.",
)
@with_options(*COMMON)
def init(json: Path | None, quiet: bool, target: str | None, ci: str | None) -> None:
    """Write knorm.toml, two tests and a CI job into the current folder.

    Nothing is overwritten. TARGET: the method, as every command takes it. Without one, presses, caches and functions
    are looked for in the folder's Python files; without any, knorm's own stands in until you name yours.
    """
    from knorm.scaffold import files_of, plan, refuse_started

    root = Path.cwd()
    ci = ci or _ci(root)
    refuse_started(root, files_of(plan_without_a_look(target), root, ci))
    from knorm.models import hush

    hush()
    console, start = make_console(quiet), _with_laws(plan(root, target))
    files = files_of(start, root, ci)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with (root / name).open("x", encoding="utf-8") as stream:
            stream.write(content)
        console.print(f"wrote {name}", soft_wrap=True, markup=False)
    for line in _said(start, target, files):
        console.print(line, soft_wrap=True, markup=False)
    fields = {"target": start.target, "also_seen": start.others, "expected_failures": dict(start.expected)}
    write_json(json, {**fields, "written": [*files]})


def plan_without_a_look(target: str | None) -> Start:
    """Return a start of the same files as `plan` would give."""
    from knorm.scaffold import OWN, Start

    return Start(target or OWN)


def _ci(root: Path) -> str:
    from knorm.git import git

    try:
        remotes = git(root, "remote", "-v")
    except ValueError:
        remotes = ""
    return "gitlab" if (root / ".gitlab-ci.yml").exists() or "gitlab" in remotes else "github"


def _with_laws(start: Start) -> Start:
    """Ask the laws of a method; those that it breaks today are written down as expected failures."""
    from knorm.laws.process.protocol import Request
    from knorm.laws.process.supervisor import Supervisor
    from knorm.laws.process.usage import check_request

    assert start.laws is not None
    request = Request(start.laws, quiet=True)
    expected: dict[str, str] = {}
    try:
        check_request(request)
        with closing(Supervisor(request, 20.0).results()) as results:
            for result in results:
                if result.failed:
                    expected[result.check] = " ".join((result.counterexample or result.law).split())[:160]
    except ValueError as error:
        return replace(start, laws=None, why=f"laws are not asked of {start.target}: {error}")
    return replace(start, expected=expected)


def _said(start: Start, target: str | None, files: dict[str, Any]) -> list[str]:
    lines = []
    if target is None:
        others = f"; also seen: {', '.join(start.others)}" if start.others else ""
        lines.append(f"The method is {start.target}{others}.")
    if start.why:
        lines.append(f"Note: {start.why}")
    if start.expected:
        names = ", ".join(start.expected)
        laws = "1 law is" if len(start.expected) == 1 else f"{len(start.expected)} laws are"
        lines.append(f"{laws} refuted, and expected to fail in the test: {names}.")
    if ".gitlab/knorm.yml" in files:
        lines.append("Include .gitlab/knorm.yml in your .gitlab-ci.yml.")
    lines.append(
        f'Then: pytest; commit; knorm golden record {start.case}; knorm golden accept {start.case} --reason "..."'
    )
    return lines
