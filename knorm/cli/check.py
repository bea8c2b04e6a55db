"""`knorm check`: is a target correct?"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from knorm.cli.options import BROKEN, COMMON, HOLDS, REFUTED, check_device, make_console, with_options
from knorm.cli.outputs import write_json
from knorm.laws.targets import KINDS


@click.command()
@click.argument("target")
@click.option(
    "--as",
    "kind",
    metavar="KIND",
    help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}.  [follows from its parameters]",
)
@click.option("--like", metavar="knorm", help="The target promises all that knorm's own core does.")
@click.option(
    "--trait", "traits", multiple=True, metavar="NAME=VALUE", help="A promise of the target, e.g. rounding=ceil."
)
@click.option("--select", metavar="NAME[,NAME]", help="Run only these checks or families of checks.  [all]")
@click.option(
    "--expect-failure",
    multiple=True,
    metavar="CHECK=REASON",
    help="A check that may fail; if it holds, that is reported.",
)
@click.option("--profile", default="quick", show_default=True, help="How hard to try: quick or thorough.")
@click.option("--seed", default=0, show_default=True, help="The same seed draws the same cases.")
@click.option("--device", default="cpu", show_default=True, help="Where the drawn tensors lie: cpu, cuda, cuda:1 ...")
@click.option("--limit", default=20.0, show_default=True, help="Seconds that the target may take for an answer.")
@with_options(*COMMON)
@click.pass_obj
def check(
    verbose: bool,
    /,
    json: Path | None,
    quiet: bool,
    select: str | None,
    expect_failure: tuple[str, ...],
    limit: float,
    **given: Any,
) -> None:
    """Try to refute the laws that TARGET's promises ask of it, in a process of its own.

    TARGET: path/to/file.py:name, package.module:name, or kvpress:PressName.
    """
    from knorm.cli.verdicts import Report
    from knorm.laws.process.protocol import Request
    from knorm.laws.process.supervisor import Supervisor
    from knorm.laws.process.usage import check_request

    names = None if select is None else tuple(name.strip() for name in select.split(",") if name.strip())
    if names == ():
        raise ValueError("--select is empty, but should be names of checks or families, e.g. order,retained_count")
    if not limit > 0:
        raise ValueError(f"--limit {limit:g}, but should be seconds above 0")
    expected = tuple(map(_expected, expect_failure))
    request = Request(**given, select=names, expected=expected, quiet=quiet, verbose=bool(verbose))
    check_request(request)
    check_device(given["device"])
    supervisor = Supervisor(request, limit)
    report = Report(make_console(quiet), _again(given), verbose)
    with closing(supervisor.results()) as heard:  # the worker ends, whatever happens here
        for result in heard:
            report.add(result)
    report.close()
    results = report.results
    tried = {result.check for result in results if result.verdict != "does not apply"}
    if not tried:
        raise ValueError("none of the checks chosen applies to this target: drop --select, or promise more by --trait")
    if idle := sorted({name for name, _ in expected} - tried):
        raise ValueError(f"--expect-failure names {', '.join(idle)}, but that was not tried on this target")
    settings = {name: given[name] for name in ("profile", "seed", "device")}
    written = {"traits": asdict(supervisor.traits), **settings, "results": [*map(asdict, results)]}
    write_json(json, {"target": given["target"], **written})
    if any(result.fault for result in results):
        sys.exit(BROKEN)
    # what was not tried was not found to hold
    sys.exit(REFUTED if any(result.failed or result.verdict == "untested" for result in results) else HOLDS)


def _expected(text: str) -> tuple[str, str]:
    name, _, reason = text.partition("=")
    if not (name and reason):
        raise ValueError(f"--expect-failure {text}, but should be CHECK=REASON, e.g. time_order='sorts by norm'")
    return name, reason


def _again(given: dict[str, Any]) -> list[str]:
    """Write the command with all that decides what a law is tried on, to be shown with one check selected."""
    words = ["knorm", "check", given["target"]]
    for option, name, default in (("--as", "kind", None), ("--like", "like", None), ("--profile", "profile", "quick")):
        words += [option, given[name]] if given[name] != default else []
    for trait in given["traits"]:
        words += ["--trait", trait]
    for name, unless in (("seed", 0), ("device", "cpu")):
        words += [f"--{name}", str(given[name])] if given[name] != unless else []
    return words
