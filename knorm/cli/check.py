"""`knorm check`: is a target correct?"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from knorm.cli.numbers import Above
from knorm.cli.options import BROKEN, COMMON, HOLDS, REFUTED, check_device, make_console, with_options
from knorm.cli.outputs import write_json
from knorm.files import read_text
from knorm.laws.names import refuse_unknown, suite_revision
from knorm.laws.results import Result
from knorm.laws.targets import KINDS

_MOST_BYTES = 2**26  # of a --baseline


@click.command()
@click.argument("target")
@click.option(
    "--as",
    "kind",
    metavar="KIND",
    show_default="follows from its parameters",
    help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}.",
)
@click.option("--like", metavar="knorm", help="The target promises all that knorm's own core does.")
@click.option(
    "--trait",
    "traits",
    multiple=True,
    metavar="NAME=VALUE",
    help="A promise of the target, e.g. rounding=ceil. May be repeated.",
)
@click.option(
    "--select",
    metavar="NAME[,NAME]",
    show_default="all",
    help="Run only these checks or families of checks.",
)
@click.option(
    "--expect-failure",
    multiple=True,
    metavar="CHECK=REASON",
    help="A check that may fail; if it holds, that is reported. May be repeated.",
)
@click.option(
    "--expect-untested",
    multiple=True,
    metavar="CHECK=REASON",
    help="A check that may stay untested; it may not be refuted. May be repeated.",
)
@click.option(
    "--baseline",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="OLD.json",
    help="Results of an earlier --json: what was refuted or untested there already does not count.",
)
@click.option("--profile", default="quick", show_default=True, help="How hard to try: quick or thorough.")
@click.option("--seed", default=0, show_default=True, help="The same seed draws the same cases.")
@click.option("--device", default="cpu", show_default=True, help="Where the drawn tensors lie: cpu, cuda, cuda:1 ...")
@click.option(
    "--limit",
    type=Above("seconds"),
    default=20.0,
    show_default=True,
    help="Seconds that the target may take for an answer.",
)
@with_options(*COMMON)
@click.pass_obj
def check(
    verbose: bool,
    /,
    json: Path | None,
    quiet: bool,
    select: str | None,
    expect_failure: tuple[str, ...],
    expect_untested: tuple[str, ...],
    baseline: Path | None,
    limit: float,
    **given: Any,
) -> None:
    """Try to refute the laws that TARGET's promises ask of it.

    That is done in a process of its own. TARGET: path/to/file.py:name, package.module:name, or kvpress:PressName.
    """
    from knorm.cli.verdicts import Report
    from knorm.laws.process.protocol import Request
    from knorm.laws.process.supervisor import Supervisor
    from knorm.laws.process.usage import check_request

    names = None if select is None else tuple(name.strip() for name in select.split(",") if name.strip())
    if names == ():
        raise ValueError("--select is empty, but should be names of checks or families, e.g. order,retained_count")
    expected = tuple(_expected("--expect-failure", text) for text in expect_failure)
    tolerated = _before(baseline, given["target"]) if baseline else {}
    tolerated |= {(name, "untested"): why for name, why in (_expected("--expect-untested", x) for x in expect_untested)}
    refuse_unknown(name for name, _ in tolerated)
    request = Request(**given, select=names, expected=expected, quiet=quiet, verbose=bool(verbose))
    check_request(request)
    check_device(given["device"])
    supervisor = Supervisor(request, limit)
    report = Report(make_console(quiet), _again(given), verbose)
    with closing(supervisor.results()) as heard:  # the worker ends, whatever happens here
        for result in heard:
            report.add(_tolerated(result, tolerated))
    report.close()
    results = report.results
    tried = {result.check for result in results if result.verdict != "does not apply"}
    if not tried:
        raise ValueError("none of the checks chosen applies to this target: drop --select, or promise more by --trait")
    if idle := sorted({name for name, _ in expected} - tried):
        raise ValueError(f"--expect-failure names {', '.join(idle)}, but that was not tried on this target")
    settings = {name: given[name] for name in ("profile", "seed", "device")}
    written = {"suite": suite_revision(), "traits": asdict(supervisor.traits), **settings}
    written["results"] = [*map(asdict, results)]
    write_json(json, {"target": given["target"], **written})
    if any(result.fault for result in results):
        sys.exit(BROKEN)
    # what was not tried was not found to hold
    untested = {result.check for result in results if result.verdict == "untested"}
    untested -= {name for name, verdict in tolerated if verdict == "untested"}
    sys.exit(REFUTED if untested or any(result.failed for result in results) else HOLDS)


def _expected(option: str, text: str) -> tuple[str, str]:
    name, _, reason = text.partition("=")
    if not (name and reason):
        raise ValueError(f"{option} {text}, but should be CHECK=REASON, e.g. time_order='sorts by norm'")
    return name, reason


def _before(file: Path, target: str) -> dict[tuple[str, str], str]:
    """Read what an earlier run refuted or left untested: (check, verdict) -> why it is no news."""
    import json

    should = "should be a file that `knorm check --json` wrote"
    try:
        text = read_text(file, _MOST_BYTES)
    except ValueError as error:
        raise ValueError(f"--baseline {should}: {error}") from None
    try:
        old = json.loads(text)
        verdicts = {(str(result["check"]), str(result["verdict"])) for result in old["results"]}
        suite, of = old["suite"], old["target"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"--baseline {file} cannot be read ({type(error).__name__}: {error}), but {should}") from error
    if of != target:
        raise ValueError(f"--baseline {file} is of {of}, but should be of {target}")
    other = "" if suite == suite_revision() else f", by the laws of {suite}"
    # what was expected then stays so only where it is expected now
    return {key: f"as in {file.name}{other}" for key in verdicts if key[1] in ("refuted", "untested")}


def _tolerated(result: Result, tolerated: dict[tuple[str, str], str]) -> Result:
    """Mark a refutation that is no news as expected, and say why a check may be untested."""
    why = tolerated.get((result.check, result.verdict))
    if why is None or result.fault:
        return result
    if result.verdict == "refuted":
        return replace(result, verdict="expected failure", reason=why)
    return replace(result, reason=f"{why}; {result.reason}")


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
