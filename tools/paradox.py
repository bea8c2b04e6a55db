"""The seed document's claims, one by one, on the embedded model: python tools/paradox.py [FOLDER]

Writes paradox.md, paradox-curve.png and paradox-recall.png into FOLDER (docs). Offline; minutes on 2 CPU cores.

The document reports perplexities of pythia-70m-deduped under l2compress' streaming protocol: after every token each
layer but the first, once it holds 32 tokens, keeps ceil(keep_ratio x length) of the lowest key norm.
"""

from __future__ import annotations

import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from knorm import KnormCache, Policy, exact_nll, load_embedded, retained_count
from knorm.cli.figures import plot_curves, plot_recall
from knorm.evaluation.curve import Row, measure_row
from knorm.evaluation.facts import Recall, fact_windows, recall
from knorm.evaluation.interventions import newest_to_protect
from knorm.evaluation.runner import Runner
from knorm.evaluation.windows import Windows, cut_windows
from knorm.laws.subjects import CompressingCache, Kept
from knorm.model_attention import cache_keyword
from knorm.models import hush, load_text
from knorm.perplexity import exact_run
from knorm.rounding import attend_shuffled
from knorm.schedule import cache_lengths, evicted_at

RATIOS = ("1.0", "0.95", "0.9", "0.85", "0.8", "0.75", "0.7", "0.6", "0.5", "0.4", "0.3")  # the companion table's
FACT_RATIOS = ("1.0", "0.95", "0.9", "0.7", "0.5", "0.3")
SEED = Policy("0.9", 32, (0,), protocol="streaming")


def curves(model: PreTrainedModel, windows: Windows) -> dict[str, list[Row]]:
    """Perplexity at each ratio, by what is kept."""
    policies = [replace(SEED, keep_ratio=ratio) for ratio in RATIOS]
    protected = [replace(p, protect_recent=newest_to_protect(p, 1, 16)) for p in policies]
    kinds = {
        "lowest norms kept": policies,
        "random kept": [replace(p, score="random") for p in policies],
        "highest norms kept": [replace(p, score="high_norm") for p in policies],
        "lowest norms, newest half of the budget protected": protected,
    }
    runner = Runner(model, windows)
    return {name: [measure_row(runner, policy) for policy in chosen] for name, chosen in kinds.items()}


def order(model: PreTrainedModel, ids: Tensor) -> float:
    """Largest difference of any token's NLL between ordered and shuffled slots, at every ratio below 1."""
    largest = 0.0
    for ratio in RATIOS[1:]:
        policy = replace(SEED, keep_ratio=ratio)
        shuffled = exact_run(model, ids, policy, attend=attend_shuffled).nll
        largest = max(largest, float((shuffled - exact_nll(model, ids, policy)).abs().max()))
    return largest


def document_way(in_time_order: bool) -> Callable[..., Kept]:
    """The document's two versions, before and after its fix: argsort and slice, and the indices sorted again."""

    def compress_layer(keys: Tensor, values: Tensor, keep_ratio: float, layer: int | None = None) -> Kept:
        if layer == 0:
            return Kept(keys, values)
        index = keys.norm(dim=-1).argsort(dim=-1)[..., : retained_count(keys.shape[2], keep_ratio)]
        index = (index.sort(dim=-1).values if in_time_order else index)[..., None]
        return Kept(*(x.gather(2, index.expand(*index.shape[:3], x.shape[3])) for x in (keys, values)))

    return compress_layer


@torch.no_grad()
def loop(model: PreTrainedModel, ids: Tensor, in_time_order: bool) -> Tensor:
    """Token NLLs of the document's own loop at ratio 0.8, where it reports 143.90 before the fix and 135.16 after."""
    cache = CompressingCache(document_way(in_time_order), 0.8, streaming_from=32)
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    logits = [
        model(ids[:, t : t + 1], position_ids=positions[:, t : t + 1], **{cache_keyword(model): cache}).logits
        for t in range(ids.shape[1])
    ]
    return functional.cross_entropy(torch.cat(logits, 1)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def collapse(model: PreTrainedModel, ids: Tensor) -> tuple[float, float]:
    """Mean NLL with no layer skipped, by right positions and by those of the stored length."""
    policy = replace(SEED, skip_layers=())
    stored = cache_lengths(evicted_at(torch.zeros(ids.shape[1]), policy)) - 1
    wrong = exact_nll(model, ids, policy, position_ids=stored.expand(ids.shape))
    return float(exact_nll(model, ids, policy).double().mean()), float(wrong.double().mean())


@torch.no_grad()
def first_token_and_total(model: PreTrainedModel, prompt: Tensor, policy: Policy, new: int = 50) -> tuple[float, float]:
    """Seconds to the first token, and of the whole generation."""
    cache, begin = KnormCache(policy), time.perf_counter()
    keyword = cache_keyword(model)
    token = model(prompt, use_cache=True, **{keyword: cache}).logits[:, -1:].argmax(-1)
    first = time.perf_counter() - begin
    for _ in range(new - 1):
        token = model(token, use_cache=True, **{keyword: cache}).logits[:, -1:].argmax(-1)
    return first, time.perf_counter() - begin


def first_tokens(model: PreTrainedModel, prompt: Tensor, repeats: int = 7) -> dict[str, float]:
    """Medians: TTFT of both, measured in turn, and what the document calls the baseline's, a tenth of the total."""
    full, compressed = [], []
    for i in range(repeats + 1):
        pairs = [(Policy(), full), (replace(SEED), compressed)]
        for policy, times in pairs if i % 2 else pairs[::-1]:
            times.append(first_token_and_total(model, prompt, policy))
    one, two = (list(zip(*times[1:], strict=True)) for times in (full, compressed))  # the first is warm-up
    ratio = statistics.median(b / a for a, b in zip(one[0], two[0], strict=True))
    return {
        "full": statistics.median(one[0]),
        "compressed": statistics.median(two[0]),
        "ratio": ratio,
        "estimated": 0.1 * statistics.median(one[1]),
    }


def facts(model: PreTrainedModel, tokenizer: object) -> dict[str, list[tuple[str, Recall]]]:
    """Recall of the narrative's facts against ratio: compressed once, and after every token."""
    windows = fact_windows(tokenizer)  # type: ignore[arg-type]
    length = windows.input_ids.shape[1]
    found: dict[str, list[tuple[str, Recall]]] = {
        "compressed once, after 480 tokens": [],
        "after every token, prune_after 128": [],
        "the same, newest 16 protected": [],
    }
    full = recall(model, windows, Policy())
    for ratio in FACT_RATIOS:
        once = Policy(ratio, skip_layers=(0,))
        each = Policy(ratio, 128, (0,), protocol="streaming")
        safe = replace(each, protect_recent=newest_to_protect(each, 1, 16))
        for name, policy, prompt in zip(found, (once, each, safe), (length - 32, 1, 1), strict=True):
            result = full if ratio == "1.0" else recall(model, windows, policy, prompt_length=prompt)
            found[name].append((ratio, result))
    unnamed = recall(model, fact_windows(tokenizer, named=False), Policy())  # type: ignore[arg-type]
    found["never named (full cache)"] = [("1.0", unnamed)]
    return found


def curve_table(found: dict[str, list[Row]]) -> list[str]:
    lines = ["| keep_ratio | " + " | ".join(RATIOS) + " |", "| --- " * (len(RATIOS) + 1) + "|"]
    for name, rows in found.items():
        lines.append(f"| PPL, {name} | " + " | ".join(f"{row.ppl:.1f}" for row in rows) + " |")
    lowest = found["lowest norms kept"]
    lines.append("| mean cache length | " + " | ".join(f"{row.mean_cache:.0f}" for row in lowest) + " |")
    return [*lines, "| of the newest 16, cached | " + " | ".join(f"{row.recent or 0:.1f}" for row in lowest) + " |"]


def recall_table(found: dict[str, list[tuple[str, Recall]]]) -> list[str]:
    lines = ["| policy | keep_ratio | names: perplexity | names: accuracy | all other tokens: perplexity |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, results in found.items():
        for ratio, r in results:
            lines.append(f"| {name} | {ratio} | {r.ppl:.1f} | {r.accuracy:.0%} | {r.others:.2f} |")
    return lines


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def untouched(model: PreTrainedModel, ids: Tensor) -> float:
    """Largest difference from the full cache at any ratio, with prune_after 512 on 512 tokens."""
    full = exact_nll(model, ids, Policy())
    policies = [Policy(ratio, 512, (0,), protocol="streaming") for ratio in RATIOS]
    return max(largest(exact_nll(model, ids, policy), full) for policy in policies)


def claims(model: PreTrainedModel, tokenizer: object, text: str, found: dict[str, list[Row]]) -> list[tuple[str, ...]]:
    """Claim, what was done, number, verdict."""
    ids = cut_windows(tokenizer, text, 256, 16).input_ids  # type: ignore[arg-type]
    few, long = ids[:4], cut_windows(tokenizer, text, 512, 4).input_ids  # type: ignore[arg-type]
    first = first_tokens(model, tokenizer(text[:512], return_tensors="pt").input_ids)  # type: ignore[operator]
    right, wrong = collapse(model, ids)
    lowest, safe = found["lowest norms kept"], found["lowest norms, newest half of the budget protected"]
    ppl = {row.keep_ratio: f"{row.ppl:.1f} at {row.keep_ratio}" for row in lowest}
    kept = {row.keep_ratio: f"{row.ppl:.1f} at {row.keep_ratio}" for row in safe}
    peak = max(lowest[1:], key=lambda row: row.ppl)
    rises = all(b.ppl >= a.ppl * 0.99 for a, b in pairwise(safe))
    return [
        (
            "Perplexity falls as less is kept",
            "its protocol (every layer but the first, after every token, from 32 tokens on), 16 windows of 256 tokens",
            ", ".join((ppl["1.0"], ppl[peak.keep_ratio], ppl["0.5"], ppl["0.3"])),
            "**holds**: the same U-shape",
        ),
        (
            "because the cache is out of order",
            "slots shuffled in every layer, ten ratios, 4 windows",
            f"largest change of any token's NLL {order(model, few):.0e}",
            "**refuted**: attention does not see slot order",
        ),
        (
            "and the fix brings it down (143.90 to 135.16 at 0.8)",
            "the document's two versions, each by its own loop, the same 4 windows",
            f"largest difference {largest(loop(model, few, False), loop(model, few, True)):.0e}",
            "**refuted**: it cannot be the order; other samples, presumably",
        ),
        (
            "it is a paradox",
            "the newest half of the budget protected",
            f"{kept['1.0']}, {kept['0.9']}, {kept['0.5']}, {kept['0.3']}; without, {peak.recent:.1f} of the newest 16 "
            f"tokens were cached at {peak.keep_ratio}, {lowest[-1].recent:.1f} at {lowest[-1].keep_ratio}",
            "**explained**: the newest tokens were starved, the more the higher the ratio; protected, the curve "
            + ("rises as less is kept" if rises else "no longer falls by half"),
        ),
        (
            "prune_after 512 on 512 tokens costs nothing",
            "eleven ratios, 4 windows",
            f"largest change {untouched(model, long):.0e}",
            "**holds, and says nothing**: no token was ever evicted",
        ),
        (
            "positions are right",
            "no layer skipped, positions from the stored length",
            f"{wrong - right:+.3f} nats a token (perplexity {math.exp(right):.1f} to {math.exp(wrong):.1f})",
            "**only because layer 0 is skipped**: otherwise every later token gets a wrong position",
        ),
        (
            "TTFT improves by 90%",
            "a prompt of 512 characters, 50 new tokens, both in turn, median of 7",
            f"{first['full'] * 1e3:.1f} ms and {first['compressed'] * 1e3:.1f} ms, ratio {first['ratio']:.2f}; a tenth "
            f"of the total, the document's baseline, is {first['estimated'] * 1e3:.1f} ms",
            "**refuted**: the baseline was never measured",
        ),
    ]


INTRODUCTION = """# The paradox, reproduced

A public project saw perplexity *fall* while more of the cache was thrown away (165.81 at keep_ratio 0.9, 146.27 at
0.1), blamed the order of the cache, changed it, and reported the fall as repaired. This page takes its claims one by
one on the model in the box.
"""
RECALL = """## What the mean hides

The narrative names 33 things early and needs them late. Each window holds the passage that names one (80 tokens), then
the text that needs it (432 tokens). The names' own tokens, and all others:
"""


def main() -> None:
    folder, begin = Path(sys.argv[1] if len(sys.argv) > 1 else "docs"), time.perf_counter()
    hush()
    model, tokenizer = load_embedded()
    text = load_text("narrative")
    found = curves(model, cut_windows(tokenizer, text, 256, 16))
    judged, recalled = claims(model, tokenizer, text, found), facts(model, tokenizer)
    title = "Embedded model, narrative: 16 windows of 256 tokens, streaming, prune_after 32, layer 0 skipped"
    plot_curves(found, title, folder / "paradox-curve.png")
    plot_recall(recalled, "What the story names early and needs late", folder / "paradox-recall.png")
    lines = [
        INTRODUCTION,
        f"`python tools/paradox.py` wrote it and its figures, offline, in {time.perf_counter() - begin:.0f} s on "
        f"{torch.get_num_threads()} CPU threads ({platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}).",
        "",
        "| claim | what was done | number | verdict |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(claim)} |" for claim in judged),
        "",
        *curve_table(found),
        "",
        "![perplexity and recency against keep_ratio](paradox-curve.png)",
        "",
        RECALL,
        *recall_table(recalled),
        "",
        "![names and other tokens against keep_ratio](paradox-recall.png)",
        "",
        "Compressed once, the other tokens hardly notice; the name is gone.",
    ]
    (folder / "paradox.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
