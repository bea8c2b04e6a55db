from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knorm import compress, retained_count
from knorm.laws import CHECKS, law, run_check
from knorm.laws.registry import check
from knorm.laws.strategies import caches


@pytest.mark.parametrize("name", CHECKS)
@given(data=st.data())
def test_knorms_own_core_holds(name, data):
    CHECKS[name](compress, data.draw(caches()))


def _sort(keys, count, largest=False):
    return keys.double().norm(dim=-1).argsort(dim=-1, stable=True, descending=largest)[..., :count, None]


def _take(tensor, index):
    return tensor.gather(2, index.expand(*index.shape[:3], tensor.shape[3]))


def in_norm_order(keys, values, ratio):
    index = _sort(keys, retained_count(keys.shape[2], ratio))
    return _take(keys, index), _take(values, index)


def binary_ceiling(keys, values, ratio):
    count = math.ceil(keys.shape[2] * ratio)
    index = _sort(keys, count).sort(2).values
    return _take(keys, index), _take(values, index)


def nothing_on_short_caches(keys, values, ratio):
    count = int(keys.shape[2] * ratio)
    index = _sort(keys, count).sort(2).values
    return _take(keys, index), _take(values, index)


def highest_norms(keys, values, ratio):
    index = _sort(keys, retained_count(keys.shape[2], ratio), largest=True).sort(2).values
    return _take(keys, index), _take(values, index)


def values_of_another_head(keys, values, ratio):
    kept = compress(keys, values, ratio)
    return kept.keys, compress(keys.flip(1), values, ratio).values


def choice_of_the_first_row(keys, values, ratio):
    index = compress(keys[:1], values[:1], ratio).positions[..., None].expand(keys.shape[0], -1, -1, -1)
    return _take(keys, index), _take(values, index)


def view_of_the_full_buffer(keys, values, ratio):
    count = retained_count(keys.shape[2], ratio)
    return keys[:, :, :count], values[:, :, :count]


def writes_to_its_input(keys, values, ratio):
    kept = compress(keys, values, ratio)
    keys.zero_()
    return kept[:2]


def silent_about_nan(keys, values, ratio):
    return compress(keys.nan_to_num(), values, ratio)[:2]


def float16_norms(keys, values, ratio):
    squares = (keys.half() * 1000).norm(dim=-1).nan_to_num(torch.inf)
    index = squares.argsort(dim=-1, stable=True)[..., : retained_count(keys.shape[2], ratio), None].sort(2).values
    return _take(keys, index), _take(values, index)


@pytest.mark.parametrize(
    ("compressor", "name", "words"),
    [
        (in_norm_order, "time_order", "positions [1, 0] retained from 2 tokens"),
        (binary_ceiling, "retained_count", "but should be"),
        (nothing_on_short_caches, "retained_count", "0 keys and 0 values retained of 1 tokens"),
        (highest_norms, "lowest_norms", "but should be [0]"),
        (values_of_another_head, "pairing", "tagged (row, head, position)"),
        (choice_of_the_first_row, "independence", "alone"),
        (view_of_the_full_buffer, "memory", "are kept alive"),
        (writes_to_its_input, "memory", "wrote to its input"),
        (silent_about_nan, "nonfinite", "did not raise"),
        (float16_norms, "scaling", "keys times"),
    ],
)
def test_a_broken_compressor_is_refuted_by_its_law(compressor, name, words):
    result = run_check(name, compressor, examples=300)
    assert result.verdict == "refuted"
    assert words in result.counterexample


def test_the_seed_bug_shrinks_to_two_tokens():
    result = run_check("time_order", in_norm_order)
    assert result.counterexample == (
        "time order: positions [1, 0] retained from 2 tokens at ratio 1.0, but should ascend: [0, 1]"
    )


def test_a_result_says_the_law_and_how_hard_it_tried():
    result = run_check("time_order", compress, examples=20)
    assert (result.law, result.verdict, result.examples) == ("Retained positions ascend.", "holds", 20)


def test_the_same_seed_draws_the_same():
    outcomes = {run_check("retained_count", binary_ceiling, seed=3).counterexample for _ in range(2)}
    assert len(outcomes) == 1


def test_unknown_and_duplicate_checks_are_refused():
    with pytest.raises(ValueError, match="no check is named 'time'; there are"):
        law("time")
    with pytest.raises(ValueError, match="'time_order' is in the catalogue already"):
        check(CHECKS["time_order"])


@settings(max_examples=20)
@given(caches())
def test_tagged_values_tell_their_place_in_every_dtype(cache):
    assert torch.equal(cache.positions(cache.values)[0, 0], torch.arange(cache.length))
