"""The pytest plugin: how hard law tests try, and their marker. Imports only the standard library and pytest."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --knorm-profile and --knorm-seed."""
    group = parser.getgroup("knorm", "laws of a compressed KV cache")
    group.addoption(
        "--knorm-profile",
        choices=("quick", "thorough"),
        default="quick",
        help="How hard the tests of knorm.laws.parametrize_with_checks try. [quick]",
    )
    group.addoption("--knorm-seed", type=int, default=0, metavar="N", help="The same seed draws the same cases. [0]")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker that parametrize_with_checks adds."""
    config.addinivalue_line("markers", "knorm: a law of a compressed KV cache, tried on drawn cases")


def pytest_report_header(config: pytest.Config) -> str:
    """How hard law tests try."""
    return f"knorm: profile {config.getoption('knorm_profile')}, seed {config.getoption('knorm_seed')}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Hand the options to the checks, once a law test is there: it has loaded them."""
    if item.get_closest_marker("knorm"):
        from knorm.laws.runner import OPTIONS

        OPTIONS.update(profile=item.config.getoption("knorm_profile"), seed=item.config.getoption("knorm_seed"))
