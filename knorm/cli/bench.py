"""`knorm bench`: latency that can be trusted, of policies or of commits."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from knorm.cli.options import (
    COMMON,
    HOLDS,
    MODEL,
    REFUTED,
    SCORING,
    Numbers,
    check_device,
    file_option,
    make_console,
    progress_bar,
    with_options,
    write_json,
)

_prompt_options = (
    click.option(
        "--text", default="encyclopedia,narrative", show_default=True, help="Texts of the prompts, which take turns."
    ),
    click.option(
        "--prompt-characters", type=Numbers(int), default="512,1024", show_default=True, help="A prompt each."
    ),
    click.option("--prompt-tokens", type=Numbers(int), help="The same in tokens, instead."),
    click.option("--new-tokens", type=Numbers(int), default="50,100", show_default=True, help="Of each prompt."),
    click.option("--batch", default=1, show_default=True, help="Sequences at a time."),
)
_cache_options = (
    click.option("--keep-ratio", type=Numbers(str), default="0.5", show_default=True, help="A policy each."),
    click.option(
        "--prune-after", type=int, help="Tokens a cache must hold to be compressed.  [32 if streaming, else 0]"
    ),
    click.option("--skip-layers", type=Numbers(int), default="0", show_default=True, help="Layers never compressed."),
    click.option(
        "--protocol",
        type=click.Choice(["prefill", "streaming"]),
        default="streaming",
        show_default=True,
        help="Compress once, after the prompt, or after every token.",
    ),
)


@click.command()
@with_options(*_cache_options, *SCORING, *_prompt_options, *MODEL)
@click.option("--threads", default=1, show_default=True, help="Of PyTorch on the CPU; more wait for each other.")
@click.option(
    "--seconds", default=25.0, show_default=True, help="Of measuring; at least 8 blocks have to fit twice that."
)
@click.option("--blocks", type=int, help="Blocks instead of seconds; with --against in each round.  [8 at least; 2]")
@click.option("--margin", type=float, help="Slowdown in per cent that is no concern.  [5 on a CPU, 2.5 on CUDA]")
@click.option("--strict", is_flag=True, help="Exit code 1 for INCONCLUSIVE too.")
@click.option("--against", metavar="REF", help="Compare with another commit of this project, in fresh processes.")
@click.option("--rounds", default=8, show_default=True, help="With --against: fresh pairs of processes.")
@click.option("--allow-counters", is_flag=True, help="With --against: show counters, do not judge them.")
@click.option("--reported", is_flag=True, help="Show published TTFT, TPOT and tokens/s too, with a verdict per claim.")
@file_option("--plot", "Draw the slowdowns with their intervals (.png, .svg, .pdf).")
@with_options(*COMMON)
def bench(json: Path | None, plot: Path | None, quiet: bool, **given: Any) -> None:
    """Time to first token, time per token, throughput and memory of each policy, in turns with the uncompressed cache.

    PASS: the slowdown is shown to be below the margin. FAIL: it is slower, and the margin is not excluded; exit code 1.
    INCONCLUSIVE: the noise is too large to say; exit code 0, or 1 with --strict. Nothing is run again until it passes.
    """
    from knorm.bench.latency import check_alone, memory_in_one_line
    from knorm.statistics import LEAST, MARGIN, check_share

    if json and plot and json.resolve() == plot.resolve():
        raise ValueError(f"--json and --plot are both {json}, but should be two files")
    if plot:
        from knorm.cli.figures import check_plot

        check_plot(plot)
    device = check_device(given["device"])
    check_alone(device)
    margin = MARGIN["cpu" if device == "cpu" else "cuda"]
    if given["margin"] is not None:
        margin = check_share("--margin", given["margin"] / 100)
    blocks, against = given["blocks"], given["against"]
    if not against and blocks is not None and blocks < LEAST:
        raise ValueError(f"--blocks {blocks}, but should be at least {LEAST}: fewer cannot tell noise from change")
    if against and (given["rounds"] < LEAST or (blocks or 1) < 1):
        raise ValueError(
            f"--rounds {given['rounds']}, but should be at least {LEAST}, of at least 1 block: fewer cannot tell noise "
            "from change"
        )
    if not given["seconds"] > 0:
        raise ValueError(f"--seconds {given['seconds']:g}, but should be above 0")
    with memory_in_one_line(device):
        run = _against if against else _policies
        verdict = run(given, margin, make_console(quiet), progress_bar(quiet), json, plot)
    sys.exit(REFUTED if verdict == "FAIL" or (verdict == "INCONCLUSIVE" and given["strict"]) else HOLDS)


def _load(given: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    """Model, prompts by name, policies."""
    import torch

    from knorm.bench.latency import check_fits
    from knorm.bench.policies import make_prompts
    from knorm.models import hush, load_model
    from knorm.policy import Policy

    if not given["keep_ratio"]:
        raise ValueError("--keep-ratio is empty, but should be ratios in (0, 1], e.g. 0.9,0.5")
    prune_after = given["prune_after"]
    if prune_after is None:
        prune_after = 32 if given["protocol"] == "streaming" else 0
    options = {n: given[n] for n in ("skip_layers", "protect_first", "protect_recent", "score", "seed", "protocol")}
    policies = [Policy(ratio, prune_after, **options) for ratio in given["keep_ratio"]]
    if len({*policies}) < len(policies):
        raise ValueError(f"--keep-ratio {','.join(given['keep_ratio'])}: one stands there twice")
    if given["threads"] < 1:
        raise ValueError(f"--threads {given['threads']}, but should be at least 1")
    torch.set_num_threads(given["threads"])
    hush()
    model, tokenizer = load_model(given["model"], dtype=getattr(torch, given["dtype"]), device=given["device"])
    in_tokens = given["prompt_tokens"] is not None
    prompts = make_prompts(
        tokenizer,
        [name.strip() for name in given["text"].split(",") if name.strip()],
        given["prompt_tokens"] if in_tokens else given["prompt_characters"],
        given["new_tokens"],
        characters=not in_tokens,
        batch=given["batch"],
        device=given["device"],
    )
    check_fits(model, prompts)
    return model, prompts, policies


def _setting(given: dict[str, Any], margin: float, prompts: Any) -> dict[str, Any]:
    """What was run, as JSON has it."""
    import torch

    from knorm.statistics import ALPHA, POWER

    fields = {name: given[name] for name in ("model", "dtype", "device", "batch", "protocol")}
    shapes = [{"text": n, "tokens": p.ids.shape[1], "new_tokens": p.new_tokens} for n, p in prompts.items()]
    judged = {"margin": margin, "alpha": ALPHA, "power": POWER}
    return {**fields, "threads": torch.get_num_threads(), "prompts": shapes, **judged}


def _policies(given: dict[str, Any], margin: float, console: Any, bar: Any, json: Any, plot: Any) -> str:
    from knorm.bench.policies import as_fields, bench
    from knorm.cli.figures import plot_slowdowns
    from knorm.cli.tables import comparisons_table, show_verdict, times_table

    model, prompts, policies = _load(given)
    setting = _setting(given, margin, prompts)
    claims = _claims(policies, prompts) if given["reported"] else None
    with bar:
        task = bar.add_task("blocks", total=given["blocks"])
        found = bench(
            model, prompts, policies,
            margin=margin, blocks=given["blocks"], seconds=given["seconds"], on_block=lambda: bar.advance(task),
        )  # fmt: skip
    blocks = len(found.samples)
    threads = f", {given['threads']} threads" if given["threads"] > 1 else ""
    title = f"{given['model']}, {given['dtype']} on {given['device']}{threads}: " + "; ".join(
        f"{p['text']} ({p['tokens']} tokens) + {p['new_tokens']} new" for p in setting["prompts"]
    )
    console.print(title, soft_wrap=True, markup=False)
    console.print(times_table(found.rows), "")
    pairs = [(row.name, row.comparisons) for row in found.rows[1:]]
    seen = f"{blocks} blocks after {found.warm_up} generation for warm-up, {found.seconds:.0f} s"
    seen += f", {found.interrupted} steps interrupted"
    console.print(f"Slowdown against the uncompressed cache: {seen}", soft_wrap=True)
    console.print(comparisons_table(pairs))
    show_verdict(console, found.verdict, pairs, setting)
    judged = claims(found) if claims else []
    if claims:
        from knorm.evaluation.published.judge import claims_text

        console.print("\nWhat was published, beside what this machine and model show")
        console.print(claims_text(judged), soft_wrap=True, markup=False)
    if plot:
        plot_slowdowns(pairs, f"Slowdown against the uncompressed cache: {seen}", margin, plot)
    counted = {
        "blocks": blocks, "warm_up": found.warm_up, "seconds": found.seconds, "interrupted": found.interrupted
    }  # fmt: skip
    rows = [as_fields(row) for row in found.rows]
    reported = [
        {"claim": j.claim.id, "verdict": j.verdict, "reported": j.reported, "measured": j.measured, "why": j.why}
        for j in judged
    ]
    write_json(json, {**setting, **counted, "verdict": found.verdict, "rows": rows, "reported": reported})
    return found.verdict


def _claims(policies: list[Any], prompts: Any) -> Any:
    """A function from what is measured to judged claims. Raises ValueError where another protocol is run."""
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

    def judge(found: Any) -> Any:
        measured = time_quantities(found.samples, ratios, new)
        return judge_claims((claim for claim in report.claims if claim.quantity in measured), measured)

    return judge


def _against(given: dict[str, Any], margin: float, console: Any, bar: Any, json: Any, plot: Any) -> str:
    from knorm.bench.commits import against, changed_files, describe, find_checkout, resolve, worktree

    if given["reported"]:
        raise ValueError("--reported is about policies, --against about commits: drop one")
    root = find_checkout()
    commit, changed = resolve(root, given["against"]), changed_files(root)
    _, prompts, policies = _load(given | {"device": "cpu"})  # for its tokens: each process loads its own
    setting, setup = _setting(given, margin, prompts), _setup(given, prompts, policies)
    names = f"commit {commit[:12]}", describe(root, changed)
    rounds, blocks = given["rounds"], given["blocks"] or 2
    with worktree(root, commit) as old, bar:
        task = bar.add_task("blocks", total=rounds * blocks * len(policies))
        found = against(
            (old, root), names, setup, rounds=rounds, blocks=blocks, on_block=lambda: bar.advance(task)
        )  # fmt: skip
    title = f"Slowdown of {names[1]} against {given['against']} ({commit[:12]}): {rounds} rounds of "
    title += f"{blocks} block{'s' if blocks > 1 else ''}, {found.interrupted} steps interrupted"
    console.print(title, soft_wrap=True, markup=False)
    verdict, rows = _judge(found, policies, setting, console, plot, judged=not given["allow_counters"])
    counted = {"against": commit, "changed_files": changed, "rounds": rounds, "blocks": blocks}
    write_json(json, {**setting, **counted, "verdict": verdict, "rows": rows})
    return verdict


def _setup(given: dict[str, Any], prompts: Any, policies: list[Any]) -> Any:
    """What the processes of both commits are told: the same model and tokens."""
    import torch

    from knorm.bench.commits import Setup
    from knorm.bench.policies import policy_fields
    from knorm.paths import ASSETS

    folder = str(ASSETS) if given["model"] == "embedded" else given["model"]
    if Path(folder).is_dir():
        folder = str(Path(folder).resolve())
    told = tuple({"ids": prompt.ids.tolist(), "new_tokens": prompt.new_tokens} for prompt in prompts.values())
    fields = tuple(map(policy_fields, policies))
    return Setup(folder, given["dtype"], given["device"], torch.get_num_threads(), told, fields)


def _judge(
    found: Any, policies: list[Any], setting: dict[str, Any], console: Any, plot: Any, *, judged: bool
) -> tuple[str, list[dict[str, Any]]]:
    """Print what came of two commits; the verdict, and a row per policy as JSON has it."""
    from knorm.bench.counters import risen
    from knorm.bench.policies import GATED, policy_fields
    from knorm.cli.figures import plot_slowdowns
    from knorm.cli.tables import comparisons_table, show_counters, show_verdict
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
        counters = {"old": asdict(found.old[index]), "new": asdict(found.new[index]), "risen": rises[index]}
        row: dict[str, Any] = {"policy": policy_fields(policies[index]), **{m: asdict(c) for m, c in compared.items()}}
        row |= {"verdict": verdicts[index], "mde": {m: c.mde for m, c in compared.items()}}
        rows.append(row | {"counters": counters, "log_ratios": found.logs[index]})
    return verdict, rows
