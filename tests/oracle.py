"""The laws' oracle for a Policy: what a compressed cache must compute, from lists of living tokens."""

from __future__ import annotations

from dataclasses import fields

from knorm.laws import oracle


def oracle_logits(model, ids, policy, calls):
    """Logits float64 [batch, T, vocabulary] of a model in float64, without a cache; tokens come in `calls`."""
    rules = oracle.Rules(**{field.name: getattr(policy, field.name) for field in fields(policy)})
    return oracle.run(model, ids, rules, calls).logits
