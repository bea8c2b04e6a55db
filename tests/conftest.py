"""Hypothesis profiles, a model to test on, and the command."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from commands import IN_FULL
from hypothesis import HealthCheck, settings

slow_is_fine = {"database": None, "deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=40, **slow_is_fine)
settings.register_profile("thorough", max_examples=150, **slow_is_fine)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("thorough" if os.environ.get("CI") else "quick"))

# One, since pytest -n auto has a worker per core; `nox -s cpus` asks for others.
torch.set_num_threads(int(os.environ.get("KNORM_THREADS") or 1))


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_make_scheduler(config, log):
    """A worker that has nothing left takes what the other has not begun: the longest tests stand together."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_collection_modifyitems(items):
    if not IN_FULL:
        reason = "takes long, most of it to load PyTorch: where CI or KNORM_PROCESSES is set, as .ci/run does"
        for item in items:
            if item.get_closest_marker("processes"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _no_downloads(tmp_path_factory):
    """No test reaches a network, or writes to anyone's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def embedded():
    """The model in the box and its tokenizer."""
    from knorm import load_embedded

    return load_embedded()


@pytest.fixture
def run_knorm(monkeypatch, capfd, tmp_path):
    """Run a command in a folder of its own; returns exit code, stdout and stderr, those of its processes included."""
    from knorm.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["knorm", *arguments])
        try:
            code = main() or 0
        except SystemExit as ended:
            code = ended.code
        return code, *capfd.readouterr()

    return run
