"""The tool that tries the gates of declared cases: a run in which nothing matters, and a fault, from end to end."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

import declared_power as tool  # noqa: E402


@pytest.fixture
def small(monkeypatch):
    """The cache alone, on few tokens."""
    monkeypatch.setattr(tool, "OPTIONS", {"model": "embedded-llama", "window": 64, "windows": 2})
    monkeypatch.setattr(tool, "SUBJECTS", {"cache": replace(tool.SUBJECTS["cache"], options={"keep_ratio": ["0.3"]})})


@pytest.mark.processes
def test_a_fault_fires_where_another_rounding_does_not(small, tmp_path):
    tool.reference(tmp_path)
    for number in (0, 2):
        tool.one_run("cache", None, number, number == 0, tmp_path / "cache" / "runs" / f"nothing-{number}.run")
    fault = "the count rounded down"
    tool.one_run("cache", fault, 1, False, tmp_path / "cache" / "runs" / "fault.run")
    found, first, second = tool.rows_of(tmp_path, "cache")
    assert (first.near, first.fired, first.moved["worst"]) == ("same", [], 0.0)
    assert (second.near != "same", second.fired) == (True, [])
    assert "seen/0.3" in {finding.metric for finding in found.fired}
    text = tool.section(tmp_path)
    assert f"| cache | {fault} | 1 of 1 |" in text
    assert "|  |  |  | all | 2 |  |  |  | 0 | 0 |" in text


@pytest.mark.parametrize("name", ["cache", "quantised cache"])
def test_every_fault_is_a_target_that_loads(name):
    subject = tool.SUBJECTS[name]
    if not subject.here:
        pytest.skip("transformers here has no fp8 cache")
    assert len(subject.changes) == 4
    for target in (subject.target, *subject.changes.values()):
        assert tool.case_of(name, target).own_noise
