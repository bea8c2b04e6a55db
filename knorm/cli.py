"""The commands. Everything heavy is imported when a command needs it."""

from __future__ import annotations

import sys
import traceback
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from knorm import __version__
from knorm.bench_cli import bench
from knorm.golden_cli import golden
from knorm.options import (
    BROKEN,
    COMMON,
    HOLDS,
    MODEL,
    REFUTED,
    SCORING,
    WRONG_USAGE,
    Numbers,
    check_device,
    file_option,
    make_console,
    progress_bar,
    with_options,
    write_json,
)


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
@with_options(*COMMON)
def verify(json: Path | None, quiet: bool) -> None:
    """Check knorm itself on the embedded model: laws, one pass against the loop, perplexity curves, goldens."""
    from rich.text import Text

    from knorm.models import hush
    from knorm.report import curve_table, show_suspicions
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
    console.print(
        f"{sum(v.holds and v.compared for v in verdicts)} hold, {refuted} refuted, "
        f"in {sum(v.seconds for v in verdicts):.0f} s",
        style="bold red" if refuted else "bold green",
    )
    write_json(json, {"verdicts": [asdict(verdict) for verdict in verdicts]})
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
    from knorm.report import show_result, show_summary
    from knorm.supervisor import Request, Supervisor

    names = None if select is None else tuple(name.strip() for name in select.split(",") if name.strip())
    if names == ():
        raise ValueError("--select is empty, but should be names of checks or families, e.g. order,retained_count")
    if not limit > 0:
        raise ValueError(f"--limit {limit:g}, but should be seconds above 0")
    expected = tuple(map(_expected, expect_failure))
    check_device(given["device"])
    supervisor = Supervisor(
        Request(**given, select=names, expected=expected, quiet=quiet, verbose=bool(verbose)), limit
    )
    console, results = make_console(quiet), []
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
    write_json(json, {"target": given["target"], "traits": supervisor.traits, **settings, "results": results})
    wrong = {"refuted", "unexpectedly holds", "untested"}  # what was not tried was not found to hold
    sys.exit(REFUTED if wrong & {result["verdict"] for result in results} else HOLDS)


def _expected(text: str) -> tuple[str, str]:
    name, _, reason = text.partition("=")
    if not (name and reason):
        raise ValueError(f"--expect-failure {text}, but should be CHECK=REASON, e.g. time_order='sorts by norm'")
    return name, reason


_text_options = (
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
    click.option("--skip-layers", type=Numbers(int), default="", help="Layers never compressed, e.g. 0,1."),
    click.option(
        "--protocol",
        type=click.Choice(["prefill", "streaming"]),
        help="Compress once, after the prompt, or after every token.  [prefill with --prompt-length, else streaming]",
    ),
    click.option("--prompt-length", type=int, help="Tokens of the first call; only those after it are scored.  [1]"),
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
    device = check_device(given["device"])
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


@cli.command()
@with_options(*_text_options)
@click.option("--keep-ratio", type=Numbers(str), default=_CURVE, show_default=True, help="A row each.")
@with_options(*_policy_options, *SCORING, *MODEL)
@click.option("--stream", is_flag=True, help="Run the loop too, and compare.")
@click.option(
    "--reported",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Judge somebody else's table instead: .csv or .json with keep_ratio and ppl (or ppl_before, ppl_after).",
)
@file_option("--plot", "Draw the curve (.png, .svg, .pdf).")
@with_options(*COMMON)
def ppl(json: Path | None, plot: Path | None, quiet: bool, reported: Path | None, **given: Any) -> None:
    """Perplexity of a text at each ratio, exactly, from one forward pass each."""
    console = make_console(quiet)
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
    with progress_bar(quiet) as progress:
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
    write_json(json, {**setting.fields, **found})
    sys.exit(HOLDS if holds else REFUTED)


def _judge(reported: Path, json: Path | None, console: Any) -> None:
    """Somebody else's table: exit 1 where it is suspicious."""
    from knorm.report import show_suspicions
    from knorm.sanity import judge_reported, read_reported

    doubts = judge_reported(read_reported(reported))
    show_suspicions(console, doubts)
    if not doubts:
        console.print(f"Nothing in {reported} is suspicious by itself; `knorm ppl` measures it.")
    write_json(json, {"reported": str(reported), "suspicious": [asdict(doubt) for doubt in doubts]})
    sys.exit(REFUTED if doubts else HOLDS)


@cli.command()
@with_options(*_text_options)
@click.option("--keep-ratio", default="0.9", show_default=True, help="The one to explain.")
@with_options(*_policy_options, *SCORING, *MODEL)
@click.option("--newest", default=16, show_default=True, help="Newest tokens that one intervention protects.")
@click.option(
    "--positions",
    type=click.Choice(["seen", "stored"]),
    default="seen",
    show_default=True,
    help="Count from the tokens seen, or, as an unaware loop does, from those stored.",
)
@click.option("--worst", default=8, show_default=True, help="Tokens to show of those that got worse.")
@file_option("--plot", "Draw perplexity and recency against ratio (.png, .svg, .pdf).")
@with_options(*COMMON)
def explain(json: Path | None, plot: Path | None, quiet: bool, keep_ratio: str, **given: Any) -> None:
    """Why did perplexity move? One thing about the run is changed at a time, and the run evaluated again."""
    from knorm.explain import curves_around, explain
    from knorm.report import plot_curves, show_explanation

    if given["newest"] < 1 or given["worst"] < 1:
        raise ValueError(f"--newest {given['newest']} and --worst {given['worst']}, but should be at least 1")
    console, setting = make_console(quiet), _setting(given, (keep_ratio,), plot, json)
    on, policy = (setting.model, setting.windows), setting.policies[0]
    again = {"prompt_length": setting.prompt_length, "batch": given["batch"]}
    with progress_bar(quiet) as progress:
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
    write_json(json, {**setting.fields, "keep_ratio": str(policy.keep_ratio), **asdict(found)})
    sys.exit(HOLDS)


cli.add_command(bench)
cli.add_command(golden)


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
