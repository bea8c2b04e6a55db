"""What the laws say of kvpress' presses. Each verdict was seen with kvpress 0.5.5."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("kvpress.presses", reason="kvpress is not installed: run tox -e kvpress")

import kvpress

from knorm.laws import CHECKS, Refuted, Traits, check_compressor, reproduce
from knorm.laws.adapters import adapt
from knorm.laws.loading import load_target
from knorm.laws.strategies import Cache, tagged_values

TOP_K = "top-k returns indices by score, and kvpress gathers them as they come"
SINKS = "a cache no longer than its sinks fails an assertion"
WINDOW = "a cache no longer than its window fails an assertion"
LAST = "a cache of one token has no other to take the highest score of"
ONE_DRAW = "one draw for all rows and heads: a row alone gets other numbers"
GLOBAL = "without a seed it draws from torch's global generator"
CLIPPED = "a budget below the protected tokens cuts them without a word"
SLOTS = "protects slots, and the compression before did not leave them in time order"
FIRST_ROW = "all rows and heads get the chunks that the first row's and head's scores choose"

IN_SCORE_ORDER = {"time_order": TOP_K}
ALL_BUT_EMPTY = [name for name in CHECKS if name != "empty"]  # which only a ratio of 1 refutes, and few draws have it
RANDOM = {**IN_SCORE_ORDER, "rows_alone": ONE_DRAW, "heads_alone": ONE_DRAW}


def failures(press, traits=None, **options):
    """The checks that refuted the press, and what they found."""
    results = check_compressor(press, traits, **options)
    assert "untested" not in {result.verdict for result in results}
    return {result.check: result.counterexample for result in results if result.verdict == "refuted"}


@pytest.mark.parametrize(
    ("press", "expected"),
    [
        pytest.param(kvpress.KnormPress, IN_SCORE_ORDER, id="Knorm"),
        pytest.param(kvpress.KeyDiffPress, IN_SCORE_ORDER, id="KeyDiff"),
        pytest.param(kvpress.ObservedAttentionPress, IN_SCORE_ORDER, id="ObservedAttention"),
        pytest.param(kvpress.StreamingLLMPress, {**IN_SCORE_ORDER, "accepts": SINKS}, id="StreamingLLM"),
        pytest.param(kvpress.ExpectedAttentionPress, {**IN_SCORE_ORDER, "accepts": SINKS}, id="ExpectedAttention"),
        pytest.param(kvpress.SnapKVPress(window_size=2), {**IN_SCORE_ORDER, "accepts": WINDOW}, id="SnapKV"),
        pytest.param(kvpress.RandomPress(seed=0), RANDOM, id="Random, seeded"),
        pytest.param(
            kvpress.RandomPress,
            {**RANDOM, "repeatable": GLOBAL, "no_leak": GLOBAL, "layout": GLOBAL},
            id="Random",
        ),
    ],
)
def test_a_press_breaks_these_laws_and_no_other(press, expected):
    results = check_compressor(press, expected_failures=expected, select=ALL_BUT_EMPTY)
    assert not [result for result in results if result.failed]
    assert {result.check for result in results if result.verdict == "expected failure"} == {*expected}
    assert "untested" not in {result.verdict for result in results}


def refused(law, press, traits, keep_ratio, numbers):
    """What a check says of one cache: a row of keys (n, 0, 0, 0), n from numbers [heads, length]."""
    keys = torch.zeros(1, *numbers.shape, 4)
    keys[..., 0] = numbers
    with pytest.raises(Refuted) as raised:
        reproduce(law, adapt(press, traits), Cache(keys, tagged_values(*keys.shape[:3], keys.dtype), keep_ratio))
    return str(raised.value)


def test_at_ratio_1_a_cache_without_tokens_comes_back():
    message = refused("empty", kvpress.KnormPress, None, 1.0, torch.ones(1, 3))
    assert message == "empty: 0 tokens came back as 0 at ratio 1.0, but should be refused"


FLOOR = {"rounding": "floor", "time_order": False}


@pytest.mark.parametrize(
    ("keep_ratio", "length", "words"),
    [
        (0.2, 10, "1 of 10 tokens retained, but should be 2"),
        (0.1, 100, "9 of 100 tokens retained, but should be 10"),
    ],
)
def test_binary_arithmetic_keeps_a_token_less_than_the_floor(keep_ratio, length, words):
    numbers = torch.arange(length)[None]
    assert words in refused("retained_count", kvpress.KnormPress, FLOOR, keep_ratio, numbers)


def test_the_count_is_no_ceiling():
    found = failures(kvpress.KnormPress, {"rounding": "ceil"}, select=["retained_count"])
    assert found == {"retained_count": "retained count: 1 of 2 tokens retained, but should be 2"}


NUMBERS = ["subnormal", "nonfinite", "overflow"]


def test_knorm_press_ranks_by_norm_but_leaves_ties_and_what_is_not_finite_to_chance():
    traits = {"scores": "key_norm", "ties": "earlier", "nonfinite": "raise"}
    found = failures(kvpress.KnormPress, traits, select=["selection", "half_precision", *NUMBERS])
    assert {*found} == {"ties", *NUMBERS}
    assert "did not raise" in found["nonfinite"]


def test_key_diff_scores_keys_alone():
    assert not failures(kvpress.KeyDiffPress, {"scores": "keys"}, select=["values_ignored", "nesting"])


@pytest.mark.parametrize(
    ("press", "traits"),
    [
        pytest.param(kvpress.StreamingLLMPress, {"protect_first": 4}, id="StreamingLLM"),
        pytest.param(kvpress.SnapKVPress(window_size=2), {"protect_recent": 2}, id="SnapKV"),
    ],
)
def test_what_a_press_protects_it_loses_at_the_second_compression(press, traits):
    found = failures(press, traits, select=["protection"])
    assert {*found} == {"protected_tokens", "protection_refused"}, (SLOTS, CLIPPED)
    assert "after 2 compressions" in found["protected_tokens"]


def test_tova_mixes_heads():
    numbers = torch.tensor([[8.0, 1, 2, 3, 4, 5], [-8, 5, 4, 3, 2, 1]])
    assert "head 0 alone retains" in refused("heads_alone", kvpress.TOVAPress, None, 0.5, numbers)


def test_tova_has_no_answer_for_one_token():
    found = failures(kvpress.TOVAPress, select=["accepts", "time_order"])
    assert {*found} == {"accepts", "time_order"}, (LAST, TOP_K)
    assert "max(): Expected reduction dim" in found["accepts"]


def test_a_window_of_64_leaves_short_caches_unanswered():
    found = failures(kvpress.SnapKVPress, select=["accepts"])
    assert "Query length 1 should be greater than the window size 64" in found["accepts"]


def test_chunks_are_chosen_by_the_first_row():
    found = failures(kvpress.ChunkKVPress(kvpress.KnormPress()), select=["rows_alone", "heads_alone"])
    assert {*found} == {"rows_alone", "heads_alone"}, FIRST_ROW


def test_keys_rotated_to_new_positions_are_none_of_those_given():
    found = failures(kvpress.KeyRerotationPress(kvpress.KnormPress()), select=["pairing"])
    assert "but no token of that row and head has both" in found["pairing"]


def test_what_is_only_marked_is_ragged_and_frees_no_memory():
    press = kvpress.AdaKVPress(kvpress.KnormPress())
    families = ["count", "provenance", "order", "memory", "independence"]
    assert {*failures(press, select=families)} == {"equal_counts", "heads_alone", "frees_memory"}
    assert not failures(press, {"ragged": True, "frees_memory": False}, select=families)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("KVzipPress", "KVzipPress has no compress(module, hidden_states, keys, values, attentions, kwargs)"),
        ("ComposedPress", "ComposedPress has no compress("),
        ("DMSPress", "DMSPress has no compress("),
        ("ThinKPress", "ThinKPress takes no compression_ratio"),
        ("DuoAttentionPress", "DuoAttentionPress takes no compression_ratio"),
        ("AdaKVPress", "AdaKVPress takes no compression_ratio; give an instance, as AdaKVPress(KnormPress())"),
    ],
)
def test_a_press_that_does_not_compress_tensors_by_a_ratio_is_refused(name, words):
    with pytest.raises(TypeError) as raised:
        adapt(getattr(kvpress, name))
    assert words in str(raised.value)
    with pytest.raises(ValueError, match=f"target 'kvpress:{name}': {name}"):
        load_target(f"kvpress:{name}")


def test_a_press_is_named_on_the_command_line_and_told_of_misspellings():
    subject = load_target("kvpress:KnormPress", traits=FLOOR)
    assert (subject.name, subject.traits) == ("KnormPress", Traits(**FLOOR))
    with pytest.raises(ValueError, match="kvpress has no 'KNormPress'; it has KnormPress"):
        load_target("kvpress:KNormPress")


@pytest.mark.parametrize(
    "press",
    [kvpress.KnormPress, kvpress.SnapKVPress(window_size=2), kvpress.AdaKVPress(kvpress.KeyDiffPress())],
)
def test_the_lines_of_code_run_the_press(press):
    subject = adapt(press)
    keys, values = torch.randn(2, 2, 9, 4), tagged_values(2, 2, 9, torch.float32)
    scope = {}
    exec(subject.code, scope)
    for got, expected in zip(scope["compress"](keys, values, 0.5), subject.compress(keys, values, 0.5), strict=True):
        assert torch.equal(got, expected)


def test_scores_agree_with_a_real_model():
    """The press on a whole model keeps the keys that it keeps of that model's cache."""
    from transformers import DynamicCache

    from knorm.laws.model import small_model

    model, ids = small_model("cpu"), torch.arange(1, 25)[None]
    full, compressed = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=full)
        with kvpress.KnormPress(0.5)(model):
            model(ids, past_key_values=compressed)
    ours = adapt(kvpress.KnormPress)(full.layers[0].keys, full.layers[0].values, 0.5)
    assert torch.equal(ours.keys, compressed.layers[0].keys)
