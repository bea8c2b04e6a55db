from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import deque
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from commands import in_a_new_process, new_environment, strict_json

import knorm
from knorm.cli import cli
from knorm.laws import CHECKS, KNORM, Result, find
from knorm.laws.adapters import KINDS
from knorm.laws.process import supervisor
from knorm.laws.process.supervisor import Board, Lost, Request, Supervisor, Worker
from knorm.laws.process.worker import serve

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


class Inline:
    """A worker that works here, all at once: for what does not end a process."""

    def __init__(self, request):
        self.board, self.sent = Board(), deque()
        serve(self.sent.append, self.board, request)

    def hear(self, limit):
        return self.sent.popleft()

    def end(self):
        pass


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(supervisor, "Worker", Inline)


def target(code, name="target.py"):
    Path(name).write_text(textwrap.dedent(code), encoding="utf-8")
    return f"{name}:compress"


def verdicts(file):
    return {result["check"]: result["verdict"] for result in strict_json(file)["results"]}


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


def test_a_correct_compressor_holds_however_it_treats_its_process(run_knorm):
    select = ("--select", "count,order,nonfinite,masked_attention,crop")
    code, out, err = run_knorm("check", target(RUDE), "--like", "knorm", *select, "--seed", "3", "--json", "out.json")
    written = strict_json("out.json")
    assert (code, err) == (0, "")
    assert "hello from the target\n" in out
    assert "good bye" in out
    assert "holds    Retained positions ascend. [time_order: 60 examples; 0." in out
    assert out.splitlines()[-2] == "1 law does not apply"
    assert out.splitlines()[-1].startswith("7 hold, 0 refuted, 0 untested, 1 do not apply, in ")
    assert written["environment"]["knorm"] == knorm.__version__
    assert written["traits"] == {**asdict(KNORM), "skip_layers": []}
    assert [written[name] for name in ("target", "profile", "seed", "device")] == [
        "target.py:compress", "quick", 3, "cpu",
    ]  # fmt: skip
    assert all([*result] == [field.name for field in fields(Result)] for result in written["results"])
    assert [result["check"] for result in written["results"]] == [
        name for name, check in CHECKS.items() if name in ("nonfinite", "masked_attention", "crop")
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


def test_a_target_that_crashes_or_hangs_is_refuted_and_the_rest_goes_on(run_knorm):
    names = "retained_count,at_least_one,monotone_count,time_order,subnormal"
    options = ("--like", "knorm", "--trait", "nonfinite=none", "--select", names, "--limit", "2", "-q")
    code, out, err = run_knorm("check", target(CATASTROPHES), *options, "--json", "out.json")
    results = {result["check"]: result for result in strict_json("out.json")["results"]}
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


def test_a_printed_snippet_shows_the_wrong_positions_in_a_fresh_interpreter(run_knorm):
    code, out, _ = run_knorm(
        "-v", "check", target(IN_NORM_ORDER), "--select", "time_order,nesting", "--json", "out.json"
    )
    (result, other) = strict_json("out.json")["results"]
    lines = out.splitlines()
    assert (code, other["verdict"]) == (1, "does not apply")
    assert lines[0].startswith("REFUTED  Retained positions ascend. [time_order: example ")
    assert lines[1] == f"    {result['counterexample']}"
    assert lines[2] == f"    given: {result['given']}"
    assert lines[3] == ""
    end = lines.index("", 4)
    snippet = textwrap.dedent("\n".join(lines[4:end]))
    assert snippet == result["snippet"]
    assert lines[end + 1 : -1] == [
        f"n/a      {find('nesting').law} [nesting: needs scores=key_norm or keys]",
        "1 law does not apply; promise more with --trait: scores",
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


def test_ctrl_c_ends_the_worker_and_exits_with_130(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "from knorm.cli import main; main()"  # without a guard: a worker must not run it again
    Path("script.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "script.py", "check", target(HANGS), "--limit", "60"]
    with subprocess.Popen(command, env=new_environment(), stderr=subprocess.PIPE, text=True) as process:
        until(Path("pid").exists, 60)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read().strip() == ""
    until(lambda: not alive(int(Path("pid").read_text())), 5)


# The process, with something lighter than the catalogue in it.

LIFE = """
import ctypes, os, signal, time

def life(pipe, board, request):
    exec(request)
"""


@pytest.fixture
def begin(monkeypatch, tmp_path):
    """Start a worker that runs a few lines instead; it is ended in any case."""
    (tmp_path / "lighter.py").write_text(LIFE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import lighter

    monkeypatch.setattr(supervisor, "_work", lighter.life)
    started = []

    def start(code):
        started.append(Worker(code))
        return started[-1]

    yield start
    for worker in started:
        worker.end()
    sys.modules.pop("lighter")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("os._exit(0)", "ended the interpreter with exit code 0"),
        ("os._exit(3)", "ended the interpreter with exit code 3"),
        ("raise SystemExit(4)", "ended the interpreter with exit code 4"),
        ("ctypes.string_at(0)", "the process ended with signal 11 (SIGSEGV)"),
        ("os.abort()", "the process ended with signal 6 (SIGABRT)"),
        ("os.kill(os.getpid(), 9)", "the process ended with signal 9 (SIGKILL), as when memory runs out"),
        ("os.kill(os.getpid(), 40)", "the process ended with signal 40 (unknown)"),
        ("time.sleep(60)", "no answer within 1 s"),
        ("while True: pass", "no answer within 1 s"),
        ("os.closerange(3, 99); time.sleep(60)", "closed the files that are not its own"),
        ("os.fork() or time.sleep(3); os._exit(5)", "ended the interpreter with exit code 5"),
        ("os.write(pipe.fileno(), b'\\0\\0\\1\\0abc'); os._exit(6)", "ended the interpreter with exit code 6"),
    ],
)
def test_how_a_worker_was_lost_is_told(begin, code, words):
    worker = begin(code)
    with pytest.raises(Lost) as lost:
        worker.hear(1)
    assert str(lost.value) == words


def test_what_was_sent_before_the_end_is_heard(begin):
    worker = begin("pipe.send(1); pipe.send('x' * 10**5); board.given = b'call'; os._exit(3)")
    assert (worker.hear(9), worker.hear(9)) == (1, "x" * 10**5)
    with pytest.raises(Lost, match="exit code 3"):
        worker.hear(9)
    assert worker.board.given == b"call"


def test_a_slow_worker_that_goes_on_calling_is_waited_for(begin):
    worker = begin("for _ in range(8): time.sleep(0.25); board.calls += 1\npipe.send('done')")
    assert worker.hear(1.5) == "done"


def test_a_worker_ends_with_its_parent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = """
        import os
        from knorm.laws.process.supervisor import Request, Worker
        worker = Worker(Request("nowhere.py:f"))
        print(worker.process.pid, flush=True)
        os.kill(os.getpid(), 9)
    """
    run = in_a_new_process(code)
    until(lambda: not alive(int(run.stdout)), 10)


# The supervisor, with workers that tell what a test wants.


class Scripted:
    """Workers that send, or are lost with, what stands in `lives`, one list for each."""

    lives = ()

    def __init__(self, request):
        self.request, self.script, self.board = request, deque(Scripted.lives.pop(0)), Board()
        Scripted.selected.append(request.select)

    def hear(self, limit):
        said = self.script.popleft()
        if isinstance(said, Exception):
            raise said
        return said

    def end(self):
        pass


def entry(name, verdict="untested", **found):
    check = find(name)
    return asdict(Result(check.name, check.law, check.family, verdict, **found))


def plan(*entries):
    return "plan", {"traits": {}, "code": "", "checks": [*entries]}


@pytest.fixture
def supervise(monkeypatch):
    monkeypatch.setattr(supervisor, "Worker", Scripted)
    Scripted.selected = []

    def run(*lives, **options):
        Scripted.lives = [*map(list, lives)]
        return [*Supervisor(Request("target", **options)).results()]

    return run


NAMES = ("accepts", "shape", "time_order", "dtype", "empty")


def test_after_three_lost_in_a_row_the_rest_is_untested(supervise):
    first, other = plan(*map(entry, NAMES)), plan()
    results = supervise([first, Lost("hangs")], [other, Lost("died")], [other, Lost("died")])
    assert [result["verdict"] for result in results] == ["refuted"] * 3 + ["untested"] * 2
    assert results[0]["counterexample"] == "accepts: hangs"
    assert {result["reason"] for result in results[3:]} == {"3 workers in a row were lost to the checks before"}
    assert Scripted.selected == [None, NAMES[1:], NAMES[2:]]


def test_a_check_that_comes_back_makes_good(supervise):
    first, other, fine = plan(*map(entry, NAMES)), plan(), ("result", entry("shape", "holds"))
    lost = Lost("died")
    results = supervise([first, lost], [other, fine, lost], [other, lost], [other, lost])
    assert [result["verdict"] for result in results] == ["refuted", "holds", *["refuted"] * 3]


def test_laws_that_do_not_apply_need_no_worker(supervise):
    unasked = entry("copy", "does not apply", reason="needs a transformers cache")
    results = supervise([plan(entry("accepts"), unasked), Lost("died")])
    assert [result["verdict"] for result in results] == ["refuted", "does not apply"]


def test_a_target_that_does_not_load_again_leaves_the_rest_untested(supervise):
    results = supervise([plan(*map(entry, NAMES[:3])), Lost("died")], [("wrong", ("no disk", "trace"))])
    assert [result["verdict"] for result in results] == ["refuted", "untested", "untested"]
    assert results[2]["reason"] == "not loaded again: no disk"


def test_a_broken_cuda_context_does_not_reach_the_next_check(supervise):
    broken = ("result", entry("accepts", "refuted", counterexample="accepts: raised AcceleratorError: CUDA error: ..."))
    results = supervise([plan(*map(entry, NAMES[:2])), broken], [plan(), ("result", entry("shape", "holds"))])
    assert [result["verdict"] for result in results] == ["refuted", "holds"]


def test_a_loss_may_be_expected(supervise):
    (result,) = supervise([plan(entry("accepts")), Lost("died")], expected=(("accepts", "known"),))
    assert (result["verdict"], result["reason"]) == ("expected failure", "known")


def test_a_target_that_ends_the_worker_while_it_loads_is_wrong_usage(supervise):
    with pytest.raises(ValueError, match=r"^target cannot be loaded: ended the interpreter with exit code 3$"):
        supervise([Lost("ended the interpreter with exit code 3")])


# What a target does that ends no process.


@pytest.mark.parametrize(
    ("body", "refuted", "words"),
    [
        ("raise RuntimeError('no\\nway')", {"accepts"}, "accepts: raised RuntimeError: no\n    way [keys [1, 1, 1, 4]"),
        ("raise SystemExit(2)", {"accepts"}, "accepts: raised SystemExit: 2 [keys [1, 1, 1, 4]"),
        ("import sys; sys.exit()", {"accepts"}, "accepts: raised SystemExit: "),
        ("raise KeyboardInterrupt", {"accepts", "shape"}, "accepts: raised KeyboardInterrupt:  [keys ["),
        ("return None", {"shape"}, "shape: returned None, but should return (keys, values)"),
        ("return 'nonsense'", {"shape"}, "shape: returned str"),
        ("return 1, 2", {"shape"}, "shape: returned tuple of int"),
        ("return keys[0], values[0]", {"shape"}, "shape: returned keys float32 [1, 1, 4]"),
        ("return {'keys': keys}", {"shape"}, "shape: returned dict"),
        ("raise ValueError('\\ud800')", {"accepts"}, "accepts: raised ValueError: ? [keys "),
    ],
)
def test_what_answers_with_an_error_or_nonsense_is_refuted(run_knorm, inline, body, refuted, words):
    code = f"def compress(keys, values, keep_ratio):\n    {body}\n"
    ended, out, err = run_knorm("check", target(code), "--select", "accepts,shape", "--json", "out.json")
    assert (ended, err) == (1, "")
    assert {name for name, verdict in verdicts("out.json").items() if verdict == "refuted"} == refuted
    assert words in out


def test_untested_laws_are_no_success(run_knorm, inline):
    code = "def compress(keys, values, keep_ratio):\n    return None"
    ended, out, _ = run_knorm("check", target(code), "--select", "dtype")
    assert ended == 1
    assert out.startswith("untested Dtype and device are kept. [dtype: no drawn case was answered; ")
    assert out.splitlines()[-1].startswith("0 hold, 0 refuted, 1 untested, 0 do not apply, in ")


def test_expected_failures_are_told_from_others(run_knorm, inline):
    options = ("--expect-failure", "time_order=sorts by norm", "--select", "time_order,dtype")
    ended, out, _ = run_knorm("check", target(IN_NORM_ORDER), *options)
    assert ended == 0
    assert out.startswith("expected Retained positions ascend. [time_order: sorts by norm; example ")
    assert "1 hold, 0 refuted, 1 failed as expected, 0 untested" in out
    ended, out, _ = run_knorm("check", target(GOOD), *options)
    assert ended == 1
    assert out.startswith("HOLDS THOUGH EXPECTED TO FAIL  Retained positions ascend. [time_order: sorts by norm; 60 ")
    assert "1 hold, 0 refuted, 1 held though expected to fail, 0 untested" in out


def test_traits_profile_and_seed_reach_the_checks(run_knorm, inline):
    options = ("--select", "retained_count,subnormal", "--like", "knorm", "--trait", "rounding=floor")
    assert run_knorm("check", target(GOOD), *options, "--profile", "thorough", "--json", "out.json")[0] == 1
    count, subnormal = strict_json("out.json")["results"]
    assert "tokens retained, but should be " in count["counterexample"]
    assert subnormal["examples"] == 600
    seeds = [
        (
            run_knorm("check", target(GOOD), *options, "--seed", seed, "-q", "--json", "out.json"),
            strict_json("out.json"),
        )
        for seed in ("1", "1", "5")
    ]
    tried = [[result["examples"] for result in written["results"]] for _, written in seeds]
    assert tried[0] == tried[1] != tried[2]


def test_what_knorm_stumbles_over_is_no_success_and_no_crash(run_knorm, inline, monkeypatch):
    def stumble(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("knorm.laws.runner.run_check", stumble)
    for verbose in ((), ("-v",)):
        ended, out, err = run_knorm(*verbose, "check", target(GOOD), "--select", "time_order")
        assert ended == 1
        assert "[time_order: knorm could not run it: ZeroDivisionError: oops; 0.0 s]" in out
        assert ("Traceback" in err) is bool(verbose)


def test_a_result_in_a_terminal_wraps_but_its_snippet_does_not():
    from rich.console import Console

    from knorm.cli.tables import show_result

    console = Console(force_terminal=True, width=40, color_system=None, highlight=False)
    found = {"counterexample": "word " * 20, "given": "keys", "snippet": "keys = [" + "0.0, " * 30 + "]"}
    with console.capture() as captured:
        show_result(console, entry("time_order", "refuted", **found))
    lines = captured.get().splitlines()
    assert "        " + found["snippet"] in lines
    assert max(len(line) for line in lines if "keys = [" not in line) <= 40


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
        ("good.py:compress --as fish", "fish"),
        ("good.py:compress --like scipy", "--like scipy, but should be knorm"),
        ("good.py:compress --trait rounding", "--trait rounding, but should be NAME=VALUE"),
        ("good.py:compress --trait round=ceil", "no trait is named 'round'; there are batch_independent, "),
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
        ("check", "Missing argument 'TARGET'"),
        ("check good.py:compress --json nowhere/out.json", "there is no folder nowhere"),
        ("check good.py:compress --json .", "cannot write .: it is a folder"),
        ("check good.py:compress --seed many", "'many' is not a valid integer"),
        ("check good.py:compress more", "unexpected extra argument"),
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


def test_nothing_is_refused_late(run_knorm, monkeypatch):
    """What can be seen from the arguments alone starts no worker."""
    monkeypatch.setattr(supervisor, "Worker", SimpleNamespace)
    for arguments in (("--expect-failure", "x"), ("--select", ""), ("--limit", "-1"), ("--device", "tpu")):
        assert run_knorm("check", "good.py:compress", *arguments)[0] == 2


def test_help_names_every_kind_of_target():
    out = " ".join(CliRunner().invoke(cli, ["check", "--help"]).output.split())
    assert f"{', '.join(KINDS[:-1])} or {KINDS[-1]}." in out


@pytest.mark.parametrize("arguments", [["check", "--help"], ["check", "x", "--limit", "0"]])
def test_the_parent_loads_nothing_heavy(arguments):
    code = """
        import sys
        from knorm.cli import cli, main
        try:
            main()
        finally:
            print(sorted({'torch', 'transformers', 'hypothesis', 'knorm.laws.runner'} & {*sys.modules}))
    """
    run = in_a_new_process(code, *arguments)
    assert run.stdout.splitlines()[-1] == "[]"
