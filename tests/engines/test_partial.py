"""Predictions of which the likeliest tokens alone are known: a lower bound, and what stays exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knorm.engines.partial import Top, compare_known
from knorm.engines.process import EngineError
from knorm.engines.scorer import ModelScorer, compared
from knorm.evaluation.damage import compare
from knorm.evaluation.windows import cut_windows
from knorm.models import load_text

ROUNDING = 1e-5  # the bucket is known to 1e-6


def top_of(logits, known, true):
    rows = logits.double().log_softmax(-1)
    tokens = [torch.unique(torch.cat([row.topk(known).indices, t[None]])) for row, t in zip(rows, true, strict=True)]
    return Top(tokens, [row[each] for row, each in zip(rows, tokens, strict=True)])


def exactly(full, run, true):
    return compare(lambda x: x, full[None], run[None], true[None], full.shape[1])


@given(st.integers(0, 2**31), st.integers(1, 39), st.sampled_from([0.1, 1.0, 8.0]))
def test_it_is_a_lower_bound_and_all_else_is_exact(seed, known, spread):
    torch.manual_seed(seed)
    full, run = torch.randn(3, 40) * spread, torch.randn(3, 40) * spread
    true = torch.randint(0, 40, (3,))
    whole = exactly(full, run, true)
    half, both = (compare_known(side, top_of(run, known, true), true) for side in (full, top_of(full, known, true)))
    for part in (half, both):
        assert bool((part.kl <= whole.kl + ROUNDING).all())
        assert torch.equal(part.same_top, whole.same_top)
        assert torch.equal(part.correct, whole.correct)
        for name in ("nll", "nll_full", "delta_p"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name), atol=ROUNDING, rtol=1e-5)


def test_the_more_is_known_the_nearer_it_comes_and_all_is_all():
    torch.manual_seed(3)
    full, run, true = torch.randn(50, 40) * 2, torch.randn(50, 40) * 2, torch.randint(0, 40, (50,))
    means = [float(compare_known(full, top_of(run, known, true), true).kl.mean()) for known in (1, 5, 10, 20, 40)]
    assert means == sorted(means)
    assert means[-1] == pytest.approx(float(exactly(full, run, true).kl.mean()), abs=1e-5)
    assert means[0] < 0.9 * means[-1]  # so that the order says something


def test_what_was_likeliest_and_is_not_told_is_another_top():
    """The full model's likeliest token, 9, is in the bucket, where nothing would stand out."""
    full = torch.zeros(1, 10)
    full[0, 9] = 3.0
    run = torch.linspace(1, 0, 10)[None]
    tokens = compare_known(full, top_of(run, 2, torch.tensor([1])), torch.tensor([1]))
    assert not bool(tokens.same_top)


def test_what_cannot_be_compared_is_one_line():
    full, true = torch.zeros(1, 8), torch.tensor([3])
    with pytest.raises(EngineError, match="the log-probability of token 3, the next one of the text, is not told"):
        compare_known(full, Top([torch.tensor([1])], [torch.tensor([-1.0])]), true)
    with pytest.raises(EngineError, match="token 9 is predicted, but the vocabulary of the model beside it has 8"):
        compare_known(full, Top([torch.tensor([3, 9])], [torch.tensor([-1.0, -2.0])]), true)


class Likeliest:
    """What a model predicts, as a server that tells the likeliest tokens."""

    def __init__(self, model, known):
        self.model, self.known = ModelScorer(model), known

    def logits(self, tokens, prompt):
        place = prompt
        for chunk in self.model.logits(tokens, prompt):
            yield top_of(chunk, self.known, tokens[place : place + len(chunk)])
            place += len(chunk)


def test_scorers_of_both_kinds_stand_side_by_side(embedded):
    model, tokenizer = embedded
    ids = cut_windows(tokenizer, load_text("narrative"), 48, 2).input_ids
    same, itself = compared([ModelScorer(model), Likeliest(model, 20)], ids, 30, [(0, 1), (1, 1)])
    assert same.kl.shape == (2, 18)
    assert float(same.kl.max()) < 1e-9
    assert float(itself.kl.max()) == 0
    assert bool(same.same_top.all())
