from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from goldens import ELSEWHERE, HERE, NLL, NOISE, TOKENS, candidate, measured, metric
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from knorm.cli import main
from knorm.golden import cases, rules, verify
from knorm.golden.cases import Case
from knorm.golden.environment import device_class
from knorm.golden.files import Damaged
from knorm.golden.format import Gate, Measured, environment_changes
from knorm.golden.gates import Results, gate_changes, judge
from knorm.golden.rules import MEAN_ABSOLUTE, RULES, Pair
from knorm.golden.shift import shift_of

ENVIRONMENTS = {"same": HERE, "versions": HERE.model_copy(update={"device": "another"}), "elsewhere": ELSEWHERE}
BLOCKS = np.random.Generator(np.random.PCG64(3)).normal(0.0, 0.01, (12, 1))


# Each rule in each environment


def example(rule, change):
    """A metric of each rule: as it was accepted, or changed for the worse or the better; with its tensors."""
    step = {"equal": 0, "worse": 1, "better": -1}[change]
    gate = Gate(rule=rule, threshold=0.05)
    if rule == "tokens":
        nll = NLL + np.float32(0.5 * step)
        return metric(rule, float(nll.astype(np.float64).mean()), "nll", TOKENS, "lower"), {rule: nll}
    if rule == "close":
        numbers = NLL + np.float32(5.0 * step)
        return metric(rule, float(numbers.mean()), "value", gate, "lower"), {rule: numbers}
    if rule == "timing":
        blocks = BLOCKS + 0.2 * step
        return metric(rule, float(np.exp(blocks.mean())), "ratio", gate, "lower"), {rule: blocks}
    if rule == "at_most":
        return metric(rule, 1.5 + 0.2 * step, "ratio", gate, "lower"), {}
    return metric(rule, 100 + step, "count", Gate(rule=rule, threshold=0.002), "lower"), {}


def results(change, environment=HERE, rules=tuple(RULES)):
    examples = [example(rule, change) for rule in rules]
    tensors = {name: tensor for _, each in examples for name, tensor in each.items()}
    return Results(tuple(one for one, _ in examples), tensors, environment)


EQUAL, ANY, SHOWN, WORSE = (  # verdicts where nothing changed, where it is worse, and where it is better
    ("holds", "holds", "holds"),
    ("holds", "moved", "moved"),
    ("holds", "shown", "shown"),
    ("holds", "moved", "holds"),
)
EXPECTED = {
    "exact": {"same": ANY, "versions": ANY, "elsewhere": ANY},
    "same_environment": {"same": ANY, "versions": SHOWN, "elsewhere": SHOWN},
    "same_versions": {"same": ANY, "versions": ANY, "elsewhere": SHOWN},
    "tokens": {"same": ANY, "versions": ANY, "elsewhere": ANY},
    "exact_here": {"same": ANY, "versions": ANY, "elsewhere": ANY},
    "within": {"same": ANY, "versions": ANY, "elsewhere": ANY},
    "near": {"same": ANY, "versions": ANY, "elsewhere": ANY},
    "close": {"same": ANY, "versions": ANY, "elsewhere": ANY},
    "at_most": {"same": WORSE, "versions": WORSE, "elsewhere": WORSE},
    "timing": {"same": WORSE, "versions": ("holds", "shown", "holds"), "elsewhere": ("holds", "shown", "holds")},
}


def test_every_rule_has_an_example_here():
    assert {*EXPECTED} == {*RULES}


@pytest.mark.parametrize("change", ["equal", "worse", "better"])
@pytest.mark.parametrize("where", ENVIRONMENTS)
@pytest.mark.parametrize("rule", EXPECTED)
def test_a_rule_judges_where_it_speaks_and_is_shown_elsewhere(rule, where, change):
    (finding,) = judge(results("equal", rules=[rule]), results(change, ENVIRONMENTS[where], [rule]))
    assert finding.verdict == EXPECTED[rule][where][("equal", "worse", "better").index(change)]
    assert (finding.worse > 0) == (change == "worse")
    assert finding.low is None or finding.low - 1e-9 <= finding.difference <= finding.high + 1e-9
    assert bool(finding.evidence) >= (finding.verdict != "holds"), "a verdict has its evidence"


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run `knorm golden` where a case gives what it is told to, in the environment it is told to."""
    state = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KNORM_COMMIT", "a" * 40)
    Path("golden").mkdir()
    case = Case(
        "rules", "each rule", lambda: {}, lambda *_: Measured(state["case"].metrics, state["case"].tensors), timed=True
    )
    for module in (cases, verify):
        monkeypatch.setattr(module, "CASES", {"rules": case})
    monkeypatch.setattr(verify, "environment", lambda *_: state["case"].environment)

    def run(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["knorm", "golden", *arguments, "--golden-dir", "golden", "--json", "out.json"]
        )
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr()

    def settle(found):
        state["case"] = found

    def start(found):
        settle(found)
        assert run("record", "rules")[0] == 0
        assert run("accept", "rules", "--reason", "first")[0] == 0

    run.settle, run.start = settle, start
    return run


def from_json(key):
    return json.loads(Path("out.json").read_text())[key]


@pytest.mark.parametrize("change", ["equal", "worse", "better"])
@pytest.mark.parametrize("where", ENVIRONMENTS)
def test_verify_and_diff_give_the_same_verdicts(command, where, change):
    command.start(results("equal"))
    command.settle(results(change, ENVIRONMENTS[where]))
    verified, _ = command("verify", "rules")
    (outcome,) = from_json("outcomes")
    assert command("record", "rules", "--unmoved")[0] == 0
    differing, _ = command("diff")
    findings = from_json("changes")[f"rules/{device_class('cpu')}"]
    assert findings == outcome["findings"]
    place = ("equal", "worse", "better").index(change)
    assert {f["metric"]: f["verdict"] for f in findings} == {r: EXPECTED[r][where][place] for r in EXPECTED}
    assert verified == differing == (change != "equal")


def times(rise, count):
    """As many ratios of times, with noise that hides a small rise."""
    gate = Gate(rule="timing", threshold=0.05)
    made = [metric(f"tpot/{i}", float(np.exp(rise)), "ratio", gate, "lower") for i in range(count)]
    return Results(tuple(made), {each.name: 1.75 * BLOCKS + rise for each in made}, HERE)


APART = ["same_environment", "same_versions", "timing"]  # rules that do not speak elsewhere


@pytest.mark.parametrize(
    ("accepted", "found", "verdict"),
    [
        (results("equal", HERE, APART), results("worse", ELSEWHERE, APART), "shown"),
        (times(0.0, 6), times(0.03, 6), "inconclusive"),
    ],
)
def test_what_is_shown_or_inconclusive_is_no_failure_of_diff(command, accepted, found, verdict):
    command.start(accepted)
    command.settle(found)
    assert command("verify", "rules")[0] == 0
    assert {f["verdict"] for f in from_json("outcomes")[0]["findings"]} == {verdict}
    assert command("record", "rules", "--unmoved")[0] == 0
    code, (out, _) = command("diff")
    assert code == 0
    assert "moved" not in out
    assert {f["verdict"] for f in from_json("changes")[f"rules/{device_class('cpu')}"]} == {verdict}


def test_times_share_the_error_rate():
    assert judge(times(0.0, 1), times(0.03, 1))[0].verdict == "moved"
    assert {finding.verdict for finding in judge(times(0.0, 6), times(0.03, 6))} == {"inconclusive"}


def test_of_a_new_golden_everything_is_new():
    findings = verify.changes(None, (candidate(), {"nll/0.5": NLL}))
    assert [(f.verdict, f.evidence) for f in findings] == [("moved", "is new: record it again")] * 4


@pytest.mark.parametrize("where", ENVIRONMENTS)
def test_each_ratio_of_times_is_resampled_once(monkeypatch, where):
    calls, real = [], rules.compare_times
    monkeypatch.setattr(rules, "compare_times", lambda *a, **k: calls.append(k["alpha"]) or real(*a, **k))
    judge(times(0.0, 6), replace(times(0.1, 6), environment=ENVIRONMENTS[where]))
    assert calls == [pytest.approx(0.01 / 6)] * 6


# What each rule bounds


def judged(found, environment=HERE):
    """Findings about a run, against the golden of `goldens.py`."""
    run = Results(found.metrics, found.tensors, environment)
    return {finding.metric: finding for finding in judge(Results.of(candidate(), {"nll/0.5": NLL}), run)}


def verdicts(found, environment=HERE):
    return {name: finding.verdict for name, finding in judged(found, environment).items()}


def test_the_same_holds():
    assert set(verdicts(measured()).values()) == {"holds"}
    assert set(verdicts(measured(), ELSEWHERE).values()) == {"holds"}


@pytest.mark.parametrize("environment", [HERE, ELSEWHERE])
def test_counts_are_exact_everywhere(environment):
    assert verdicts(measured(seen=101), environment)["seen/0.5"] == "moved"


def test_schedules_are_exact_in_the_same_environment_and_shown_elsewhere():
    assert verdicts(measured(schedule="cd34"))["evicted_at/0.5"] == "moved"
    assert verdicts(measured(schedule="cd34"), ELSEWHERE)["evicted_at/0.5"] == "shown"


def test_a_value_that_is_not_finite_moves_in_words_that_json_can_hold():
    ratio = judged(measured(ratio=float("nan")))["ppl_ratio/0.5"]
    json.dumps(asdict(ratio), allow_nan=False)
    assert (ratio.verdict, ratio.measured, ratio.evidence) == ("moved", "nan", "is nan, not at most 1.5")


def test_a_ratio_may_fall_but_not_rise():
    assert verdicts(measured(ratio=1.5002))["ppl_ratio/0.5"] == "moved"
    assert verdicts(measured(ratio=1.5001))["ppl_ratio/0.5"] == "holds"
    assert verdicts(measured(ratio=1.2))["ppl_ratio/0.5"] == "holds"


def test_what_a_golden_does_not_know_of_its_environment_does_not_count():
    driven = HERE.model_copy(update={"driver": "580.65"})
    assert environment_changes(HERE, driven) == []
    assert environment_changes(HERE, driven.model_copy(update={"threads": 2})) == ["threads"]
    assert environment_changes(driven, HERE) == ["driver"]


def test_metrics_that_come_and_go_are_moved():
    less = Measured(measured().metrics[:3], {"nll/0.5": NLL})
    more = Measured((*measured().metrics, metric("new", 1)), {"nll/0.5": NLL})
    assert verdicts(less)["ppl_ratio/0.5"] == "moved"
    assert verdicts(more)["new"] == "moved"


def moved(nll, same, golden=NLL):
    """Why tokens moved; empty where they did not."""
    before = metric("nll", 1.0, "nll", TOKENS, "lower")
    where = "same" if same else "elsewhere"
    found = RULES["tokens"].judge(Pair(before, before, golden.astype(np.float64), nll.astype(np.float64), where))
    assert (found.verdict == "moved") == bool(found.evidence)
    return found.evidence


def test_one_token_beyond_the_tolerance_moves_the_same_environment_only():
    one = NLL.copy()
    one[3, 7] += 1e-3
    assert moved(one, same=True) == "window 3, token 7 moved by 1.0e-03 nats, at most 5e-05 in the same environment"
    assert moved(one, same=False) == "", "a near-tie of one window may flip"


def test_the_mean_absolute_difference_is_bounded_where_the_mean_stands_still():
    swung = NLL + np.where(np.arange(40) % 2, 1, -1) * 1.5 * MEAN_ABSOLUTE
    assert "on average" in moved(swung, same=True)
    assert "the typical window's tokens moved by 1.5e-04" in moved(swung, same=False)


@pytest.mark.parametrize("by", [5.0, -2.0, 0.1])
def test_damage_to_few_windows_moves_wherever_it_is_measured(by):
    few = NLL.copy()
    few[1:3] += by
    few[5] -= by
    assert moved(few, same=True)
    assert "one window's tokens moved by" in moved(few, same=False)


def test_a_shift_of_all_windows_moves_and_one_within_the_noise_does_not():
    generator = np.random.default_rng(1)
    noise = generator.normal(0, 1e-6, NLL.shape)
    noise -= noise.mean(1, keepdims=True)
    assert "the mean moved by +5.0e-06 nats" in moved(NLL.astype(np.float64) + 5e-6 + noise, same=False)
    assert moved(NLL.astype(np.float64) + 1.5e-6 + noise, same=False) == ""
    per_window = 3e-6 + 8e-6 * np.array([[1], [-1]] * 4)
    assert moved(NLL.astype(np.float64) + per_window, same=False) == "", "the interval over windows holds 0"


@pytest.mark.parametrize("same", [True, False])
def test_what_is_not_a_number_or_of_another_shape_moves(same):
    broken = NLL.copy()
    broken[2, 5] = np.nan
    assert moved(broken, same) == "the value of window [2, 5] is not finite"
    assert "[7, 40] windows and tokens, but the golden has [8, 40]" in moved(NLL[:7], same)


@given(st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_the_interval_is_students_over_windows(windows, seed):
    difference = np.random.default_rng(seed).normal(0.1, 1, (windows, 5))
    shift = shift_of(difference, np.zeros_like(difference), alpha=0.025)
    low, high = stats.ttest_1samp(difference.mean(1), 0).confidence_interval(0.95)
    assert (shift.low, shift.high) == pytest.approx((low, high))
    assert shift.mean == pytest.approx(difference.mean())
    assert shift.largest == np.abs(difference).max() == abs(difference[shift.where])


def test_one_window_has_no_interval_but_its_tokens_are_still_bounded():
    assert moved(NLL[:1] + np.float32(0.1), same=False, golden=NLL[:1]).startswith("the typical window's")


def judge_one(before, now, tensors=(None, None)):
    old, new = ({} if tensor is None else {before.name: tensor} for tensor in tensors)
    (finding,) = judge(Results((before,), old, HERE), Results((now,), new, HERE))
    return finding


def test_what_is_within_the_noise_is_not_worse():
    old, new = (metric("nll", value, "nll", TOKENS, "lower") for value in (3.0, 3.000001))
    assert judge_one(old, new, (NLL, NLL)).worse == 0
    assert judge_one(metric("seen", 1), metric("seen", 2)).worse == 0, "neither way is better"
    higher = [metric("rate", value, "memory", Gate(rule="at_most", threshold=0.0), "higher") for value in (10.0, 9.0)]
    assert judge_one(*higher).worse == pytest.approx(10)


@pytest.mark.parametrize("values", [(0.0, 5.0), (1.0, float("inf")), (1.0, float("nan"))])
def test_what_was_nothing_or_is_not_finite_is_worse_by_a_number_that_json_holds(values):
    gate = Gate(rule="at_most", threshold=0.0)
    finding = judge_one(*(metric("bytes", value, "memory", gate, "lower") for value in values))
    assert (finding.verdict, finding.worse) == ("moved", 1e9)
    json.dumps(asdict(finding), allow_nan=False)


@pytest.mark.parametrize(
    ("rule", "tensors", "words"),
    [
        ("tokens", (NLL, None), "has no tokens to compare"),
        ("timing", (None, BLOCKS), "has no blocks to compare"),
        ("tokens", (NLL[0], NLL[0]), "[40] windows and tokens"),
        ("tokens", (NLL[:0], NLL[:0]), "[0, 40] windows and tokens"),
        ("timing", (BLOCKS[:, 0], BLOCKS), "blocks of shape [12], but should be [blocks, 1]"),
        ("timing", (BLOCKS[:7], BLOCKS[:7]), "7 blocks, but should be at least 8"),
        ("timing", (BLOCKS, BLOCKS * np.inf), "a block's log-ratio is not finite"),
        ("exact", (np.zeros(3), np.zeros((2, 3))), "shape [2, 3], but the golden has [3]"),
        ("exact", (np.array(1), np.array(2)), "2, but the golden has 1"),
        ("exact", (np.array([[1, 2]]), np.array([[1, 3]])), "positions [1, 3] at [0], but the golden has [1, 2]"),
    ],
)
def test_tensors_that_do_not_fit_move_in_words(rule, tensors, words):
    before, now = (metric("one", value, "ratio", Gate(rule=rule), "lower") for value in (1.0, 2.0))
    finding = judge_one(before, now, tensors)
    assert finding.verdict == "moved"
    assert words in finding.evidence


def test_a_number_that_became_text_moves_and_a_golden_of_text_in_its_place_is_damaged():
    gate = Gate(rule="at_most", threshold=0.0)
    finding = judge_one(metric("bytes", 1.0, "memory", gate), metric("bytes", "many", "memory", gate))
    assert finding.evidence == "is 'many', but should be a number"
    with pytest.raises(Damaged, match=r"field metrics.0.value is 'many', but should be a number"):
        candidate(Measured((metric("bytes", "many", "memory", gate),)))


def test_a_rule_that_is_unknown_is_damage():
    known = r"field metrics.0.gate.rule is 'at_least', but this knorm knows exact, .*timing"
    with pytest.raises(Damaged, match=known):
        candidate(Measured((metric("bytes", 1, "memory", Gate(rule="at_least")),)))


def test_whatever_decides_later_acceptances_is_part_of_the_gate():
    def changed(**fields):
        first, *rest = measured().metrics
        after = candidate(Measured((first.model_copy(update=fields), *rest), {"nll/0.5": NLL}))
        return gate_changes(candidate(), after)

    loose = TOKENS.model_copy(update={"noise": NOISE.model_copy(update={"typical": 1.0})})
    assert changed(gate=loose) == {"nll/0.5": "judged by another gate: typical 1e-05 becomes 1.0"}
    assert changed(direction="same") == {"nll/0.5": "judged by another gate: direction lower becomes same"}
    assert changed(unit="bits/token") == {"nll/0.5": "judged by another gate: unit nats/token becomes bits/token"}
    more_runs = TOKENS.model_copy(update={"noise": NOISE.model_copy(update={"runs": 500})})
    assert not changed(gate=more_runs)
    assert not changed(value=9.0)
