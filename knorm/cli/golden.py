"""`knorm golden`: list, verify, record, diff and accept golden results."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from knorm.cli.options import COMMON, HOLDS, REFUTED, check_device, make_console, with_options
from knorm.cli.outputs import write_json


@click.group()
def golden() -> None:
    """Golden results: did anything move since a person accepted them?"""


_golden_dir = click.option(
    "--golden-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the goldens.  [those of this checkout, else those installed with knorm]",
)


def _store(folder: Path | None, json: Path | None) -> Any:
    """The goldens; a result must not be written among them."""
    from knorm.golden.store import Store

    store = Store(folder)
    if json and store.folder.resolve() in json.resolve().parents:
        raise ValueError(f"--json {json} lies among the goldens, which only `knorm golden accept` writes")
    return store


_some_cases = click.argument("cases", nargs=-1, metavar="[CASE]...")
_golden_device = click.option(
    "--device", default="cpu", show_default=True, help="Device to measure on: cpu, cuda, cuda:1 ..."
)


@golden.command("list")
@_golden_dir
@with_options(*COMMON)
def golden_list(json: Path | None, quiet: bool, golden_dir: Path | None) -> None:
    """Which cases there are, and which goldens, candidates and leftovers."""
    from knorm.cli.tables import goldens_table
    from knorm.golden.cases import CASES
    from knorm.golden.files import Damaged

    console, store = make_console(quiet), _store(golden_dir, json)
    rows: list[tuple[str, ...]] = []
    damaged = 0
    for case in CASES.values():
        devices = sorted(device for name, device in store.files if name == case.id)
        for device in devices:
            try:
                made = store.read(case.id, device)[0].provenance
                rows.append((case.id, device, made.date[:10], made.commit[:12], made.reason, case.what))
            except Damaged as error:
                damaged += 1
                rows.append((case.id, device, "DAMAGED", "-", str(error), case.what))
        if not devices:
            rows.append((case.id, "-", "-", "-", "no golden yet: knorm golden record", case.what))
    orphans = store.orphans([*CASES])
    rows += [(name, "-", "ORPHAN", "-", "belongs to no case", "-") for name in orphans]
    console.print(goldens_table(rows))
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
    """Measure each CASE, by default all, and compare it with its golden of exactly this device class."""
    from knorm.cli.tables import show_outcome
    from knorm.golden.verify import verify_goldens
    from knorm.models import hush

    hush()
    console, store, outcomes = make_console(quiet), _store(golden_dir, json), []
    for outcome in verify_goldens(store, list(cases) or None, check_device(device)):
        outcomes.append(outcome)
        show_outcome(console, outcome)
    failed = sum(outcome.failed for outcome in outcomes)
    idle = sum(not outcome.compared for outcome in outcomes)
    said = [f"{len(outcomes) - failed - idle} hold, {failed} failed"]
    for verdict in ("not compared", "inconclusive"):
        if number := sum(outcome.verdict == verdict for outcome in outcomes):
            said.append(f"{number} {verdict.upper()}")
    style = "bold red" if failed or (idle and require_goldens) else "bold yellow" if idle else "bold green"
    console.print(f"{', '.join(said)}, in {sum(o.seconds for o in outcomes):.0f} s", style=style)
    if moved := " ".join(outcome.case for outcome in outcomes if outcome.verdict == "moved"):
        on = "" if device == "cpu" else f" --device {device}"
        console.print(
            f"If the change is intended: knorm golden record {moved}{on}{store.option}, look at it, then "
            f'knorm golden accept {moved} --reason "..."{store.option}',
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
@_golden_device
@click.option("--runs", default=3, show_default=True, help="How many runs have to agree.")
@_golden_dir
@with_options(*COMMON)
def golden_record(
    json: Path | None,
    quiet: bool,
    cases: tuple[str, ...],
    everything: bool,
    device: str,
    runs: int,
    golden_dir: Path | None,
) -> None:
    """Measure each CASE several times and write a candidate beside its golden, which stays as it is."""
    if bool(cases) == everything:  # before anything heavy is loaded
        raise ValueError("name the cases to record, or give --all")
    import torch

    from knorm.golden.cases import CASES, find_case
    from knorm.golden.store import checkout
    from knorm.golden.verify import record
    from knorm.models import hush

    kind = torch.device(check_device(device)).type
    chosen = (
        [c for c in CASES.values() if kind in c.devices and not (c.optional or c.timed)]
        if everything
        else [*map(find_case, cases)]
    )
    hush()
    console, store = make_console(quiet), _store(golden_dir, json)
    now, written = checkout(store.folder), []
    if not now.clean:
        console.print("The tree has changes outside the goldens: this candidate can be looked at, but not accepted.")
    for case in chosen:
        made, measured = record(case, device, now, runs)
        file = store.write_candidate(made, measured.tensors)
        written.append(str(file))
        _show_changes(console, store, made, measured.tensors)
        console.print(f"wrote {file}\n", soft_wrap=True, markup=False)
    if now.clean:
        names = " ".join(case.id for case in chosen)
        said = f'To accept: knorm golden accept {names} --reason "..."{store.option}'
        console.print(said, soft_wrap=True, markup=False)
    write_json(json, {"device": device, "candidates": written})


def _show_changes(console: Any, store: Any, made: Any, tensors: Any) -> list[Any]:
    """Print what a candidate would change; the changes."""
    from knorm.cli.tables import changes_table
    from knorm.golden.files import Damaged
    from knorm.golden.format import differing
    from knorm.golden.gates import gate_changes
    from knorm.golden.verify import changes

    old = None
    if (made.case, made.device_class) in store.files:
        try:
            old = store.read(made.case, made.device_class)
        except Damaged as damaged:
            console.print(f"DAMAGED: {damaged}", soft_wrap=True, markup=False)
    findings = changes(old, (made, tensors))
    title = f"{made.case} ({made.device_class})"
    if old and any(change.verdict != "holds" or change.golden != change.measured for change in findings):
        console.print(changes_table(findings, title))
    else:
        said = (
            f"{title}: nothing differs in {len(findings)} metrics" if old else f"{title}, new: {len(findings)} metrics"
        )
        console.print(said, markup=False)
    if old:
        was, now = old[0].configuration, made.configuration
        for name in differing(was, now):
            console.print(f"configuration: {name} was {was.get(name)}, is {now.get(name)}", markup=False)
        for metric, change in gate_changes(old[0], made).items():
            console.print(f"GATE  {metric} is {change}", soft_wrap=True, markup=False)
    return findings


def _chosen_candidates(store: Any, names: tuple[str, ...]) -> list[tuple[Path, Any, Any]]:
    """Read candidates by case, or by file; refuses unknown ones, and two for one golden."""
    from knorm.golden.cases import CASES, find_case
    from knorm.golden.format import differing
    from knorm.golden.store import read_candidate

    files: list[Path] = []
    for name in names:
        if name.endswith(".candidate"):
            files.append(Path(name))
            continue
        case = find_case(name).id
        waiting = [file for file in store.candidates() if file.parent.name == case]
        if not waiting:
            raise ValueError(f"{name} has no candidate in {store.folder}: knorm golden record {name}{store.option}")
        files += waiting
    candidates = [(file, *read_candidate(file)) for file in dict.fromkeys(files)]
    places = [(made.case, made.device_class) for _, made, _ in candidates]
    for file, made, _ in candidates:
        if places.count((made.case, made.device_class)) > 1:
            raise ValueError(f"{file} is one of two candidates for {made.case}/{made.device_class}: give one of them")
        if made.case not in CASES:
            raise ValueError(f"{file} is of case {made.case!r}, which is unknown; known are {', '.join(sorted(CASES))}")
        if changed := differing(made.configuration, CASES[made.case].configuration()):
            raise ValueError(f"{file}: field 'configuration' ({changed[0]}) is not that of the case: record it again")
    return candidates


@golden.command("diff")
@click.argument("candidates", nargs=-1, metavar="[CASE|FILE]...")
@_golden_dir
@with_options(*COMMON)
def golden_diff(json: Path | None, quiet: bool, candidates: tuple[str, ...], golden_dir: Path | None) -> None:
    """Show what each candidate would change: old, new, difference with its interval.

    The verdicts are those of `knorm golden verify`. Exit code 1 where a metric moved.
    """
    console, store = make_console(quiet), _store(golden_dir, json)
    names = candidates or tuple(str(file) for file in store.candidates())
    if not names:
        raise ValueError(f"there are no candidates in {store.folder}: knorm golden record makes them")
    changed = {}
    for _, made, tensors in _chosen_candidates(store, names):
        changed[f"{made.case}/{made.device_class}"] = _show_changes(console, store, made, tensors)
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
    """Put candidates in place of their goldens: those of a CASE, or a FILE that a CUDA runner recorded.

    All of them are accepted, or none. A refusal names every problem, and the command that permits what it may.
    """
    if not candidates:  # before anything heavy is loaded
        raise ValueError("name the cases, or the candidate files, to accept: knorm golden list shows them")
    from knorm.golden.approval import Refused, approve, parse_permissions
    from knorm.golden.store import checkout

    permissions = parse_permissions(allow_worse, allow_gate)
    console, store = make_console(quiet), _store(golden_dir, json)
    chosen, now = _chosen_candidates(store, candidates), checkout(store.folder)
    pairs = [(made, tensors) for _, made, tensors in chosen]
    try:
        approved = approve(store, pairs, reason, now=now, permissions=permissions)
    except Refused as refused:
        command = refused.command(candidates, reason, permissions, store.option)
        lead = "Then" if any(problem.stale for problem in refused.problems) else "If that is intended"
        raise ValueError(f"{refused}\n{lead}: {command}" if command else str(refused)) from None
    written = [str(store.accept(made, x, file)) for made, (file, _, x) in zip(approved, chosen, strict=True)]
    for path in written:
        console.print(f"accepted {path}", soft_wrap=True, markup=False)
    console.print("Commit them with the change that they belong to.")
    write_json(json, {"accepted": written, "reason": reason})
