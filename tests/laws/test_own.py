"""The judges of knorm's own parts: each can fail, and what raises is a verdict."""

from __future__ import annotations

import ast
import copy
import inspect
import math
from fractions import Fraction

import pytest
import torch
from tiny import tokens

from knorm import core, verify
from knorm.laws import Refuted, oracle, own, own_cache, own_model, traits
from knorm.laws.oracle import Rules
from knorm.laws.traits import Traits, exact_share
from knorm.perplexity import Agreement, Run
from knorm.policy import Policy


@pytest.mark.parametrize("check", verify.OWN, ids=lambda check: check.__name__)
def test_a_judge_of_knorms_own_holds_and_says_its_claim(check):
    assert check()
    assert check.__doc__.splitlines()[0].endswith(".")


def test_the_runs_and_generate_equal_the_oracle_on_the_embedded_model(embedded):
    model = copy.deepcopy(embedded[0]).double()
    assert own.check_runs(model, tokens(2, 32)).startswith("largest difference of a token's NLL ")
    assert own_cache.check_generation(model, tokens(3, 24), new=6).startswith("4 runs of 6 tokens, largest difference ")


@pytest.mark.parametrize(("judge", "names"), [(oracle, {"Policy"}), (traits, {"Ratio"})])
def test_what_laws_compare_with_takes_nothing_from_knorm_but_a_name(judge, names):
    """The oracle makes a Policy for others and reads none; a Ratio is a type."""
    imports = [node for node in ast.walk(ast.parse(inspect.getsource(judge))) if isinstance(node, ast.ImportFrom)]
    taken = {alias.name for node in imports if (node.module or "").startswith("knorm") for alias in node.names}
    assert taken == names


def test_the_laws_own_arithmetic_is_not_that_which_they_judge(monkeypatch):
    monkeypatch.setattr("knorm.policy.retained_count", lambda length, ratio: math.floor(Fraction(str(ratio)) * length))
    assert Traits(rounding="ceil").count(100, 0.551) == 56
    assert Rules(0.551).count(100) == 56
    with pytest.raises(Refuted, match=r"Policy\(0.55\).budget\(1\) is 0, but should be 1"):
        own.check_counts()


def test_a_share_is_that_of_the_decimal_that_a_ratio_prints_as():
    assert [exact_share(100, ratio) for ratio in (0.55, "1/3", Fraction(5, 9))] == [
        55,
        Fraction(100, 3),
        Fraction(500, 9),
    ]


def test_a_list_of_living_tokens_by_hand():
    life = oracle.live(Rules(0.5, 4, protocol="streaming"), [3.0, 1.0, 2.0, 9.0, 1.0, 0.0], [4, 1, 1])
    assert life == ([4, 6, 6, 4, 6, 6], [1, 5], [4, 6]), "of tokens 1 and 4, with one norm, the earlier stays"


def test_the_random_score_is_that_of_the_published_splitmix64():
    """Three outputs of splitmix64 seeded with 0, as its author's reference implementation prints them."""
    golden = 0x9E3779B97F4A7C15
    for count, output in enumerate((0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F), 1):
        state = count * golden % 2**64
        assert oracle.random_score(0, 0, 0, state) == (output & 2**53 - 1) / 2**53


def test_what_raises_in_a_measurement_is_a_verdict_not_wrong_usage(monkeypatch):
    def raises(*_, **__):
        raise ValueError("shapes do not agree")

    verdict = verify.judge("It holds.", raises)
    assert (verdict.holds, verdict.evidence) == (False, "raised ValueError: shapes do not agree")
    (verdict,) = verify.judge_each("Each holds.", iter(map(raises, [1])))
    assert (verdict.claim, verdict.holds) == ("Each holds.", False)
    threads = torch.get_num_threads()
    assert verify.judge("It holds.", lambda: "evidence", one_thread=True).holds
    assert torch.get_num_threads() == threads


def laws_of(compressor, *select):
    results = verify.iter_results(verify.Subject("it", verify.KNORM, compressor), select=select)
    return [(verdict.holds, verdict.evidence) for verdict in verify._laws(results)]


def test_a_core_that_raises_is_refuted(monkeypatch):
    def raises(*_, **__):
        raise RuntimeError("shapes do not agree")

    assert laws_of(raises, "order") == [(False, "none of 60 cases could be answered")]
    monkeypatch.setattr("knorm.core.select", raises)
    ((holds, evidence),) = laws_of(verify.compress, "accepts")
    assert not holds
    assert evidence.startswith("accepts: raised RuntimeError: shapes do not agree")


def test_an_agreement_that_says_other_than_its_runs_is_refuted():
    nll = torch.tensor([[1.0, 2.0]])
    one = Run(nll, nll > 0, (torch.full((1, 1, 3), 3),), 0.0, 0.0)
    other = one._replace(nll=nll + torch.tensor([[0.0, 0.5]]))
    own.recount(Agreement(one, other, 0, 0.0, 0.5))
    with pytest.raises(Refuted, match=r"the largest difference of a token's NLL is 0\.0, but should be 0\.5"):
        own.recount(Agreement(one, other, 0, 0.0, 0.0))
    with pytest.raises(Refuted, match="the number of evictions that differ is 1, but should be 0"):
        own.recount(Agreement(one, other, 1, 0.0, 0.5))


FAULTS = {
    "positions": ("knorm.cache.KnormLayer.get_seq_length", lambda self: self.stored),
    "mask": ("knorm.cache.KnormLayer.get_mask_sizes", lambda self, queries: (self.stored + queries, 0)),
    "spared layers": ("knorm.cache.KnormLayer._budget", lambda self, length: self.policy.budget(length)),
    "prefill": ("knorm.cache.KnormLayer._compress", lambda self: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_cache_is_refuted_whatever_is_called(monkeypatch, fault):
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises((Refuted, ValueError, RuntimeError)):
        own_cache.check_any_order()


def test_other_tokens_than_those_of_lowest_norm_are_refuted_in_generate(embedded, monkeypatch):
    monkeypatch.setattr("knorm.core.token_scores", lambda keys, *_: -keys.square().sum(-1))
    model = copy.deepcopy(embedded[0]).double()
    with pytest.raises(Refuted, match=r"generate\(\), a streaming policy with a skipped layer"):
        own_cache.check_generation(model, tokens(3, 24), new=4)


def test_a_nested_list_is_refuted_by_its_first_difference():
    with pytest.raises(Refuted, match=r"^it is \[3\], but should be \[4\] \(at \[1, 0\]\)$"):
        own._differs("it", [[[1]], [[3]]], [[[1]], [[4]]])


def test_what_must_be_refused_is_refused_by_the_right_error():
    own.must_raise("it", ValueError, lambda: Policy(2))
    with pytest.raises(Refuted, match=r"^it was answered, but should raise ValueError$"):
        own.must_raise("it", ValueError, lambda: None)
    with pytest.raises(Refuted, match=r"it raised ZeroDivisionError: .*, but should raise ValueError"):
        own.must_raise("it", ValueError, lambda: 1 / 0)


def test_a_context_that_leaves_padding_to_others_is_refuted(monkeypatch):
    monkeypatch.setattr("knorm.model_attention._leads", lambda mask: None)
    with pytest.raises(Refuted, match=r"^a call without a cache inside attention\(\), sdpa: logits of "):
        own_model.check_contexts()


def test_a_run_that_should_be_refused_is_refuted(monkeypatch):
    monkeypatch.setattr("torch.is_autocast_enabled", lambda device: False)
    with pytest.raises(Refuted, match=r"^a run under autocast was answered, but should raise ValueError$"):
        own_model.check_run_refusals()


def test_large_caches_are_compared_too(monkeypatch):
    take = core._take
    monkeypatch.setattr(
        core, "_take", lambda rows, index: take(rows, index.flip(-1) if rows.numel() > 2**20 else index)
    )
    with pytest.raises(
        Refuted, match=r"^of 8192 tokens, the keys or values that stay are not those of their positions$"
    ):
        own.check_selections()
