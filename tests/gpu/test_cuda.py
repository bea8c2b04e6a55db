from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutants import MUTANTS
from mutants.correct import CORRECT
from tiny import ARCHITECTURES, tiny, tokens

from knorm import Policy, compress, evicted_at, exact_nll, masked_attention
from knorm.core import token_scores
from knorm.laws import CHECKS, describe, iter_results, run_check
from knorm.laws.strategies import caches
from knorm.perplexity import agreement, exact_run

STREAMING = Policy(0.5, prune_after=8, protocol="streaming", skip_layers=(0,))


# caches as people write them differ in what they keep, not in where it lies: tools/bench_laws.py tries them all
SUBJECTS = [each for each in CORRECT if getattr(each.subject.make_cache, "__module__", "") != "mutants.real"]
# whose drawn tensors lie on the device; the witness' models are on the CPU, whatever the device
DRAWN = [check.name for check in CHECKS.values() if check.surface not in ("witness", "press")]


@pytest.mark.parametrize("correct", SUBJECTS, ids=lambda correct: correct.name)
def test_the_catalogue_holds_on_cuda(correct):
    results = list(iter_results(correct.subject, expected_failures=correct.expected, select=DRAWN, device="cuda"))
    assert not [describe(result) for result in results if result.failed]
    assert sum(result.verdict == "holds" for result in results) >= 3  # an evaluator has three laws


@pytest.mark.parametrize("mutant", MUTANTS[::4], ids=lambda mutant: mutant.name)
def test_mutants_are_refuted_on_cuda(mutant):
    result = run_check(CHECKS[mutant.check], mutant.subject, device="cuda")
    assert result.verdict == "refuted"
    assert mutant.words in result.counterexample


@given(caches(), st.sampled_from(["low_norm", "high_norm", "random"]))
def test_where_sums_are_exact_selections_agree_with_the_cpu_bit_for_bit(cache, score):
    policy = Policy(cache.keep_ratio, score=score, seed=5)
    here, there = compress(cache.keys, cache.values, policy), compress(cache.keys.cuda(), cache.values.cuda(), policy)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one, other.cpu())


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 7, 40]))
def test_schedules_agree_with_the_cpu(seed, prompt):
    scores = torch.randint(0, 9, (2, 3, 60), generator=torch.Generator().manual_seed(seed)).float()
    for policy in (Policy(0.5), STREAMING, Policy(0.9, prune_after=20, protect_recent=4, protocol="streaming")):
        assert torch.equal(evicted_at(scores, policy, prompt), evicted_at(scores.cuda(), policy, prompt).cpu())


def test_random_scores_are_the_same_on_every_device():
    keys, positions = torch.zeros(1, 3, 50, 2), torch.arange(50).expand(1, 3, 50)
    policy = Policy(0.5, score="random", seed=9)
    here = token_scores(keys, policy, positions, 2)
    assert torch.equal(here, token_scores(keys.cuda(), policy, positions.cuda(), 2).cpu())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_one_pass_equals_the_loop(kind, padded):
    model, ids = tiny(kind).cuda(), tokens(3, 60)
    mask = (torch.arange(60) >= torch.tensor([0, 5, 31])[:, None]).long() if padded else None
    for policy, prompt in ((STREAMING, 1), (Policy(0.3, protect_recent=2), 35)):
        both = agreement(model, ids, policy, prompt_length=prompt, attention_mask=mask)
        assert both.difference <= 1e-4
        assert both.gap <= 2**-20


def test_the_device_does_not_matter_in_float64():
    model, ids = tiny("llama", torch.float64), tokens(2, 60)
    here = exact_nll(model, ids, STREAMING)
    assert torch.allclose(here, exact_nll(model.cuda(), ids, STREAMING).cpu(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_and_counts_what_differs(dtype):
    both = agreement(tiny("qwen2", dtype).cuda(), tokens(2, 60), STREAMING)
    assert both.exact.nll.isfinite().all()
    assert both.evictions >= 0
    assert both.difference < 1


def test_a_long_text_holds_no_square_mask():
    model = tiny("llama", max_position_embeddings=16384).cuda()
    ids = tokens(1, 16384)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run = exact_run(model, ids, Policy(0.5, prune_after=512, protocol="streaming"))
    assert torch.cuda.max_memory_allocated() - before < 16384**2, "bytes of one head's mask alone"
    assert run.nll.isfinite().all()


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_a_long_text_in_half_precision_is_attended_to_by_a_compiled_kernel(kind, monkeypatch):
    model = tiny(kind, torch.bfloat16, max_position_embeddings=9000).cuda()
    ids = tokens(1, 8500)  # no multiple of a tile
    for policy, prompt in ((Policy(0.5, prune_after=512, protocol="streaming"), 1), (Policy(0.9), 4000)):
        compiled = exact_run(model, ids, policy, prompt_length=prompt)
        with monkeypatch.context() as patch:
            patch.setattr(masked_attention, "_COMPILED_FROM", 2**30)
            blocks = exact_run(model, ids, policy, prompt_length=prompt)
        assert torch.equal(compiled.evicted_at[0], blocks.evicted_at[0])
        assert (compiled.nll - blocks.nll).abs().mean() < 0.05


def test_the_embedded_model(embedded):
    from knorm.evaluation.windows import cut_windows
    from knorm.models import load_embedded, load_text

    model, tokenizer = embedded
    ids = cut_windows(tokenizer, load_text("narrative"), 256, 2).input_ids
    policy = Policy(0.7, prune_after=32, protocol="streaming", skip_layers=(0,))
    on_cuda, _ = load_embedded(device="cuda")
    both = agreement(on_cuda, ids, policy)
    assert both.holds, both
    here = exact_run(model, ids, policy)
    if all(torch.equal(a, b.cpu()) for a, b in zip(here.evicted_at, both.exact.evicted_at, strict=True)):
        assert (here.nll - both.exact.nll.cpu()).abs().max() < 1e-4
