"""`knorm check`: is a target correct?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from knorm.cli.engined import EngineOptions, engine_options
from knorm.cli.numbers import Above
from knorm.cli.options import (
    BROKEN,
    COMMON,
    HOLDS,
    REFUTED,
    WRONG_USAGE,
    check_device,
    make_console,
    waiting,
    with_options,
)
from knorm.cli.outputs import write_json, write_programs
from knorm.files import read_text
from knorm.laws.names import refuse_unknown, suite_revision
from knorm.laws.results import Result
from knorm.laws.targets import KINDS

if TYPE_CHECKING:
    from knorm.cli.asked import Asked
    from knorm.cli.verdicts import Report
    from knorm.laws.process.protocol import Request

_MOST_BYTES = 2**26  # of a --baseline


@click.command()
@click.argument("targets", nargs=-1, metavar="[TARGET]...")
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
    "--snippets",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Write a program for each refutation, which shows it without knorm.",
)
@click.option(
    "--limit",
    type=Above("seconds"),
    default=20.0,
    show_default=True,
    help="Seconds that the target may take for an answer; for an engine: --engine-limit.",
)
@engine_options
@click.option(
    "--model", metavar="MODEL", help="Beside a server's endpoint: the same weights in transformers, as for knorm ppl."
)
@with_options(*COMMON)
@click.pass_obj
def check(
    verbose: bool,
    /,
    json: Path | None,
    quiet: bool,
    targets: tuple[str, ...],
    select: str | None,
    expect_failure: tuple[str, ...],
    expect_untested: tuple[str, ...],
    baseline: Path | None,
    snippets: Path | None,
    limit: float,
    engine_options: EngineOptions,
    model: str | None,
    **given: Any,
) -> None:
    """Try to refute the laws that each TARGET's promises ask of it.

    That is done in a process of its own. TARGET: path/to/file.py:name, package.module:name, kvpress:PressName;
    kvpress:* or transformers:* for all that these ship; an engine's cache, as llama.cpp:model.gguf(type_k="q8_0"); a
    server's endpoint, as http://127.0.0.1:8000/v1#MODEL, with --model; or the NAME of a [check.NAME] in knorm.toml, of
    which all are tried where no TARGET is given.
    """
    from knorm.cli.asked import asked_of
    from knorm.cli.verdicts import Report, Summary
    from knorm.laws.process.protocol import Request

    expected = tuple(_expected("--expect-failure", text) for text in expect_failure)
    untested = dict(_expected("--expect-untested", text) for text in expect_untested)
    refuse_unknown(untested)
    request = Request("", **given, select=_selected(select), expected=expected, quiet=quiet, verbose=bool(verbose))
    alone = {
        "--as": given["kind"], "--like": given["like"], "--trait": given["traits"],
        "--expect-failure": expected, "--expect-untested": untested,
    }  # fmt: skip
    asked = _beside(asked_of(targets, request, untested, alone), model, engine_options.reference)
    if snippets and not snippets.absolute().parent.is_dir():
        raise ValueError(f"--snippets {snippets}, but there is no folder {snippets.parent}")
    before = _before(baseline, [each.request.target for each in asked]) if baseline else {}
    check_device(given["device"])
    console = make_console(quiet)
    summary = Summary(console, several=len(asked) > 1)
    tried = []
    for each in asked:
        report = Report(console, each.again, verbose, each.name if summary.several else "")
        known, started = before.get(each.request.target, {}), _started(each.request, limit, engine_options, model)
        one = _try(each, started, report, known, summary.several)
        summary.add(each.name, report.results, one.not_run, wrong=one.code == WRONG_USAGE)
        if snippets:
            programs = {x.check: x.snippet for x in one.results if x.snippet and x.verdict != "holds"}
            write_programs(snippets, each.name, programs)
        tried.append(one)
    summary.close()
    if not any(one.results for one in tried) and all(one.code == HOLDS for one in tried):
        raise ValueError("nothing was tried: " + "; ".join(f"{one.asked.name}: {one.not_run}" for one in tried))
    fields = {"suite": suite_revision(), **{name: given[name] for name in ("profile", "seed", "device")}}
    write_json(json, fields | {"targets": [one.as_fields() for one in tried]})
    sys.exit(max((one.code for one in tried), key=_WORST.index))


def _selected(select: str | None) -> tuple[str, ...] | None:
    names = None if select is None else tuple(name.strip() for name in select.split(",") if name.strip())
    if names == ():
        raise ValueError("--select is empty, but should be names of checks or families, e.g. order,retained_count")
    return names


def _beside(asked: list[Asked], model: str | None, reference: str | None) -> list[Asked]:
    """Say what is typed again of what stands beside a server's endpoint. Raises ValueError where there is none."""
    from knorm.methods.targets import is_endpoint

    options = [("--model", model), ("--reference", reference)]
    words = [word for name, value in options if value for word in (name, value)]
    servers = [is_endpoint(each.request.target) for each in asked]
    if words and not any(servers):
        raise ValueError(
            f"--{'model' if model else 'reference'} is about a server's endpoint, as http://127.0.0.1:8000/v1: give one"
        )
    pairs = zip(asked, servers, strict=True)
    return [replace(each, again=[*each.again, *words]) if served else each for each, served in pairs]


_WORST = (HOLDS, REFUTED, WRONG_USAGE, BROKEN)


@dataclass(frozen=True)
class _Tried:
    """Hold what came of one target."""

    asked: Asked
    traits: Any
    results: list[Result]
    not_run: str = ""
    code: int = HOLDS

    def as_fields(self) -> dict[str, Any]:
        return {
            "name": self.asked.name,
            "target": self.asked.request.target,
            "traits": None if self.traits is None else asdict(self.traits),
            "not_run": self.not_run or None,
            "results": [*map(asdict, self.results)],
        }


def _started(request: Request, limit: float, options: EngineOptions, model: str | None) -> Any:
    """Make what tries a target's laws; nothing runs yet."""
    from knorm.laws.process.supervisor import Supervisor
    from knorm.methods.targets import is_endpoint, is_engine

    if is_endpoint(request.target):
        with waiting():
            from knorm.laws.endpoint_run import EndpointChecks

        return EndpointChecks(request, options.engine_limit, model, options.reference)
    if not is_engine(request.target):
        return Supervisor(request, limit)
    with waiting():
        from knorm.engines.conditions import Place
        from knorm.laws.engine_run import EngineChecks

    return EngineChecks(request, Place(options.engine_python, options.engine_limit))


def _try(asked: Asked, supervisor: Any, report: Report, before: dict[tuple[str, str], str], several: bool) -> _Tried:
    """Try one target; one of several that cannot be loaded keeps the others from nothing."""
    if asked.left_out:
        return _Tried(asked, None, [], asked.left_out)
    tolerated = before | {(name, "untested"): why for name, why in asked.untested.items()}
    try:
        with closing(supervisor.results()) as heard:  # the worker ends, whatever happens here
            for result in heard:
                report.add(_tolerated(result, tolerated))
        _check_tried(asked, report.results)
    except ValueError as error:
        if not several:
            raise
        code = HOLDS if isinstance(error, _NothingApplies) else WRONG_USAGE
        why = str(error).removeprefix(f"target {asked.request.target!r}: ")  # it stands above
        return _Tried(asked, supervisor.traits, [], why, code)
    report.close(getattr(supervisor, "told", ()))
    return _Tried(asked, supervisor.traits, report.results, code=_code(report.results, tolerated))


class _NothingApplies(ValueError):
    """Say that a target promises nothing of what the chosen checks need: of several targets, one may."""


def _check_tried(asked: Asked, results: list[Result]) -> None:
    """Raise ValueError where nothing was tried, or not what was expected to fail."""
    tried = {result.check for result in results if result.verdict != "does not apply"}
    if not tried:
        first = f" ({results[0].check} {results[0].reason})" if results else ""
        raise _NothingApplies(
            f"none of the checks chosen applies to it{first}: drop --select, or promise more by --trait"
        )
    idle = sorted({name for name, _ in asked.request.expected} - tried)
    if idle and not asked.in_part:
        raise ValueError(f"--expect-failure names {', '.join(idle)}, but that was not tried on this target")


def _code(results: list[Result], tolerated: Mapping[tuple[str, str], str]) -> int:
    if any(result.fault for result in results):
        return BROKEN
    # what was not tried was not found to hold
    untested = {result.check for result in results if result.verdict == "untested"}
    untested -= {name for name, verdict in tolerated if verdict == "untested"}
    return REFUTED if untested or any(result.failed for result in results) else HOLDS


def _expected(option: str, text: str) -> tuple[str, str]:
    name, _, reason = text.partition("=")
    if not (name and reason):
        raise ValueError(f"{option} {text}, but should be CHECK=REASON, e.g. time_order='sorts by norm'")
    return name, reason


def _before(file: Path, targets: list[str]) -> dict[str, dict[tuple[str, str], str]]:
    """Read what an earlier run refuted or left untested: target -> (check, verdict) -> why it is no news."""
    import json

    should = "should be a file that `knorm check --json` wrote"
    try:
        text = read_text(file, _MOST_BYTES)
    except ValueError as error:
        raise ValueError(f"--baseline {should}: {error}") from None
    try:
        old = json.loads(text)
        verdicts = {
            str(target["target"]): {(str(result["check"]), str(result["verdict"])) for result in target["results"]}
            for target in old["targets"]
        }
        suite = old["suite"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"--baseline {file} cannot be read ({type(error).__name__}: {error}), but {should}") from error
    if not {*verdicts} & {*targets}:
        raise ValueError(
            f"--baseline {file} is of {', '.join(verdicts) or 'nothing'}, but should be of {', '.join(targets)}"
        )
    other = "" if suite == suite_revision() else f", by the laws of {suite}"
    why = f"as in {file.name}{other}"
    # what was expected then stays so only where it is expected now
    known = ("refuted", "untested")
    before = {target: {key: why for key in keys if key[1] in known} for target, keys in verdicts.items()}
    refuse_unknown({name for keys in before.values() for name, _ in keys})
    return before


def _tolerated(result: Result, tolerated: Mapping[tuple[str, str], str]) -> Result:
    """Mark a refutation that is no news as expected, and say why a check may be untested."""
    why = tolerated.get((result.check, result.verdict))
    if why is None or result.fault:
        return result
    if result.verdict == "refuted":
        return replace(result, verdict="expected failure", reason=why)
    return replace(result, reason=f"{why}; {result.reason}")
