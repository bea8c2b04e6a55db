"""The main job: is knorm itself right, here, on a real model and real text? Did anything move? A verdict a line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from knorm.core import compress
from knorm.evaluation.curve import Row, measure_row
from knorm.evaluation.doubts import Suspicion, judge_measured, nll_without_cache
from knorm.evaluation.runner import Runner
from knorm.evaluation.windows import cut_windows
from knorm.golden.cases import CASES
from knorm.golden.store import Store
from knorm.golden.verify import verify_goldens
from knorm.laws import KNORM, Subject, iter_results
from knorm.models import EMBEDDED_TEXTS, load_embedded, load_text
from knorm.perplexity import agreement, exact_nll, exact_run
from knorm.policy import Policy
from knorm.rounding import ROUNDING, attend_shuffled

CURVE = ("1.0", "0.95", "0.9", "0.8", "0.7", "0.5", "0.3", "0.1")


@dataclass(frozen=True)
class Verdict:
    """One line of the main job: a claim, whether it holds, and the evidence; compared=False: there was no golden."""

    claim: str
    holds: bool
    evidence: str
    seconds: float
    rows: tuple[Row, ...] = ()
    doubts: tuple[Suspicion, ...] = ()
    compared: bool = True


def verify(*, windows: int = 8, length: int = 512, prune_after: int = 128) -> Iterator[Verdict]:
    """The core's laws; full ratio against the plain model; one pass against the loop; perplexity curves; the goldens.

    Works offline, on the embedded model and texts. Raises ValueError where they are damaged.
    """
    for result in iter_results(Subject("knorm.compress", KNORM, compress)):
        if result.verdict != "does not apply":
            evidence = result.counterexample or f"not refuted by {result.examples} cases"
            yield Verdict(result.law, result.verdict == "holds", evidence, result.seconds)

    model, tokenizer = load_embedded()
    ids = cut_windows(tokenizer, load_text("narrative"), 256, 2).input_ids
    begin = time.perf_counter()
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    plain = -logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    difference = float((exact_nll(model, ids, Policy()) - plain).abs().max())
    yield Verdict(
        "Ratio 1 equals the uncompressed model.",
        difference <= 1e-5,
        f"largest difference of a token's NLL {difference:.1e}",
        time.perf_counter() - begin,
    )

    streaming = Policy(0.7, prune_after=32, skip_layers=(0,), protocol="streaming")
    begin = time.perf_counter()
    ordered = exact_run(model, ids, streaming)
    lost = ordered.evicted_at  # in both: a near-tie that falls differently is no effect of order
    shuffled = exact_run(model, ids, streaming, schedule=lambda layer, _: lost[layer], attend=attend_shuffled)
    difference = float((shuffled.nll - ordered.nll).abs().max())
    yield Verdict(
        "Shuffled slots equal ordered slots: attention does not see the order of a cache.",
        difference <= ROUNDING,
        f"largest difference of a token's NLL {difference:.1e}",
        time.perf_counter() - begin,
    )
    protected = Policy(0.5, prune_after=48, protect_first=2, protect_recent=16, protocol="streaming")
    for policy, prompt in ((streaming, 1), (protected, 64), (Policy(0.3, protect_recent=8), 128)):
        begin = time.perf_counter()
        both = agreement(model, ids, policy, prompt_length=prompt)
        yield Verdict(
            f"One pass equals the loop, {policy.protocol}, ratio {policy.keep_ratio}, prompt of {prompt}.",
            both.holds,
            f"largest difference {both.difference:.1e}; {both.evictions} evictions differ, norms within {both.gap:.1e}"
            f"; {both.stream.seconds / both.exact.seconds:.0f}x the loop's speed",
            time.perf_counter() - begin,
        )

    for name in EMBEDDED_TEXTS:
        begin = time.perf_counter()
        runner = Runner(model, cut_windows(tokenizer, load_text(name), length, windows))
        policies = [Policy(ratio, prune_after, protocol="streaming", skip_layers=(0,)) for ratio in CURVE]
        rows = tuple(measure_row(runner, policy) for policy in policies)
        doubts = tuple(judge_measured(runner, rows, policies, nll_empty=nll_without_cache(runner)))
        same = len({row.tokens for row in rows}) == 1
        yield Verdict(
            f"The same tokens of the {name} are scored at every ratio, at a finite perplexity.",
            same and all(row.ppl < float("inf") for row in rows),
            f"{rows[0].tokens} tokens at each of {len(rows)} ratios",
            time.perf_counter() - begin,
            rows,
            doubts,
        )

    for outcome in verify_goldens(Store()):
        claim = (
            f"Nothing moved in {outcome.case}: {CASES[outcome.case].what}." if outcome.case in CASES else outcome.case
        )
        yield Verdict(claim, not outcome.failed, outcome.evidence, outcome.seconds, compared=outcome.compared)
