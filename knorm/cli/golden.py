"""`knorm golden`: list, verify, record, diff and accept golden results."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from knorm.cli.golden_log import golden_log
from knorm.cli.golden_shown import accepted, show_changes, show_seen
from knorm.cli.numbers import AtLeast
from knorm.cli.options import COMMON, HOLDS, REFUTED, check_device, counting, make_console, progress_bar, with_options
from knorm.cli.outputs import write_json
from knorm.limits import RUNS
from knorm.paths import resolved

_AGREE = "one run cannot show that runs agree"


@click.group()
def golden() -> None:
    """Golden results: did anything move since a person accepted them?

    The cases are those of the project that one stands in, declared in its knorm.toml or in [tool.knorm] of its
    pyproject.toml; elsewhere knorm's own.
    """


golden.add_command(golden_log)
_golden_dir = click.option(
    "--golden-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    show_default="the project's; without one, those of this checkout, or installed with knorm",
    help="Folder of the goldens.",
)


def _workspace(folder: Path | None, json: Path | None) -> Any:
    """The cases and goldens that one works on; a result must not be written among them."""
    from knorm.golden.project import find_project

    find_project(Path.cwd())  # what is declared wrongly is said before anything heavy is loaded
    from knorm.golden.workspace import find_workspace

    workspace = find_workspace(folder)
    if json and resolved(workspace.store.folder) in resolved(json).parents:
        raise ValueError(f"--json {json} lies among the goldens, which only `knorm golden accept` writes")
    return workspace


_some_cases = click.argument("cases", nargs=-1, metavar="[CASE]...")
_golden_device = click.option(
    "--device", default="cpu", show_default=True, help="Device to measure on: cpu, cuda, cuda:1 ..."
)


@golden.command("list")
@_golden_dir
@with_options(*COMMON)
def golden_list(json: Path | None, quiet: bool, golden_dir: Path | None) -> None:
    """List the cases, with their goldens, candidates and leftovers.

    Below each case its device classes, each with the day and the commit at which its golden was recorded.
    `knorm golden log CASE` shows why each was accepted.
    """
    from knorm.cli.tables import show_goldens
    from knorm.golden.files import Damaged

    console, workspace = make_console(quiet), _workspace(golden_dir, json)
    store = workspace.store
    rows: list[tuple[str, ...]] = []
    damaged = 0
    pins = workspace.pins | dict.fromkeys(store.of_tests, "values of a test")
    for case, what in pins.items():
        devices = sorted(device for name, device in store.files if name == case)
        for device in devices:
            try:
                made = store.read(case, device)[0].provenance
                rows.append((case, device, made.date[:10], made.commit[:12], made.reason, what))
            except Damaged as error:
                damaged += 1
                rows.append((case, device, "DAMAGED", "-", str(error), what))
        if not devices:
            rows.append((case, "-", "-", "-", f"no golden yet: knorm golden record {case}{store.option}", what))
    orphans = store.orphans(workspace.names)
    rows += [(name, "-", "ORPHAN", "-", "belongs to no case", "-") for name in orphans]
    show_goldens(console, rows)
    for file in store.candidates():
        console.print(f"candidate: {file}", soft_wrap=True, markup=False)
    for file in store.leftovers():
        console.print(f"left by an interrupted accept, or by one that is running: {file}", soft_wrap=True, markup=False)
    fields = ("case", "device_class", "accepted", "commit", "reason", "pins")
    write_json(json, {"goldens": [dict(zip(fields, row, strict=True)) for row in rows]})
    sys.exit(REFUTED if damaged or orphans else HOLDS)


@golden.command("verify")
@_some_cases
@_golden_device
@click.option("--require-goldens", is_flag=True, help="Fail if a case has no golden of this device class (for CI).")
@_golden_dir
@with_options(*COMMON)
def golden_verify(
    json: Path | None,
    quiet: bool,
    cases: tuple[str, ...],
    device: str,
    require_goldens: bool,
    golden_dir: Path | None,
) -> None:
    """Measure each CASE, and compare it with its golden.

    By default all. Goldens are those of exactly this device class.
    """
    workspace = _workspace(golden_dir, json)
    from knorm.cli.tables import show_outcome
    from knorm.golden.environment import device_class
    from knorm.golden.verify import verify_goldens
    from knorm.models import hush

    console, store, outcomes = make_console(quiet), workspace.store, []
    check_device(device)
    known = workspace.load(cases or None)
    if not cases:
        workspace.check(device_class(device))
    hush()
    with progress_bar(quiet) as bar:
        task = bar.add_task("cases", total=len(cases) or len(_timeless(known, device)))
        options: dict[str, Any] = {"catalogue": known, "on_step": lambda made: bar.update(task, completed=made)}
        for outcome in verify_goldens(store, list(cases) or None, device, **options):
            outcomes.append(outcome)
            bar.stop()  # it would write over the line
            show_outcome(console, outcome)
            bar.update(task, completed=len(outcomes))
            bar.start()
    failed = sum(outcome.failed for outcome in outcomes)
    idle = sum(not outcome.compared for outcome in outcomes)
    said = [f"{len(outcomes) - failed - idle} hold, {failed} failed"]
    for verdict in ("not compared", "inconclusive"):
        if number := sum(outcome.verdict == verdict for outcome in outcomes):
            said.append(f"{number} {verdict.upper()}")
    if timed := [name for name, case in known.items() if case.timed and not cases and workspace.project]:
        said.append(f"left out, since a clock measures them: {' '.join(timed)}")
    style = "bold red" if failed or (idle and require_goldens) else "bold yellow" if idle else "bold green"
    console.print(f"{', '.join(said)}, in {sum(o.seconds for o in outcomes):.0f} s", style=style)
    if moved := " ".join(outcome.case for outcome in outcomes if outcome.verdict in ("moved", "missing", "damaged")):
        on = "" if device == "cpu" else f" --device {device}"
        console.print(
            f"If the change is intended, commit it, then: knorm golden record {moved}{on}{store.option}",
            soft_wrap=True,
            markup=False,
        )
    write_json(json, {"device": device, "outcomes": [asdict(outcome) for outcome in outcomes]})
    sys.exit(REFUTED if failed or (idle and require_goldens) else HOLDS)


@golden.command("record")
@_some_cases
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Record all cases that this device measures, except optional and timed ones.",
)
@click.option(
    "--from-tests",
    is_flag=True,
    help="Run the tests, and record what they give to golden.check; CASEs are pytest's arguments: -- tests -k name.",
)
@_golden_device
@click.option(
    "--runs", type=AtLeast(RUNS, _AGREE), default=RUNS, show_default=True, help="How many runs have to agree."
)
@click.option("--unmoved", is_flag=True, help="Write candidates also where nothing moved, as for another environment.")
@_golden_dir
@with_options(*COMMON)
def golden_record(
    json: Path | None,
    quiet: bool,
    cases: tuple[str, ...],
    everything: bool,
    from_tests: bool,
    device: str,
    runs: int,
    unmoved: bool,
    golden_dir: Path | None,
) -> None:
    """Measure each CASE, and write a candidate where anything moved.

    Where nothing moved, one run suffices. A candidate lies beside its golden, which stays as it is.
    """
    if from_tests and everything:
        raise ValueError("--all and --from-tests are two selections: give one of them")
    if not from_tests and bool(cases) == everything:  # before anything heavy is loaded
        raise ValueError("name the cases to record, or give --all")
    workspace = _workspace(golden_dir, json)
    from knorm.golden.environment import device_class
    from knorm.golden.noise import MOST_RUNS
    from knorm.golden.store import checkout
    from knorm.golden.verify import record
    from knorm.models import hush

    check_device(device)
    chosen = _cases_of_tests(workspace, cases, runs) if from_tests else [*workspace.load(cases or None).values()]
    if everything:
        chosen = _timeless({case.id: case for case in chosen}, device)
    hush()
    console, store = make_console(quiet), workspace.store
    store.prepare()
    now, mine = checkout(store.folder), device_class(device)
    written: dict[str, str] = {}
    noise: dict[str, Any] = {}
    if not now.clean:
        console.print("The tree has changes outside the goldens: this candidate can be looked at, but not accepted.")
    for case in chosen:
        old = accepted(console, store, case.id, mine)
        with counting(quiet, f"{case.id}, runs", runs + MOST_RUNS * case.own_noise) as on_step:
            recorded = record(case, device, now, runs, before=old, unmoved=unmoved, on_step=on_step)
        if recorded is None:
            dropped = store.drop_candidate(case.id, mine)
            more = "; the earlier candidate is removed" if dropped else ""
            console.print(f"{case.id} ({mine}): nothing moved, no candidate{more}", soft_wrap=True, markup=False)
            continue
        file = store.write_candidate(recorded.golden, recorded.measured.tensors)
        written[case.id] = str(file)
        show_changes(console, old, recorded.golden, recorded.measured.tensors)
        if recorded.seen is not None:
            noise[case.id] = show_seen(console, recorded)
        console.print(f"wrote {file}\n", soft_wrap=True, markup=False)
        if case.beside is not None:
            console.print(case.beside(device), soft_wrap=True, markup=False)
    if now.clean and written:
        said = f'To accept: knorm golden accept {" ".join(written)} --reason "..."{store.option}'
        console.print(said, soft_wrap=True, markup=False)
    write_json(json, {"device": device, "written": [*written.values()], "noise": noise})


def _timeless(cases: Mapping[str, Any], device: str) -> list[Any]:
    """Those cases that a device measures, without the optional ones and those that a clock measures."""
    kind = device.partition(":")[0]
    return [case for case in cases.values() if kind in case.devices and not (case.optional or case.timed)]


def _cases_of_tests(workspace: Any, arguments: tuple[str, ...], runs: int) -> list[Any]:
    """Run the tests, and make a case of each name that they check; none is that of a declared case."""
    from knorm.golden.values import cases_of_tests

    chosen = [*cases_of_tests(arguments, max(runs, 3)).values()]
    if taken := sorted({case.id for case in chosen} & {*workspace.names}):
        raise ValueError(f"golden.check({taken[0]!r}): a case is named so: give the values another name")
    return chosen


def _chosen_candidates(workspace: Any, names: tuple[str, ...]) -> tuple[list[tuple[Path, Any, Any]], Any]:
    """Read candidates by case, or by file, and load their cases; refuses unknown ones, and two for one golden."""
    from knorm.golden.cases import check_name
    from knorm.golden.format import differences
    from knorm.golden.store import read_candidate

    store = workspace.store
    known = [*workspace.names, *store.of_tests]
    files: list[Path] = []
    for name in names:
        if name.endswith(".candidate"):
            files.append(Path(name))
            continue
        check_name(name, known)
        waiting = [file for file in store.candidates() if file.parent.name == name]
        if not waiting:
            raise ValueError(f"{name} has no candidate in {store.folder}: knorm golden record {name}{store.option}")
        files += waiting
    candidates = [(file, *read_candidate(file)) for file in dict.fromkeys(files)]
    places = [(made.case, made.device_class) for _, made, _ in candidates]
    for file, made, _ in candidates:
        if places.count((made.case, made.device_class)) > 1:
            raise ValueError(f"{file} is one of two candidates for {made.case}/{made.device_class}: give one of them")
        if made.case not in known:
            raise ValueError(f"{file} is of case {made.case!r}, which is unknown; known are {', '.join(sorted(known))}")
    cases = workspace.load_of(made.case for _, made, _ in candidates)
    for file, made, _ in candidates:
        if changed := differences(made.configuration, cases[made.case].configuration()):
            again = f"knorm golden record {cases[made.case].recorded or made.case}{store.option}"
            raise ValueError(f"{file}: the case is configured otherwise now ({changed[0]}): {again}")
    return candidates, cases


@golden.command("diff")
@click.argument("candidates", nargs=-1, metavar="[CASE|FILE]...")
@_golden_dir
@with_options(*COMMON)
def golden_diff(json: Path | None, quiet: bool, candidates: tuple[str, ...], golden_dir: Path | None) -> None:
    """Show what each candidate would change.

    Each metric that differs: old, new, difference with its interval. The verdicts are those of `knorm golden verify`.
    Exit code 1 where a metric moved.
    """
    console, workspace = make_console(quiet), _workspace(golden_dir, json)
    store = workspace.store
    names = candidates or tuple(str(file) for file in store.candidates())
    if not names:
        raise ValueError(f"there are no candidates in {store.folder}: knorm golden record makes them")
    changed = {}
    for _, made, tensors in _chosen_candidates(workspace, names)[0]:
        old = accepted(console, store, made.case, made.device_class)
        changed[f"{made.case}/{made.device_class}"] = show_changes(console, old, made, tensors)
    write_json(json, {"changes": {name: [asdict(change) for change in findings] for name, findings in changed.items()}})
    sys.exit(
        REFUTED if any(change.verdict == "moved" for findings in changed.values() for change in findings) else HOLDS
    )


@golden.command("accept")
@click.argument("candidates", nargs=-1, metavar="CASE|FILE...")
@click.option("--reason", default="", help="Why the change is intended; kept with the golden.")
@click.option(
    "--allow-worse",
    multiple=True,
    metavar="CASE:METRIC=PERCENT",
    help="Let metrics of a case be worse by at most PERCENT, e.g. 'prefill:nll/*=2'. May be repeated; CASE: may be "
    "left out where one golden is accepted.",
)
@click.option(
    "--allow-gate",
    multiple=True,
    metavar="CASE:METRIC",
    help="Let metrics of a case be judged by another gate than before, or be gone, e.g. 'prefill:nll/*'. May be "
    "repeated; CASE: may be left out where one golden is accepted.",
)
@_golden_dir
@with_options(*COMMON)
def golden_accept(
    json: Path | None,
    quiet: bool,
    candidates: tuple[str, ...],
    reason: str,
    allow_worse: tuple[str, ...],
    allow_gate: tuple[str, ...],
    golden_dir: Path | None,
) -> None:
    """Put candidates in place of their goldens.

    The candidates of a CASE, or a FILE that a CUDA runner recorded. All of them are accepted, or none. A refusal names
    every problem, and the command that permits what it may.
    """
    if not candidates:  # before anything heavy is loaded
        raise ValueError("name the cases, or the candidate files, to accept: knorm golden list shows them")
    from knorm.golden.approval import Refused, approve, parse_permissions
    from knorm.golden.store import checkout

    permissions = parse_permissions(allow_worse, allow_gate)
    console, workspace = make_console(quiet), _workspace(golden_dir, json)
    store = workspace.store
    (chosen, cases), now = _chosen_candidates(workspace, candidates), checkout(store.folder)
    pairs = [(made, tensors) for _, made, tensors in chosen]
    codes = {name: now.code_of(case.sources) for name, case in cases.items()}
    try:
        approved = approve(store, pairs, reason, now=now, permissions=permissions, codes=codes)
    except Refused as refused:
        command = refused.command(candidates, reason, permissions, store.option)
        lead = "Then" if any(problem.stale for problem in refused.problems) else "If that is intended"
        raise ValueError(f"{refused}\n{lead}: {command}" if command else str(refused)) from None
    written = [str(store.accept(made, x, file)) for made, (file, _, x) in zip(approved, chosen, strict=True)]
    for path in written:
        console.print(f"accepted {path}", soft_wrap=True, markup=False)
    console.print("Commit them with the change that they belong to.")
    write_json(json, {"written": written, "reason": reason})
