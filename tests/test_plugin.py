from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from knorm import compress
from knorm.laws import Subject, Traits, find, run_check

pytest_plugins = ["pytester"]

COMPRESSORS = """
from knorm import compress, retained_count

tried = []


def good(keys, values, keep_ratio):
    tried.append([list(keys.shape), keep_ratio])
    return compress(keys, values, keep_ratio)[:2]


def in_norm_order(keys, values, keep_ratio):
    index = keys.double().norm(dim=-1).argsort(dim=-1, stable=True)
    index = index[..., : retained_count(keys.shape[2], keep_ratio), None]
    return tuple(x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
"""

TESTS = """
import json, os
from pathlib import Path
from compressors import good, in_norm_order, tried
from knorm.laws import parametrize_with_checks

def failures(compressor):
    if compressor is not in_norm_order:
        return {"dtype": "it holds"}
    return {"full_ratio": "sorts by norm"}

@parametrize_with_checks([good, in_norm_order], expected_failures=failures)
def test_laws(compressor, check):
    tried.clear()
    check(compressor)
    if tried:
        folder = Path(os.environ["TRIED"])
        folder.mkdir(exist_ok=True)
        test = os.environ["PYTEST_CURRENT_TEST"].split("-")[-1].split("]")[0]
        (folder / test).write_text(json.dumps(tried))
"""

UNKNOWN = """
from compressors import good
from knorm.laws import parametrize_with_checks

@parametrize_with_checks([good], expected_failures=lambda _: {"tim_order": "a slip"})
def test_laws(compressor, check):
    check(compressor)
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Run pytest on a compressor that is right and one that is not; returns the result and what the first was given."""
    pytester.makepyfile(compressors=COMPRESSORS, test_laws=TESTS, test_unknown=UNKNOWN)
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:cacheprovider")
    monkeypatch.setenv("TRIED", "tried")

    def run(*options):
        result = pytester.runpytest_subprocess(*options)
        return result, {file.name: json.loads(file.read_text()) for file in Path("tried").glob("*")}

    return run


def draws(name, **options):
    """What a check gives a compressor."""
    tried = []

    def good(keys, values, keep_ratio):
        tried.append([list(keys.shape), keep_ratio])
        return compress(keys, values, keep_ratio)[:2]

    assert run_check(find(name), Subject("good", Traits(), good), **options).verdict == "holds"
    return tried


@pytest.mark.processes
def test_law_tests_fail_and_pass_as_laws_do(run):
    names = "time_order or (full_ratio and not plain) or dtype"
    result, tried = run("-rfExX", "-m", "knorm", "-k", names, "--continue-on-collection-errors")
    out = result.stdout.str()
    result.assert_outcomes(passed=3, failed=2, xfailed=1, errors=1)
    assert "knorm: profile quick, seed 0\n" in out
    assert "XFAIL test_laws.py::test_laws[in_norm_order-full_ratio] - sorts by norm" in out
    assert "FAILED test_laws.py::test_laws[good-dtype] - [XPASS(strict)] it holds" in out
    assert "ValueError: no check is named 'tim_order'; there are accepts, " in out
    assert tried["time_order"] == draws("time_order", profile="quick", seed=0)
    report = out[out.index("test_laws[in_norm_order-time_order] _") : out.index("short test summary info")]
    assert re.search(r"^E +\S*Refuted: Retained positions ascend\.$", report, re.M)
    assert re.search(
        r"^E +time order: positions \[.*\] retained from \d+ tokens at ratio .*, but should ascend", report, re.M
    )
    assert re.search(r"^E +given: keys \[1, 1, \d+, 4\] ", report, re.M)
    assert re.search(r"^E +from compressors import in_norm_order", report, re.M)
    assert re.search(r"^E +kept = compress\(keys, values, ", report, re.M)
    frames = re.findall(r"^(\S+\.py):\d+: ", report, re.M)
    assert frames
    assert not [frame for frame in frames if "laws/" in frame], "knorm's own frames are hidden"


@pytest.mark.processes
def test_options_reach_the_checks_also_under_xdist(run):
    which = ("-k", "good-dtype or good-at_least_one")
    result, tried = run("test_laws.py", *which, "-n", "2", "--knorm-seed", "7", "--knorm-profile", "thorough")
    result.assert_outcomes(passed=1, failed=1)  # expected to fail, but holds
    assert "knorm: profile thorough, seed 7\n" in result.stdout.str()
    assert tried["dtype"] == draws("dtype", profile="thorough", seed=7)
    assert draws("dtype", seed=7) != draws("dtype", seed=0)


@pytest.mark.parametrize(
    ("option", "words"),
    [("--knorm-profile=slow", "invalid choice: 'slow'"), ("--knorm-seed=many", "invalid int value: 'many'")],
)
def test_wrong_options_are_refused(pytester, option, words):
    result = pytester.runpytest_subprocess(option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{words}*"])


@pytest.mark.parametrize(("test", "loaded"), [("pass", "[]"), ("import hypothesis", "['hypothesis']")])
def test_a_run_without_law_tests_loads_nothing_heavy(pytester, test, loaded):
    probe = "import sys; print(sorted({'torch', 'hypothesis', 'knorm.laws'} & {*sys.modules}))"
    pytester.makepyfile(f"def test_it():\n    {test}\n    {probe}")
    # Hypothesis has a plugin too, which loads it where a test module does.
    result = pytester.runpytest_subprocess("-s", "-p", "no:hypothesispytest", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
    assert loaded in result.stdout.str()


def test_the_plugin_is_registered():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["pytest11"] == {"knorm": "knorm.plugin"}


UNTESTED = """
from knorm.laws import parametrize_with_checks

def nothing(keys, values, keep_ratio):
    return None

def untested(compressor):
    return {"dtype": "returns nothing yet", "shape": "nor this"}

@parametrize_with_checks([nothing], expected_untested=untested)
def test_declared(compressor, check):
    check(compressor)

@parametrize_with_checks([nothing])
def test_undeclared(compressor, check):
    check(compressor)
"""


def test_an_untested_law_fails_its_test_unless_that_is_declared(pytester):
    pytester.makepyfile(test_untested=UNTESTED)
    result = pytester.runpytest("-rfx", "-k", "dtype or shape")
    result.assert_outcomes(failed=3, xfailed=1)
    result.stdout.fnmatch_lines(
        [
            "E*.Untested: Dtype and device are kept.",
            "FAILED*test_declared?nothing-shape? - *",
            "FAILED*test_undeclared?nothing-dtype? - *",
            "XFAIL*test_declared?nothing-dtype? - returns nothing yet",
        ]
    )


def test_traits_and_expectations_of_several_targets(pytester):
    pytester.makepyfile(
        """
        from knorm.laws import check_compressor, parametrize_with_checks

        class Newest:
            def __init__(self, start):
                self.start = start
            def __call__(self, keys, values, keep_ratio):
                start = self.start if keep_ratio < 1 else 0
                return keys[:, :, start:].bfloat16(), values[:, :, start:].clone()

        targets = [Newest(-1), Newest(-2)]
        seen = {}

        @parametrize_with_checks(
            targets, traits=lambda target: {"protect_recent": -target.start}, expected_failures={"dtype": "by design"},
            expected_untested=lambda target: {}
        )
        def test_newest(compressor, check):
            if check.keywords["check"].name == "dtype":
                check(compressor)

        def test_the_same_in_both():
            options = {"expected_failures": lambda target: {"dtype": "by design"}, "select": ["dtype"]}
            results = check_compressor(targets[0], **options)
            assert [result.verdict for result in results] == ["expected failure"]
        """
    )
    done = pytester.runpytest("-p", "no:cacheprovider", "-q", "-rA", "--no-header")
    done.assert_outcomes(passed=done.parseoutcomes()["passed"], xfailed=2)
    done.stdout.fnmatch_lines(["*[[]Newest-dtype[]]*", "*[[]Newest#2-dtype[]]*"])
