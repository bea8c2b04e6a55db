"""The tool that puts faults into knorm: each fault fits today's source, and one goes all the way."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))

import mutate  # noqa: E402


@pytest.mark.parametrize("mutation", mutate.MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_fault_fits_todays_source(mutation):
    faulty = mutate.source_of(mutation)
    ast.parse(faulty)
    assert faulty != (mutate.PACKAGE / mutation.file).read_text(encoding="utf-8")


def test_text_that_does_not_occur_once_is_refused():
    for old, count in (("no such text", 0), ("def ", "")):
        with pytest.raises(ValueError, match=f"count-floor: .* occurs {count}.* times in policy.py, but should once"):
            mutate.source_of(replace(mutate.MUTATIONS[0], old=old))


def test_there_are_enough_in_every_module_and_few_change_nothing():
    files = {mutation.file for mutation in mutate.MUTATIONS}
    assert len(mutate.MUTATIONS) >= 40
    assert {"policy.py", "core.py", "schedule.py", "masked_attention.py", "perplexity.py", "cache.py"} <= files
    assert files <= {*mutate.TESTS}
    assert sum(bool(mutation.nothing) for mutation in mutate.MUTATIONS) <= 3


def test_the_document_has_every_fault_and_none_is_open():
    text = mutate.DOCUMENT.read_text(encoding="utf-8")
    rows = dict(line.split(" | ", 2)[1:] for line in text.splitlines() if line.startswith("| `"))
    assert set(rows) == {f"`{mutation.name}`" for mutation in mutate.MUTATIONS}, (
        "python tools/mutate.py run, then table"
    )
    missed = {name.strip("`") for name, rest in rows.items() if "**not noticed**" in rest}
    assert missed <= {mutation.name for mutation in mutate.MUTATIONS if mutation.nothing}


def result(**fields):
    return {"name": "x", "exit": 1, "said": "It holds. [it does not; 0.1 s]", **fields}


@pytest.mark.parametrize(
    ("row", "noticed"),
    [
        (result(), True),
        (result(exit=2), False),
        (result(exit=3, said="ValueError: shapes"), False),
        (result(exit=None, said="no answer in 300 s"), False),
        (result(exit=0, said="60 hold, 0 refuted, in 40 s"), False),
    ],
)
def test_noticed_is_a_refuted_sentence_and_exit_code_1(row, noticed):
    assert mutate.noticed(row) == noticed


def test_the_document_says_what_was_said_and_what_was_missed():
    results = {m.name: result(name=m.name, tests="test_it") for m in mutate.MUTATIONS}
    results["count-floor"] |= {"exit": 2, "said": "knorm: a | b"}
    text = mutate.document(results)
    assert "| `policy.py` | `count-floor` | rounded down | **not noticed**: knorm: a \\| b | `test_it` |" in text
    assert "| It holds. *it does not* | `test_it` |" in text
    assert "1 are open" in text
    with pytest.raises(ValueError, match="there is no result for count-floor"):
        mutate.document({name: row for name, row in results.items() if name != "count-floor"})


def test_an_unknown_fault_is_wrong_usage(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mutate", "run", str(tmp_path / "r.jsonl"), "--only", "count-ceiling"])
    assert mutate.main() == 2
    assert "no fault is named count-ceiling" in capsys.readouterr().err


@pytest.mark.processes
def test_a_count_rounded_down_is_noticed_without_goldens_and_the_checkout_left_alone(tmp_path):
    before = (mutate.PACKAGE / "policy.py").read_bytes()
    command = [
        sys.executable,
        str(ROOT / "tools" / "mutate.py"),
        "run",
        "r.jsonl",
        "--only",
        "count-floor",
        "--workers=1",
    ]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads((tmp_path / "r.jsonl").read_text())
    assert row["exit"] == 1
    assert "retained_count(2, 0.55) is 1, but should be 2" in row["said"]
    assert (mutate.PACKAGE / "policy.py").read_bytes() == before
    again = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=300)
    assert again.stdout == "", "what is in the results is not run again"
