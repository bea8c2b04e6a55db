"""Small goldens for tests: metrics, tokens, environments, candidates."""

from __future__ import annotations

import numpy as np

from knorm.golden.approval import approve
from knorm.golden.files import make
from knorm.golden.format import Environment, Gate, Measured, Metric, Noise, Provenance
from knorm.golden.store import Checkout

NOISE = Noise(runs=200, sigma=1e-7, largest=5e-5, typical=1e-5, alpha=0.01, power=1.0)
TOKENS = Gate(rule="tokens", threshold=2e-6, noise=NOISE)
HERE = Environment(
    device="x86_64", driver=None, cuda=None, capability="AVX2", threads=1, numerics="usual", torch="2.13.0",
    transformers="5.24.0", numpy="2.4.6", python="3.11.7",
)  # fmt: skip
ELSEWHERE = HERE.model_copy(update={"torch": "2.14.1"})
CLEAN = Checkout("a" * 40, True, "c" * 64)
NLL = np.random.default_rng(0).gamma(2, 2, (8, 40)).astype(np.float32)


def metric(name, value, kind="count", gate=None, direction="same", unit="tokens"):
    gate = gate or Gate(rule="exact")
    return Metric(name=name, unit=unit, direction=direction, kind=kind, value=value, anchor=value, gate=gate)


def measured(nll=NLL, seen=100, schedule="ab12", ratio=1.5):
    return Measured(
        (
            metric("nll/0.5", float(nll.mean()), "nll", TOKENS, "lower", "nats/token"),
            metric("seen/0.5", seen),
            metric("evicted_at/0.5", schedule, "schedule", Gate(rule="same_environment")),
            metric("ppl_ratio/0.5", ratio, "ratio", Gate(rule="at_most", threshold=1e-4), "lower"),
        ),
        {"nll/0.5": nll},
    )


def candidate(found=None, now=CLEAN, environment=HERE, case="streaming", device="cpu-x86_64"):
    found = found or measured()
    made = Provenance(
        knorm="0.1.0", commit=now.commit, clean=now.clean, code=now.code, date="2026-01-02T03:04:05Z", runs=3, reason=""
    )
    return make(case, device, {"windows": 8, "policies": [{"keep_ratio": 0.5}]}, found, environment, made)


def accept(store, made, tensors=None, reason="why", permissions=(), now=CLEAN, file=None):
    tensors = {"nll/0.5": NLL} if tensors is None else tensors
    (golden,) = approve(store, [(made, tensors)], reason, now=now, permissions=permissions)
    return store.accept(golden, tensors, file)
