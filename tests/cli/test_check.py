from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from commands import in_a_new_process, new_environment, strict_json
from inline import Inline

import knorm
from knorm.cli import cli
from knorm.laws import CHECKS, KNORM, Result, find
from knorm.laws.adapters import KINDS
from knorm.laws.names import check_names, suite_revision
from knorm.laws.process import supervisor
from knorm.laws.results import PROFILES
from knorm.laws.search import EFFORT
from knorm.methods.targets import expanded

GOOD = """
from knorm import compress as core


def compress(keys, values, keep_ratio):
    return core(keys, values, keep_ratio)[:2]
"""

IN_NORM_ORDER = """
def compress(keys, values, keep_ratio):
    count = max(1, int(keys.shape[2] * keep_ratio))
    index = keys.double().norm(dim=-1).argsort(dim=-1, stable=True)[..., :count, None]
    return tuple(x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
"""


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(supervisor, "Worker", Inline)


def target(code, name="target.py"):
    Path(name).write_text(textwrap.dedent(code), encoding="utf-8")
    return f"{name}:compress"


def as_json(fields):
    return json.loads(json.dumps(fields))


def verdicts(file):
    return {result["check"]: result["verdict"] for result in strict_json(file)["targets"][0]["results"]}


# Through the command, in processes.

RUDE = """
import os, sys, threading, time
import torch
from knorm import compress as core

print("hello from the target")
torch.set_default_dtype(torch.float16)
threading.Thread(target=time.sleep, args=(600,)).start()
calls = 0


def compress(keys, values, keep_ratio):
    global calls
    calls += 1
    assert torch.get_default_dtype() == torch.float16
    torch.manual_seed(0)
    torch.set_default_device("meta")
    os.chdir("/")
    if calls == 100:
        print("good bye", end="")
    if calls == 200:
        sys.stdout.close()
    return core(keys, values, keep_ratio)[:2]
"""


@pytest.mark.processes
def test_a_correct_compressor_holds_however_it_treats_its_process(run_knorm):
    select = ("--select", "count,order,nonfinite,sees_once,crop")
    code, out, err = run_knorm("check", target(RUDE), "--like", "knorm", *select, "--seed", "3", "--json", "out.json")
    written = strict_json("out.json")
    (written,) = ({**written, **target} for target in written.pop("targets"))
    assert code == 0
    assert "hello from the target\n" in err
    assert "good bye" in err
    assert "holds    order: time_order [60 tried, " in out
    assert out.splitlines()[-2].startswith("2 laws do not apply")
    assert out.splitlines()[-1].startswith("6 hold, 0 refuted, 0 untested, 2 do not apply, in ")
    assert written["environment"]["knorm"] == knorm.__version__
    assert written["traits"] == as_json(asdict(KNORM))
    assert [written[name] for name in ("target", "profile", "seed", "device")] == [
        "target.py:compress", "quick", 3, "cpu",
    ]  # fmt: skip
    assert all({*result} == {field.name for field in fields(Result)} for result in written["results"])
    assert [result["check"] for result in written["results"]] == [
        name for name, check in CHECKS.items() if name in ("nonfinite", "sees_once", "crop")
        or check.family in ("count", "order")
    ]  # fmt: skip


CATASTROPHES = """
import ctypes, os, time
from knorm import compress as core

print("loaded")
with open("loads", "a+") as file:
    file.write("x")
    file.seek(0)
    worker = len(file.read())
calls = 0


def compress(keys, values, keep_ratio):
    global calls
    calls += 1
    if worker == 1:
        ctypes.string_at(0)
    if worker == 2 and calls > 200:
        time.sleep(600)
    if worker == 3 and calls == 1:
        os._exit(3)
    return core(keys, values, keep_ratio)[:2]
"""


@pytest.mark.processes
def test_a_target_that_crashes_or_hangs_is_refuted_and_the_rest_goes_on(run_knorm):
    names = "retained_count,at_least_one,monotone_count,time_order,subnormal"
    options = ("--like", "knorm", "--trait", "nonfinite=none", "--select", names, "--limit", "2", "-q")
    code, out, err = run_knorm("check", target(CATASTROPHES), *options, "--json", "out.json")
    results = {result["check"]: result for result in strict_json("out.json")["targets"][0]["results"]}
    said = {name: result["counterexample"] for name, result in results.items()}
    assert (code, out, err) == (1, "", "")
    assert Path("loads").read_text() == "xxx", "a worker for each loss, and none for laws that do not apply"
    assert [result["verdict"] for result in results.values()] == [
        "refuted", "holds", "refuted", "refuted", "does not apply"
    ]  # fmt: skip
    given = results["retained_count"]["given"]
    assert given == "keys [1, 1, 5, 4] float32 at ratio 0.2"
    assert said["retained_count"] == f"retained count: the process ended with signal 11 (SIGSEGV) [{given}]"
    assert said["monotone_count"].startswith("monotone count: no answer within 2 s [keys [")
    assert 2 <= results["monotone_count"]["seconds"] < 10
    assert said["time_order"].startswith("time order: ended the interpreter with exit code 3 [keys [")
    assert "keys = torch.tensor([[[[" in results["retained_count"]["snippet"]
    assert "kept = compress(keys, values, 0.2)" in results["retained_count"]["snippet"]


COMES_BACK_TWICE = """
import os
from knorm import compress as core

def compress(keys, values, keep_ratio):
    os.fork()
    return core(keys, values, keep_ratio)[:2]
"""

FORGES = """
import os

def compress(keys, values, keep_ratio):
    if os.fork() == 0:
        os.setsid()
        os.execlp("sleep", "sleep", "600.125")
    print("9 hold, 0 refuted, 0 untested", flush=True)
    for name in os.listdir("/proc/self/fd"):
        try:
            os.write(int(name), b"junk")
        except OSError:
            pass
    return keys, values
"""


@pytest.mark.processes
def test_a_target_that_forks_is_judged_as_another(run_knorm):
    code, out, _ = run_knorm("check", target(COMES_BACK_TWICE), "--select", "accepts,dtype", "--json", "out.json")
    assert (code, verdicts("out.json")) == (0, {"accepts": "holds", "dtype": "holds"})
    assert "holds    provenance: accepts [" in out
    assert "holds    numerics: dtype [" in out


@pytest.mark.processes
def test_a_target_that_writes_everywhere_forges_nothing_and_leaves_no_process(run_knorm):
    code, out, err = run_knorm("check", target(FORGES), "--select", "accepts", "--json", "out.json")
    assert (code, verdicts("out.json")) == (1, {"accepts": "refuted"})
    assert "wrote to a file that is knorm's own: bytes that no worker sends" in " ".join(out.split())
    assert "9 hold" in err
    assert "9 hold" not in out
    assert not [file for file in Path("/proc").glob("[0-9]*/cmdline") if b"600.125" in file.read_bytes()]


@pytest.mark.processes
def test_a_printed_snippet_shows_the_wrong_positions_in_a_fresh_interpreter(run_knorm):
    code, out, _ = run_knorm(
        "-v", "check", target(IN_NORM_ORDER), "--select", "time_order,nesting", "--json", "out.json"
    )
    (result, other) = strict_json("out.json")["targets"][0]["results"]
    lines = out.splitlines()
    assert (code, other["verdict"]) == (1, "does not apply")
    assert lines[0].startswith("REFUTED  time_order: Retained positions ascend. [example ")
    begin = lines.index("")
    said = " ".join(" ".join(lines[1:begin]).split())
    assert f"time order: {said}" == f"{result['counterexample']} given: {result['given']}"
    assert max(map(len, lines[:begin])) <= 80
    end = lines.index("", begin + 1)
    snippet = textwrap.dedent("\n".join(lines[begin + 1 : end]))
    assert snippet == result["snippet"]
    assert " ".join(" ".join(lines[end + 1 : -4]).split()) == (
        f"n/a nesting: {find('nesting').law} [needs scores=key_norm or keys]"
    )
    assert lines[-4:-1] == [
        "1 law does not apply; promise more with --trait: scores",
        "to be mended: time_order; to see one alone:",
        "    knorm check target.py:compress --select time_order",
    ]
    assert lines[-1].startswith("0 hold, 1 refuted, 0 untested, 1 do not apply, in ")
    run = in_a_new_process(snippet, check=True)
    values = json.loads(run.stdout.splitlines()[-1])
    wrong = [[int(256 * v[2] + v[3]) for v in head] for row in values for head in row]
    assert any(f"positions {positions} retained" in result["counterexample"] for positions in wrong)
    assert any(positions != sorted(positions) for positions in wrong)


HANGS = """
import os, time

def compress(keys, values, keep_ratio):
    with open("pid.part", "w") as file:
        file.write(str(os.getpid()))
    os.rename("pid.part", "pid")
    time.sleep(600)
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.processes
def test_ctrl_c_ends_the_worker_and_exits_with_130(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    heeding = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a job in the background does not
    )
    code = f"{heeding}\nfrom knorm.cli import main; main()"  # without a guard: a worker must not run it again
    Path("script.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "script.py", "check", target(HANGS), "--limit", "60"]
    with subprocess.Popen(command, env=new_environment(), stderr=subprocess.PIPE, text=True) as process:
        until(Path("pid").exists, 60)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read().strip() == "knorm: interrupted; nothing was written"
    until(lambda: not alive(int(Path("pid").read_text())), 5)


# What a target does that ends no process.


@pytest.mark.parametrize(
    ("body", "refuted", "words"),
    [
        ("raise RuntimeError('no\\nway')", {"accepts"}, "raised RuntimeError: no way [keys [1, 1, 1, 4]"),
        ("raise SystemExit(2)", {"accepts"}, "raised SystemExit: 2 [keys [1, 1, 1, 4]"),
        ("import sys; sys.exit()", {"accepts"}, "raised SystemExit: "),
        ("raise KeyboardInterrupt", {"accepts", "shape"}, "raised KeyboardInterrupt: [keys ["),
        ("return None", {"shape"}, "returned None, but should return (keys, values)"),
        ("return 'nonsense'", {"shape"}, "returned str"),
        ("return 1, 2", {"shape"}, "returned tuple of int"),
        ("return keys[0], values[0]", {"shape"}, "returned keys float32 [1, 1, 4]"),
        ("return {'keys': keys}", {"shape"}, "returned dict"),
        ("raise ValueError('\\ud800')", {"accepts"}, "raised ValueError: ? [keys "),
        ("raise ValueError('\\x1b[2K\\x9b\\u202e')", {"accepts"}, "ValueError: \\x1b[2K\\x9b\\u202e [keys "),
    ],
)
def test_what_answers_with_an_error_or_nonsense_is_refuted(run_knorm, inline, body, refuted, words):
    code = f"def compress(keys, values, keep_ratio):\n    {body}\n"
    ended, out, err = run_knorm("check", target(code), "--select", "accepts,shape", "--json", "out.json")
    assert (ended, err) == (1, "")
    assert {name for name, verdict in verdicts("out.json").items() if verdict == "refuted"} == refuted
    assert words in " ".join(out.split())


def test_untested_laws_are_no_success(run_knorm, inline):
    code = "def compress(keys, values, keep_ratio):\n    return None"
    ended, out, _ = run_knorm("check", target(code), "--select", "dtype")
    assert ended == 1
    assert out.startswith("untested dtype: Dtype and device are kept. [0 of ")
    assert out.splitlines()[-1].startswith("0 hold, 0 refuted, 1 untested, 0 do not apply, in ")


def test_expected_failures_are_told_from_others(run_knorm, inline):
    options = ("--expect-failure", "time_order=sorts by norm", "--select", "time_order,dtype")
    ended, out, _ = run_knorm("check", target(IN_NORM_ORDER), *options)
    assert ended == 0
    assert out.startswith("expected time_order: Retained positions ascend. [sorts by norm; example ")
    assert "1 hold, 0 refuted, 1 failed as expected, 0 untested" in out
    ended, out, _ = run_knorm("check", target(GOOD), *options)
    assert ended == 1
    words = " ".join(out.split())
    assert words.startswith("HOLDS THOUGH EXPECTED TO FAIL time_order: Retained positions ascend. [sorts by norm; 60 ")
    assert "to be mended: time_order; to see one alone: knorm check target.py:compress --select time_order" in words
    assert "1 hold, 0 refuted, 1 held though expected to fail, 0 untested" in out


NOTHING = "def compress(keys, values, keep_ratio):\n    return None"


def test_a_law_that_may_stay_untested_is_no_failure_but_may_not_be_refuted(run_knorm, inline):
    options = ("--select", "dtype", "--expect-untested", "dtype=returns nothing yet")
    ended, out, _ = run_knorm("check", target(NOTHING), *options)
    assert ended == 0
    assert out.startswith("untested dtype: Dtype and device are kept. [returns nothing yet; 0 of ")
    ended, out, _ = run_knorm("check", target(NOTHING), "--select", "shape", "--expect-untested", "shape=not yet")
    assert ended == 1
    assert "1 refuted" in out


def test_a_baseline_hides_what_was_refuted_or_untested_before_and_nothing_else(run_knorm, inline):
    select = ("--select", "shape,dtype", "--json", "old.json")
    assert run_knorm("check", target(NOTHING), *select)[0] == 1
    assert verdicts("old.json") == {"shape": "refuted", "dtype": "untested"}
    assert strict_json("old.json")["suite"] == suite_revision()
    ended, out, _ = run_knorm("check", target(NOTHING), *select[:2], "--baseline", "old.json", "--json", "new.json")
    assert (ended, verdicts("new.json")) == (0, {"shape": "expected failure", "dtype": "untested"})
    assert "[as in old.json; example " in " ".join(out.split())
    old = strict_json("old.json")
    old["suite"] = "another"
    (before,) = old["targets"]
    before["results"] = [result for result in before["results"] if result["check"] == "dtype"]
    Path("old.json").write_text(json.dumps(old))
    ended, out, _ = run_knorm("check", target(NOTHING), *select[:2], "--baseline", "old.json")
    assert ended == 1, "shape is news"
    assert "as in old.json, by the laws of another; " in " ".join(out.split())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            None,
            "--baseline should be a file that `knorm check --json` wrote: old.json cannot be read: it is not there",
        ),
        ("[", "--baseline old.json cannot be read (JSONDecodeError: "),
        ("[]", "--baseline old.json cannot be read (TypeError: "),
        ("{}", "--baseline old.json cannot be read (KeyError: 'targets'), but should be a file that "),
        ('{"suite": "", "targets": []}', "--baseline old.json is of nothing, but should be of target.py:compress"),
        (
            '{"suite": "", "targets": [{"target": "x.py:y", "results": []}]}',
            "--baseline old.json is of x.py:y, but should be of target.py:compress",
        ),
        (
            '{"suite": "", "targets": [{"target": "target.py:compress", "results": '
            '[{"check": "tim", "verdict": "refuted"}]}]}',
            "'tim'",
        ),
    ],
)
def test_a_baseline_that_is_none_is_wrong_usage(run_knorm, inline, text, words):
    if text is not None:
        Path("old.json").write_text(text)
    ended, _, err = run_knorm("check", target(GOOD), "--select", "dtype", "--baseline", "old.json")
    assert ended == 2
    assert words in err


# Several targets

CHECKS_TOML = """
[check.good]
target = "mine/target.py:compress"
like = "knorm"
traits = {rounding = "ceil", skip_layers = [0, 1], dtypes = ["float16", "float32"]}
select = ["time_order", "retained_count"]

[check.sorted]
target = "mine/sorted.py:compress"
expected_failures = {time_order = "sorts by norm"}
select = ["time_order", "dtype"]
"""


@pytest.fixture
def declared():
    Path("mine").mkdir()
    target(GOOD, "mine/target.py")
    target(IN_NORM_ORDER, "mine/sorted.py")
    Path("knorm.toml").write_text(CHECKS_TOML)


def test_several_targets_are_tried_one_after_the_other_and_summed_up(run_knorm, inline):
    targets = target(GOOD), target(IN_NORM_ORDER, "sorted.py"), "missing_name.py:compress"
    target("", "missing_name.py")
    ended, out, _ = run_knorm("check", *targets, "--select", "time_order,dtype", "--json", "out.json")
    assert ended == 2
    lines = out.splitlines()
    assert lines[0] == "target.py:compress"
    assert lines[1].startswith("holds    time_order, dtype [each at least 60 tried")
    assert "sorted.py:compress" in lines
    assert "    knorm check sorted.py:compress --select time_order" in lines
    assert "REFUTED  sorted.py:compress: time_order" in lines
    assert "NOT LOADED missing_name.py:compress: missing_name.py has no 'compress'" in " ".join(out.split())
    assert lines[-1] == "3 targets: 3 hold, 1 refuted, 0 untested, 0 do not apply"
    found = strict_json("out.json")["targets"]
    assert [(one["name"], len(one["results"]), bool(one["not_run"])) for one in found] == [
        ("target.py:compress", 2, False), ("sorted.py:compress", 2, False), ("missing_name.py:compress", 0, True),
    ]  # fmt: skip
    assert run_knorm("check", *targets[:2], "knorm:exact_nll", "--select", "dtype,same_tokens")[0] == 0
    ended, _, err = run_knorm("check", *targets[:2], "--select", "same_tokens")
    assert ended == 2
    assert "nothing was tried: target.py:compress: none of the checks chosen applies to it" in err
    # what was refuted is no news; another target is
    ended, out, _ = run_knorm("check", *targets[:2], "--select", "time_order", "--baseline", "out.json")
    assert ended == 0
    assert "[as in out.json; example " in " ".join(out.split())
    target(IN_NORM_ORDER, "other.py")
    code = run_knorm("check", targets[1], "other.py:compress", "--select", "time_order", "--baseline", "out.json")[0]
    assert code == 1


def test_what_a_project_declares_is_tried_where_no_target_is_given(run_knorm, inline, declared, monkeypatch):
    ended, out, _ = run_knorm("check", "--json", "out.json")
    assert ended == 0, out
    assert out.splitlines()[-1] == "2 targets: 3 hold, 0 refuted, 1 failed as expected, 0 untested, 0 do not apply"
    first, _ = strict_json("out.json")["targets"]
    assert (first["name"], first["target"]) == ("good", "mine/target.py:compress")
    own = {"rounding": "ceil", "skip_layers": [0, 1], "dtypes": ["float16", "float32"]}
    assert first["traits"] == as_json({**asdict(KNORM), **own})
    ended, out, _ = run_knorm("check", "sorted", "--select", "dtype")  # what is not tried cannot fail
    assert ended == 0
    assert out.splitlines()[-1].startswith("1 hold, 0 refuted, 0 untested, 0 do not apply, in ")


@pytest.mark.processes
def test_a_project_is_tried_from_any_of_its_folders(run_knorm, declared, monkeypatch):
    monkeypatch.chdir("mine")
    ended, out, err = run_knorm("check", "good", "--select", "time_order")
    assert ended == 0, err
    assert "holds    order: time_order [60 tried" in out


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (
            ("", ""),
            ("--like", "knorm"),
            "--like is for targets of the command line, but good is declared in knorm.toml",
        ),
        (("", ""), ("god",), "'god' is neither a target nor declared in knorm.toml: good, sorted"),
        (("like =", "likes ="), (), "knorm.toml: check good: unknown key 'likes'; did you mean like?"),
        (("rounding =", "round ="), (), "knorm.toml: check good: no trait is named 'round'; there are acts, "),
        (("[0, 1]", '[0, "a"]'), (), "check good: traits has skip_layers = [0, 'a'], but should have true, false,"),
        (('"ceil"', "{}"), (), "check good: traits has rounding = {}, but should have true, false, a number, a text"),
        (("mine/sorted", "mine/gone"), (), "check sorted: target 'mine/gone.py:compress': there is no Python file "),
        (('"sorts by norm"', '""'), (), "check sorted: expected_failures has time_order without a reason"),
        (("time_order =", "tim_order ="), (), "check sorted: no check is named 'tim_order'"),
        (("[check.sorted]", "[check.good]"), (), "knorm.toml: two checks are named 'good' (line "),
        ((CHECKS_TOML, ""), (), "no TARGET was given, and no knorm.toml declares one as [check.NAME]; a target is "),
    ],
)
def test_what_is_declared_wrongly_is_one_line(run_knorm, inline, declared, change, arguments, words):
    Path("knorm.toml").write_text(CHECKS_TOML.replace(*change) if change[0] else CHECKS_TOML)
    ended, _, err = run_knorm("check", *arguments)
    assert (ended, err.count("\n")) == (2, 1)
    assert words in err


@pytest.mark.processes
def test_snippets_are_written_and_long_ones_are_not_shown(run_knorm, inline):
    targets = target(IN_NORM_ORDER, "sorted.py"), "transformers:StaticCache"
    options = "--select", "time_order,rows_move,dtype", "--snippets", "shown"
    ended, out, _ = run_knorm("check", *targets, *options)
    assert ended == 1
    short, long = Path("shown/sorted.py-compress-time_order.py"), Path("shown/transformers-StaticCache-rows_move.py")
    assert sorted(Path("shown").iterdir()) == sorted([short, long])
    assert textwrap.indent("\n".join(short.read_text().splitlines()[1:]), " " * 8) in out
    count = len(long.read_text().splitlines()) - 1
    assert f"    A program of {count} lines shows it without knorm: add --snippets FOLDER.\n" in out
    assert "AttributeError: 'StaticLayer' object has no attribute" in in_a_new_process(long.read_text()).stderr
    assert run_knorm("check", *targets, *options)[0] == 1, "knorm wrote them: they are written again"
    short.write_text("mine")
    ended, _, err = run_knorm("check", *targets, *options)
    assert (ended, short.read_text()) == (2, "mine")
    assert f"cannot write {short}: knorm did not write what is there" in err
    ended, _, err = run_knorm("check", *targets, *options[:-1], "no/where")
    assert ended == 2
    assert "--snippets no/where, but there is no folder no" in err


@pytest.mark.processes
@pytest.mark.parametrize(
    ("called", "code"),
    [
        ("target.py:newest(sinks=1)", "= partial(newest, sinks=1)"),
        ("target.py:Window(size=3)", "= partial(Window, size=3)"),
    ],
)
def test_the_snippet_of_a_target_that_is_called_with_more_runs(run_knorm, inline, called, code):
    target(
        """
        def newest(keys, values, keep_ratio, sinks=0):
            return keys[:, :, -1:].bfloat16(), values[:, :, -1:]

        class Window:
            def __init__(self, keep_ratio, size, ratio=1):
                self.size = size

            def __call__(self, keys, values):
                return newest(keys, values, 1)
        """
    )
    run_knorm("check", called, "--select", "dtype", "--json", "out.json")
    (result,) = strict_json("out.json")["targets"][0]["results"]
    assert code in result["snippet"]
    done = in_a_new_process(result["snippet"])
    assert "torch.bfloat16" in done.stdout, done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("called", ["", "(sinks=1)"])
@pytest.mark.parametrize("file", ["target.py", "sub dir/target.py", "sub dir/my-target.py"])
def test_a_program_names_the_folder_as_the_target_does(run_knorm, inline, tmp_path, file, called):
    """A page that is published with it says nothing of the machine."""
    code = "def newest(keys, values, keep_ratio, sinks=0):\n    return keys[:, :, -1:].bfloat16(), values[:, :, -1:]\n"
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text(code)
    run_knorm("check", f"{file}:newest{called}", "--select", "dtype", "--json", "out.json")
    (result,) = strict_json("out.json")["targets"][0]["results"]
    (line,) = [line for line in result["snippet"].splitlines() if "import sys" in line]
    place = str(Path(file).parent)
    assert line == f"import sys; sys.path.insert(0, {place!r})  # run this in the folder from which {file} is seen"
    assert str(tmp_path) not in Path("out.json").read_text()
    done = in_a_new_process(result["snippet"])
    assert "torch.bfloat16" in done.stdout, done.stderr


@pytest.mark.processes
def test_a_program_of_a_target_with_an_absolute_path_runs_anywhere(run_knorm, inline, tmp_path, monkeypatch):
    code = "def newest(keys, values, keep_ratio):\n    return keys[:, :, -1:].bfloat16(), values[:, :, -1:]\n"
    (tmp_path / "target.py").write_text(code)
    run_knorm("check", f"{tmp_path}/target.py:newest", "--select", "dtype", "--json", "out.json")
    (result,) = strict_json("out.json")["targets"][0]["results"]
    assert f"import sys; sys.path.insert(0, {str(tmp_path)!r})" in result["snippet"].splitlines()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = in_a_new_process(result["snippet"])
    assert "torch.bfloat16" in done.stdout, done.stderr


@pytest.mark.processes
def test_a_program_of_a_link_finds_what_lies_beside_its_file(run_knorm, inline):
    code = "from beside import last\n\ndef newest(keys, values, keep_ratio):\n    return last(keys), last(values)\n"
    Path("real").mkdir()
    Path("real/target.py").write_text(code)
    Path("real/beside.py").write_text("def last(tensor):\n    return tensor[:, :, -1:].bfloat16()\n")
    Path("link.py").symlink_to("real/target.py")
    run_knorm("check", "link.py:newest", "--select", "dtype", "--json", "out.json")
    (result,) = strict_json("out.json")["targets"][0]["results"]
    assert "sys.path.insert(0, 'real')  # run this in the folder from which real/target.py is seen" in result["snippet"]
    done = in_a_new_process(result["snippet"])
    assert "torch.bfloat16" in done.stdout, done.stderr


def test_an_expected_failure_of_several_targets_has_no_place(run_knorm, inline):
    targets = target(GOOD), target(IN_NORM_ORDER, "sorted.py")
    ended, _, err = run_knorm("check", *targets, "--expect-failure", "time_order=sorts")
    assert ended == 2
    assert "--expect-failure does not say which of 2 targets it is for: declare each as [check.NAME]" in err


def test_a_star_stands_for_all_that_transformers_ships(run_knorm, inline):
    ended, out, _ = run_knorm("check", "transformers:*", "--select", "positions", "--json", "out.json")
    assert ended == 0, out
    assert [one["name"] for one in strict_json("out.json")["targets"]] == expanded("transformers:*")


@pytest.mark.processes
def test_traits_profile_and_seed_reach_the_checks(run_knorm, inline):
    options = ("--select", "retained_count,subnormal", "--like", "knorm", "--trait", "rounding=floor")
    assert run_knorm("check", target(GOOD), *options, "--profile", "thorough", "--json", "out.json")[0] == 1
    count, subnormal = strict_json("out.json")["targets"][0]["results"]
    assert "tokens retained, but should be " in count["counterexample"]
    assert subnormal["examples"] == 600
    seeds = [
        (
            run_knorm("check", target(GOOD), *options, "--seed", seed, "-q", "--json", "out.json"),
            strict_json("out.json"),
        )
        for seed in ("1", "1", "5")
    ]
    tried = [[result["examples"] for result in written["targets"][0]["results"]] for _, written in seeds]
    assert tried[0] == tried[1] != tried[2]


def test_what_knorm_stumbles_over_is_no_success_and_no_crash(run_knorm, inline, monkeypatch):
    def stumble(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("knorm.laws.process.worker.run_check", stumble)
    for verbose in ((), ("-v",)):
        ended, out, err = run_knorm(*verbose, "check", target(GOOD), "--select", "time_order")
        assert ended == 3
        assert "[knorm could not run it: ZeroDivisionError: oops; 0.0 s]" in " ".join(out.split())
        assert ("Traceback" in err) is bool(verbose)


def shown(*results, width=40, verbose=False):
    """The lines of a report in a terminal."""
    from rich.console import Console

    from knorm.cli.verdicts import Report

    console = Console(force_terminal=True, width=width, color_system=None, highlight=False)
    report = Report(console, ["knorm", "check", "a b.py:compress"], verbose)
    with console.capture() as captured:
        for result in results:
            report.add(result)
        report.close()
    return captured.get().splitlines()


def test_a_result_in_a_terminal_wraps_but_its_snippet_and_the_command_do_not():
    found = {"counterexample": "word " * 20, "given": "keys\tand\tvalues", "snippet": "keys = [" + "0.0, " * 30 + "]"}
    lines = shown(Result("time_order", "Law.", "order", "refuted", **found))
    again = "    knorm check 'a b.py:compress' --select time_order"
    assert "        " + found["snippet"] in lines
    assert again in lines
    assert max(len(line) for line in lines if "keys = [" not in line and line != again) <= 40
    assert " ".join(lines[1:5]).split() == ["word"] * 20 + ["given:", "keys", "and", "values"]


def test_what_was_judged_with_stand_in_weights_says_so():
    held = Result("pairing", "Pairs.", "provenance", "holds", 60, answered=60, reason="with stand-in weights")
    untested = Result("shape", "Shapes.", "provenance", "untested", reason="with stand-in weights; none was drawn")
    lines = shown(held, untested, width=120)
    assert "holds    provenance: pairing [with stand-in weights; 60 tried, 60 answered; 0.0 s]" in lines
    assert "untested shape: Shapes. [with stand-in weights; none was drawn; 0.0 s]" in lines


def test_what_holds_is_a_line_for_each_family_unless_verbose():
    held = [
        Result("pairing", "Pairs.", "provenance", "holds", 60, answered=57, evicted=51),
        Result("shape", "Shapes.", "provenance", "holds", 60, answered=60, evicted=51),
        Result("time_order", "Order.", "order", "holds", 60, answered=60, evicted=50),
    ]
    assert shown(*held, width=100) == [
        "holds    provenance: pairing, shape [each at least 60 tried, 57 answered, 51 evicted; 0.0 s]",
        "holds    order: time_order [60 tried, 60 answered, 50 evicted; 0.0 s]",
        "3 hold, 0 refuted, 0 untested, 0 do not apply, in 0 s",
    ]
    assert shown(*held, width=100, verbose=True)[0] == (
        "holds    pairing: Pairs. [60 tried, 57 answered, 51 evicted; 0.0 s]"
    )


# Bad input.

FILES = {
    "good.py": GOOD,
    "syntax.py": "def compress(:\n",
    "raises.py": "1 / 0\n",
    "exits.py": "import sys\nsys.exit(3)\n",
    "number.py": "compress = 3\n",
    "two.py": "def compress(keys, values):\n    return keys, values\n",
    "needs.py": "import no_such_module\n",
}


@pytest.fixture
def bad_files(tmp_path):
    for name, code in FILES.items():
        (tmp_path / name).write_text(code, encoding="utf-8")


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nowhere.py:compress", "nowhere.py"),
        ("no_such_package.module:compress", "no_such_package"),
        ("knorm.core:compres", "compres"),
        ("good.py:other", "other"),
        ("good.py", "good.py"),
        ("good.py:", "good.py"),
        (":", ":"),
        ("kvpress:NoSuchPress", "kvpress"),
        ("syntax.py:compress", "syntax.py"),
        ("raises.py:compress", "ZeroDivisionError"),
        ("exits.py:compress", "exits.py"),
        ("needs.py:compress", "no_such_module"),
        ("number.py:compress", "should be called as compress(keys, values, keep_ratio)"),
        ("two.py:compress", "(keys, values)"),
        ("good.py:compress --as fish", "--as fish, but should be one of function, "),
        ("good.py:compress --like scipy", "--like scipy, but should be knorm"),
        ("good.py:compress --trait rounding", "--trait rounding, but should be NAME=VALUE"),
        ("good.py:compress --trait round=ceil", "no trait is named 'round'; there are acts, batch_independent, "),
        ("good.py:compress --trait rounding=up", "trait rounding='up', but should be ceil, floor, half_even, None"),
        ("good.py:compress --trait prune_after=-1", "trait prune_after='-1', but should be an integer of at least 0"),
        ("good.py:compress --trait skip_layers=0,x", "should be layer indices"),
        ("good.py:compress --like knorm --trait time_order=1", "trait time_order=1, but should be true or false"),
        ("good.py:compress --select order,tim", "no check is named 'tim'; there are accepts, "),
        ("good.py:compress --select ,", "--select is empty"),
        ("good.py:compress --expect-failure tim=x", "no check is named 'tim'; there are accepts, "),
        ("good.py:compress --expect-failure time_order", "--expect-failure time_order, but should be CHECK=REASON"),
        ("good.py:compress --expect-failure time_order=", "--expect-failure time_order=, but should be CHECK=REASON"),
        ("good.py:compress --expect-failure =x", "--expect-failure =x, but should be CHECK=REASON"),
        ("good.py:compress --expect-untested tim=x", "no check is named 'tim'; there are accepts, "),
        ("good.py:compress --expect-untested time_order", "--expect-untested time_order, but should be CHECK=REASON"),
        ("good.py:compress --profile slow", "--profile slow, but should be one of quick, thorough"),
        ("good.py:compress --limit 0", "--limit 0, but should be seconds above 0"),
        ("good.py:compress --limit nan", "--limit nan, but should be seconds above 0"),
        ("good.py:compress --device cuda", "PyTorch sees no CUDA device"),
        ("good.py:compress --device tpu", "--device tpu, but should be cpu, cuda or cuda:N"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run_knorm, inline, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run_knorm("check", *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("knorm: ")
    assert words in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("check good.py:compress --json nowhere/out.json", "there is no folder nowhere"),
        ("check good.py:compress --json .", "cannot write .: it is a folder"),
        ("check good.py:compress --seed many", "'many' is not a valid integer"),
    ],
)
def test_wrong_usage_shows_the_usage_and_exits_with_2(run_knorm, arguments, words):
    code, out, err = run_knorm(*arguments.split())
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("Error: ")
    assert words in err


@pytest.mark.usefixtures("bad_files")
def test_v_shows_the_traceback_of_the_targets_own_error(run_knorm, inline):
    code, out, err = run_knorm("-v", "check", "raises.py:compress")
    assert (code, out) == (2, "")
    assert err.startswith("knorm.laws.process.supervisor._Told: in the worker:\n\nTraceback (most recent call last)")
    assert "    1 / 0\n" in err
    assert "ZeroDivisionError: division by zero\n" in err


def test_help_names_every_kind_of_target():
    out = " ".join(CliRunner().invoke(cli, ["check", "--help"]).output.split())
    assert f"{', '.join(KINDS[:-1])} or {KINDS[-1]}." in out


REFUSED = (
    ("check good.py:compress --limit 0", "--limit 0, but"),
    ("check good.py:compress --trait rounding", "--trait rounding, but should be NAME=VALUE"),
    ("check good.py:compress --trait round=ceil", "no trait is named 'round'"),
    ("check good.py:compress --trait rounding=up", "trait rounding='up'"),
    ("check good.py:compress --like scipy", "--like scipy"),
    ("check good.py:compress --as fish", "--as fish, but should be one of function, class, "),
    ("check good.py:compress --select order,tim", "no check is named 'tim'; there are accepts, "),
    ("check good.py:compress --expect-failure tim=x", "no check is named 'tim'; there are accepts, "),
    ("check good.py:compress --expect-failure order=x", "no check is named 'order'"),
    ("check good.py:compress --profile slow", "--profile slow, but should be one of quick, thorough"),
    ("check nowhere.py:compress", "there is no Python file "),
    ("check good.py", "target 'good.py', but should be "),
    ("check no_such_package.module:compress", "there is no module 'no_such_package'"),
    ("check .hidden:compress", "there is no module '.hidden'"),
    ("check good.py:compress --device tpu", "--device tpu, but should be cpu, cuda or cuda:N"),
    ("ppl --model nowhere", "model 'nowhere' should be embedded, embedded-llama, smollm2, a folder, a .gguf file, or"),
    ("ppl --text nowhere.txt", "text 'nowhere.txt' is no file here"),
    ("ppl --device tpu", "--device tpu, but should be cpu, cuda or cuda:N"),
    ("ppl --reported nowhere.csv", "nowhere.csv cannot be read: it is not there"),
    ("explain --model nowhere/at@all", "model 'nowhere/at@all' is no folder here"),
    ("explain --text hub:nowhere", "text 'hub:nowhere' should be hub:organisation/name@commit:files"),
    (
        "bench --model nowhere",
        "model 'nowhere' should be embedded, embedded-llama, smollm2, a folder, a .gguf file, or",
    ),
    ("golden record", "name the cases to record, or give --all"),
    ("golden accept", "name the cases, or the candidate files"),
)


@pytest.mark.usefixtures("bad_files")
def test_what_can_be_told_from_the_arguments_is_told_before_anything_heavy_is_loaded(tmp_path):
    code = """
        import json, sys
        from knorm.cli import main
        ended = []
        for line in json.loads(sys.argv[1]):
            sys.argv = ["knorm", *line.split()]
            try:
                main()
            except SystemExit as end:
                ended.append(end.code)
            print("-----", file=sys.stderr)
        sys.argv = ["knorm", "check", "--help"]
        main()
        heavy = {'torch', 'transformers', 'hypothesis', 'numba', 'knorm.laws.runner'}
        print(json.dumps([ended, sorted(heavy & {*sys.modules})]))
    """
    run = in_a_new_process(code, json.dumps([line for line, _ in REFUSED]), check=True, cwd=tmp_path)
    ended, heavy = json.loads(run.stdout.splitlines()[-1])
    said = run.stderr.split("-----\n")
    assert heavy == []
    assert ended == [2] * len(REFUSED)
    for text, (line, words) in zip(said, REFUSED, strict=False):
        assert words in text, line
        assert text.count("\n") == 1, line


def test_the_names_of_checks_read_from_the_source_are_those_of_the_catalogue():
    assert check_names() == {check.name: check.family for check in CHECKS.values()}
    assert tuple(EFFORT) == PROFILES


@pytest.mark.parametrize(("make", "message"), [(os.mkfifo, "is a pipe"), (lambda f: f.write_text("[" * 10**5), "read")])
def test_a_baseline_is_read_within_limits(run_knorm, tmp_path, make, message):
    make(tmp_path / "old.json")
    code, _, err = run_knorm("check", "knorm:compress", "--baseline", "old.json")
    assert code == 2
    assert message in err
    assert "should be a file that `knorm check --json` wrote" in err
