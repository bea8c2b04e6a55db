from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from goldens import NLL, accept, candidate, measured

from knorm.golden.history import history, moving
from knorm.golden.store import Store


def git(*arguments):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def log(tmp_path, run_knorm, monkeypatch):
    """A repository in which a golden was accepted three times, the last not committed; runs `knorm golden log`."""
    monkeypatch.setenv("COLUMNS", "200")
    git("init", "-q", ".")
    Path("knorm.toml").touch()
    Path("golden").mkdir()
    store = Store(Path("golden"))
    for value, reason in ((100, "the first"), (110, "windows are longer"), (120, "sinks are kept")):
        made = measured(NLL * np.float32(value / 100), seen=value)
        accept(store, candidate(made), made.tensors, reason=reason, permissions=everything())
        if value < 120:
            git("add", ".")
            git("commit", "-qm", reason)
    return lambda *arguments: run_knorm("golden", "log", *arguments)


def everything():
    from knorm.golden.approval import parse_permissions

    return parse_permissions(["streaming:*=100"], ["streaming:*"])


def test_it_shows_values_reasons_and_the_anchor(log):
    code, out, _ = log("streaming", "--json", "out.json", "--plot", "out.png")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].strip() == "streaming (cpu-x86_64): accepted 3 times"
    assert lines[1].split() == ["recorded", "commit", "reason", "nll/0.5", "seen/0.5"]
    assert "the first" in lines[2]
    assert lines[2].split()[-1] == "100"
    assert "windows are longer" in lines[3]
    assert lines[3].endswith("110 (+10.00%)")
    assert git("rev-parse", "HEAD")[:12] in lines[3]
    assert "not committed  sinks are kept" in lines[4]
    assert lines[4].endswith("120 (+20.00%)")
    entries = json.loads(Path("out.json").read_text())["entries"]
    assert [entry["values"]["seen/0.5"] for entry in entries] == [100, 110, 120]
    assert {entry["anchors"]["seen/0.5"] for entry in entries} == {100}
    assert [entry["commit"] is None for entry in entries] == [False, False, True]
    assert Path("out.png").read_bytes()[:4] == b"\x89PNG"


def test_metrics_are_chosen_by_name(log):
    code, out, _ = log("streaming", "--metric", "ppl*", "--metric", "seen/0.5")
    assert code == 0
    assert out.splitlines()[1].split()[3:] == ["seen/0.5", "ppl_ratio/0.5"]
    code, _, err = log("streaming", "--metric", "kl")
    assert (code, err) == (2, "knorm: --metric kl fits none of nll/0.5, seen/0.5, evicted_at/0.5, ppl_ratio/0.5\n")


def test_a_commit_that_touches_nothing_and_one_that_cannot_be_read(log):
    file = Path("golden/streaming/cpu-x86_64.json")
    git("add", ".")
    git("commit", "-qm", "three")
    whole = file.read_text()
    file.write_text(whole[:100])
    git("commit", "-qam", "broken")
    file.write_text(whole)
    git("commit", "-qam", "mended")
    broken = git("rev-parse", "HEAD~1")
    code, out, _ = log("streaming")
    assert code == 0
    assert "accepted 3 times" in out
    assert f"not read: the golden of {broken}" in out


def test_where_nothing_ever_changed_it_says_so(log):
    entries, _ = history(Store(Path("golden")), "streaming", "cpu-x86_64")
    assert moving(entries[:1]) == []
    git("stash", "-uq")
    git("reset", "-q", "--hard", "HEAD~1")
    code, out, _ = log("streaming")
    assert code == 0
    assert "No metric ever changed: --metric names those to show all the same." in out


def test_what_there_is_not_is_one_line(log):
    code, _, err = log("stream")
    assert (code, err.count("\n")) == (2, 1)
    assert "stream has no golden in " in err
    assert "there are goldens of streaming" in err
    code, _, err = log("streaming", "--device-class", "cpu-riscv")
    assert code == 2
    assert "streaming/cpu-riscv.json: no golden was ever accepted in " in err
    code, _, err = log("streaming", "--plot", "out.xyz")
    assert code == 2
