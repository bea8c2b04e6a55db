"""Laws are tried on fewer cases where a test is about a subject that holds, which takes all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from commands import IN_FULL

from knorm.laws import readings, runner, search
from knorm.laws.search import EFFORT


@pytest.fixture
def fewer(monkeypatch):
    """A third of the examples; at a desk a sixth, and a verdict on caches needs fewer readings too."""
    if not IN_FULL:
        monkeypatch.setattr(readings, "SHORT", readings.SHORT[::5])
        monkeypatch.setattr(readings, "LONG", readings.LONG[::5])
        for module in (search, runner):
            monkeypatch.setattr(module, "LEAST", 4)
    part = 3 if IN_FULL else 6
    less = {slow: replace(effort, examples=effort.examples // part) for slow, effort in EFFORT["quick"].items()}
    monkeypatch.setitem(EFFORT, "quick", less)
