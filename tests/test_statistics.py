from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from knorm.statistics import compare, effective_blocks, overall


def logs(slowdown=0.0, spread=0.01, blocks=16, seed=0):
    return (math.log1p(slowdown) + spread * np.random.default_rng(seed).standard_normal(blocks)).tolist()


def test_the_t_interval_is_students():
    values = logs(seed=1)
    found = compare(values, margin=0.05)
    assert found.effective == len(values), "neighbours are not alike: nothing is widened"
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.98)
    assert np.log(found.t) == pytest.approx([expected.low, expected.high])
    assert found.low <= min(found.t[0], found.bootstrap[0])
    assert found.high >= max(found.t[1], found.bootstrap[1])


def test_the_smallest_detectable_slowdown_is_found_in_95_of_100_runs():
    """The MDE of a typical run, injected: FAIL needs a lower bound above 0, whatever the margin."""
    mde = compare(logs(blocks=12, seed=1), margin=1e-9).mde
    rng = np.random.default_rng(2)
    error = mde / (stats.t.ppf(0.99, 11) + stats.t.ppf(0.95, 11))
    runs = math.log1p(mde) + error * math.sqrt(12) * rng.standard_normal((2000, 12))
    t = runs.mean(1) / (runs.std(1, ddof=1) / math.sqrt(12))
    assert 0.93 < (t > stats.t.ppf(0.99, 11)).mean() < 0.985


@pytest.mark.parametrize(
    ("slowdown", "spread", "verdict"),
    [
        (0.0, 0.01, "PASS"),
        (-0.3, 0.01, "PASS"),
        (0.02, 0.01, "PASS"),
        (0.1, 0.01, "FAIL"),
        (0.06, 0.01, "FAIL"),
        (0.0, 0.2, "INCONCLUSIVE"),
        (0.05, 0.2, "INCONCLUSIVE"),
    ],
)
def test_verdicts(slowdown, spread, verdict):
    assert compare(logs(slowdown, spread), margin=0.05).verdict == verdict


def test_a_run_with_the_blocks_that_inconclusive_asks_for_decides():
    found = compare(logs(0.03, 0.06), margin=0.05)
    assert found.verdict == "INCONCLUSIVE"
    for seed in range(20):
        assert compare(logs(0.03, 0.06, int(1.5 * (16 + found.more)), seed), margin=0.05).verdict != "INCONCLUSIVE"


def test_nothing_changed_fails_at_most_as_often_as_stated():
    verdicts = [compare(logs(0, 0.08, 10, seed), margin=0.001, alpha=0.05).verdict for seed in range(200)]
    assert verdicts.count("FAIL") <= 20  # of 200 at 5%: 10 expected


def test_blocks_that_resemble_their_neighbours_count_less():
    rng, series = np.random.default_rng(0), [0.0]
    for step in rng.standard_normal(400):
        series.append(0.6 * series[-1] + step)
    assert effective_blocks(series) == pytest.approx(400 * 0.4 / 1.6, rel=0.3)
    assert effective_blocks(rng.standard_normal(400).tolist()) > 340
    assert effective_blocks([1.0, -1.0] * 8) == 16  # negative correlation earns nothing
    found, fewer = compare(series[:40], margin=0.05), compare(sorted(series[:40]), margin=0.05)
    assert fewer.t[1] - fewer.t[0] > found.t[1] - found.t[0]


def test_blocks_that_are_all_alike_have_no_noise():
    found = compare([0.1] * 8, margin=0.05)
    assert (found.verdict, found.mde) == ("FAIL", pytest.approx(0, abs=1e-9))
    assert found.low == pytest.approx(found.high)
    assert compare([0.0] * 8, margin=0.05).verdict == "PASS"


def test_too_few_blocks_and_broken_clocks_are_refused():
    with pytest.raises(ValueError, match="7 blocks, but should be at least 8"):
        compare([0.0] * 7, margin=0.05)
    with pytest.raises(ValueError, match="not finite"):
        compare([0.0] * 7 + [math.nan], margin=0.05)


def test_against_a_golden_the_rise_of_the_ratio_is_judged():
    old = logs(0.5, 0.01, seed=3)
    assert compare(logs(0.5, 0.01, seed=4), margin=0.05, golden=old).verdict == "PASS"
    assert compare(logs(0.3, 0.01, seed=4), margin=0.05, golden=old).verdict == "PASS"
    risen = compare(logs(0.65, 0.01, seed=4), margin=0.05, golden=old)
    assert risen.verdict == "FAIL"
    welch = stats.ttest_ind(logs(0.65, 0.01, seed=4), old, equal_var=False).confidence_interval(0.98)
    assert np.log(risen.t) == pytest.approx([welch.low, welch.high], rel=0.2)
    assert compare(logs(0.5, 0.3, seed=4), margin=0.05, golden=old).verdict == "INCONCLUSIVE"


def test_one_verdict_of_many():
    assert overall(["PASS", "INCONCLUSIVE", "FAIL"]) == "FAIL"
    assert overall(["PASS", "INCONCLUSIVE"]) == "INCONCLUSIVE"
    assert overall(["PASS"]) == "PASS"
