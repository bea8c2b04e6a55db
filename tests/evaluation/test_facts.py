from __future__ import annotations

import json

import pytest

from knorm import Policy, exact_nll
from knorm.evaluation.facts import PASSAGE, fact_windows, recall
from knorm.models import ASSETS, load_text


def test_each_fact_is_named_early_and_needed_late():
    text = load_text("narrative")
    facts = json.loads((ASSETS / "facts.json").read_text(encoding="utf-8"))
    assert len(facts) == 33
    for fact in facts:
        words = fact["fact"].lower().split()
        for place in ("named", "needed"):
            assert text[slice(*fact[place])].lower().split() == words
        assert fact["needed"][0] - fact["named"][1] > 10_000


def test_a_window_names_the_fact_first_and_asks_for_it_last(embedded):
    facts = fact_windows(embedded[1], 256)
    for name, ids, asked in zip(facts.names, facts.input_ids, facts.asked, strict=True):
        wanted = " ".join(name.lower().split())
        assert wanted in " ".join(embedded[1].decode(ids[:PASSAGE]).lower().split())
        tail = embedded[1].decode(ids[1:][asked]).lower()
        assert wanted.replace(" ", "") in "".join(tail.split())
        assert asked.sum() == asked[-int(asked.sum()) :].sum(), "the last tokens"


@pytest.mark.processes
def test_the_full_cache_recalls_and_a_small_one_forgets_though_the_mean_hardly_moves(embedded):
    facts = fact_windows(embedded[1], 256)
    full, small = (recall(embedded[0], facts, policy, prompt_length=224) for policy in (Policy(), Policy(0.3)))
    assert full.tokens == int(facts.asked.sum())
    assert full.nll == pytest.approx(
        float(exact_nll(embedded[0], facts.input_ids, Policy())[facts.asked].mean()), abs=1e-5
    )
    assert full.ppl < 0.4 * small.ppl
    assert full.accuracy > small.accuracy + 0.1
    assert small.others < 1.1 * full.others
    guessed = recall(embedded[0], fact_windows(embedded[1], 256, named=False), Policy())
    assert full.ppl < 0.4 * guessed.ppl, "it is memory, not guessing"


def test_windows_too_short_for_a_passage_are_refused(embedded):
    with pytest.raises(ValueError, match="windows of 100 tokens, but should be at least 160"):
        fact_windows(embedded[1], 100)
