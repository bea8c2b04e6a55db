"""Python in a process of its own, and what commands write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import knorm

# Else at a desk: fewer cases of the same, and nothing that starts processes that load PyTorch
IN_FULL = bool(os.environ.get("CI") or os.environ.get("KNORM_PROCESSES"))
HOME = Path(knorm.__file__).parents[1]  # the folder that holds the package under test


def new_environment(*folders: Path, **variables: str) -> dict[str, str]:
    """This process' environment of now, in which Python finds the package under test and what lies in other folders."""
    path = os.pathsep.join(filter(None, [str(HOME), *map(str, folders), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **variables}


def in_a_new_process(code, *arguments, **options):
    """Run lines of Python, indented or not, and return the ended process; options are those of subprocess.run."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    options = {"env": new_environment(), "check": False, **options}
    return subprocess.run(command, capture_output=True, text=True, **options)  # noqa: PLW1510


def strict_json(file):
    """What a JSON file holds; NaN and Infinity, which are no JSON, fail the test."""
    return json.loads(Path(file).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def command(*arguments):
    """Run a command in this process; returns its exit code."""
    from knorm.cli import main

    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["knorm", *map(str, arguments)])
    try:
        return main() or 0
    except SystemExit as ended:
        return ended.code
    finally:
        patch.undo()
