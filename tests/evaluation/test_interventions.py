from __future__ import annotations

from dataclasses import replace

from knorm import Policy
from knorm.evaluation.interventions import Intervention, interventions

POLICY = Policy(0.5, prune_after=8, protocol="streaming", skip_layers=(1,))


def changes(policy, stored=False) -> list[Intervention]:
    return [*interventions(policy, layers=3, length=60, prompt_length=1, newest=16, stored=stored)]


def test_each_intervention_has_a_kind_and_only_layers_share_one():
    kinds = [change.kind for change in changes(replace(POLICY, skip_layers=()))]
    assert kinds == ["order", "positions", "recency", "sinks", "choice", *["layers"] * 3, "repetition", "amount"]
    assert [c.kind for c in changes(POLICY) if not c.remedy] == ["order", "positions"]


def test_a_run_by_stored_positions_is_changed_in_one_thing_too():
    own, stored = changes(POLICY), changes(POLICY, stored=True)
    assert [c.kind for c in own] == [c.kind for c in stored]
    for one, other in zip(own, stored, strict=True):
        assert ("position_ids" in one.options) == (one.kind == "positions")
        assert ("position_ids" in other.options) == (one.kind != "positions")
    (corrected,) = (change for change in stored if change.kind == "positions")
    assert (corrected.name, corrected.remedy) == ("positions corrected", True)
