from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest
import torch
from tiny import tiny, tokens
from transformers.cache_utils import DynamicCache

from knorm import KnormCache, Policy
from knorm.bench import latency
from knorm.bench.counters import count, risen
from knorm.bench.latency import (
    SEGMENT,
    Arm,
    Prompt,
    Sample,
    attending,
    check_alone,
    check_fits,
    log_ratio,
    measure,
    memory_in_one_line,
    run_block,
    without_interruptions,
)
from knorm.bench.policies import bench, make_prompts

STREAMING = Policy(0.5, 8, (0,), protocol="streaming")


@pytest.fixture
def alone(monkeypatch):
    """As outside pytest-xdist: what is tested here is not time."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


class Clockwork:
    """An arm on a clock of its own: each call takes `cost` of a shared machine that slows down as time goes by."""

    def __init__(self, machine, cost):
        self.machine, self.cost, self.calls = machine, cost, []

    def _take(self):
        self.machine["time"] += 1
        return self.cost * (1 + self.machine["drift"] * self.machine["time"])

    def prompt(self, index):
        self.calls.append(f"prompt {index}")
        return 10 * self._take()

    def steps(self, count):
        self.calls.append(count)
        return [self._take()] * count


def test_a_block_is_mirrored_so_that_drift_cancels():
    machine = {"time": 0, "drift": 0.001}
    arms = [Clockwork(machine, 1.0), Clockwork(machine, 1.05), Clockwork(machine, 0.9)]
    for flip in (False, True):
        samples = run_block(arms, [41], flip)
        for metric in latency.METRICS:
            assert log_ratio(samples[1], samples[0], metric) == pytest.approx(math.log(1.05), abs=1e-5)
            assert log_ratio(samples[2], samples[0], metric) == pytest.approx(math.log(0.9), abs=1e-5)


def test_every_token_is_timed_once_in_segments():
    arm = Clockwork({"time": 0, "drift": 0}, 1.0)
    (sample,) = run_block([arm], [13, 2])
    assert [len(steps) for steps in sample.steps] == [12, 1]
    assert [call for call in arm.calls if isinstance(call, int)] == [SEGMENT, SEGMENT, 2, 1]
    assert arm.calls.count("prompt 0") == arm.calls.count("prompt 1") == 2 * latency.PASSES


def test_how_many_blocks_there_are_depends_on_their_length_alone(monkeypatch):
    clock = iter(range(0, 1000, 3))  # a warm-up block takes 3 s
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    arm = Clockwork({"time": 0, "drift": 0}, 1.0)
    assert len(measure([arm], [3], seconds=60)) == 20
    assert len(measure([arm], [3], seconds=12)) == 8
    assert len(measure([arm], [3], blocks=5, warm_up=3)) == 5


def test_blocks_that_do_not_fit_are_refused(monkeypatch):
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    with pytest.raises(ValueError, match=r"too few blocks: 8 of them would take 24 s .* are 11: .* --seconds 12 or"):
        measure([Clockwork({"time": 0, "drift": 0}, 1.0)], [3], seconds=11)


def test_interrupted_steps_count_as_little_and_steps_that_compress_as_they_are():
    usual = Sample(((10.0, 10.0),), ((1.0, 5.0, 1.0),))  # the second step compresses, in every block
    broken = replace(usual, steps=((1.0, 5.0, 90.0),))
    calm, interrupted = without_interruptions([[usual, usual], [usual, broken], [usual, usual]])
    assert interrupted == 1
    assert calm[1][1].steps == ((1.0, 5.0, 1.5),)
    assert calm[0] == [usual, usual]


def rough(draw, blocks, share):
    """Two arms that are the same, on a machine that stops `share` of all steps for up to three times their length."""

    def steps():
        return tuple(draw.uniform(0.95, 1.05) * (1 + draw.uniform(1, 3) * (draw.random() < share)) for _ in range(12))

    return [[Sample(((1.0,) * 4,), (steps(),)) for _ in range(2)] for _ in range(blocks)]


def test_where_interruptions_are_usual_nothing_is_cut():
    draw = random.Random(0)
    often, seldom = (rough(draw, 40, share) for share in (0.2, 0.02))
    calm, interrupted = without_interruptions(often)
    assert calm == often
    assert interrupted > 100
    assert without_interruptions(seldom)[0] != seldom


def test_an_interval_says_what_it_says_where_interruptions_are_usual():
    """Of arms that are the same it excludes 0 once in a hundred: what is cut at 1.5 did three times as often."""
    draw, beyond, runs = random.Random(1), 0, 1000
    for _ in range(runs):
        calm, _ = without_interruptions(rough(draw, 32, 0.25))
        logs = [log_ratio(one, other, "tpot") for one, other in calm]
        beyond += abs(statistics.fmean(logs)) > 2.74 * statistics.stdev(logs) / 32**0.5  # 1% of Student's t
    assert beyond <= 20


@pytest.mark.parametrize("policy", [None, STREAMING, Policy(0.5)])
def test_an_arm_generates_what_the_model_does(policy):
    model, ids = tiny("llama"), tokens(2, 12)
    arm = Arm(model, [Prompt(ids, 6)], policy)
    with attending(model):
        assert arm.prompt(0) > 0
        chosen = [arm.token]
        for _ in range(5):
            (seconds,) = arm.steps(1)
            assert seconds > 0
            chosen.append(arm.token)
        cache = DynamicCache() if policy is None else KnormCache(policy)
        expected = model.generate(ids, **{arm.keyword: cache}, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(torch.cat(chosen, 1), expected[:, 12:])


def test_what_is_stored_is_counted():
    model = tiny("llama")  # 3 layers, 2 heads of 16 for keys and values
    arms = [Arm(model, [Prompt(tokens(1, 12), 6)], policy) for policy in (None, Policy(0.5))]
    with attending(model):
        plain, half = (arm.alone(0) for arm in arms)
    assert (plain.retained, plain.nbytes, plain.peak) == ((17, 17, 17), 3 * 17 * 2 * 2 * 16 * 4, None)
    assert (half.retained, half.nbytes) == ((11, 11, 11), 3 * 11 * 2 * 2 * 16 * 4)


def test_counters_are_the_same_on_every_run_and_notice_one_operator_more():
    model = tiny("llama")
    arm = Arm(model, [Prompt(tokens(1, 12), 6)], STREAMING)
    with attending(model):
        once, again = (count(arm, 0, arm.alone(0)) for _ in range(2))
        arm.after_step = lambda: torch.zeros(1).add(1)
        more = count(arm, 0, arm.alone(0))
        arm.after_step, arm.policy = None, Policy(0.4, 8, (0,), protocol="streaming")
        other = count(arm, 0, arm.alone(0))
    assert once == again
    assert once.step_operators > once.prompt_operators > 50
    assert (once.steps, once.prompt_launches, risen(again, once)) == (5, None, [])
    assert more.step_operators - once.step_operators == 2 * 5
    (said,) = risen(more, once)
    assert said == f"operators of 5 decode steps rose from {once.step_operators:,} to {more.step_operators:,}"
    assert risen(once, more) == []
    assert any("tokens retained per layer were [17, " in words for words in risen(other, once))
    launched = replace(once, prompt_launches=3, step_launches=9)
    assert risen(replace(launched, step_launches=10), launched) == [
        "kernels launched in 5 decode steps rose from 9 to 10"
    ]


def test_a_bench_has_a_row_for_each_arm():
    model = tiny("gpt_neox")
    prompts = {"a": Prompt(tokens(1, 12), 4), "b": Prompt(tokens(1, 20), 7)}
    found = bench(model, prompts, [STREAMING, Policy(0.5)], margin=0.05, blocks=8)
    assert [row.name for row in found.rows] == ["uncompressed", "0.5", "0.5"]
    assert len(found.samples) == 8
    assert not found.rows[0].comparisons
    for row in found.rows[1:]:
        assert {metric: c.blocks for metric, c in row.comparisons.items()} == dict.fromkeys(latency.METRICS, 8)
        assert {c.alpha for c in row.comparisons.values()} == {0.01 / 4}, "two policies, two verdicts each"
        assert row.counters.retained[0] < 27 or row.policy.skip_layers
    assert found.rows[0].counters.retained == (26, 26, 26)
    assert 0 < found.rows[0].times.tpot_median <= found.rows[0].times.tpot_p99


# Bad input


def test_timing_under_xdist_is_refused(monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    with pytest.raises(ValueError, match=r"timing under pytest-xdist \(gw1\): .* Run it alone: pytest -n 0"):
        check_alone("cpu")


@pytest.mark.parametrize(
    ("processes", "busy", "initialised", "said"),
    [
        (["123"], "0", False, "another process"),
        (["123", "124"], "0", False, "2 other processes"),
        (["123"], "90", True, None),  # our own, and our own work
        (["123", "124"], "0", True, "another process"),
        ([], "71", False, "others, 71% of the time"),
        ([], "0", False, None),
        (None, None, False, None),  # no nvidia-smi to ask
    ],
)
def test_a_gpu_that_others_use_is_refused(alone, monkeypatch, processes, busy, initialised, said):
    answers = {"--query-compute-apps=pid": processes, "--query-gpu=utilization.gpu": busy and [busy]}
    monkeypatch.setattr(latency, "_ask", lambda which, query: answers[query])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    if said is None:
        check_alone("cuda")
        return
    with pytest.raises(ValueError, match=rf"cuda:1 is used by {said}: no time would be this code's\. Wait for them"):
        check_alone("cuda:1")


def test_the_gpu_that_is_asked_about_is_the_visible_one(monkeypatch):
    asked = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-abc")
    monkeypatch.setattr(latency, "_ask", lambda which, query: asked.append(which) or [])
    latency._others(1)
    assert set(asked) == {"GPU-abc"}


def test_a_prompt_that_does_not_fit_is_refused(monkeypatch):
    model = tiny("llama")  # a context of 128
    check_fits(model, {"a": Prompt(tokens(1, 100), 28)})
    with pytest.raises(
        ValueError, match="a: 100 tokens of prompt and 29 new ones are 129, but the model's context is 128"
    ):
        check_fits(model, {"a": Prompt(tokens(1, 100), 29)})
    with pytest.raises(ValueError, match="1 new tokens, but should be at least 2"):
        check_fits(model, {"a": Prompt(tokens(1, 10), 1)})
    with pytest.raises(ValueError, match=r"a: the uncompressed cache of 1,000,000,000 .* GiB: give a smaller batch"):
        check_fits(model, {"a": Prompt(tokens(1, 10).expand(1_000_000_000, 10), 2)})
    with monkeypatch.context() as elsewhere:
        elsewhere.delattr(latency.os, "sysconf")
        check_fits(model, {"a": Prompt(tokens(1, 10).expand(1_000_000_000, 10), 2)})
    model.config.multi_query = True  # heads that the usual names do not tell: nothing is said of memory
    check_fits(model, {"a": Prompt(tokens(1, 10).expand(1_000_000_000, 10), 2)})


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_is_one_line(error):
    with (
        pytest.raises(ValueError, match=r"^out of memory on cuda: give a shorter prompt, .*\)$"),
        memory_in_one_line("cuda"),
    ):
        raise error


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="something else"), memory_in_one_line("cpu"):
        raise RuntimeError("something else")


def test_prompts_are_cut_as_asked(embedded):
    _, tokenizer = embedded
    found = make_prompts(tokenizer, ["narrative", "encyclopedia"], [100, 200, 300], [5], batch=3)
    assert [name.split(",")[0] for name in found] == ["narrative", "encyclopedia", "narrative"]
    assert all(prompt.ids.shape[0] == 3 and prompt.new_tokens == 5 for prompt in found.values())
    (prompt,) = make_prompts(tokenizer, ["narrative"], [77], [5], characters=False).values()
    assert prompt.ids.shape == (1, 77)
    for arguments, said in (
        ((["narrative"], [10, 20], [5, 6, 7]), r"prompts of \[10, 20\] from 1 texts with \[5, 6, 7\] new tokens"),
        ((["narrative"], [0], [5]), "but both should be at least 1"),
        ((["narrative"], [10**9], [5]), "narrative has no 1000000000 characters"),
        ((["narrative"], [10, 10], [5]), "two are the same"),
    ):
        with pytest.raises(ValueError, match=said):
            make_prompts(tokenizer, *arguments)
