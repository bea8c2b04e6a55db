from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from commands import HOME
from tiny import tiny, tokens

import knorm
from knorm.bench import commits as versus
from knorm.bench import latency
from knorm.bench import worker as bench_worker
from knorm.bench.commits import Setup, Worker, changed_files, find_checkout, resolve, worktree
from knorm.bench.counters import Counters
from knorm.bench.latency import Prompt
from knorm.cli import bench as bench_cli
from knorm.cli.bench import _folder as model_folder
from knorm.models import ASSETS, load_model

QUICK = ("--prompt-tokens", "9", "--new-tokens", "4", "--keep-ratio", "0.5", "--blocks", "8")


@pytest.fixture
def run_bench(run_knorm, monkeypatch):
    """Run `knorm bench` as if alone on the machine."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def small(asked):
        """A model that takes no time, where nothing is asked of the real one."""
        prompts = {"a": Prompt(tokens(1, 9), 4), "b": Prompt(tokens(1, 12), 6)}
        return tiny("gpt_neox"), None, prompts, asked.policies.policies()

    def run(*arguments):
        if arguments[: len(QUICK)] == QUICK and "--json" not in arguments:
            monkeypatch.setattr(bench_cli, "_load", small)
        return run_knorm("bench", *arguments)

    return run


@pytest.mark.processes
def test_the_command_gives_tables_json_and_a_figure(run_bench):
    code, out, err = run_bench(*QUICK, "--json", "out.json", "--plot", "out.png", "--margin", "900")
    assert (code, err) == (0, "")
    found = json.loads(Path("out.json").read_text())
    assert {"blocks", "verdict", "margin", "alpha", "power", "prompts", "warm_up", "environment"} <= {*found}
    assert (found["blocks"], found["warm_up"], found["verdict"], found["margin"]) == (8, 1, "PASS", 9.0)
    plain, half = found["rows"]
    assert plain["policy"] is plain["verdict"] is None
    assert not plain["comparisons"]
    assert half["policy"]["keep_ratio"] == 0.5
    for metric in ("ttft", "tpot", "throughput"):
        compared = half["comparisons"][metric]
        assert compared["low"] < compared["ratio"] < compared["high"]
        assert compared["mde"] > 0
        assert len(half["log_ratios"][metric]) == 8
    assert half["tpot"]["median"] <= half["tpot"]["p99"]
    assert half["counters"]["retained"][0] == plain["counters"]["retained"][0] == 12
    words = out.split()
    assert {"uncompressed", "PASS:", "TTFT", "TPOT", "bootstrap's."} <= {*words}
    assert f"{1000 * plain['ttft']['seconds']:.2f}" in words
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


def verdicts(monkeypatch, shift, spread):
    """Blocks whose log-ratios are given."""
    noise = torch.randn(8, generator=torch.Generator().manual_seed(0)) * spread
    logs = iter((math.log1p(shift) + noise).tolist() * 3)
    monkeypatch.setattr("knorm.bench.policies.log_ratio", lambda *_: next(logs))


@pytest.mark.parametrize(
    ("shift", "spread", "strict", "code", "said"),
    [
        (0.0, 0.005, (), 0, "PASS: no TTFT or TPOT is slower by 5.0% or more"),
        (0.2, 0.005, (), 1, "FAIL: slower: TTFT at 0.5 by 19.9%, TPOT at 0.5 by 19.9%"),
        (0.0, 0.5, (), 0, "INCONCLUSIVE: TPOT at 0.5: the noise is too large for 8 blocks; about "),
        (0.0, 0.5, ("--strict",), 1, "INCONCLUSIVE: TPOT at 0.5"),
    ],
)
def test_verdicts_and_exit_codes(run_bench, monkeypatch, shift, spread, strict, code, said):
    verdicts(monkeypatch, shift, spread)
    found, out, _ = run_bench(*QUICK, *strict)
    assert found == code
    assert said in out


def test_published_times_stand_beside_those_of_this_machine(run_bench):
    code, out, _ = run_bench(*QUICK, "--reported", "--margin", "900")
    assert code == 0
    (line,) = (line for line in out.splitlines() if " ttft-0.5 " in line)
    assert line.startswith("does not hold")
    assert "+92.9%" in line
    (line,) = (line for line in out.splitlines() if " tpot-seconds-1.0 " in line)
    assert line.startswith("cannot be tested")
    assert "ttft-0.9" not in out, "what was not measured is left out"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--blocks", "7"), "--blocks 7, but should be at least 8: fewer cannot tell noise from change"),
        (("--against", "HEAD", "--rounds", "3"), "--rounds 3, but should be at least 8"),
        (("--seconds", "0"), "--seconds 0, but should be seconds above 0"),
        (("--margin", "0"), "--margin 0, but should be a slowdown in per cent above 0"),
        (("--keep-ratio", ""), "--keep-ratio is empty, but should be ratios in (0, 1], e.g. 0.9,0.5"),
        (("--keep-ratio", "0.5,0.50"), "--keep-ratio 0.5,0.50: one stands there twice"),
        (("--threads", "0"), "--threads 0, but should be at least 1"),
        (("--new-tokens", "2000"), "512 characters: 171 tokens of prompt and 2000 new ones are 2171, but the model's"),
        (("--new-tokens", "1"), "--new-tokens 1, but should be at least 2"),
        (("--batch", "0"), "--batch 0, but should be at least 1"),
        (("--device", "cuda"), "--device cuda, but PyTorch sees no CUDA device"),
        (("--plot", "a.gif"), "--plot a.gif, but should end in .png, .svg or .pdf"),
        (("--reported", "--protocol", "prefill"), "--reported is about streaming with --prune-after 32"),
        (("--reported", "--against", "HEAD"), "--reported is about policies, --against about commits: drop one"),
    ],
)
def test_wrong_usage_is_one_line_and_no_number(run_bench, monkeypatch, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run_bench(*arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err


def test_under_xdist_the_command_refuses(run_bench, monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    code, out, err = run_bench()
    assert (code, out) == (2, "")
    assert "timing under pytest-xdist (gw0)" in err


def test_a_busy_gpu_is_refused_before_anything_is_loaded(run_bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(latency, "_ask", lambda which, query: ["4711"])
    code, out, err = run_bench("--device", "cuda")
    assert (code, out) == (2, "")
    assert "cuda is used by another process: no time would be this code's" in err


# Two commits


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True, env=environment)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A repository of this package: "good"; "broken", which raises when imported; "empty", without the package."""
    root = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__", "assets", "laws")
    shutil.copytree(HOME / "knorm", root / "knorm", ignore=ignored)
    git(root, "init", "-q")
    for tag, file, line in (
        ("good", "policy.py", ""),
        ("broken", "policy.py", "raise RuntimeError('half a change')\n"),
        ("empty", None, ""),
    ):
        if file:
            with (root / "knorm" / file).open("a") as stream:
                stream.write(line)
        else:
            git(root, "rm", "-rq", "knorm")
        git(root, "add", "-A")
        git(root, "commit", "-qm", tag, "--allow-empty")
        git(root, "tag", tag)
    git(root, "checkout", "-q", "good")
    return root


def test_the_checkout_is_found_and_its_changes_are(project, monkeypatch, tmp_path):
    monkeypatch.setattr(versus, "PACKAGE", tmp_path / "site-packages" / "knorm")
    monkeypatch.chdir(project / "knorm")
    assert find_checkout() == project.resolve()
    assert changed_files(project) == 0
    (project / "knorm" / "new.py").write_text("")
    assert changed_files(project) == 1
    assert "changes in 1 file" in versus.describe(project, 1)
    (project / "knorm" / "new.py").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"neither .* nor the current folder is a git checkout of knorm: run it in one"
    ):
        find_checkout()


def test_the_command_names_the_checkout_that_lacks_the_reference(run_bench, project, monkeypatch, tmp_path):
    monkeypatch.setattr(versus, "PACKAGE", tmp_path / "site-packages" / "knorm")
    monkeypatch.chdir(project)
    code, out, err = run_bench("--against", "no/such")
    assert (code, out) == (2, "")
    assert f"--against no/such, but {project.resolve()} has no commit, branch or tag of that name" in err


@pytest.mark.parametrize("ref", ["nope", "--help", "HEAD~99", ""])
def test_a_reference_that_does_not_exist(project, ref):
    assert len(resolve(project, "good")) == 40
    with pytest.raises(ValueError, match="no commit, branch or tag of that name: git fetch it, or see git log"):
        resolve(project, ref)


def test_the_worktree_is_gone_whatever_happens(project):
    seen = []

    def interrupted(error):
        with worktree(project, resolve(project, "good")) as tree:
            seen.append((tree, (tree / "knorm" / "core.py").is_file()))
            raise error

    def terminated():
        with worktree(project, resolve(project, "good")) as tree:
            seen.append((tree, (tree / "knorm" / "core.py").is_file()))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error):
            interrupted(error)
    with pytest.raises(SystemExit):
        terminated()
    assert [(tree.exists(), there) for tree, there in seen] == [(False, True)] * 3
    with pytest.raises(ValueError, match=r"commit \w{12} does not build: it has no knorm/__init__\.py"):
        worktree(project, resolve(project, "empty")).__enter__()
    listed = subprocess.run(["git", "-C", project, "worktree", "list"], capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1


def setup(**changes):
    prompt = {"ids": [[1, 2, 3, 4, 5, 6, 7, 8, 9]], "new_tokens": 4}
    fields = {"model": str(ASSETS), "dtype": "float32", "device": "cpu", "threads": 1, "prompts": (prompt,)}
    return Setup(**{**fields, "policies": (knorm.Policy(0.5).as_json(),), **changes})


def test_a_commit_that_does_not_import_is_quoted(project):
    with worktree(project, resolve(project, "broken")) as tree:
        worker = Worker(tree, setup(), "commit abc")
        with pytest.raises(ValueError, match=r"commit abc does not build or import: RuntimeError: half a change"):
            worker.wait_until_ready()
        worker.end()


def told(lines, project_package):
    """What a worker answers, in this process."""
    heard = []
    lines = iter([json.dumps(line) for line in (asdict(setup()), *lines)])
    bench_worker.serve(lines, heard.append, project_package)
    return heard


def test_a_worker_answers_each_line():
    ready, first, steps, counted = told([["prompt", 0, 0], ["steps", 0, 3], ["count", 0, 0]], HOME / "knorm")
    assert ready == "ready"
    assert first > 0
    assert len(steps) == 3
    assert counted["retained"] == (8,) * 7  # 5 of 9, and three new ones
    assert counted["step_operators"] > 0


def test_a_worker_that_imports_another_knorm_says_so(tmp_path):
    with pytest.raises(ImportError, match=r"knorm was imported from .*, not from"):
        told([], tmp_path)


STUB = """
import json, os, sys
tree = os.path.basename(os.path.dirname(sys.argv[1]))
slow = 1.5 if tree == "slow" else 1.0
setup, alive = json.loads(next(sys.stdin)), 0
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    what, arm, number = json.loads(line)
    if tree == "dies":
        sys.exit("out of luck")
    counters = {"retained": [5], "cache_bytes": 9, "steps": 3, "prompt_operators": 4,
                "step_operators": 7 * slow, "prompt_launches": None, "step_launches": None}
    print(json.dumps({"prompt": slow, "steps": [slow] * number, "count": counters}[what]), flush=True)
"""


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Workers that load nothing: what they are called decides how fast they are."""
    (tmp_path / "worker.py").write_text(STUB)
    monkeypatch.setattr(versus, "_WORKER", tmp_path / "worker.py")
    for name in ("as it was", "slow", "dies"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_two_commits_take_turns(stub):
    done = []
    both = stub / "as it was", stub / "slow"
    found = versus.against(both, ("old", "new"), setup(), rounds=2, blocks=3, on_block=lambda: done.append(1))
    assert len(done) == 6
    assert found.logs == [{metric: [pytest.approx(math.log(1.5))] * 2 for metric in latency.METRICS}]
    assert (found.old[0].step_operators, found.new[0].step_operators) == (7, 10.5)


def test_a_process_that_dies_is_named_with_its_last_words(stub):
    both = stub / "as it was", stub / "dies"
    with pytest.raises(ValueError, match="the process of new died: out of luck"):
        versus.against(both, ("old", "new"), setup(), rounds=1, blocks=1)


@pytest.mark.parametrize(("allowed", "code"), [((), 1), (("--allow-counters",), 0)])
def test_counters_that_rose_fail_unless_they_may(run_bench, monkeypatch, project, allowed, code):
    logs = {metric: [0.0] * 8 for metric in latency.METRICS}
    counters = [Counters((5,), 9, 3, 4, operators, None, None) for operators in (7, 8)]
    found = versus.Found([logs], counters[:1], counters[1:])
    monkeypatch.setattr(versus, "against", lambda *_, **__: found)
    monkeypatch.setattr(versus, "find_checkout", lambda: project)
    ended, out, err = run_bench(*QUICK, "--against", "good", *allowed)
    assert (ended, err) == (code, "")
    assert "operators of 3 decode steps rose from 7 to 8" in out
    assert ("FAIL: counters rose" in out) == (not allowed)
    assert "against good (" in out


@pytest.mark.processes
def test_two_real_processes_of_two_commits(project):
    with worktree(project, resolve(project, "good")) as tree:
        found = versus.against((tree, project), ("old", "new"), setup(), rounds=1, blocks=2)
    assert found.new == found.old
    assert found.new[0].retained == (8,) * 7
    assert [len(logs) for logs in found.logs[0].values()] == [1, 1, 1]


def test_another_commit_gets_a_model_as_a_folder_or_a_path_that_holds_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2", "folder"):  # a folder called so is not what load_model takes
        (tmp_path / name).mkdir()
    (tmp_path / "m.gguf").touch()
    with model_folder("embedded-llama") as folder:
        assert type(load_model(folder)[0]).__name__ == "LlamaForCausalLM"
    for given, passed in {
        "embedded": str(ASSETS),
        "folder": str(tmp_path / "folder"),
        "m.gguf": str(tmp_path / "m.gguf"),
        "smollm2": "smollm2",
        "org/name@0": "org/name@0",
    }.items():
        with model_folder(given) as folder:
            assert folder == passed
