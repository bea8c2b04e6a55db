"""An arm of `knorm bench` is a method: it decodes what its users get, and leaves nothing behind between turns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny, tokens
from transformers import DynamicCache

from knorm import KnormCache, Policy
from knorm.bench import methods as bench
from knorm.bench.latency import Prompt
from knorm.bench.policies import Bench, Row, Times, advice
from knorm.methods.door import method
from knorm.model_attention import cache_keyword
from knorm.statistics import Comparison, compare

IDS = tokens(2, 24)
PROMPTS = [Prompt(IDS, 7), Prompt(IDS[:, :12], 5)]


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def keep_newest(keys, values, keep_ratio):
    count = int(keys.shape[2] * keep_ratio)
    return keys[:, :, -count:], values[:, :, -count:]


def drop(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, -12:], layer.values[:, :, -12:]


def generated(model, cache, change=lambda cache: None):
    """Greedy tokens, their positions counted from the tokens seen."""
    found, token, keyword = [], IDS, {cache_keyword(model): cache}
    with torch.no_grad():
        for step in range(7):
            places = torch.arange(24)[None] if step == 0 else torch.tensor([[23 + step]])
            token = model(input_ids=token, position_ids=places.expand(2, -1), **keyword).logits[:, -1:].argmax(-1)
            found.append(token)
            if step == 0:
                change(cache)
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("chosen", "cache", "change"),
    [
        (None, DynamicCache, lambda cache: None),
        (method(keep_newest, keep_ratio=0.5), DynamicCache, drop),
        (
            method(Policy("0.5", skip_layers=(0,))),
            lambda: KnormCache(Policy("0.5", skip_layers=(0,))),
            lambda cache: None,
        ),
    ],
    ids=["uncompressed", "function", "policy"],
)
def test_an_arm_generates_what_its_users_get(llama, chosen, cache, change):
    arm, found = bench.MethodArm(llama, PROMPTS, chosen, None), []
    arm.prompt(0)
    found.append(arm.token)
    for _ in range(6):
        assert len(arm.steps(1)) == 1
        found.append(arm.token)
    arm.close()
    assert torch.equal(torch.cat(found, 1), generated(llama, cache(), change))


def test_turns_are_whole_generations_mirrored(llama, monkeypatch):
    order = []

    def generation(self, index):
        order.append((self.method and self.method.name, index))
        return 1.0 + len(order), [float(len(order))] * (PROMPTS[index].new_tokens - 1)

    monkeypatch.setattr(bench.MethodArm, "generation", generation)
    arms = [bench.MethodArm(llama, PROMPTS, chosen, None) for chosen in (None, method(keep_newest, keep_ratio=0.5))]
    samples = bench.run_generations(arms, [7, 5])
    turns = [None, "keep_newest", "keep_newest", None]
    assert order == [(name, 0) for name in turns] + [(name, 1) for name in turns]
    assert samples[0].first == ((2.0, 5.0), (6.0, 9.0))
    assert samples[0].steps == ((2.5,) * 6, (6.5,) * 4), "free of linear drift: as those of the other arm"
    assert samples[1].steps == samples[0].steps
    order.clear()
    bench.run_generations(arms, [7], flip=True)
    assert order[0] == ("keep_newest", 0)


def test_a_method_is_closed_after_its_turn_even_where_it_fails(llama):
    def fails(keys, values, keep_ratio):
        raise RuntimeError("no")

    arm = bench.MethodArm(llama, PROMPTS, method(fails, keep_ratio=0.5), None)
    with pytest.raises(Exception, match="no"):
        arm.generation(0)
    assert llama.config._attn_implementation == "sdpa"
    arm = bench.MethodArm(llama, PROMPTS, method(keep_newest, keep_ratio=0.5), None)
    arm.generation(1)
    assert llama.config._attn_implementation == "sdpa"
    assert arm.stored().retained == (6 + 4,) * 3


@pytest.mark.processes
def test_a_slow_method_fails_and_counts_are_beside_it(llama):
    def slow(keys, values, keep_ratio):
        for _ in range(1000):  # so slow that a busy machine does not hide it
            keys @ keys.mT
        return keep_newest(keys, values, keep_ratio)

    chosen = method(slow, keep_ratio=0.5)
    found = bench.bench_methods(llama, {"a": PROMPTS[0]}, [chosen], None, margin=0.05, blocks=8)
    row = found.rows[1]
    assert (row.name, row.comparisons["ttft"].verdict) == ("slow 0.5", "FAIL")
    assert row.comparisons["ttft"].ratio > 1.5
    assert row.counters.retained == (12 + 6,) * 3
    assert found.rows[0].counters.retained == (24 + 6,) * 3
    assert row.counters.prompt_operators > found.rows[0].counters.prompt_operators + 600
    assert row.counters.cache_bytes < found.rows[0].counters.cache_bytes


def rows(ttft, tpot, policy):
    times = (Times(0.030, 0.005, 0.005, 0.005, 1.0), Times(0.030 * ttft, 0.005 * tpot, 0.005, 0.005, 1.0))
    judged = {
        name: compare([ratio - 1 + 1e-4 * k for k in range(8)], margin=0.05, alpha=0.005)
        for name, ratio in (("ttft", ttft), ("tpot", tpot))
    }
    assert all(isinstance(comparison, Comparison) for comparison in judged.values())
    base = Row("uncompressed", None, times[0], None, None)
    return Bench((base, replace(base, name="0.5", policy=policy, times=times[1], comparisons=judged)), (), 0, 1, 1.0)


def test_a_ttft_that_fails_says_what_to_do():
    streaming = Policy("0.5", 32, protocol="streaming")
    assert advice(rows(1.1, 0.75, streaming)) == [
        "0.5: the first token waits 3.0 ms for the prompt's cache to be compressed; faster steps make that up after 4 "
        "new tokens. With --prune-after above the prompt's length it does not wait"
    ]
    assert "steps are no faster here, so only memory is saved" in advice(rows(1.1, 1.02, streaming))[0]
    assert "--prune-after" not in advice(rows(1.1, 0.8, None))[0]
    assert advice(rows(1.0, 0.8, streaming)) == []


@pytest.mark.processes
def test_targets_are_timed_from_the_command_line(run_knorm, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # its times are not looked at
    code, _, err = run_knorm("bench", "knorm", "--against", "HEAD")
    assert (code, "drop the TARGET" in err) == (2, True)
    code, _, err = run_knorm("bench", "--keep-tokens", "8")
    assert (code, "about a TARGET" in err) == (2, True)
    size = ("--prompt-tokens", "40", "--new-tokens", "4", "--text", "narrative", "--blocks", "8")
    code, out, err = run_knorm("bench", "transformers:DynamicCache", *size, "--margin", "90", "--json", "out.json")
    assert (code, err) == (0, ""), out
    assert "PASS" in out
    assert "transformers:DynamicCache" in out
