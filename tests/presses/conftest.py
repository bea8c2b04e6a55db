"""Tests that need kvpress: skipped where it is not installed, failed where it was promised (tox -e kvpress)."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest


def _installed() -> bool:
    try:
        return find_spec("kvpress.presses") is not None
    except ModuleNotFoundError:
        return False


def pytest_collection_modifyitems():
    if os.environ.get("KNORM_REQUIRE_KVPRESS") and not _installed():
        pytest.exit("KNORM_REQUIRE_KVPRESS is set, but kvpress is not installed: run tox -e kvpress", returncode=1)
