"""`knorm bench`: latency that can be trusted, of policies or of commits."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from knorm.cli.compared import Asked, explicit, fitting_model, methods_of
from knorm.cli.numbers import Numbers
from knorm.cli.options import (
    COMMON,
    HOLDS,
    REFUTED,
    TIMED,
    ModelOptions,
    PolicyOptions,
    check_outputs,
    kind_option,
    make_console,
    model_options,
    policy_options,
    progress_bar,
    waiting,
    with_options,
)
from knorm.cli.outputs import file_option, write_json
from knorm.cli.prompts import PromptOptions, TimingOptions, prompt_options, timing_options
from knorm.policy import Policy

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from knorm.bench.commits import Found, Setup
    from knorm.bench.latency import Prompt
    from knorm.bench.policies import Bench
    from knorm.evaluation.published.judge import Judged


@dataclass(frozen=True)
class _Asked:
    """Hold all that a run is asked for; `margin` is a share, given or the device's."""

    policies: PolicyOptions
    prompts: PromptOptions
    model: ModelOptions
    timing: TimingOptions
    margin: float
    json: Path | None
    plot: Path | None
    quiet: bool


@dataclass(frozen=True)
class Targets:
    """Hold what the command line says about methods, and which of its options it gives."""

    asked: Asked
    given: frozenset[str]


@click.command()
@click.argument("targets", nargs=-1, metavar="[TARGET]...")
@policy_options(TIMED, "Ratios in (0, 1], a policy for each; of a TARGET 0.5, unless it has its own.")
@click.option(
    "--keep-tokens", type=Numbers(1), help="Budgets in tokens, each at least 1, for a TARGET that takes them."
)
@kind_option
@prompt_options
@model_options
@timing_options
@file_option("--plot", "Draw the slowdowns with their intervals (.png, .svg, .pdf).")
@with_options(*COMMON)
@click.pass_context
def bench(
    context: click.Context,
    /,
    targets: tuple[str, ...],
    keep_tokens: tuple[int, ...] | None,
    kind: str | None,
    policy_options: PolicyOptions,
    prompt_options: PromptOptions,
    model_options: ModelOptions,
    timing_options: TimingOptions,
    plot: Path | None,
    json: Path | None,
    quiet: bool,
) -> None:
    """How fast is generation, and how much memory does it take?

    Time to first token, time per token, throughput and memory of each policy, in turns with the uncompressed cache.

    PASS: the slowdown is shown to be below the margin. FAIL: it is slower, and the margin is not excluded; exit code 1.
    INCONCLUSIVE: the noise is too large to say; exit code 0, or 1 with --strict. Nothing is run again until it passes.

    With targets, written as for knorm ppl: each method opened for whole generations, in turns with the same.
    """
    given = explicit(context)
    methods = None
    if targets:
        if timing_options.against or timing_options.reported:
            raise ValueError("--against and --reported are about knorm's own policies: drop the TARGET, or them")
        ratios = tuple(policy_options.keep_ratio) if "keep_ratio" in given else None
        methods = Targets(Asked(targets, ratios, keep_tokens, kind, "auto", False), given)
    elif keep_tokens or kind:
        raise ValueError("--keep-tokens and --as are about a TARGET: give one, as knorm")
    check_outputs(json, plot)
    model_options.check()

    from knorm.bench.latency import check_alone, memory_in_one_line

    device = model_options.device
    check_alone(device)
    margin = _check_timing(timing_options, device)
    asked = _Asked(policy_options, prompt_options, model_options, timing_options, margin, json, plot, quiet)
    with memory_in_one_line(device):
        verdict = _against(asked, timing_options.against) if timing_options.against else _timed(asked, methods)
    failed = verdict == "FAIL" or (verdict == "INCONCLUSIVE" and timing_options.strict)
    sys.exit(REFUTED if failed else HOLDS)


def _check_timing(timing: TimingOptions, device: str) -> float:
    """Return the margin as a share. Raises ValueError for options that could tell nothing."""
    from knorm.limits import BLOCKS
    from knorm.statistics import MARGIN, check_share

    margin = MARGIN["cpu" if device == "cpu" else "cuda"]
    if timing.margin is not None:
        margin = check_share("--margin", timing.margin / 100)
    if not timing.against and timing.blocks is not None and timing.blocks < BLOCKS:
        raise ValueError(
            f"--blocks {timing.blocks}, but should be at least {BLOCKS}: fewer cannot tell noise from change"
        )
    return margin


def _load(asked: _Asked) -> tuple[PreTrainedModel, Any, dict[str, Prompt], list[Policy]]:
    """Load the model, its tokenizer, prompts by name, and policies."""
    given = asked.prompts
    policies = asked.policies.policies()
    if len({*policies}) < len(policies):
        raise ValueError(f"--keep-ratio {','.join(asked.policies.keep_ratio)}: one stands there twice")
    with waiting():
        import torch

        from knorm.bench.latency import check_fits
        from knorm.bench.policies import make_prompts

        torch.set_num_threads(asked.timing.threads)
        model, tokenizer = asked.model.load()
    in_tokens = given.prompt_tokens is not None
    prompts = make_prompts(
        tokenizer,
        [name.strip() for name in given.text.split(",") if name.strip()],
        given.prompt_characters if given.prompt_tokens is None else given.prompt_tokens,
        given.new_tokens,
        characters=not in_tokens,
        batch=given.batch,
        device=asked.model.device,
    )
    check_fits(model, prompts)
    return model, tokenizer, prompts, policies


def _setting(asked: _Asked, policies: list[Policy], prompts: Mapping[str, Prompt]) -> dict[str, Any]:
    """Say what was run, as JSON has it."""
    import torch

    from knorm.statistics import ALPHA, POWER

    shapes = [{"text": n, "tokens": p.ids.shape[1], "new_tokens": p.new_tokens} for n, p in prompts.items()]
    run = {"batch": asked.prompts.batch, "protocol": policies[0].protocol}
    judged = {"margin": asked.margin, "alpha": ALPHA, "power": POWER}
    return {**asdict(asked.model), **run, "threads": torch.get_num_threads(), "prompts": shapes, **judged}


def _timed(asked: _Asked, targets: Targets | None) -> str:
    """Time policies, or the methods that targets name, and print and write what came of it; the verdict."""
    from knorm.bench.methods import bench_methods
    from knorm.bench.policies import bench

    timing = asked.timing
    methods = methods_of(targets.asked, asked.policies) if targets else []
    if targets:
        asked = replace(asked, model=fitting_model(methods, asked.model, targets.given, make_console(asked.quiet)))
    model, tokenizer, prompts, policies = _load(asked)
    setting = _setting(asked, policies, prompts)
    claims = _claims(policies, prompts) if timing.reported else None
    with progress_bar(asked.quiet) as bar:
        task = bar.add_task("blocks", total=timing.blocks)
        options: dict[str, Any] = {"margin": asked.margin, "blocks": timing.blocks, "seconds": timing.seconds}
        options["on_block"] = lambda: bar.advance(task)
        if targets:
            measured = bench_methods(model, prompts, methods, tokenizer, **options)
        else:
            measured = bench(model, prompts, policies, **options)
    return _show(asked, measured, setting, claims)


def _show(
    asked: _Asked, measured: Bench, setting: dict[str, Any], claims: Callable[[Bench], list[Judged]] | None
) -> str:
    """Print and write what was timed; the verdict."""
    from knorm.bench.policies import advice, as_fields
    from knorm.cli.figures import plot_slowdowns
    from knorm.cli.tables import print_wrapped
    from knorm.cli.timings import comparisons_table, counters_table, show_verdict, times_table

    console, timing = make_console(asked.quiet), asked.timing
    blocks = len(measured.samples)
    threads = f", {timing.threads} threads" if timing.threads > 1 else ""
    title = f"{asked.model.model}, {asked.model.dtype} on {asked.model.device}{threads}: " + "; ".join(
        f"{p['text']} ({p['tokens']} tokens) + {p['new_tokens']} new" for p in setting["prompts"]
    )
    console.print(title, soft_wrap=True, markup=False)
    console.print(times_table(measured.rows), "", counters_table(measured.rows), "", sep="\n")
    pairs = [(row.name, row.comparisons) for row in measured.rows[1:]]
    seen = f"{blocks} blocks after {measured.warm_up} generation for warm-up, {measured.seconds:.0f} s"
    seen += f", {measured.interrupted} steps interrupted"
    console.print(f"Slowdown against the uncompressed cache: {seen}", soft_wrap=True)
    console.print(comparisons_table(pairs))
    show_verdict(console, measured.verdict, pairs, setting)
    lines = advice(measured)
    for line in lines:
        print_wrapped(console, line)
    judged = claims(measured) if claims else []
    if claims:
        from knorm.evaluation.published.judge import claims_text

        console.print("\nWhat was published, beside what this machine and model show")
        console.print(claims_text(judged), soft_wrap=True, markup=False)
    if asked.plot:
        plot_slowdowns(pairs, f"Slowdown against the uncompressed cache: {seen}", asked.margin, asked.plot)
    counted = {
        "blocks": blocks, "warm_up": measured.warm_up, "seconds": measured.seconds, "interrupted": measured.interrupted
    }  # fmt: skip
    rows = [as_fields(row) for row in measured.rows]
    reported = [
        {"claim": j.claim.id, "verdict": j.verdict, "published": j.reported, "measured_here": j.measured, "why": j.why}
        for j in judged
    ]
    fields = {**counted, "verdict": measured.verdict, "advice": lines, "rows": rows, "claims": reported}
    write_json(asked.json, {**setting, **fields})
    return measured.verdict


def _claims(policies: list[Policy], prompts: Mapping[str, Prompt]) -> Callable[[Bench], list[Judged]]:
    """Make a function from what is measured to judged claims. Raises ValueError where another protocol is run."""
    from knorm.evaluation.published.judge import judge_claims
    from knorm.evaluation.published.measure import time_quantities
    from knorm.evaluation.published.schema import bug_report

    report = bug_report()
    for policy in policies:
        if policy != report.protocol.policy(str(policy.keep_ratio)):
            raise ValueError(
                f"--reported is about streaming with --prune-after {report.protocol.prune_after} --skip-layers "
                f"{','.join(map(str, report.protocol.skip_layers))}: drop what differs, or drop --reported"
            )
    ratios = ["1.0", *(str(policy.keep_ratio) for policy in policies)]
    new = [prompt.new_tokens for prompt in prompts.values()]

    def judge(found: Bench) -> list[Judged]:
        measured = time_quantities(found.samples, ratios, new)
        return judge_claims((claim for claim in report.claims if claim.quantity in measured), measured)

    return judge


def _against(asked: _Asked, reference: str) -> str:
    """Time another commit beside this tree, and print and write what came of it; the verdict."""
    from knorm.bench.commits import against, changed_files, describe, find_checkout, resolve, worktree

    console, timing = make_console(asked.quiet), asked.timing
    if timing.reported:
        raise ValueError("--reported is about policies, --against about commits: drop one")
    root = find_checkout()
    commit, changed = resolve(root, reference), changed_files(root)
    on_cpu = replace(asked, model=replace(asked.model, device="cpu"))
    _, _, prompts, policies = _load(on_cpu)  # for its tokens: each process loads its own
    setting = _setting(asked, policies, prompts)
    names = f"commit {commit[:12]}", describe(root, changed)
    rounds, blocks = timing.rounds, timing.blocks or 2
    with worktree(root, commit) as old, _folder(asked.model.model) as folder, progress_bar(asked.quiet) as bar:
        setup = _setup(folder, asked, prompts, policies)
        task = bar.add_task("blocks", total=rounds * blocks * len(policies))
        outcome = against(
            (old, root), names, setup, rounds=rounds, blocks=blocks, on_block=lambda: bar.advance(task)
        )  # fmt: skip
    title = f"Slowdown of {names[1]} against {reference} ({commit[:12]}): {rounds} rounds of "
    title += f"{blocks} block{'s' if blocks > 1 else ''}, {outcome.interrupted} steps interrupted"
    console.print(title, soft_wrap=True, markup=False)
    verdict, rows = _judge(outcome, policies, setting, console, asked.plot, judged=not timing.allow_counters)
    counted = {"against": commit, "changed_files": changed, "rounds": rounds, "blocks": blocks}
    write_json(asked.json, {**setting, **counted, "verdict": verdict, "rows": rows}, "against")
    return verdict


@contextmanager
def _folder(model: str) -> Iterator[str]:
    """Say a model as an older commit takes it, which has other models in its box, if any."""
    from knorm.models import embedded_folder
    from knorm.sources import EMBEDDED_MODELS, SMOLLM2

    if model in EMBEDDED_MODELS:
        with embedded_folder(model) as folder:
            yield str(folder.resolve())
    else:
        yield str(Path(model).resolve()) if model != SMOLLM2 and os.path.exists(model) else model


def _setup(folder: str, asked: _Asked, prompts: Mapping[str, Prompt], policies: list[Policy]) -> Setup:
    """Say what the processes of both commits work on: the same model and tokens."""
    import torch

    from knorm.bench.commits import Setup

    tokens = tuple({"ids": prompt.ids.tolist(), "new_tokens": prompt.new_tokens} for prompt in prompts.values())
    fields = tuple(policy.as_json() for policy in policies)  # read by a commit's own Policy(**fields)
    return Setup(folder, asked.model.dtype, asked.model.device, torch.get_num_threads(), tokens, fields)


def _judge(
    found: Found, policies: list[Policy], setting: dict[str, Any], console: Console, plot: Path | None, *, judged: bool
) -> tuple[str, list[dict[str, Any]]]:
    """Print what came of two commits; return the verdict, and a row per policy as JSON has it."""
    from knorm.bench.counters import risen
    from knorm.bench.policies import GATED
    from knorm.cli.figures import plot_slowdowns
    from knorm.cli.timings import comparisons_table, show_counters, show_verdict
    from knorm.statistics import ALPHA, compare, overall

    margin, each = setting["margin"], ALPHA / (len(GATED) * len(policies))
    pairs = [
        (str(policy.keep_ratio), {m: compare(values, margin=margin, alpha=each) for m, values in logs.items()})
        for policy, logs in zip(policies, found.logs, strict=True)
    ]
    rises = [risen(new, old) for new, old in zip(found.new, found.old, strict=True)]
    verdicts = [overall(compared[metric].verdict for metric in GATED) for _, compared in pairs]
    verdict = "FAIL" if judged and any(rises) else overall(verdicts)
    console.print(comparisons_table(pairs))
    show_counters(console, policies, found, rises, judged)
    show_verdict(console, verdict, pairs, setting, "rounds")
    if plot:
        plot_slowdowns(pairs, "Slowdown against the other commit", margin, plot)
    rows = []
    for index, (_, compared) in enumerate(pairs):
        row = {"policy": policies[index].as_json(), "verdict": verdicts[index], "log_ratios": found.logs[index]}
        row |= {"comparisons": {metric: asdict(comparison) for metric, comparison in compared.items()}}
        counted = {"counters": asdict(found.new[index]), "counters_before": asdict(found.old[index])}
        rows.append({**row, **counted, "risen": rises[index]})
    return verdict, rows
