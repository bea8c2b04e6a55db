"""The pytest plugin: options, the marker of laws, comparison with goldens. Imports only stdlib and pytest."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest

_GOLDENS: dict[str, dict[str, Any]] = {
    "golden-dir": {"metavar": "DIR", "help": "Goldens to compare with. [the project's, else knorm's own]"},
    "require-goldens": {
        "action": "store_true",
        "help": "Fail, not skip, where a device class has no goldens (CI).",
    },
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of law tests and of golden comparisons."""
    group = parser.getgroup("knorm", "laws of a compressed KV cache")
    group.addoption(
        "--knorm-profile",
        choices=("quick", "thorough"),
        default="quick",
        help="How hard the tests of knorm.laws.parametrize_with_checks try. [quick]",
    )
    group.addoption("--knorm-seed", type=int, default=0, metavar="N", help="The same seed draws the same cases. [0]")
    for name, options in _GOLDENS.items():
        group.addoption(f"--knorm-{name}", **options)


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(parser: pytest.Parser) -> Generator[None, Any, Any]:
    """Offer the old names of options too, where no plugin and no conftest.py has taken them."""
    result = yield
    for name, options in _GOLDENS.items():
        own = {**options, "dest": f"knorm_{name.replace('-', '_')}", "help": f"The same as --knorm-{name}."}
        with contextlib.suppress(ValueError, argparse.ArgumentError):  # it is taken
            parser.getgroup("knorm").addoption(f"--{name}", **own)
    return result


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker that parametrize_with_checks adds."""
    config.addinivalue_line("markers", "knorm: a law of a compressed KV cache, tried on drawn cases")


def pytest_report_header(config: pytest.Config) -> str:
    """Say how hard law tests try."""
    return f"knorm: profile {config.getoption('knorm_profile')}, seed {config.getoption('knorm_seed')}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Hand the options to the checks, once a law test is there: it has loaded them."""
    if item.get_closest_marker("knorm"):
        from knorm.laws.runner import OPTIONS

        OPTIONS.update(profile=item.config.getoption("knorm_profile"), seed=item.config.getoption("knorm_seed"))


class Goldens:
    """Compare with goldens, and never write: the value of the fixture `golden`, for the test of its `request`."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._config, self._folder = request.config, request.path.parent

    def __call__(self, case: str, *, device: str = "cpu") -> Any:
        """Measure a case of the project that the test lies in, else one of knorm's own, and compare it.

        Fails where anything moved. Skips where there is no golden of this device class at all; with
        --knorm-require-goldens that fails.

        Args:
            case: its name.
            device: to measure on.

        Returns:
            The outcome: its findings hold golden and measured values.

        Example:
            >>> def test_nothing_moved(golden):
            ...     golden("snap-half")
        """
        __tracebackhide__ = True
        from knorm.golden.verify import verify_goldens

        try:
            workspace = self._workspace()
            (outcome,) = verify_goldens(workspace.store, [case], device, catalogue=workspace.load([case]))
        except (ValueError, RuntimeError, AssertionError) as error:  # PyTorch's own, where it has no such device
            pytest.fail(str(error), pytrace=False)
        return self._judged(outcome)

    def check(
        self, name: str, metrics: Mapping[str, Any], tensors: Any = None, *, gate: Any = None, device: str = "cpu"
    ) -> Any:
        """Compare values of the test's own with an accepted golden.

        `knorm golden record --from-tests` makes the candidate that `knorm golden accept NAME` puts in place. Fails and
        skips as for a case.

        Args:
            name: of the golden; a-z, 0-9, - and _.
            metrics: numbers and texts by name. Whole numbers and texts must be equal, others within 1e-5, relative.
            tensors: by name, of NumPy, torch, or nested lists. Whole numbers must be equal, others within 1e-5 of the
                largest.
            gate: another relative tolerance, or "exact", "same_environment", "same_versions", "at_most"; for all
                values, or a dictionary by name.
            device: whose class the golden is of.

        Returns:
            The outcome; None while `record` runs the test.

        Example:
            >>> def test_counts(golden):
            ...     golden.check("counts", {"kept": 128}, tensors={"positions": [0, 5, 7]})
        """
        __tracebackhide__ = True
        from knorm.golden.values import check_values, measured_values

        try:
            workspace = self._workspace()
            if name in workspace.names:
                raise ValueError(f"golden.check({name!r}): a case is named so: give the values another name")
            outcome = check_values(name, measured_values(metrics, tensors, gate), workspace.store, device)
        except (ValueError, RuntimeError, AssertionError) as error:
            pytest.fail(str(error), pytrace=False)
        return self._judged(outcome) if outcome else None

    def _workspace(self) -> Any:
        from knorm.golden.workspace import find_workspace

        folder = self._config.getoption("knorm_golden_dir")
        return find_workspace(Path(folder) if folder else None, self._folder)

    def _judged(self, outcome: Any) -> Any:
        __tracebackhide__ = True
        from rich.console import Console

        from knorm.cli.tables import show_outcome

        console = Console(width=120)
        with console.capture() as capture:
            show_outcome(console, outcome)
        if outcome.failed or (not outcome.compared and self._config.getoption("knorm_require_goldens")):
            pytest.fail(capture.get(), pytrace=False)
        if not outcome.compared:
            pytest.skip(f"{outcome.verdict.upper()}: {outcome.evidence}")
        return outcome


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Goldens:
    """Read-only comparison: golden("snap-half") of a case, golden.check("name", {"kept": 128}) of the test's values."""
    return Goldens(request)
