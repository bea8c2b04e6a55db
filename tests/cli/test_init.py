from __future__ import annotations

import json
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from commands import new_environment

from knorm.scaffold import Start, files_of, plan, seen_methods

NEWEST = """
import math

def newest(keys, values, keep_ratio):
    kept = max(1, math.ceil(keys.shape[2] * keep_ratio))
    return keys[:, :, -kept:], values[:, :, -kept:]
"""
SORTED = """
def compress(keys, values, keep_ratio):  # each [batch, kv_heads, length, head_dim]
    kept = max(1, round(keys.shape[2] * keep_ratio))
    index = keys.norm(dim=-1).argsort(dim=-1)[..., :kept, None]
    return tuple(x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
"""
METHODS = """
from transformers import DynamicCache
from kvpress import ScorerPress

def helper(keys, values): ...
def newest(keys, values, keep_ratio): ...
def _hidden(keys, values, keep_ratio): ...
class Ours(DynamicCache): ...
class MyPress(ScorerPress): ...
class _Base(ScorerPress): ...
class Plain: ...
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", new_environment()["PYTHONPATH"])
    return tmp_path


def git(*arguments):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def run_tests(*options):
    """Run the project's tests as its CI does; the exit code and the last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_knorm.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()[-1]


# What is seen


def test_presses_caches_and_functions_are_seen_and_nothing_is_run(folder):
    for place in ("pkg/sub", "src/other", "tests", "venv", ".hidden"):
        (folder / place).mkdir(parents=True)
    for package in ("pkg", "pkg/sub", "src/other"):
        (folder / package / "__init__.py").touch()
    for file in (
        "pkg/sub/methods.py",
        "src/other/more.py",
        "tests/helper.py",
        "venv/x.py",
        ".hidden/x.py",
        "test_x.py",
    ):
        (folder / file).write_text(METHODS)
    (folder / "broken.py").write_text("def (")
    (folder / "large.py").write_text("#" * 2**21)
    assert seen_methods(folder) == [
        "pkg.sub.methods:MyPress",
        "other.more:MyPress",
        "pkg.sub.methods:Ours",
        "other.more:Ours",
        "pkg.sub.methods:newest",
        "other.more:newest",
    ]


def test_what_does_not_load_is_passed_over_and_said(folder):
    Path("broken.py").write_text("import nothing_of_this_name\n" + NEWEST)
    start = plan(folder, None)
    assert (start.target, start.laws, start.others) == ("knorm", "knorm:compress", ("broken.py:newest",))
    assert "there is no module 'nothing_of_this_name'" in start.why
    Path("mine.py").write_text(NEWEST)
    assert plan(folder, None) == Start("mine.py:newest", ("0.9", "0.5"), ("broken.py:newest",), "mine.py:newest")


def test_a_method_with_a_budget_of_its_own_gets_none(folder):
    Path("mine.py").write_text(
        "def newest(keys, values, window=8):\n    return keys[:, :, -window:], values[:, :, -window:]\n"
    )
    assert plan(folder, "mine.py:newest(window=4)").budgets == ()


@pytest.mark.parametrize(
    ("target", "case"),
    [
        ("knorm", "knorm"),
        ("pkg.a:SnapKVPress(window_size=3)", "snapkvpress"),
        ("a.py:my_method", "my-method"),
        ("a.py:__", "method"),
        ("a.py:reported", "method"),
        ('transformers:QuantizedCache(backend="fp8")', "quantizedcache"),
    ],
)
def test_a_case_is_named_after_its_method(target, case):
    assert Start(target).case == case


# What is written


def test_every_file_is_what_its_reader_takes(folder):
    start = Start("mine.py:newest", ("0.5",), ("a:b",), "mine.py:newest", {"dtype": 'it says "no"'})
    for ci, file in (("github", ".github/workflows/knorm.yml"), ("gitlab", ".gitlab-ci.yml")):
        files = files_of(start, folder, ci)
        job = yaml.safe_load(files[file])
        assert "pip install knorm pytest" in json.dumps(job)
        compile(files["tests/test_knorm.py"], "test_knorm.py", "exec")
    Path("pyproject.toml").write_text("[project]\n")
    Path(".gitlab-ci.yml").touch()
    assert "pip install knorm pytest ." in files_of(start, folder, "gitlab")[".gitlab/knorm.yml"]
    assert [*files_of(start, folder, "none")] == ["knorm.toml", "tests/test_knorm.py"]
    only = files_of(Start("knorm"), folder, "none")["tests/test_knorm.py"]
    assert "parametrize" not in only


def test_nothing_is_overwritten(folder, run_knorm):
    Path("tests").mkdir()
    Path("tests/test_knorm.py").write_text("mine")
    code, _, err = run_knorm("init")
    assert (code, err) == (
        2, "knorm: tests/test_knorm.py is there already, and stays as it is: move it away; nothing was written\n"
    )  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == ["tests"]
    Path("tests/test_knorm.py").unlink()
    Path("pyproject.toml").write_text("[tool.knorm]\n")
    code, _, err = run_knorm("init")
    assert code == 2
    assert err.startswith("knorm: pyproject.toml declares cases already: knorm golden list shows them; nothing was")


def test_a_target_that_does_not_load_is_one_line(folder, run_knorm):
    code, _, err = run_knorm("init", "mine.py:newest")
    assert code == 2
    assert err.startswith("knorm: target 'mine.py:newest': there is no Python file")
    assert err.count("\n") == 1
    assert [*folder.iterdir()] == []


def test_the_job_is_that_of_the_projects_host(folder, run_knorm, monkeypatch):
    from knorm.cli import init

    monkeypatch.setattr(init, "_with_laws", lambda start: start)
    git("init", "-q", ".")
    git("remote", "add", "origin", "https://gitlab.com/a/b.git")
    assert run_knorm("init", "knorm", "-q", "--json", "out.json")[0] == 0
    assert json.loads(Path("out.json").read_text())["written"][-1] == ".gitlab-ci.yml"


@pytest.mark.processes
def test_what_is_written_into_an_empty_folder_passes_at_once(folder, run_knorm):
    git("init", "-q", ".")
    code, out, _ = run_knorm("init")
    assert code == 0
    assert "The method is knorm." in out
    assert Path(".github/workflows/knorm.yml").exists()
    code, last = run_tests()
    assert (code, "1 skipped" in last, "failed" in last) == (0, True, False)


@pytest.mark.processes
def test_a_project_from_nothing_to_an_intended_change(folder, run_knorm, monkeypatch):
    """Init, record, accept, a CI run, an intended change and its update, in a repository of its own."""
    monkeypatch.setenv("COLUMNS", "160")
    golden = partial(run_knorm, "golden")
    git("init", "-q", ".")
    Path("mine.py").write_text(SORTED)
    code, out, _ = run_knorm("init")
    assert code == 0
    assert "The method is mine.py:compress." in out
    assert "laws are refuted, and expected to fail in the test" in out
    assert "time_order" in Path("tests/test_knorm.py").read_text()
    code, last = run_tests()
    assert (code, "xfailed" in last) == (0, True)
    git("add", ".")
    git("commit", "-qm", "one")

    assert golden("record", "compress")[0] == 0
    assert golden("accept", "compress", "--reason", "the first")[0] == 0
    git("add", ".")
    git("commit", "-qm", "goldens")
    assert not git("status", "--porcelain")
    code, last = run_tests("--knorm-require-goldens")
    assert (code, "skipped" in last) == (0, False)

    Path("mine.py").write_text(SORTED.replace("norm(dim", "norm(p=1, dim"))
    assert run_tests("--knorm-require-goldens")[0] == 1
    git("commit", "-qam", "another norm")
    code, out, _ = golden("verify")
    assert code == 1
    assert "MOVED         compress" in out
    assert golden("record", "compress")[0] == 0
    code, out, err = golden("accept", "compress", "--reason", "norms are sums now")
    if code:
        pasted = shlex.split(err.splitlines()[-1].partition(": ")[2])
        assert golden(*pasted[2:])[0] == 0
    git("add", ".")
    git("commit", "-qm", "goldens of the change")
    code, last = run_tests("--knorm-require-goldens")
    assert (code, "skipped" in last) == (0, False)
