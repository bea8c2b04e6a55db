"""What single tokens lost: the text comes back, the losses are the run's, and what was missed is what was evicted."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny

from knorm import Policy
from knorm.evaluation.explain import explain
from knorm.evaluation.runner import Runner
from knorm.evaluation.tokens import MOST_NUMBERS, check_window
from knorm.evaluation.windows import Windows, cut_windows
from knorm.models import load_text

POLICY = Policy(0.5, prune_after=16)


@pytest.fixture(scope="module")
def setting(embedded):
    model, tokenizer = embedded
    runner = Runner(model, cut_windows(tokenizer, load_text("narrative"), 64, 2), prompt_length=32)
    return runner, tokenizer, explain(runner, tokenizer, POLICY, tokens=1, worst=64)


def test_each_token_is_told_with_its_losses_and_when_it_was_evicted(setting):
    runner, tokenizer, found = setting
    told, ids = found.per_token, runner.windows.input_ids[1]
    assert told.window == 1
    assert "".join(token.token for token in told.shown_tokens) == tokenizer.decode(ids)
    run, full = runner.run(POLICY), runner.run(Policy())
    assert [token.nll for token in told.shown_tokens] == [None] * 32 + run.nll[1].double().tolist()
    assert [token.nll_full for token in told.shown_tokens[32:]] == pytest.approx(full.nll[1].tolist())
    assert told.evicted_at == [layer[1].tolist() for layer in run.evicted_at]


def test_what_a_prediction_missed_had_been_evicted_and_is_what_the_worst_tokens_had_lost(setting):
    _, _, found = setting
    told = found.per_token
    for position, token in enumerate(told.shown_tokens):
        for lost in token.lost:
            assert any(head[lost.position] <= position - 1 for layer in told.evicted_at for head in layer)
    worst = [token for token in found.worst if token.window == 1 and token.attention >= 0.01]
    assert len(worst) > 3
    for token in worst:
        first = told.shown_tokens[token.position].lost[0]
        assert first.attention == pytest.approx(token.attention, rel=1e-4)
        assert first.position == token.evicted_position


def test_a_window_that_is_not_there_or_too_large_is_refused_before_anything_runs(setting):
    runner, tokenizer, _ = setting
    for window in (2, -1):
        with pytest.raises(ValueError, match=f"there is no window {window}: there are 2, the first is 0"):
            explain(runner, tokenizer, POLICY, tokens=window, on_step=pytest.fail)
    model = runner.model
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    most = MOST_NUMBERS // (layers * heads)
    check_window(model, torch.zeros(1, most, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=f"give a --window of at most {most}"):
        check_window(model, torch.zeros(1, most + 1, dtype=torch.int64), 0)


def test_heads_that_share_keys_and_layers_that_are_skipped_are_counted_as_the_worst_tokens_count_them(embedded):
    _, tokenizer = embedded
    model = tiny("llama")
    ids = torch.randint(0, model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    policy = Policy(0.3, prune_after=8, skip_layers=(0,))
    found = explain(Runner(model, Windows(ids), prompt_length=20), tokenizer, policy, tokens=0, worst=20)
    seen = 0
    for token in found.worst:
        if token.attention >= 0.01:
            first = found.per_token.shown_tokens[token.position].lost[0]
            assert first.attention == pytest.approx(token.attention, rel=1e-4)
            seen += 1
    assert seen
