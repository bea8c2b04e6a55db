from __future__ import annotations

import json
import os

import pytest

from knorm import Policy
from knorm.evaluation.curve import measure_row
from knorm.evaluation.doubts import fall, judge_measured, judge_reported, read_reported
from knorm.evaluation.runner import Runner
from knorm.evaluation.windows import cut_windows
from knorm.models import load_text

SEED = """keep_ratio,ppl_before,ppl_after
1.0,51.91,51.91
0.9,165.81,165.81
0.8,143.90,135.16
0.7,140.67,124.54
0.5,136.75,122.10
0.3,-,123.22
0.1,146.27,-
"""


@pytest.fixture
def table(tmp_path):
    def write(text, name="table.csv"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def judged(table, text, name="table.csv"):
    return [str(suspicion) for suspicion in judge_reported(read_reported(table(text, name)))]


def test_the_seed_documents_table_is_suspicious_in_three_ways(table):
    said = judged(table, SEED)
    assert any("ppl_before: perplexity falls from 165.81 at 0.9 to 136.75 at 0.5" in s for s in said)
    assert any("ppl_after: perplexity falls from 165.81 at 0.9 to 122.1 at 0.5" in s for s in said)
    assert sum("jumps from 51.91 at 1.0 to 165.81 at 0.9, 3.2-fold" in s for s in said) == 2
    assert any("equal at 0.9 but differ at 0.8, 0.7, 0.5" in s for s in said)
    for command in ("knorm explain --keep-ratio 0.9", "knorm check TARGET --select attention", "knorm ppl"):
        assert any(command in s for s in said)


def test_a_curve_that_rises_as_less_is_kept_is_not_suspicious(table):
    assert not judged(table, "keep_ratio,ppl\n1.0,33.9\n0.9,38.8\n0.5,39.4\n0.1,42.8\n")


def test_a_curve_that_never_moves_says_that_nothing_was_compressed(table):
    assert "nothing was compressed" in judged(table, "keep_ratio,ppl\n1.0,60.81\n0.5,60.81\n0.1,60.81\n")[0]


def test_other_tokens_at_other_ratios_and_a_missing_baseline_are_suspicious(table):
    assert (
        "score different tokens (512 at 1, 256 at 0.5)"
        in judged(table, "keep_ratio,ppl,tokens\n1,9,512\n0.5,10,256\n")[0]
    )
    assert "there is no row at ratio 1" in judged(table, "keep_ratio,ppl\n0.9,9\n0.5,10\n")[0]


@pytest.mark.parametrize("ppl", ["50\n0.9,10", "50\n0.9,30\n0.8,30.1\n0.7,30.2"])
def test_a_fall_from_the_full_cache_is_suspicious_too(table, ppl):
    assert "lies below the full cache's 50: that can be right" in judged(table, f"keep_ratio,ppl\n1.0,{ppl}\n")[0]


def test_errors_of_a_perplexity_are_no_perplexities_and_names_may_be_written_otherwise(table):
    (series,) = read_reported(table("Keep_Ratio , PPL,ppl_stderr\n1.0,9,0.4\n0.5,10,0.3\n", "T.CSV"))
    assert (series.name, series.ppl) == ("ppl", {"1.0": 9.0, "0.5": 10.0})


def test_what_knorm_ppl_writes_is_read_again(table):
    rows = {"rows": [{"keep_ratio": "1.0", "ppl": 30.0, "tokens": 9}, {"keep_ratio": "0.5", "ppl": 31.0, "tokens": 9}]}
    (series,) = read_reported(table(json.dumps(rows), "out.json"))
    assert (series.ppl, series.tokens) == ({"1.0": 30.0, "0.5": 31.0}, {"1.0": 9.0, "0.5": 9.0})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "has no rows"),
        ("t.csv", "keep_ratio,ppl\n", "has no rows"),
        ("t.csv", "ratio,ppl\n1,2\n", "has the columns ratio, ppl, but should have keep_ratio and ppl"),
        ("t.csv", "keep_ratio,loss\n1,2\n", "should have keep_ratio and ppl"),
        ("t.csv", "keep_ratio,ppl\n1.0,2\n0.5\n", "row 2: not as many cells as the header has"),
        ("t.csv", "keep_ratio,ppl\n1.0,2,3\n", "row 1: not as many cells"),
        ("t.csv", "keep_ratio,ppl\n1.0,many\n", "row 1: ppl='many', but should be a number"),
        ("t.csv", "keep_ratio,ppl\n1.0,nan\n", "should be a number"),
        ("t.csv", "keep_ratio,ppl\n1.0,0.5\n", "a perplexity is at least 1"),
        ("t.csv", "keep_ratio,ppl\n90%,2\n", "row 1: keep_ratio='90%', but should lie in"),
        ("t.csv", "keep_ratio,ppl\n1.5,2\n", "should lie in"),
        ("t.csv", "keep_ratio,ppl\n0.5,2\n0.50,3\n", "keep_ratio 0.5, 0.50 more than once"),
        ("t.csv", "keep_ratio,ppl\n0.5,-\n", "the column ppl is empty"),
        ("t.csv", "keep_ratio,ppl,ppl\n1.0,2,3\n", "has the column ppl more than once"),
        ("t.csv", f"keep_ratio,ppl\n1.0,{'9' * 200_000}\n", "is not CSV"),
        ("t.json", f'[{{"keep_ratio": 1, "ppl": {10**400}}}]', "should be a number"),
        ("t.json", '[{"keep_ratio": 1, "ppl": true}]', "should be a number"),
        ("t.json", "[" * 200_000, "is not JSON"),
        ("t.json", "{", "is not JSON"),
        ("t.json", "[1, 2]", "should be a list of objects"),
        ("t.json", "{}", "should be a list of objects"),
        ("t.csv", "keep_ratio,ppl\n1.0,1_0\n", "ppl='1_0', but should be a number"),
        ("t.csv", "keep_ratio,ppl\n1.0,١٢\n", "but should be a number"),
        ("t.csv", "keep_ratio,ppl\n0.5_0,12\n", "keep_ratio='0.5_0', but should lie in"),
        ("t.csv", f"keep_ratio,ppl\n{'9' * 100_000},12\n", "row 1: keep_ratio=999"),
        ("t.csv", f"keep_ratio,ppl\n1.0,{'x' * 100_000}\n", "row 1: ppl='xxx"),
        ("t.csv", f"keep_ratio,{'x' * 100_000}\n1.0,12\n", "should have keep_ratio and ppl"),
        ("t.csv", f"keep_ratio,{'x' * 200_000}\n1.0,12\n", "is not CSV"),
        ("t.csv", 'keep_ratio,ppl\n1.0,"12\n', "is not CSV"),
        ("t.csv", "keep_ratio,PPL,ppl\n1.0,2,3\n", "has the column ppl more than once"),
        ("t.json", '[{"keep_ratio": 1, "PPL": 2, "ppl": 3}]', "has the column ppl more than once"),
        ("t.json", '[{"keep_ratio": 1, "ppl": 2, "ppl": 3}]', "field ppl stands there twice"),
        ("t.json", '[{"keep_ratio": 1, "ppl": "1_0"}]', "should be a number"),
        ("t.json", '[{"keep_ratio": 1, "ppl": 9, "tokens": -3}]', "row 1: tokens=-3, but should be a count of tokens"),
        ("t.json", '[{"keep_ratio": 1, "ppl": 9, "tokens": 0}]', "should be a count of tokens"),
        ("t.json", '[{"keep_ratio": 1, "ppl": 9, "tokens": 2.5}]', "should be a count of tokens"),
        ("t.json", json.dumps([{"keep_ratio": 1, "ppl": 9}] * 1001), "has 1001 rows and 2 columns, but should have at"),
        ("t.json", json.dumps([{"keep_ratio": 1} | {f"ppl{n}": 9 for n in range(100)}]), "and 101 columns"),
    ],
)
def test_a_malformed_table_is_refused(table, name, text, message):
    with pytest.raises(ValueError, match=r"t[.](csv|json)") as raised:
        read_reported(table(text, name))
    assert message in str(raised.value)
    assert len(str(raised.value)) < 1000
    assert "\n" not in str(raised.value)


def test_a_missing_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_reported(tmp_path / "nowhere.csv")


def test_the_widest_fall_below_ratio_1_is_found():
    assert fall({"1.0": 50.0, "0.9": 160.0, "0.8": 130.0, "0.5": 120.0}) == ("0.9", "0.5")
    assert fall({"1.0": 50.0, "0.9": 40.0}) is None
    assert fall({"0.9": 100.0, "0.5": 99.5}) is None, "within a percent"


def test_a_falling_curve_measured_here_comes_with_its_cause(embedded):
    model, tokenizer = embedded
    runner = Runner(model, cut_windows(tokenizer, load_text("narrative"), 200, 4))
    policies = [Policy(ratio, 32, (0,), protocol="streaming") for ratio in ("1.0", "0.9", "0.5")]
    rows = [measure_row(runner, policy) for policy in policies]
    (found,) = judge_measured(runner, rows, policies)
    assert found.what.startswith("perplexity falls from ")
    assert "the newest tokens had been starved" in found.then
    assert f"{rows[1].recent:.1f} of the newest 16 are cached at 0.9" in found.then


def test_perplexity_outside_full_and_empty_cache_is_reported_as_possible(embedded):
    model, tokenizer = embedded
    runner = Runner(model, cut_windows(tokenizer, load_text("narrative"), 100, 2))
    policies = [Policy(ratio, 32, (0,), protocol="streaming") for ratio in ("1.0", "0.9")]
    rows = [measure_row(runner, policy) for policy in policies]
    (found,) = judge_measured(runner, rows, policies, nll_empty=rows[0].nll + 0.01)
    assert "perplexity at 0.9 lies outside" in found.what
    assert "that can be right" in found.then


def test_a_column_that_only_some_rows_have_is_read(table):
    rows = [{"keep_ratio": 1, "ppl": 9}, {"keep_ratio": 0.5, "ppl": 10, "ppl_after": 8}]
    first, second = read_reported(table(json.dumps(rows), "t.json"))
    assert (first.ppl, second.ppl) == ({"1": 9.0, "0.5": 10.0}, {"0.5": 8.0})


def test_a_cell_may_hold_a_line_end(table):
    (series,) = read_reported(table('keep_ratio,ppl,note\n1.0,9,"two\nlines"\n0.5,10,\u2028\n'))
    assert series.ppl == {"1.0": 9.0, "0.5": 10.0}


@pytest.mark.parametrize("name", ["t.csv", "t.json"])
def test_what_is_no_file_or_too_large_is_not_read(tmp_path, name):
    place = tmp_path / name
    for make, words in (
        (lambda: os.mkfifo(place), "is a pipe, but should be a file"),
        (lambda: place.symlink_to("/dev/zero"), "is a device, but should be a file"),
        (lambda: place.symlink_to(name), "Too many levels of symbolic links"),
        (lambda: place.symlink_to("gone"), "is a link to gone, which is not there"),
        (lambda: place.open("wb").truncate(2**24 + 1), "but should have at most 16,777,216"),
    ):
        make()
        with pytest.raises(ValueError, match=words):
            read_reported(place)
        place.unlink()
