"""The main job: is knorm itself right, here, on a real model and real text? Did anything move? A verdict a line."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from knorm.core import compress
from knorm.evaluation.curve import Row, measure_row
from knorm.evaluation.doubts import Suspicion, judge_measured, nll_without_cache
from knorm.evaluation.runner import Runner
from knorm.evaluation.windows import Windows, cut_windows
from knorm.laws import KNORM, Refuted, Result, Subject, iter_results, own, own_cache, own_model
from knorm.laws.catalogue.perplexity import EQUAL
from knorm.laws.catalogue.selection import NEAR_TIE
from knorm.laws.subjects import in_words
from knorm.models import load_embedded, load_text
from knorm.perplexity import agreement, exact_nll, exact_run
from knorm.policy import Policy
from knorm.rounding import attend_shuffled
from knorm.sources import EMBEDDED_TEXTS

CURVE = ("1.0", "0.95", "0.9", "0.8", "0.7", "0.5", "0.3", "0.1")


@dataclass(frozen=True)
class Verdict:
    """Hold one line of the main job: a claim, whether it holds, the evidence.

    Attributes:
        claim: in words.
        holds: False refutes it.
        evidence: numbers in words.
        seconds: that it took.
        rows: the curve, where it is one.
        doubts: what makes no sense in that.
        compared: False where there was no golden to compare with.
    """

    claim: str
    holds: bool
    evidence: str
    seconds: float
    rows: tuple[Row, ...] = ()
    doubts: tuple[Suspicion, ...] = ()
    compared: bool = True


def judge(claim: str, measure: Callable[[], Verdict | str], *, one_thread: bool = False) -> Verdict:
    """Turn a measurement into a verdict: its evidence, or what refutes the claim.

    Whatever it raises refutes the claim too: knorm is what is measured here, and wrong usage is not among the causes.

    Args:
        claim: in words.
        measure: returns the evidence, or a verdict; raises Refuted with what refutes the claim.
        one_thread: where tensors are small, threads cost more than they save, and much more on a busy machine.

    Returns:
        The verdict, with the seconds that it took.
    """
    begin, threads = time.perf_counter(), torch.get_num_threads()
    if one_thread:
        torch.set_num_threads(1)
    try:
        verdict = measure()
    except Refuted as refuted:
        verdict = Verdict(claim, False, str(refuted), 0.0)
    except Exception as error:
        verdict = Verdict(claim, False, f"raised {in_words(error)}", 0.0)
    finally:
        torch.set_num_threads(threads)
    if isinstance(verdict, str):
        verdict = Verdict(claim, True, verdict, 0.0)
    return replace(verdict, seconds=time.perf_counter() - begin)


def judge_each(claim: str, verdicts: Iterator[Verdict]) -> Iterator[Verdict]:
    """Pass `verdicts` on; what the iterator raises refutes `claim`, and ends it."""
    begin = time.perf_counter()
    try:
        yield from verdicts
    except Exception as error:
        yield Verdict(claim, False, f"raised {in_words(error)}", time.perf_counter() - begin)


def verify(*, windows: int = 8, length: int = 512, prune_after: int = 128, goldens: bool = True) -> Iterator[Verdict]:
    """Check the laws of core and cache; one pass, the loop and generate() against an oracle; curves; the goldens.

    Works offline, on the embedded model and texts; whatever knorm raises on them is a verdict.

    Args:
        windows: of each text, for its perplexity curve.
        length: tokens of each window.
        prune_after: tokens that the cache holds when it is compressed for the curves.
        goldens: True to compare with the goldens too.

    Yields:
        A verdict for each claim.

    Raises:
        ValueError: the embedded model or a text is damaged.
    """
    model, tokenizer = load_embedded()
    texts = {name: load_text(name) for name in EMBEDDED_TEXTS}
    for check in OWN:
        yield judge(_first_line(check), check, one_thread=True)
    yield from judge_each(
        "Every law is asked of knorm.compress.", _laws(iter_results(Subject("knorm.compress", KNORM, compress)))
    )
    ids = cut_windows(tokenizer, texts["narrative"], 256, 2).input_ids
    double = copy.deepcopy(model).double()
    for measure, given in ((own.check_runs, ids[:, :32]), (own_cache.check_generation, ids.view(-1, 128)[:3, :24])):
        yield judge(_first_line(measure), partial(measure, double, given), one_thread=True)
    yield from judge_each("Every law is asked of knorm.KnormCache.", _laws(own_cache.cache_results(), "KnormCache: "))
    yield from _one_pass(model, ids)
    for name, text in texts.items():
        yield judge(
            f"The same tokens of the {name} are scored at every ratio, at a finite perplexity.",
            partial(_curve, model, cut_windows(tokenizer, text, length, windows), name, prune_after),
        )
    if goldens:
        yield from judge_each("Every golden can be compared.", _goldens())


OWN: tuple[Callable[[], str], ...] = (
    own.check_counts,
    own.check_refusals,
    own.check_selections,
    own.check_schedules,
    own.check_masked_attention,
    own.check_parting,
    own_model.check_contexts,
    own_model.check_run_refusals,
    own_cache.check_any_order,
    own_cache.check_cache_refusals,
)


def _first_line(check: Callable[..., str]) -> str:
    return (check.__doc__ or "").splitlines()[0]


def _laws(results: Iterator[Result], of: str = "") -> Iterator[Verdict]:
    for result in results:
        if result.verdict != "does not apply":
            evidence = result.counterexample or (
                f"not refuted by {result.examples} cases"
                if result.verdict == "holds"
                else f"none of {result.examples} cases could be answered"
            )
            yield Verdict(of + result.law, result.verdict == "holds", evidence, result.seconds)


def _one_pass(model: PreTrainedModel, ids: Tensor) -> Iterator[Verdict]:
    """The one pass beside the model, beside itself with its slots shuffled, and beside the loop."""
    streaming = Policy(0.7, prune_after=32, skip_layers=(0,), protocol="streaming")

    def plain() -> tuple[float, float]:
        with torch.no_grad():
            logits = model(ids).logits[:, :-1]
        nll = -logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return float((exact_nll(model, ids, Policy()) - nll).abs().max()), 1e-5

    def shuffled() -> tuple[float, float]:
        ordered = exact_run(model, ids, streaming)
        lost = ordered.evicted_at  # in both: a near-tie that falls differently is no effect of order
        second = exact_run(model, ids, streaming, schedule=lambda layer, _: lost[layer], attend=attend_shuffled)
        return float((second.nll - ordered.nll).abs().max()), EQUAL

    for claim, measure in (
        ("Ratio 1 equals the uncompressed model.", plain),
        ("Shuffled slots equal ordered slots: attention does not see the order of a cache.", shuffled),
    ):
        yield judge(claim, partial(_within, measure))
    protected = Policy(0.5, prune_after=48, protect_first=2, protect_recent=16, protocol="streaming")
    for policy, prompt in ((streaming, 1), (protected, 64), (Policy(0.3, protect_recent=8), 128)):
        claim = f"One pass equals the loop, {policy.protocol}, ratio {policy.keep_ratio}, prompt of {prompt}."
        yield judge(claim, partial(_agree, model, ids, policy, prompt, claim), one_thread=True)


def _within(measure: Callable[[], tuple[float, float]]) -> str:
    difference, most = measure()
    evidence = f"largest difference of a token's NLL {difference:.1e}"
    if not difference <= most:
        raise Refuted(evidence)
    return evidence


def _agree(model: PreTrainedModel, ids: Tensor, policy: Policy, prompt: int, claim: str) -> Verdict:
    both = agreement(model, ids, policy, prompt_length=prompt)
    own.recount(both)
    return Verdict(
        claim,
        both.difference <= EQUAL and both.gap <= NEAR_TIE,
        f"largest difference {both.difference:.1e}; {both.evictions} evictions differ, norms within {both.gap:.1e}"
        f"; {both.stream.seconds / both.exact.seconds:.0f}x the loop's speed",
        0.0,
    )


def _curve(model: PreTrainedModel, text: Windows, name: str, prune_after: int) -> Verdict:
    policies = [Policy(ratio, prune_after, protocol="streaming", skip_layers=(0,)) for ratio in CURVE]
    runner = Runner(model, text)
    rows = tuple(measure_row(runner, policy) for policy in policies)
    doubts = tuple(judge_measured(runner, rows, policies, nll_empty=nll_without_cache(runner)))
    return Verdict(
        f"The same tokens of the {name} are scored at every ratio, at a finite perplexity.",
        len({row.tokens for row in rows}) == 1 and all(row.ppl < float("inf") for row in rows),
        f"{rows[0].tokens} tokens at each of {len(rows)} ratios",
        0.0,
        rows,
        doubts,
    )


def _goldens() -> Iterator[Verdict]:
    from knorm.golden.cases import CASES  # makes its policies: a policy that raises is a verdict too
    from knorm.golden.store import Store
    from knorm.golden.verify import verify_goldens

    for outcome in verify_goldens(Store()):
        claim = (
            f"Nothing moved in {outcome.case}: {CASES[outcome.case].what}." if outcome.case in CASES else outcome.case
        )
        yield Verdict(claim, not outcome.failed, outcome.evidence, outcome.seconds, compared=outcome.compared)
