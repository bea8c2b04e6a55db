from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from goldens import CLEAN, ELSEWHERE, HERE, candidate, metric

from knorm.golden.cases import NOISE, Case
from knorm.golden.environment import How
from knorm.golden.format import Gate, Measured
from knorm.golden.gates import Results, judge
from knorm.golden.metrics import count, share, tokens
from knorm.golden.noise import (
    ROUNDINGS,
    attending_otherwise,
    measure_noise,
    passes,
    rounded_up,
    with_gates,
    with_gates_of,
)
from knorm.golden.rules import ANY_WINDOW
from knorm.golden.verify import record
from knorm.rounding import rounded_otherwise

NLL = np.random.Generator(np.random.PCG64(5)).gamma(2, 2, (4, 32)).astype(np.float32)


def measured(shift=0.0, *, top=0.9, seen=1000, windows=slice(None)):
    nll = NLL.copy()
    nll[windows] += np.float32(shift) * np.resize([1, -1], NLL.shape[1])  # tokens move, their mean does not
    metrics = (
        tokens("nll", float(nll.mean()), NOISE["cpu"]),
        share("same_top", top, "of 128"),
        count("seen", seen, "tokens"),
    )
    return Measured(metrics, {"nll": nll, "nll/full": NLL - 1})


def seen(rounding, batch=None):
    """See the noise of a case that gives what it is told under other roundings, and in another batch."""
    runs = []

    def measure(device, how):
        runs.append(how)
        return batch if batch and how.batch != 1 else rounding

    return measure_noise(measure, "cpu", How(batch=1), measured())


def gate(made, name):
    return next(metric.gate for metric in made.metrics if metric.name == name)


def verdict(made, now, name="nll", environment=ELSEWHERE):
    findings = judge(Results(made.metrics, made.tensors, HERE), Results(now.metrics, now.tensors, environment))
    return next(finding.verdict for finding in findings if finding.metric == name)


def test_gates_that_cover_the_noise_stay():
    made = with_gates(measured(), seen(measured(4e-5)))
    assert made.metrics == measured().metrics


def test_gates_let_pass_twice_the_most_that_was_seen():
    assert verdict(measured(), measured(4e-4)) == "moved", "as other methods are judged"
    made = with_gates(measured(), seen(measured(4e-4)))
    assert gate(made, "nll").noise.typical == 1e-3
    assert gate(made, "nll").noise.runs >= ROUNDINGS + 2
    assert gate(made, "nll").noise.power is None, "nobody has measured what it catches"
    assert (verdict(made, measured(9e-4)), verdict(made, measured(2e-3))) == ("holds", "moved")
    assert verdict(made, measured(4e-4), environment=HERE) == "moved", "in the same environment nothing is noise"


def test_half_of_the_windows_may_meet_a_near_tie():
    made = with_gates(measured(), seen(measured(4e-4, windows=slice(2))))
    assert made.metrics == measured().metrics
    assert verdict(made, measured(4e-4, windows=slice(2))) == "holds"
    assert verdict(made, measured(4e-4, windows=slice(3))) == "moved"


def test_one_windows_bound_is_widened_too():
    far = measured(0.8 * ANY_WINDOW, windows=slice(1))
    made = with_gates(measured(), seen(far))
    assert gate(made, "nll").noise.worst == 0.1
    assert verdict(made, measured(0.09, windows=slice(1))) == "holds"
    assert verdict(measured(), measured(0.09, windows=slice(1))) == "moved"


def test_shares_and_counts_follow_the_noise_elsewhere_only():
    made = with_gates(measured(), seen(measured(top=0.88, seen=1004)))
    assert gate(made, "same_top").threshold == pytest.approx(0.05)
    assert gate(made, "seen") == Gate(rule="exact_here", threshold=0.01)
    assert verdict(made, measured(seen=1009), "seen") == "holds"
    assert verdict(made, measured(seen=1011), "seen") == "moved"
    assert verdict(made, measured(seen=1001), "seen", HERE) == "moved"


def test_a_declared_threshold_stays_whatever_the_noise_is():
    made = with_gates(measured(), seen(measured(top=0.8, seen=900)), fixed=("share", "count"))
    assert (gate(made, "same_top"), gate(made, "seen")) == (gate(measured(), "same_top"), Gate(rule="exact"))


def test_what_matters_is_no_noise():
    known = seen(measured(2e-4), batch=measured(0.02))
    assert known.matters == {"batch 2": pytest.approx(0.02, rel=1e-3)}
    assert "batch 2" not in known.what
    assert gate(with_gates(measured(), known), "nll").noise.typical == 5e-4

    def refused(device, how):
        if how.batch == 2:
            raise ValueError("one row\nat a time")
        return measured()

    known = measure_noise(refused, "cpu", How(batch=1), measured())
    assert known.matters == {"batch 2 (one row at a time)": float("inf")}
    assert known.as_fields()["matters"] == {"batch 2 (one row at a time)": None}


def test_what_gates_let_pass_stands_beside_what_the_method_does():
    known = seen(measured(4e-4, top=0.88))
    rows = {row.metric: row for row in passes(with_gates(measured(), known), known)}
    assert [*rows] == ["nll, a typical window", "nll, mean", "same_top"]
    typical = rows["nll, a typical window"]
    assert (typical.most, typical.passes, typical.does) == (pytest.approx(4e-4, rel=1e-3), 1e-3, pytest.approx(1))
    assert rows["same_top"].does == pytest.approx(0.1)


# Recorded again


def test_a_golden_that_is_recorded_again_keeps_its_gates_unless_the_noise_has_changed():
    wide = candidate(with_gates(measured(), seen(measured(4e-4))))
    kept = with_gates_of(wide, measured())
    assert gate(kept, "nll").noise.typical == 1e-3
    assert with_gates_of(wide, with_gates(measured(), seen(measured(2e-4))), 10).metrics == kept.metrics
    quiet = with_gates(measured(), seen(measured()))
    far = candidate(with_gates(measured(), seen(measured(4e-3))))
    assert with_gates_of(far, quiet, 10).metrics == quiet.metrics
    noisy = with_gates(measured(), seen(measured(4e-3)))
    assert with_gates_of(wide, noisy, 10).metrics == noisy.metrics
    varied = candidate(with_gates(measured(), seen(measured(seen=1004))))
    assert gate(with_gates_of(varied, measured()), "seen").rule == "exact_here"


def test_only_a_case_of_its_own_noise_is_measured_more_often_and_its_way_is_not_looked_for_again():
    hows = []

    def measure(device, how):
        hows.append(how)
        made = measured()
        return replace(made, metrics=(*made.metrics, metric("way", "loop")), tensors={"nll": NLL})

    case = Case("own", "tokens", lambda: {}, measure, how=How(batch=1))
    assert record(case, "cpu", CLEAN).seen is None
    assert len(hows) == 3
    recorded = record(replace(case, own_noise=True), "cpu", CLEAN)
    assert recorded.seen.runs >= ROUNDINGS + 2
    assert {how.way for how in hows[:6]} == {None}
    assert {how.way for how in hows[6:]} == {"loop"}
    before = recorded.golden, recorded.measured.tensors
    assert record(replace(case, own_noise=True), "cpu", CLEAN, before=before) is None


# What differs


def test_a_rounding_moves_each_weight_to_its_neighbour_and_leaves_the_model_alone(embedded):
    model = embedded[0]
    before = [weight.clone() for weight in model.parameters()]
    for was, now in zip(before, rounded_otherwise(model, 1).parameters(), strict=True):
        up, down = (torch.nextafter(was, torch.full_like(was, far)) for far in (torch.inf, -torch.inf))
        assert bool(((now == up) | (now == down)).all())
    assert all(torch.equal(was, now) for was, now in zip(before, model.parameters(), strict=True))
    one, same, two = (next(rounded_otherwise(model, seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, two)
    half, was = (next(made.parameters()) for made in (rounded_otherwise(model, 1, torch.bfloat16), model))
    assert half.dtype == torch.bfloat16
    assert bool((half.float() != was).all())  # what is stored in bfloat16 is moved in it
    assert was.dtype == torch.float32


def test_another_attention_is_the_other_one(embedded):
    model = embedded[0]
    other = attending_otherwise(model)
    assert (model.config._attn_implementation, other.config._attn_implementation) == ("sdpa", "eager")
    assert attending_otherwise(other).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("number", "bound"), [(0, 0), (1e-4, 1e-4), (1.01e-4, 2e-4), (3, 5), (6, 10), (0.02, 0.02)])
def test_bounds_are_rounded_up(number, bound):
    assert rounded_up(number) == bound
