from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import ARCHITECTURES, tiny, tokens

from knorm import Policy, evicted_at, exact_nll
from knorm.cache import KnormLayer
from knorm.core import squared_norms
from knorm.evaluation.explain import Effect, Explanation, explain, sentence_of, verdict_of
from knorm.evaluation.interventions import Intervention, interventions, newest_to_protect
from knorm.evaluation.runner import Runner
from knorm.evaluation.windows import Windows, cut_windows
from knorm.masked_attention import attend_seen
from knorm.models import load_embedded, load_text
from knorm.perplexity import exact_run, stream_nll
from knorm.rounding import OrderProbe, Rounding, attend_shuffled
from knorm.schedule import cache_lengths
from knorm.statistics import interval

STARVING = Policy("0.9", 32, (0,), protocol="streaming")


@pytest.fixture(scope="module")
def starved(embedded):
    model, tokenizer = embedded
    windows = cut_windows(tokenizer, load_text("narrative"), 160, 3)
    return explain(Runner(model, windows), tokenizer, STARVING), windows


def effect(found, start) -> Effect:
    return next(e for e in found.effects if e.name.startswith(start))


def single_change(kind, policy, length) -> Intervention:
    changes = interventions(policy, layers=3, length=length, prompt_length=1, newest=16)
    return next(change for change in changes if change.kind == kind)


def test_each_effect_is_the_run_with_that_one_change(starved, embedded):
    found, windows = starved
    model, ids = embedded[0], windows.input_ids
    own = exact_nll(model, ids, STARVING).double()
    assert found.nll == pytest.approx(float(own.mean()), abs=1e-6)
    assert found.nll_full == pytest.approx(float(exact_nll(model, ids, Policy()).double().mean()), abs=1e-6)
    for name, policy in (
        ("newest 14", replace(STARVING, protect_recent=14)),
        ("first 4", replace(STARVING, protect_first=4)),
        ("random", replace(STARVING, score="random")),
        ("layer 3", replace(STARVING, skip_layers=(0, 3))),
    ):
        change = exact_nll(model, ids, policy).double() - own
        got = effect(found, name)
        assert got.change == pytest.approx(float(change.mean()), abs=1e-6)
        assert got.recovered == pytest.approx(-got.change / found.loss, abs=1e-6)
        assert (got.low, got.high) == pytest.approx(interval(change.mean(1)), abs=1e-6)
        assert got.largest == pytest.approx(float(change.abs().max()), abs=1e-5)


@pytest.mark.cpus
def test_the_newest_tokens_are_found_to_be_starved_and_order_is_acquitted(starved):
    found, _ = starved
    assert effect(found, "newest 14").recovered > 0.6
    assert found.recent < 10
    assert effect(found, "slots shuffled").largest < 1e-4
    assert effect(found, "slots shuffled").sentence.startswith("no effect, at most ")
    assert found.verdict[0].startswith("The newest tokens were starved (")
    assert "protecting the newest 14 recovers" in found.verdict[0]
    assert "The order of the cache plays no part in it." in found.verdict
    assert [e.change for e in found.effects] == sorted(e.change for e in found.effects)


def test_the_tokens_that_got_worse_are_named_with_what_they_would_have_seen(starved, embedded):
    found, windows = starved
    rise = (
        exact_nll(embedded[0], windows.input_ids, STARVING) - exact_nll(embedded[0], windows.input_ids, Policy())
    ).max()
    worst = found.worst[0]
    assert worst.nll - worst.nll_full == pytest.approx(float(rise), abs=1e-4)
    for view in found.worst:
        ids = windows.input_ids[view.window]
        assert embedded[1].decode(ids[view.position]) == view.token
        assert embedded[1].decode(ids[view.evicted_position]) == view.evicted
        assert view.evicted_position < view.position
        assert 0 < view.attention < 1
        run = exact_run(embedded[0], ids[None], STARVING)
        assert any((lost[..., view.evicted_position] < view.position).any() for lost in run.evicted_at[1:])


def test_one_window_has_no_interval_and_says_so(embedded):
    model, tokenizer = embedded
    found = explain(Runner(model, cut_windows(tokenizer, load_text("narrative"), 96, 1)), tokenizer, STARVING, worst=1)
    assert effect(found, "random").low is None
    assert found.verdict[-1].startswith("One window only: there is no interval")


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Policy("0.5", 512, protocol="streaming"), "prune_after 512 was never reached"),
        (Policy(1.0), "keep_ratio is 1"),
        (Policy("0.5", 32, range(7), protocol="streaming"), "every layer is skipped"),
        (Policy("0.5", 64, protocol="streaming"), "prune_after 64 was never reached"),
        (Policy("0.999", 40, protocol="streaming"), "keep_ratio 0.999 of 63 tokens rounds up to all of them"),
    ],
)
def test_a_policy_that_evicts_nothing_has_nothing_to_explain(embedded, policy, reason):
    model, tokenizer = embedded
    windows = cut_windows(tokenizer, load_text("narrative"), 64, 1)
    with pytest.raises(ValueError, match=f"nothing to explain: no token was evicted; {reason}"):
        explain(Runner(model, windows), tokenizer, policy)


def test_a_prefill_is_explained_on_the_tokens_after_its_prompt(embedded):
    model, tokenizer = embedded
    windows = cut_windows(tokenizer, load_text("narrative"), 96, 2)
    found = explain(Runner(model, windows, 64), tokenizer, Policy(0.3), worst=1)
    assert found.tokens == 2 * 32
    assert not any(e.name.startswith("compressed once") for e in found.effects)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("length", [60, 13])
def test_shuffled_slots_attend_to_the_same(kind, length):
    model, ids = tiny(kind, torch.float64), tokens(2, length)
    policy = Policy(0.5, prune_after=8, protocol="streaming", skip_layers=(0,))
    shuffled = exact_run(model, ids, policy, attend=attend_shuffled).nll
    assert torch.allclose(shuffled, exact_nll(model, ids, policy), atol=1e-6)


def test_the_slots_are_shuffled_indeed():
    query, key, value = torch.randn(3, 1, 2, 40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lost = evicted_at(squared_norms(key), Policy(0.5, prune_after=8, protocol="streaming"))
    one, other = (attend(query, key, value, lost, None) for attend in (attend_seen, attend_shuffled))
    assert torch.allclose(one, other, atol=1e-12)
    assert not torch.equal(one, other), "sums run in another order"


def test_collapsed_positions_are_those_of_a_loop_that_reads_the_stored_length(monkeypatch):
    model, ids = tiny("llama", torch.float64), tokens(2, 40)
    policy = Policy(0.5, prune_after=8, protocol="streaming")
    change = single_change("positions", policy, length=40)
    collapsed = exact_nll(model, ids, policy, position_ids=change.options["position_ids"].expand(2, 40))

    monkeypatch.setattr(KnormLayer, "get_seq_length", lambda self: 0 if self.keys is None else self.keys.shape[2])
    monkeypatch.setattr(KnormLayer, "get_mask_sizes", lambda self, n: (self.get_seq_length() + 1, 0))
    unaware = unaware_loop(model, ids, policy)
    assert torch.allclose(collapsed.double(), unaware, atol=1e-5)
    assert (collapsed - stream_nll(model, ids, policy)).abs().max() > 0.1


@torch.no_grad()
def unaware_loop(model, ids, policy):
    from knorm import KnormCache
    from knorm.model_attention import cache_keyword

    cache, logits = KnormCache(policy), []
    for token in ids.split(1, dim=1):
        logits.append(model(token, use_cache=True, **{cache_keyword(model): cache}).logits)
    return torch.nn.functional.cross_entropy(torch.cat(logits, 1)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def test_as_many_tokens_means_as_many_at_every_step():
    policy = Policy("0.7", 16, (1,), protect_first=2, protocol="streaming")
    keys = torch.randn(2, 2, 60, 8)
    schedule = single_change("amount", policy, length=60).options["schedule"]
    newest = schedule(0, keys)
    assert torch.equal(cache_lengths(newest), cache_lengths(evicted_at(squared_norms(keys), policy)))
    assert (schedule(1, keys) == 60).all(), "a skipped layer stays whole"
    kept = (newest[0, 0] > 59).nonzero()[:, 0].tolist()
    assert kept == list(range(60 - len(kept), 60))


@pytest.mark.parametrize(
    ("policy", "prompt", "count"),
    [
        (Policy("0.9", 32, protocol="streaming"), 1, 14),
        (Policy("0.9", 128, protocol="streaming"), 1, 16),
        (Policy("0.1", 32, protocol="streaming"), 1, 2),
        (Policy("0.5", 32, protect_recent=16, protocol="streaming"), 1, 0),
        (Policy("0.5"), 20, 5),
    ],
)
def test_at_most_half_of_the_budget_is_protected(policy, prompt, count):
    assert newest_to_protect(policy, prompt, 16) == count


def test_the_interval_is_students():
    low, high = interval(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert (low, high) == pytest.approx((2.5 - 3.182446 * math.sqrt(5 / 3) / 2, 2.5 + 3.182446 * math.sqrt(5 / 3) / 2))


def test_a_window_longer_than_the_positions_is_refused(embedded):
    ids = torch.zeros(1, 1025, dtype=torch.int64)
    with pytest.raises(ValueError, match="1025 tokens, but"):
        explain(Runner(embedded[0], Windows(ids, ids + torch.arange(1025))), embedded[1], STARVING)


@pytest.mark.processes
def test_positions_of_an_unaware_loop_are_found_and_corrected(embedded):
    model, tokenizer = embedded
    windows = cut_windows(tokenizer, load_text("narrative"), 128, 4)
    policy = replace(STARVING, skip_layers=())
    found = explain(Runner(model, windows), tokenizer, policy, stored=True, worst=1)
    right = explain(Runner(model, windows), tokenizer, policy, worst=1)
    assert found.nll == pytest.approx(effect(right, "positions collapsed").nll, abs=1e-6)
    assert effect(found, "positions corrected").nll == pytest.approx(right.nll, abs=1e-6)
    assert effect(found, "positions corrected").sentence.startswith("counting them from the tokens seen")


def test_what_is_cached_does_not_depend_on_the_batch(embedded):
    windows = cut_windows(embedded[1], load_text("narrative"), 96, 3)
    model, tokenizer = embedded
    one, two = (explain(Runner(model, windows, batch=n), tokenizer, STARVING, worst=1).recent for n in (3, 2))
    assert one == pytest.approx(two, abs=1e-9)


@pytest.mark.parametrize(
    ("kind", "largest", "is_rounding", "sentence"),
    [
        (
            "order", 0.4, True,
            "no effect, at most 4e-01 per token (the rounding of bfloat16: in float64 attention's outputs agree to "
            "3e-15): attention does not see slot order",
        ),
        ("order", 8e-6, True, "no effect, at most 8e-06 per token: attention does not see slot order"),
        ("order", 0.4, False, "+0.020 nats a token, at most 4e-01 per token: attention must not see slot order"),
        ("layers", 0.4, True, "sparing layer 1 has no effect beyond rounding"),
        ("layers", 1e-5, True, "sparing layer 1 has no effect"),
    ],
)  # fmt: skip
def test_a_sentence_says_what_rounding_explains(kind, largest, is_rounding, sentence):
    change = Intervention(kind, "", "sparing layer 1", STARVING, 1)
    effect = Effect(kind, "", 3.0, 0.02, None, None, None, largest, "", is_rounding)
    assert sentence_of(change, effect, STARVING, OrderProbe(3e-15), torch.bfloat16) == sentence


def found_with(*effects, loss=0.5, recent=5.0):
    empty = {"nll_empty": 9.0, "windows": 3, "tokens": 9, "worst": (), "verdict": ()}
    order = Effect("order", "slots shuffled", 3.0, 0.0, 0.0, 0.0, None, 1e-6, "no effect", True)
    return Explanation(nll=3.0 + loss, nll_full=3.0, recent=recent, effects=(*effects, order), **empty)


def change(kind, name, recovered, low, high, loss=0.5):
    return Effect(kind, name, 3.0, -recovered * loss, low, high, recovered, 1.0, f"{name} recovers {recovered:.0%}")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            found_with(change("recency", "newest 14 protected", 0.8, -0.6, -0.2)),
            "The newest tokens were starved (5.0 of the newest",
        ),
        (
            found_with(change("recency", "newest 14 protected", 0.8, -0.6, -0.2), recent=15.5),
            "Newest 14 protected recovers 80%.",
        ),
        (
            found_with(
                change("choice", "random instead of low_norm", 1.4, -2.0, 0.5),
                change("repetition", "compressed once", 1.3, -0.7, -0.6),
            ),
            "Compressed once recovers 130%.",
        ),
        (
            found_with(change("choice", "random instead of low_norm", 1.4, -2.0, 0.5)),
            "No single change takes back any of the loss",
        ),
        (
            found_with(change("layers", "layer 1 spared", 0.3, -0.2, -0.1)),
            "No single change takes back half of the loss",
        ),
        (found_with(loss=0.001), "Compression costs +0.0010 nats a token here: there is no loss to explain."),
        (found_with(loss=-0.2), "Compression gains 0.200 nats a token here; what takes most of that away again is"),
    ],
)
def test_the_verdict_names_only_what_is_certain(found, said):
    assert verdict_of(found, "")[0].startswith(said)


def explained_in(dtype, tokenizer):
    windows = cut_windows(tokenizer, load_text("narrative"), 64, 2)
    return explain(Runner(load_embedded(dtype=dtype)[0], windows), tokenizer, STARVING, worst=1)


@pytest.mark.cpus
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_rounding_is_no_effect_of_order(embedded, dtype):
    found = explained_in(dtype, embedded[1])
    order = effect(found, "slots")
    assert order.is_rounding
    assert order.sentence.startswith("no effect, at most ")
    assert order.sentence.endswith(": attention does not see slot order")
    assert "The order of the cache plays no part in it." in found.verdict
    assert not effect(found, "newest 14").is_rounding, "an effect is seen through the rounding"


def test_in_half_precision_an_effect_of_order_is_seen_though_rounding_hides_it(embedded, monkeypatch):
    def sees_slots(query, key, value, evicted, scale):
        out = attend_shuffled(query, key, value, evicted, scale)
        return out + 1e-9 * out.roll(1, 2)

    monkeypatch.setattr("knorm.rounding.attend_shuffled", sees_slots)
    found = explained_in(torch.bfloat16, embedded[1])
    order = effect(found, "slots")
    assert not order.is_rounding
    assert order.sentence.endswith("attention must not see slot order")
    assert "The order of the cache plays no part in it." not in found.verdict


@pytest.mark.cpus
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_probe_knows_rounding_from_order_at_any_size(dtype, size, monkeypatch):
    query, key, value = 4 * torch.randn(3, 2, 4, 70, 16, generator=torch.Generator().manual_seed(0))
    lost = evicted_at(squared_norms(key), Policy(0.5, prune_after=8, protocol="streaming"))
    inputs = query.to(dtype), key.to(dtype), (size * value).to(dtype)
    probe = OrderProbe()
    out = probe(*inputs, lost, None)
    assert probe.holds
    assert 0 < probe.difference < 1e-14
    assert (out.dtype, out.shape) == (dtype, query.shape)
    exact = attend_seen(*(x.double() for x in inputs), lost, None)
    assert (out - exact).abs().max() / inputs[2].abs().max() <= torch.finfo(dtype).eps / 2, "rounded once"

    monkeypatch.setattr("knorm.rounding.attend_shuffled", lambda *x: attend_shuffled(*x) * (1 + 1e-9))
    probe(*inputs, lost, None)
    assert not probe.holds
    probe(inputs[0], inputs[1], 0 * inputs[2], lost, None)
    assert not probe.holds, "what was seen once is not forgotten"
    nan = OrderProbe()
    nan(inputs[0], inputs[1] * torch.nan, inputs[2], lost, None)
    assert not nan.holds


@pytest.mark.parametrize("evicts", [True, False])
def test_the_probe_takes_few_heads_at_a_time_where_scores_are_many(evicts, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    query, (key, value) = torch.randn(2, 6, 40, 16, generator=draw), torch.randn(2, 2, 3, 40, 16, generator=draw)
    lost = evicted_at(squared_norms(key), Policy(0.5, prune_after=8, protocol="streaming")) if evicts else None
    whole, by_head = OrderProbe(), OrderProbe()
    out = whole(query, key, value, lost, 0.3)
    monkeypatch.setattr("knorm.rounding._SCORES", 1)
    assert (by_head(query, key, value, lost, 0.3) - out).abs().max() <= 1e-6
    assert (out - attend_seen(query, key, value, lost, 0.3)).abs().max() <= 1e-5
    assert whole.holds
    assert by_head.holds


def test_an_eviction_that_rounding_moved_is_no_effect_of_order(embedded, monkeypatch):
    """Near-ties fall either way: here every norm does, so the two runs evict differently, and the order is innocent."""
    draw = torch.Generator().manual_seed(0)

    def noisy(layer, keys):
        norms = squared_norms(keys)
        return evicted_at(norms * (1 + 0.2 * torch.rand(norms.shape, generator=draw)), STARVING)

    monkeypatch.setattr("knorm.perplexity._schedule", lambda *_: noisy)
    found = explained_in(torch.float32, embedded[1])
    assert effect(found, "slots").largest > 1e-2, "the runs evicted differently"
    assert effect(found, "slots").is_rounding


def test_rounding_covers_neither_a_large_change_of_one_token_nor_a_small_one_of_all():
    noise = 0.01 * torch.randn(2, 95, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise[0, 5] = 1.0
    rounding = Rounding.measured(noise)
    assert rounding.covers(-noise)
    assert rounding.covers(0.5 * noise)
    one = noise.clone()
    one[1, 7] = 1.1
    assert not rounding.covers(one)
    assert not rounding.covers(torch.full_like(noise, 0.5)), "less than the largest, but of every token"
    assert Rounding().covers(torch.full_like(noise, 0.99e-4))
    assert not Rounding().covers(torch.full_like(noise, torch.nan))
    assert Rounding.measured(torch.zeros(1, 3)) == Rounding()
