"""The commands. Everything heavy is imported when a command needs it."""

from __future__ import annotations

import json
import os
import platform
import sys
import traceback
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from knorm import __version__

HOLDS, REFUTED, WRONG_USAGE, BROKEN = 0, 1, 2, 3


def _console(quiet: bool) -> Any:
    from rich.console import Console

    console = Console(quiet=quiet, highlight=False)
    if not console.is_terminal:
        console.width = 140  # a log has no edge
    return console


def _environment() -> dict[str, str]:
    packages = ("torch", "transformers", "numpy")
    return {
        "knorm": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{p: metadata.version(p) for p in packages},
    }


def _device(name: str) -> str:
    """A device that is there: refused otherwise, before anything is loaded."""
    if name == "cpu":
        return name
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}, but should be cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}, but should be cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}, but PyTorch sees no CUDA device: drop the flag, or install a CUDA build")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}, but there are only devices 0 to {torch.cuda.device_count() - 1}")
    return name


def _writable(_context: click.Context, parameter: click.Parameter, file: Path | None) -> Path | None:
    """Find out before the work, not after it, that a result cannot be written."""
    if file is not None:
        if file.is_dir() or not file.parent.is_dir():
            problem = "it is a folder" if file.is_dir() else f"there is no folder {file.parent}"
            raise click.BadParameter(f"cannot write {file}: {problem}", param=parameter)
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise click.BadParameter(f"cannot write {file}: no permission", param=parameter)
    return file


def _file(flag: str, text: str) -> Any:
    return click.option(flag, type=click.Path(path_type=Path), metavar="FILE", callback=_writable, help=text)


_common = (
    _file("--json", "Write the results as JSON."),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
)


def _with(*options: Any) -> Any:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class _Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Numbers separated by commas, kept as they are written."""

    name = "N[,N...]"

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.kind(part.strip()) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} should be numbers separated by commas, e.g. 0,1", param, ctx)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(context: click.Context, verbose: bool) -> None:
    """Is a compressed KV cache correct, and did anything move?

    Exit code 0: all holds. 1: something was refuted or moved. 2: wrong usage. 3: knorm itself failed.
    """
    context.obj = verbose


@cli.command()
@_with(*_common)
def verify(json: Path | None, quiet: bool) -> None:
    """Check knorm itself on the embedded model: laws, one pass against the loop, perplexity curves, goldens."""
    from rich.text import Text

    from knorm.models import hush
    from knorm.report import curve_table, show_suspicions
    from knorm.verify import verify as run

    hush()
    console, verdicts = _console(quiet), []
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
    console.print(
        f"{sum(v.holds and v.compared for v in verdicts)} hold, {refuted} refuted, "
        f"in {sum(v.seconds for v in verdicts):.0f} s",
        style="bold red" if refuted else "bold green",
    )
    _write(json, {"verdicts": [asdict(verdict) for verdict in verdicts]})
    sys.exit(REFUTED if refuted else HOLDS)


@cli.command()
@click.argument("target")
@click.option(
    "--as",
    "kind",
    metavar="KIND",
    help="function, class, legacy, cache function, cache, evaluator or press.  [told by its parameters]",
)
@click.option("--like", metavar="knorm", help="The target promises all that knorm's own core does.")
@click.option("--trait", "traits", multiple=True, metavar="NAME=VALUE", help="What it promises, e.g. rounding=ceil.")
@click.option("--select", metavar="NAME[,NAME]", help="Checks or families of checks.  [all]")
@click.option("--expect-failure", multiple=True, metavar="CHECK=REASON", help="May fail; one that holds is reported.")
@click.option("--profile", default="quick", show_default=True, help="quick or thorough.")
@click.option("--seed", default=0, show_default=True, help="The same seed draws the same cases.")
@click.option("--device", default="cpu", show_default=True, help="Of the tensors drawn: cpu, cuda, cuda:1 ...")
@click.option("--limit", default=20.0, show_default=True, help="Seconds for an answer of the target.")
@_with(*_common)
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
    from knorm.report import show_result, show_summary
    from knorm.supervisor import Request, Supervisor

    names = None if select is None else tuple(name.strip() for name in select.split(",") if name.strip())
    if names == ():
        raise ValueError("--select is empty, but should be names of checks or families, e.g. order,retained_count")
    if not limit > 0:
        raise ValueError(f"--limit {limit:g}, but should be seconds above 0")
    expected = tuple(map(_expected, expect_failure))
    _device(given["device"])
    supervisor = Supervisor(
        Request(**given, select=names, expected=expected, quiet=quiet, verbose=bool(verbose)), limit
    )
    console, results = _console(quiet), []
    with closing(supervisor.results()) as found:  # the worker ends, whatever happens here
        for result in found:
            results.append(result)
            show_result(console, result, verbose)
    show_summary(console, results, supervisor.traits)
    tried = {result["check"] for result in results if result["verdict"] != "does not apply"}
    if not tried:
        raise ValueError("none of the checks chosen applies to this target: drop --select, or promise more by --trait")
    if idle := sorted({name for name, _ in expected} - tried):
        raise ValueError(f"--expect-failure names {', '.join(idle)}, but that was not tried on this target")
    settings = {name: given[name] for name in ("profile", "seed", "device")}
    _write(json, {"target": given["target"], "traits": supervisor.traits, **settings, "results": results})
    wrong = {"refuted", "unexpectedly holds", "untested"}  # what was not tried was not found to hold
    sys.exit(REFUTED if wrong & {result["verdict"] for result in results} else HOLDS)


def _expected(text: str) -> tuple[str, str]:
    name, _, reason = text.partition("=")
    if not (name and reason):
        raise ValueError(f"--expect-failure {text}, but should be CHECK=REASON, e.g. time_order='sorts by norm'")
    return name, reason


_text_options = (
    click.option(
        "--model", default="embedded", show_default=True, help="embedded, a folder, or organisation/name@commit."
    ),
    click.option(
        "--text",
        default="narrative",
        show_default=True,
        help="narrative, encyclopedia, wikitext2, pg19, a .txt, .parquet or .jsonl, or hub:name@commit:files.parquet.",
    ),
    click.option("--column", default="text", show_default=True, help="The column of a .parquet or .jsonl."),
    click.option("--window", default=512, show_default=True, help="Tokens per window."),
    click.option("--windows", default=8, show_default=True, help="Windows of the text, from its start."),
)
_policy_options = (
    click.option(
        "--prune-after", type=int, help="Tokens a cache must hold to be compressed.  [128 if streaming, else 0]"
    ),
    click.option("--skip-layers", type=_Numbers(int), default="", help="Layers never compressed, e.g. 0,1."),
    click.option("--protect-first", default=0, show_default=True, help="Tokens at the start never evicted."),
    click.option("--protect-recent", default=0, show_default=True, help="Newest tokens never evicted."),
    click.option(
        "--score", type=click.Choice(["low_norm", "high_norm", "random"]), default="low_norm", show_default=True
    ),
    click.option("--seed", default=0, show_default=True, help="Of the random score."),
    click.option(
        "--protocol",
        type=click.Choice(["prefill", "streaming"]),
        help="Compress once, after the prompt, or after every token.  [prefill with --prompt-length, else streaming]",
    ),
    click.option("--prompt-length", type=int, help="Tokens of the first call; only those after it are scored.  [1]"),
    click.option("--dtype", type=click.Choice(["float32", "float64", "bfloat16", "float16"]), default="float32"),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ..."),
    click.option("--batch", default=8, show_default=True, help="Windows at a time."),
)
_CURVE = "1.0,0.95,0.9,0.8,0.7,0.5,0.3,0.1"


@dataclass(frozen=True)
class _Setting:
    """What `ppl` and `explain` work on, all of it checked before any of it is evaluated."""

    model: Any
    tokenizer: Any
    windows: Any
    policies: list[Any]
    prompt_length: int
    title: str
    fields: dict[str, Any]


def _setting(given: dict[str, Any], ratios: tuple[str, ...], plot: Path | None, json: Path | None) -> _Setting:
    import torch

    from knorm.evaluation import cut_windows
    from knorm.models import hush, load_model, load_text
    from knorm.perplexity import check_run
    from knorm.policy import Policy

    prompted = given["prompt_length"] is not None
    protocol: Any = given["protocol"] or ("prefill" if prompted else "streaming")
    prune_after = given["prune_after"]
    if prune_after is None:
        prune_after = 128 if protocol == "streaming" else 0
    if protocol == "prefill" and not prompted:
        raise ValueError("a prefill compresses once, after the prompt: give --prompt-length, or --protocol streaming")
    prompt_length = given["prompt_length"] if prompted else 1
    if not ratios:
        raise ValueError("--keep-ratio is empty, but should be ratios in (0, 1], e.g. 1.0,0.5")
    options = {name: given[name] for name in ("skip_layers", "protect_first", "protect_recent", "score", "seed")}
    policies = [Policy(ratio, prune_after=prune_after, protocol=protocol, **options) for ratio in ratios]
    if given["batch"] < 1:
        raise ValueError(f"--batch {given['batch']}, but should be at least 1")
    if json and plot and json.resolve() == plot.resolve():
        raise ValueError(f"--json and --plot are both {json}, but should be two files")
    if plot:
        from knorm.report import check_plot

        check_plot(plot)
    device = _device(given["device"])
    hush()
    model, tokenizer = load_model(given["model"], dtype=getattr(torch, given["dtype"]), device=device)
    windows = cut_windows(tokenizer, load_text(given["text"], given["column"]), given["window"], given["windows"])
    for policy in policies:
        check_run(model, windows.input_ids, policy, prompt_length)
    count, length = windows.input_ids.shape
    many = "1 window" if count == 1 else f"{count} windows"
    title = f"{given['model']} on {given['text']}: {many} of {length} tokens, {protocol}, "
    title += f"prune_after {prune_after}"
    if policies[0].skip_layers:
        skipped = policies[0].skip_layers
        title += f", layer{'s' if skipped[1:] else ''} {', '.join(map(str, skipped))} skipped"
    fields = {name: given[name] for name in ("model", "text", "window", "windows", "dtype", "device", "batch")}
    fields["policy"] = {"protocol": protocol, "prune_after": prune_after, "prompt_length": prompt_length, **options}
    return _Setting(model, tokenizer, windows, policies, prompt_length, title, fields)


def _progress(quiet: bool) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    errors = Console(stderr=True)
    return Progress(*columns, console=errors, transient=True, disable=quiet or not errors.is_terminal)


@cli.command()
@_with(*_text_options)
@click.option("--keep-ratio", type=_Numbers(str), default=_CURVE, show_default=True, help="A row each.")
@_with(*_policy_options)
@click.option("--stream", is_flag=True, help="Run the loop too, and compare.")
@click.option(
    "--reported",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Judge somebody else's table instead: .csv or .json with keep_ratio and ppl (or ppl_before, ppl_after).",
)
@_file("--plot", "Draw the curve (.png, .svg, .pdf).")
@_with(*_common)
def ppl(json: Path | None, plot: Path | None, quiet: bool, reported: Path | None, **given: Any) -> None:
    """Perplexity of a text at each ratio, exactly, from one forward pass each."""
    console = _console(quiet)
    if reported:
        if plot or given["stream"]:
            raise ValueError("--reported judges a table and measures nothing: drop --plot and --stream")
        if json and json.resolve() == reported.resolve():
            raise ValueError(f"--json {json} would overwrite the table that --reported reads: give another file")
        _judge(reported, json, console)
    from knorm.evaluation import evaluate
    from knorm.perplexity import NEAR_TIE
    from knorm.report import curve_table, plot_curve, show_suspicions
    from knorm.sanity import judge_measured, measure_empty, measure_with

    setting = _setting(given, given["keep_ratio"], plot, json)
    on = (setting.model, setting.windows)
    rows = []
    with _progress(quiet) as progress:
        count = -(-len(setting.windows.input_ids) // given["batch"])
        task = progress.add_task("windows x ratios", total=len(setting.policies) * count)
        for policy in setting.policies:
            progress.update(task, description=f"ratio {policy.keep_ratio}")
            rows.append(
                evaluate(
                    *on,
                    policy,
                    prompt_length=setting.prompt_length,
                    stream=given["stream"],
                    batch=given["batch"],
                    on_batch=lambda: progress.advance(task),
                )
            )
    console.print(curve_table(rows, setting.title))
    holds = True
    if given["stream"]:
        difference, gap = max(r.stream_difference or 0.0 for r in rows), max(r.stream_gap or 0.0 for r in rows)
        evictions = sum(r.stream_evictions or 0 for r in rows)
        console.print(
            f"One pass against the loop: {evictions} evictions differ, norms within {gap:.1e} where they first do; "
            f"under the loop's schedule, tokens within {difference:.1e}."
        )
        if given["dtype"] in ("float32", "float64"):
            holds = difference <= 1e-4 and gap <= NEAR_TIE
        else:
            console.print(f"Equality is claimed for float32 and float64, not for {given['dtype']}.")
    again = {"prompt_length": setting.prompt_length, "batch": given["batch"]}
    doubts = judge_measured(
        rows, setting.policies, measure_with(*on, **again), prompt_length=setting.prompt_length,
        nll_empty=measure_empty(*on, **again),
    )  # fmt: skip
    show_suspicions(console, doubts)
    if plot:
        plot_curve(rows, setting.title, plot)
    found = {"holds": holds, "suspicious": [asdict(doubt) for doubt in doubts], "rows": [asdict(row) for row in rows]}
    _write(json, {**setting.fields, **found})
    sys.exit(HOLDS if holds else REFUTED)


def _judge(reported: Path, json: Path | None, console: Any) -> None:
    """Somebody else's table: exit 1 where it is suspicious."""
    from knorm.report import show_suspicions
    from knorm.sanity import judge_reported, read_reported

    doubts = judge_reported(read_reported(reported))
    show_suspicions(console, doubts)
    if not doubts:
        console.print(f"Nothing in {reported} is suspicious by itself; `knorm ppl` measures it.")
    _write(json, {"reported": str(reported), "suspicious": [asdict(doubt) for doubt in doubts]})
    sys.exit(REFUTED if doubts else HOLDS)


@cli.command()
@_with(*_text_options)
@click.option("--keep-ratio", default="0.9", show_default=True, help="The one to explain.")
@_with(*_policy_options)
@click.option("--newest", default=16, show_default=True, help="Newest tokens that one intervention protects.")
@click.option(
    "--positions",
    type=click.Choice(["seen", "stored"]),
    default="seen",
    show_default=True,
    help="Count from the tokens seen, or, as an unaware loop does, from those stored.",
)
@click.option("--worst", default=8, show_default=True, help="Tokens to show of those that got worse.")
@_file("--plot", "Draw perplexity and recency against ratio (.png, .svg, .pdf).")
@_with(*_common)
def explain(json: Path | None, plot: Path | None, quiet: bool, keep_ratio: str, **given: Any) -> None:
    """Why did perplexity move? One thing about the run is changed at a time, and the run evaluated again."""
    from knorm.explain import curves_around, explain
    from knorm.report import plot_curves, show_explanation

    if given["newest"] < 1 or given["worst"] < 1:
        raise ValueError(f"--newest {given['newest']} and --worst {given['worst']}, but should be at least 1")
    console, setting = _console(quiet), _setting(given, (keep_ratio,), plot, json)
    on, policy = (setting.model, setting.windows), setting.policies[0]
    again = {"prompt_length": setting.prompt_length, "batch": given["batch"]}
    with _progress(quiet) as progress:
        task = progress.add_task("evaluations", total=None)

        def step(name: str) -> None:
            progress.update(task, advance=1, description=name)

        found = explain(
            setting.model, setting.tokenizer, setting.windows, policy, newest=given["newest"], worst=given["worst"],
            stored=given["positions"] == "stored",
            on_step=step, **again,
        )  # fmt: skip
        curves = curves_around(*on, policy, _CURVE.split(","), on_step=step, **again) if plot else {}
    show_explanation(console, found, f"{setting.title}, keep_ratio {policy.keep_ratio}")
    if plot:
        plot_curves(curves, setting.title, plot)
    _write(json, {**setting.fields, "keep_ratio": str(policy.keep_ratio), **asdict(found)})
    sys.exit(HOLDS)


@cli.group()
def golden() -> None:
    """Golden results: did anything move since a person accepted them?"""


_golden_dir = click.option(
    "--golden-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where they are.  [those of this checkout, else those installed with knorm]",
)


def _store(folder: Path | None, json: Path | None) -> Any:
    """The goldens; a result must not be written among them."""
    from knorm.store import Store

    store = Store(folder)
    if json and store.folder.resolve() in json.resolve().parents:
        raise ValueError(f"--json {json} lies among the goldens, which only `knorm golden accept` writes")
    return store


_some_cases = click.argument("cases", nargs=-1, metavar="[CASE]...")
_golden_device = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")


@golden.command("list")
@_golden_dir
@_with(*_common)
def golden_list(json: Path | None, quiet: bool, golden_dir: Path | None) -> None:
    """Which cases there are, and which goldens, candidates and leftovers."""
    from knorm.cases import CASES
    from knorm.golden import Damaged
    from knorm.report import goldens_table

    console, store = _console(quiet), _store(golden_dir, json)
    rows: list[tuple[str, ...]] = []
    damaged = 0
    for case in CASES.values():
        found = sorted(device for name, device in store.files if name == case.id)
        for device in found:
            try:
                made = store.read(case.id, device)[0].provenance
                rows.append((case.id, device, made.date[:10], made.commit[:12], made.reason, case.what))
            except Damaged as error:
                damaged += 1
                rows.append((case.id, device, "DAMAGED", "-", str(error), case.what))
        if not found:
            rows.append((case.id, "-", "-", "-", "no golden yet: knorm golden record", case.what))
    orphans = store.orphans([*CASES])
    rows += [(name, "-", "ORPHAN", "-", "belongs to no case", "-") for name in orphans]
    console.print(goldens_table(rows))
    for file in store.candidates():
        console.print(f"candidate: {file}", soft_wrap=True, markup=False)
    for file in store.leftovers():
        console.print(f"left by an interrupted accept, the next one removes it: {file}", soft_wrap=True, markup=False)
    fields = ("case", "device_class", "accepted", "commit", "reason", "pins")
    _write(json, {"goldens": [dict(zip(fields, row, strict=True)) for row in rows]})
    sys.exit(REFUTED if damaged or orphans else HOLDS)


@golden.command("verify")
@_some_cases
@_golden_device
@click.option("--require-goldens", is_flag=True, help="Fail where no golden of this device class is there (CI).")
@_golden_dir
@_with(*_common)
def golden_verify(
    json: Path | None,
    quiet: bool,
    cases: tuple[str, ...],
    device: str,
    require_goldens: bool,
    golden_dir: Path | None,
) -> None:
    """Measure each CASE, by default all, and compare it with its golden of exactly this device class."""
    from knorm.cases import verify_goldens
    from knorm.models import hush
    from knorm.report import show_outcome

    hush()
    console, outcomes = _console(quiet), []
    for outcome in verify_goldens(_store(golden_dir, json), list(cases) or None, _device(device)):
        outcomes.append(outcome)
        show_outcome(console, outcome)
    failed = sum(outcome.failed for outcome in outcomes)
    idle = sum(not outcome.compared for outcome in outcomes)
    said = [f"{len(outcomes) - failed - idle} hold, {failed} failed"] + ([f"{idle} NOT COMPARED"] if idle else [])
    style = "bold red" if failed or (idle and require_goldens) else "bold yellow" if idle else "bold green"
    console.print(f"{', '.join(said)}, in {sum(o.seconds for o in outcomes):.0f} s", style=style)
    if any(outcome.verdict == "moved" for outcome in outcomes):
        console.print(
            "If the change is intended: knorm golden record, look at it, then knorm golden accept --reason ..."
        )
    _write(json, {"device": device, "outcomes": [asdict(outcome) for outcome in outcomes]})
    sys.exit(REFUTED if failed or (idle and require_goldens) else HOLDS)


@golden.command("record")
@_some_cases
@click.option("--all", "everything", is_flag=True, help="All cases that this device measures, but for optional ones.")
@_golden_device
@click.option("--runs", default=3, show_default=True, help="How many runs have to agree.")
@_golden_dir
@_with(*_common)
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
    import torch

    from knorm.cases import CASES, find_case, record
    from knorm.models import hush
    from knorm.store import checkout

    if bool(cases) == everything:
        raise ValueError("name the cases to record, or give --all")
    kind = torch.device(_device(device)).type
    chosen = (
        [c for c in CASES.values() if kind in c.devices and not c.optional] if everything else [*map(find_case, cases)]
    )
    hush()
    console, store = _console(quiet), _store(golden_dir, json)
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
        console.print(f'To accept: knorm golden accept {names} --reason "..."', soft_wrap=True, markup=False)
    _write(json, {"device": device, "candidates": written})


def _show_changes(console: Any, store: Any, made: Any, tensors: Any) -> list[Any]:
    """Print what a candidate would change; the changes."""
    from knorm.cases import changes
    from knorm.golden import Damaged, differing, gate_changes
    from knorm.report import changes_table

    old = None
    if (made.case, made.device_class) in store.files:
        try:
            old = store.read(made.case, made.device_class)
        except Damaged as damaged:
            console.print(f"DAMAGED: {damaged}", soft_wrap=True, markup=False)
    found = changes(old, (made, tensors))
    title = f"{made.case} ({made.device_class})"
    if old and any(change.before != change.after for change in found):
        console.print(changes_table(found, title))
    else:
        said = f"{title}: nothing differs in {len(found)} metrics" if old else f"{title}, new: {len(found)} metrics"
        console.print(said, markup=False)
    if old:
        was, now = old[0].configuration, made.configuration
        for name in differing(was, now):
            console.print(f"configuration: {name} was {was.get(name)}, is {now.get(name)}", markup=False)
        for change in gate_changes(old[0], made):
            console.print(f"GATE  {change}", soft_wrap=True, markup=False)
    return found


def _chosen_candidates(store: Any, names: tuple[str, ...]) -> list[tuple[Path, Any, Any]]:
    """Candidates by case, or by file, with their files; refuses what there is not, and two for one golden."""
    from knorm.cases import CASES, find_case
    from knorm.golden import differing
    from knorm.store import read_candidate

    files: list[Path] = []
    for name in names:
        if name.endswith(".candidate"):
            files.append(Path(name))
            continue
        case = find_case(name).id
        waiting = [file for file in store.candidates() if file.parent.name == case]
        if not waiting:
            raise ValueError(f"{name} has no candidate in {store.folder}: knorm golden record {name}")
        files += waiting
    found = [(file, *read_candidate(file)) for file in dict.fromkeys(files)]
    places = [(made.case, made.device_class) for _, made, _ in found]
    for file, made, _ in found:
        if places.count((made.case, made.device_class)) > 1:
            raise ValueError(f"{file} is one of two candidates for {made.case}/{made.device_class}: give one of them")
        if made.case not in CASES:
            raise ValueError(
                f"{file} is of case {made.case!r}, which there is not; there are {', '.join(sorted(CASES))}"
            )
        if changed := differing(made.configuration, CASES[made.case].configuration()):
            raise ValueError(f"{file}: field 'configuration' ({changed[0]}) is not that of the case: record it again")
    return found


@golden.command("diff")
@click.argument("candidates", nargs=-1, metavar="[CASE|FILE]...")
@_golden_dir
@_with(*_common)
def golden_diff(json: Path | None, quiet: bool, candidates: tuple[str, ...], golden_dir: Path | None) -> None:
    """What each candidate would change: old, new, difference with its interval. Exit code 1 where anything moved."""
    console, store = _console(quiet), _store(golden_dir, json)
    names = candidates or tuple(str(file) for file in store.candidates())
    if not names:
        raise ValueError(f"there are no candidates in {store.folder}: knorm golden record makes them")
    found = {}
    for _, made, tensors in _chosen_candidates(store, names):
        found[f"{made.case}/{made.device_class}"] = _show_changes(console, store, made, tensors)
    _write(json, {"changes": {name: [asdict(change) for change in each] for name, each in found.items()}})
    sys.exit(REFUTED if any(change.significant for each in found.values() for change in each) else HOLDS)


@golden.command("accept")
@click.argument("candidates", nargs=-1, metavar="CASE|FILE...")
@click.option("--reason", default="", help="Why the change is intended; kept with the golden.")
@click.option("--allow-worse", multiple=True, metavar="METRIC=PERCENT", help="E.g. 'nll/*=2': may be 2 % worse.")
@_golden_dir
@_with(*_common)
def golden_accept(
    json: Path | None,
    quiet: bool,
    candidates: tuple[str, ...],
    reason: str,
    allow_worse: tuple[str, ...],
    golden_dir: Path | None,
) -> None:
    """Put candidates in place of their goldens: those of a CASE, or a FILE that a CUDA runner recorded."""
    from knorm.store import checkout, parse_allowance

    if not candidates:
        raise ValueError("name the cases, or the candidate files, to accept: knorm golden list shows them")
    console, store = _console(quiet), _store(golden_dir, json)
    allowed = dict(map(parse_allowance, allow_worse))
    chosen, now = _chosen_candidates(store, candidates), checkout(store.folder)
    approved = [store.approve(made, x, reason, now=now, allow_worse=allowed) for _, made, x in chosen]  # all, or none
    written = [str(store.accept(made, x, file)) for made, (file, _, x) in zip(approved, chosen, strict=True)]
    for path in written:
        console.print(f"accepted {path}", soft_wrap=True, markup=False)
    console.print("Commit them with the change that they belong to.")
    _write(json, {"accepted": written, "reason": reason})


def _write(file: Path | None, result: dict[str, Any]) -> None:
    if file is not None:
        text = json.dumps({"environment": _environment(), **result}, indent=1, allow_nan=False)
        file.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Run a command; wrong input is one line and exit code 2, with -v a traceback; a bug of knorm's own always one."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (ValueError, TypeError, OSError) as error:
        if {"-v", "--verbose"} & set(sys.argv[1:2]):
            traceback.print_exc()
            sys.exit(WRONG_USAGE)
        click.echo(f"knorm: {error}", err=True)
        sys.exit(WRONG_USAGE)
    except Exception:  # Python's own exit code would be 1: refuted
        traceback.print_exc()
        sys.exit(BROKEN)
