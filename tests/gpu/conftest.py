"""Tests that need a CUDA device: skipped where there is none, failed where one was promised (tox -e gpu)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            if os.environ.get("KNORM_REQUIRE_CUDA"):
                pytest.exit("KNORM_REQUIRE_CUDA is set, but PyTorch sees no CUDA device", returncode=1)
            item.add_marker(pytest.mark.skip(reason="no CUDA device: on a machine with one, run tox -e gpu"))
