"""Latency on CUDA, by the clock: run alone (pytest -n 0, as tox -e gpu does), on a GPU that nobody else uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from knorm.bench.latency import Arm, attending, check_alone, run_block
from knorm.bench.policies import bench, make_prompts
from knorm.evaluation.published.judge import claims_text, judge_claims
from knorm.evaluation.published.measure import time_quantities
from knorm.evaluation.published.schema import read_claims
from knorm.models import load_embedded
from knorm.policy import Policy

FILE = Path(__file__).parents[2] / "golden" / "reported" / "kv-cache-order.json"


@pytest.fixture(scope="module")
def on_cuda():
    try:
        check_alone("cuda")
    except ValueError as error:
        pytest.skip(str(error))
    return load_embedded(device="cuda")


def test_the_golden_of_this_device_class(golden):
    golden("latency", device="cuda")


def test_reported_times_beside_those_of_this_device(on_cuda):
    """On the model in the box: a TTFT that falls by 90% is the report's baseline, whatever the model."""
    model, tokenizer = on_cuda
    report = read_claims(FILE)
    ratios = ("1.0", *report.protocol.timed)
    prompts = make_prompts(tokenizer, ["encyclopedia", "narrative"], [512, 1024], [50, 100], device="cuda")
    policies = [report.protocol.policy(ratio) for ratio in ratios[1:]]
    found = bench(model, prompts, policies, margin=0.025, blocks=8)
    measured = time_quantities(found.samples, ratios, [prompt.new_tokens for prompt in prompts.values()])
    judged = judge_claims((claim for claim in report.claims if claim.quantity in measured), measured)
    print(claims_text(judged))
    assert len(judged) >= 10
    assert not [each.claim.id for each in judged if each.unexpected]


def test_events_measure_what_a_spinning_kernel_takes(on_cuda):
    model, tokenizer = on_cuda
    prompts = [*make_prompts(tokenizer, ["narrative"], [200], [21], device="cuda").values()]
    plain, slowed = Arm(model, prompts, Policy(0.5)), Arm(model, prompts, Policy(0.5))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for event in (begin, end):  # the first spin is warmth
        torch.cuda._sleep(100_000_000)  # some 50 ms, far longer than a step takes where launching is slow
        event.record()
    torch.cuda.synchronize()
    spin = begin.elapsed_time(end) / 1e3
    slowed.after_step = lambda: torch.cuda._sleep(100_000_000)
    with attending(model):
        for _ in range(2):
            one, other = run_block([plain, slowed], [21])
    assert min(other.steps[0]) > 0.9 * spin
    assert max(one.steps[0]) < 0.9 * spin
    assert max(one.first[0]) < min(other.steps[0]) * 50


def test_peak_memory_and_launches_are_counted(on_cuda):
    model, tokenizer = on_cuda
    prompts = make_prompts(tokenizer, ["narrative"], [400], [5], device="cuda")
    found = bench(model, prompts, [Policy(0.5)], margin=9.0, blocks=8)
    for row in found.rows:
        assert row.peak is not None
        assert row.peak >= row.counters.cache_bytes
        assert row.counters.step_launches > 4 * 6, "a kernel a layer and step at the very least"
    assert found.rows[1].counters.prompt_launches > found.rows[0].counters.prompt_launches, "compressing is work"
