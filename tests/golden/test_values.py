from __future__ import annotations

import platform
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import new_environment

from knorm.golden import verify
from knorm.golden.values import FOLDER, cases_of_tests, check_values, measured_values

pytest_plugins = ["pytester"]
CPU = f"cpu-{platform.machine().lower()}"
TEST = """
import numpy as np
from value import VALUE

def test_counts(golden):
    tensors = {"scores": np.linspace(0, VALUE, 6).reshape(2, 3), "positions": [[0, 2, VALUE]]}
    golden.check("counts", {"kept": VALUE, "mean": VALUE / 3, "name": "a"}, tensors=tensors)
"""


@pytest.fixture
def suite(tmp_path, pytester, run_knorm, monkeypatch):
    """A project with a test that checks values of its own; returns runners of `knorm golden` and of pytest."""
    monkeypatch.setenv("KNORM_COMMIT", "a" * 40)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PYTHONPATH", new_environment(tmp_path)["PYTHONPATH"])
    Path("knorm.toml").write_text("")
    Path("test_own.py").write_text(TEST)
    set_value(128)
    run = partial(pytester.runpytest_inprocess, "-p", "no:cacheprovider", str(tmp_path))
    return partial(run_knorm, "golden"), run


def set_value(value):
    Path("value.py").write_text(f"VALUE = {value}\n")


def fresh(monkeypatch):
    """Import the project's modules anew."""
    import sys

    for name in ("value", "test_own"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.processes
def test_the_life_of_a_tests_values(suite, monkeypatch):
    command, tests = suite
    monkeypatch.syspath_prepend(str(Path.cwd()))
    before = {*Path.cwd().rglob("*")}
    tests("-rs").assert_outcomes(skipped=1)
    tests("--knorm-require-goldens").assert_outcomes(failed=1)
    assert not [path for path in {*Path.cwd().rglob("*")} - before if "__pycache__" not in path.parts]

    code, out, err = command("record", "--from-tests", "--", "test_own.py", "-k", "counts")
    assert (code, err) == (0, "")
    assert f"counts ({CPU}), new: 5 metrics" in out
    code, out, _ = command("accept", "counts", "--reason", "the first")
    assert code == 0
    tests().assert_outcomes(passed=1)
    code, out, _ = command("list")
    assert code == 0, "it is no orphan"
    assert "values of a test" in out
    assert command("verify")[0] == 0

    set_value(127)
    fresh(monkeypatch)
    result = tests()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*MOVED*counts*",
            "*kept*",
            "*mean*is 42.3333, not 42.6667 within*",
            "*scores*is 127 at ?1, 2?, not 128 within*",
        ]
    )
    assert command("record", "--from-tests")[0] == 0
    code, _, err = command("accept", "counts", "--reason", "one less")
    assert (code, err) == (0, ""), "no way is the worse one"
    tests().assert_outcomes(passed=1)


@pytest.mark.processes
def test_a_missing_golden_fails_where_there_are_others(suite, monkeypatch):
    command, tests = suite
    monkeypatch.syspath_prepend(str(Path.cwd()))
    assert command("record", "--from-tests")[0] == 0
    assert command("accept", "counts", "--reason", "x")[0] == 0
    Path("golden/counts").rename("golden/others")
    file = Path(f"golden/others/{CPU}.json")
    file.write_text(file.read_text())
    result = tests()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*MISSING*counts*knorm golden record --from-tests*"])


@pytest.mark.processes
def test_what_a_test_run_gives_has_to_agree_and_to_pass(suite):
    command, _ = suite
    file = Path("test_own.py")
    file.write_text("import random\ndef test_it(golden):\n    golden.check('x', {'value': random.random()})\n")
    code, _, err = command("record", "--from-tests")
    assert code == 2
    assert "x: runs disagree, nothing was recorded: value is " in err
    file.write_text("def test_it(golden):\n    golden.check('x', {'value': 1})\n    assert False\n")
    code, _, err = command("record", "--from-tests")
    assert code == 2
    assert "the tests failed, nothing was recorded: " in err
    assert "1 failed" in err
    file.write_text("def test_it():\n    pass\n")
    code, _, err = command("record", "--from-tests")
    assert (code, err) == (2, "knorm: the tests call golden.check nowhere, nothing was recorded\n")
    file.write_text("def test_it(golden):\n    for _ in '12':\n        golden.check('x', {'value': 1})\n")
    code, _, err = command("record", "--from-tests")
    assert code == 2
    assert "golden.check('x') is called twice in a run: give each call its own name" in err
    assert not Path("golden").exists() or not [*Path("golden").rglob("*.candidate")]


def test_a_case_and_values_of_one_name_are_refused(suite, monkeypatch):
    command, tests = suite
    monkeypatch.syspath_prepend(str(Path.cwd()))
    Path("knorm.toml").write_text('[case.counts]\ntarget = "knorm"\n')
    result = tests()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*golden.check('counts'): a case is named so: give the values another name*"])
    code, _, err = command("record", "--from-tests", "--all")
    assert (code, err) == (2, "knorm: --all and --from-tests are two selections: give one of them\n")


def test_the_gates_that_values_get():
    metrics = {"count": 3, "text": "a", "loss": 0.5, "torch": torch.tensor(2), "numpy": np.float32(0.25)}
    tensors = {"ids": torch.arange(4), "half": torch.ones(2, dtype=torch.bfloat16), "scalar": 1.0}
    found = measured_values(metrics, tensors, {"loss": 0.1, "ids": 0.5, "count": "same_versions"})
    assert {metric.name: (metric.gate.rule, metric.gate.threshold) for metric in found.metrics} == {
        "count": ("same_versions", None),
        "text": ("exact", None),
        "loss": ("near", 0.1),
        "torch": ("exact", None),
        "numpy": ("near", 1e-5),
        "ids": ("close", 0.5),
        "half": ("close", 1e-5),
        "scalar": ("close", 1e-5),
    }
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {"ids": (4,), "half": (2,), "scalar": (1,)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({},), "was given no values"),
        (({"a": True},), "metric 'a' is True, but should be a number or a text"),
        (({"a": [1]},), "metric 'a' is \\[1\\], but should be a number or a text"),
        (({"a": 1}, {"a": [1]}), "'a' is among both metrics and tensors"),
        (({}, {"a": ["x"]}), "tensor 'a' has dtype <U1 and 1 elements, but should have numbers"),
        (({}, {"a": []}), "tensor 'a' has dtype float64 and 0 elements"),
        (({"a": 1}, None, {"b": 1}), "gate names 'b', but there are a"),
        (({"a": 1}, None, "tokens"), "gate of 'a' is 'tokens', but should be a number or one of exact, "),
        (({"a": 1}, None, -1), "gate is -1, but should be a tolerance from 0 up"),
        (({"a": "x"}, None, 0.1), "'a' is a text, which 'near' cannot judge: use 'exact'"),
    ],
)
def test_values_that_cannot_be_kept_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        measured_values(*arguments)


@pytest.mark.parametrize("name", ["", "A", "a/b", "../a", "reported", "a" * 65])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(ValueError, match="the name should be at most 64 of a-z"):
        check_values(name, measured_values({"a": 1}), None, "cpu")


@pytest.mark.processes
def test_a_case_can_be_measured_as_often_as_the_tests_ran(suite, monkeypatch):
    monkeypatch.delenv(FOLDER, raising=False)
    (case,) = cases_of_tests(["test_own.py"], 3).values()
    for _ in range(3):
        assert case.measure("cpu", case.how).metrics[0].value == 128
    here = verify.environment_of(replace(case, environment=None), "cpu", None)
    assert verify.environment_of(case, "cpu", None) == case.environment != here, "that of the tests' own process"


# Names of options

CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--golden-dir", default="theirs")
    parser.getgroup("own").addoption("--require-goldens", default="theirs")
"""


def test_the_names_of_options_are_left_to_others_who_want_them(pytester):
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        textwrap.dedent("""
        def test_it(pytestconfig):
            assert pytestconfig.getoption("golden_dir") == "mine"
            assert pytestconfig.getoption("require_goldens") == "theirs"
            assert pytestconfig.getoption("knorm_golden_dir") == "ours"
            assert pytestconfig.getoption("knorm_require_goldens")
        """)
    )
    options = ["--golden-dir=mine", "--knorm-golden-dir=ours", "--knorm-require-goldens"]
    pytester.runpytest_inprocess("-p", "no:cacheprovider", *options).assert_outcomes(passed=1)


def test_the_old_names_hold_where_they_are_free(pytester):
    pytester.makepyfile(
        """
        def test_it(pytestconfig):
            assert pytestconfig.getoption("knorm_golden_dir") == "ours"
            assert pytestconfig.getoption("knorm_require_goldens")
        """
    )
    options = ["-p", "no:cacheprovider", "--golden-dir=ours", "--require-goldens"]
    pytester.runpytest_inprocess(*options).assert_outcomes(passed=1)
