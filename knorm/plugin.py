"""The pytest plugin: options, the marker of laws, comparison with goldens. Imports only stdlib and pytest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


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
    group.addoption("--golden-dir", metavar="DIR", help="Goldens to compare with. [the checkout's, else the installed]")
    group.addoption(
        "--require-goldens", action="store_true", help="Fail, not skip, where a device class has no goldens (CI)."
    )


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


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Read-only comparison: golden("streaming-32", device="cuda") measures a case and fails where anything moved.

    Skips where there is no golden of this device class at all; with --require-goldens that fails.
    """

    def compare(case: str, *, device: str = "cpu") -> Any:
        __tracebackhide__ = True
        from rich.console import Console

        from knorm.cli.tables import show_outcome
        from knorm.golden.store import Store
        from knorm.golden.verify import verify_goldens

        folder = request.config.getoption("golden_dir")
        try:
            (outcome,) = verify_goldens(Store(Path(folder) if folder else None), [case], device)
        except (ValueError, RuntimeError, AssertionError) as error:  # PyTorch's own, where it has no such device
            pytest.fail(str(error), pytrace=False)
        console = Console(width=120)
        with console.capture() as capture:
            show_outcome(console, outcome)
        if outcome.failed or (not outcome.compared and request.config.getoption("require_goldens")):
            pytest.fail(capture.get(), pytrace=False)
        if not outcome.compared:
            pytest.skip(f"{outcome.verdict.upper()}: {outcome.evidence}")
        return outcome

    return compare
