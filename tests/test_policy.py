from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knorm import Policy, retained_count
from knorm.policy import SCORES, Score

fractions = st.fractions(min_value=Fraction(1, 1000), max_value=1, max_denominator=1000)
lengths = st.integers(1, 10_000)


@pytest.mark.parametrize(
    ("length", "ratio", "count"),
    [(100, 0.55, 55), (100, 0.07, 7), (10, 0.3, 3), (3, 0.1, 1), (1, 1e-9, 1), (7, 1, 7), (3, Fraction(1, 3), 1)],
)
def test_the_count_is_the_exact_ceiling(length, ratio, count):
    assert retained_count(length, ratio) == count


@given(lengths, st.integers(1, 1000))
def test_the_count_agrees_with_decimal_arithmetic(length, thousandths):
    ratio = Decimal(thousandths) / 1000
    ceiling = max(1, int((ratio * length).to_integral_value("ROUND_CEILING")))
    assert {retained_count(length, given) for given in (ratio, float(ratio), str(ratio))} == {ceiling}


@given(lengths, lengths, fractions, fractions)
def test_counts_never_fall_as_ratio_or_length_rises(one, two, small, large):
    (short, long), (low, high) = sorted((one, two)), sorted((small, large))
    assert 1 <= retained_count(short, low) <= retained_count(long, low) <= retained_count(long, high) <= long


@pytest.mark.parametrize("ratio", [np.float32(0.55), np.float64(0.5), torch.tensor(0.5), True, None, [0.5], 1j])
def test_a_ratio_of_another_type_is_refused(ratio):
    with pytest.raises(TypeError, match=r"keep_ratio=.*should be a float, str, Decimal or Fraction"):
        Policy(ratio)


@pytest.mark.parametrize(
    "ratio", [0, 0.0, -0.5, 1.01, 2, float("nan"), float("inf"), "", "half", "1/0", Decimal("NaN")]
)
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ValueError, match=r"keep_ratio=.*should lie in \(0, 1\]"):
        Policy(ratio)


def test_an_empty_cache_has_no_count():
    with pytest.raises(ValueError, match="length=0, but should be at least 1"):
        retained_count(0, 0.5)


def test_equal_policies_are_equal_however_written():
    policies = {
        Policy(0.55, skip_layers=(2, 0, 2), seed=7),
        Policy("0.55", skip_layers=[0, 2]),
        Policy(Decimal("0.550"), skip_layers={2, 0}, seed=1),
        Policy(Fraction(11, 20), skip_layers=iter((0, 2))),
    }
    assert len(policies) == 1
    assert policies.pop() == Policy(keep_ratio=0.55, skip_layers=(0, 2))
    assert Policy(Fraction(1, 3)).keep_ratio == Fraction(1, 3)
    assert Policy(0.5, score="random", seed=1) != Policy(0.5, score="random", seed=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_after": -1}, "prune_after=-1, but should be an integer of at least 0"),
        ({"prune_after": 1.5}, "prune_after=1.5, but should be an integer"),
        ({"protect_first": True}, "protect_first=True"),
        ({"protect_recent": "3"}, "protect_recent='3', but should be an integer"),
        ({"skip_layers": (-1,)}, "skip_layers=-1"),
        ({"skip_layers": 0}, "skip_layers=0, but should be layer indices"),
        ({"skip_layers": "01"}, "skip_layers='01'"),
        ({"score": "lowest"}, "score='lowest', but should be one of low_norm, high_norm, random"),
        ({"protocol": "decode"}, "protocol='decode', but should be one of prefill, streaming"),
        ({"score": "random", "seed": 0.5}, "seed=0.5, but should be an integer"),
        ({"protocol": "streaming"}, "prune_after=0 with protocol='streaming', but should be at least 2"),
        ({"protocol": "streaming", "prune_after": 1}, "should be at least 2"),
        (
            {"protocol": "streaming", "prune_after": 10, "protect_first": 2, "protect_recent": 4},
            "need 6 tokens, but keep_ratio=0.5 retains 5 of 10",
        ),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Policy(keep_ratio=0.5, **options)


def test_the_budget_leaves_short_and_protected_caches_whole():
    policy = Policy(0.5, prune_after=8, protect_first=1, protect_recent=2)
    assert [policy.budget(n) for n in (1, 7, 8, 9)] == [1, 7, 4, 5]
    assert Policy(0.5, protect_recent=4).budget(4) == 4
    with pytest.raises(ValueError, match=r"need 4 tokens, but keep_ratio=0.5 retains 3 of 6.*raise keep_ratio"):
        Policy(0.5, protect_recent=4).budget(6)


def test_lengths_of_other_integer_types_are_counted_exactly():
    for length in (np.int64(1_000_000), torch.tensor(1_000_000)):
        assert retained_count(length, 0.1234567890123456) == 123457
        assert type(Policy(0.1234567890123456).budget(length)) is int


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": "1e-3000000"}, "should lie in"),
        ({"keep_ratio": Decimal("sNaN")}, "should lie in"),
        ({"keep_ratio": 0.5, "skip_layers": torch.tensor([True, False, True])}, "skip_layers=tensor"),
        ({"keep_ratio": 0.5, "skip_layers": b"\x01"}, "should be layer indices"),
        ({"keep_ratio": 0.5, "prune_after": torch.tensor(True)}, "prune_after=tensor"),
        ({"keep_ratio": 0.5, "seed": "x"}, "seed='x', but should be an integer"),
        ({"keep_ratio": 0.5, "score": np.array(["low_norm", "random"])}, "score=array"),
    ],
)
def test_what_would_be_taken_for_something_else_is_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Policy(**options)


@pytest.mark.parametrize("ratio", ["0.5_0", "1_0", "٠.٥", "0.5\u0660"])
def test_a_ratio_that_only_python_reads_is_refused(ratio):
    with pytest.raises(ValueError, match="should lie in"):
        Policy(ratio)


def test_a_cache_of_less_than_nothing_has_no_budget():
    with pytest.raises(ValueError, match="length=-1, but should be a number of tokens"):
        Policy(0.5).budget(-1)


@given(
    st.one_of(
        fractions, st.floats(0, 1, exclude_min=True), st.sampled_from(["0.1", "1/3", Decimal("0.30000000000000004")])
    ),
    st.booleans(),
)
def test_a_policy_written_as_json_reads_back_as_itself(ratio, streaming):
    options = {"prune_after": 32, "protocol": "streaming"} if streaming else {"score": "random", "seed": -1}
    policy = Policy(ratio, skip_layers=(3, 1), **options)
    fields = json.loads(json.dumps(policy.as_json(), allow_nan=False))
    assert Policy(**fields) == policy
    assert fields["skip_layers"] == [1, 3]


def test_a_ratio_that_no_float_holds_is_written_as_a_fraction():
    assert Policy("1/3").as_json()["keep_ratio"] == "1/3"
    assert Policy("0.55").as_json()["keep_ratio"] == 0.55


def test_every_score_that_a_policy_takes_has_its_function():
    assert (*SCORES,) == get_args(Score)
