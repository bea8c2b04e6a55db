from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from mutants import MUTANTS, PROMISES
from mutants.correct import CORRECT
from mutants.order import argsort_then_slice
from mutants.parts import keep, squares

from knorm import compress, retained_count
from knorm.laws import CHECKS, KNORM, Subject, Traits, check_compressor, describe, iter_results, run_check
from knorm.laws.runner import applies

LAWS = (Path(__file__).parents[2] / "docs" / "laws.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_refuted_by_its_check(mutant):
    check = CHECKS[mutant.check]
    assert applies(check, mutant.subject)
    result = run_check(check, mutant.subject)
    assert result.verdict == "refuted"
    assert mutant.words in result.counterexample


@pytest.mark.parametrize("correct", CORRECT, ids=lambda correct: correct.name)
@pytest.mark.usefixtures("fewer")  # tools/bench_laws.py does it in full, with many seeds
def test_a_correct_subject_is_refuted_by_nothing_but_what_is_expected(correct):
    results = [r for r in iter_results(correct.subject, expected_failures=correct.expected) if r.reason is None]
    assert {r.verdict for r in results} == {"holds"}


@pytest.mark.parametrize("correct", [each for each in CORRECT if each.expected], ids=lambda correct: correct.name)
def test_what_is_expected_to_fail_does(correct):
    results = iter_results(correct.subject, expected_failures=correct.expected, select=correct.expected)
    assert {r.verdict for r in results} == {"expected failure"}


def test_there_are_enough_of_both():
    assert len(MUTANTS) >= 50
    assert len(CORRECT) >= 11
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_a_mutant_says_its_bug_and_promises_what_its_check_needs():
    assert not [mutant.name for mutant in MUTANTS if not mutant.bug.endswith(".")]
    assert not [mutant.name for mutant in MUTANTS if not mutant.words]


def exclusive():
    """check -> the mutants that no other check refutes, as the committed table has them."""
    laws = LAWS[: LAWS.index(" mutants\n\n|")]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| \d+ \| (.+) \|$", laws, re.MULTILINE)
    return {check: re.findall(r"`(\w+)`", alone) for check, alone in rows}


def test_every_check_alone_refutes_a_mutant():
    table = exclusive()
    assert set(table) == set(CHECKS), "run python tools/bench_laws.py matrix"
    assert not [check for check, alone in table.items() if not alone]
    assert {name for alone in table.values() for name in alone} <= {mutant.name for mutant in MUTANTS}


def test_every_mutant_stands_in_the_table():
    assert not [mutant.name for mutant in MUTANTS if f"| `{mutant.name}` | {mutant.bug} |" not in LAWS]


@pytest.mark.parametrize("seed", [9, 15, 16, 19])
def test_scores_that_overflow_are_found_whatever_is_drawn(seed):
    mutant = next(mutant for mutant in MUTANTS if mutant.check == "ranks_numbers")
    result = run_check(CHECKS["ranks_numbers"], mutant.subject, seed=seed)
    assert result.verdict == "refuted"
    assert mutant.words in result.counterexample


def run_on_seed_document(compressor, seed):
    return run_check(CHECKS["time_order"], Subject("l2compress", Traits(**PROMISES), compress=compressor), seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_the_seed_documents_bug_shrinks_to_three_tokens(seed):
    result = run_on_seed_document(argsort_then_slice, seed)
    assert result.verdict == "refuted"
    length = int(re.match(r"keys \[\d, \d, (\d+), 4\]", result.given)[1])
    assert length <= 3


def sorted_back(keys, values, keep_ratio):
    """The seed document's fix: the chosen positions are sorted before they are gathered."""
    order = squares(keys).argsort(dim=-1, stable=True)[..., : retained_count(keys.shape[2], keep_ratio)]
    return keep(keys, values, order.sort(dim=-1).values)


def test_the_seed_documents_fix_holds():
    assert run_on_seed_document(sorted_back, 0).verdict == "holds"


@pytest.mark.parametrize(
    "promised",
    [
        {"protect_first": 4},
        {"protect_first": 2, "protect_recent": 3},
        {"prune_after": 32},
        {"prune_after": 512},
        {"skip_layers": (0,)},
        {"skip_layers": (7,)},
    ],
    ids=str,
)
@pytest.mark.usefixtures("fewer")
def test_knorms_own_core_holds_however_it_is_configured(promised):
    results = check_compressor(compress, replace(KNORM, **promised), seed=1)
    assert not [describe(result) for result in results if result.failed]


@pytest.mark.usefixtures("fewer")
def test_norms_in_float32_hold():
    def float32(keys, values, keep_ratio):
        if not keys.shape[2]:
            raise ValueError("no tokens")
        order = keys.float().square().sum(-1).argsort(dim=-1, stable=True)
        index = order[..., : retained_count(keys.shape[2], keep_ratio)].sort(-1).values[..., None]
        return tuple(x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))

    results = check_compressor(float32, {"scores": "key_norm", "rounding": "ceil", "ties": "earlier"}, seed=2)
    assert not [describe(result) for result in results if result.failed]


@pytest.mark.parametrize("seed", [8, 9])
def test_binary_rounding_is_refuted_whatever_is_drawn(seed):
    for mutant in MUTANTS:
        if mutant.name in ("binary_ceiling", "binary_compression_ratio"):
            assert run_check(CHECKS[mutant.check], mutant.subject, seed=seed).verdict == "refuted"
