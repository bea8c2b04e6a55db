from __future__ import annotations

import pytest
import torch

from knorm.golden.cases import CASES
from knorm.golden.environment import How
from knorm.golden.store import Checkout, Store, hash_of_code
from knorm.golden.verify import record

CUDA = [case.id for case in CASES.values() if "cuda" in case.devices and not case.optional]


@pytest.mark.parametrize("case", CUDA)
def test_nothing_moved(case, golden):
    golden(case, device="cuda")


def test_a_candidate_of_this_device_class_is_made_and_read(tmp_path):
    recorded = record(CASES["selections"], "cuda", Checkout("a" * 40, True, hash_of_code()))
    made = recorded.golden
    Store(tmp_path).write_candidate(made, recorded.measured.tensors)
    assert made.environment.device == torch.cuda.get_device_name()
    assert made.environment.driver
    assert made.environment.cuda == torch.version.cuda


def test_selections_are_those_of_the_cpu():
    here, there = (CASES["selections"].measure(device, How()) for device in ("cpu", "cuda"))
    assert here.metrics == there.metrics


def test_a_compressed_run_needs_no_more_memory_than_a_plain_one():
    metrics = CASES["pythia-shape"].measure("cuda", How()).metrics
    peaks = {metric.name: metric.value for metric in metrics if metric.kind == "memory"}
    assert set(peaks) == {"peak_memory/0.9", "peak_memory/0.5"}
    assert all(0.5 < peak < 2 for peak in peaks.values())
