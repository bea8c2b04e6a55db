from __future__ import annotations

import pytest
import torch
from tiny import tiny, tokens

from knorm import Policy, exact_nll
from knorm.evaluation.interventions import sees_itself
from knorm.evaluation.runner import Runner
from knorm.evaluation.windows import Windows
from knorm.masked_attention import attend_seen
from knorm.perplexity import agreement, exact_run

POLICY = Policy(0.5, prune_after=8, protocol="streaming", skip_layers=(1,))


@pytest.mark.parametrize("prompt", [1, 12])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_runs_of_all_windows_are_joined_without_the_prompt(batch, prompt):
    model, ids = tiny("llama"), tokens(3, 40)
    batches = []
    run = Runner(model, Windows(ids), prompt, batch).run(POLICY, on_batch=lambda: batches.append(1))
    alone = [exact_run(model, row[None], POLICY, prompt_length=prompt) for row in ids]
    assert len(batches) == -(-3 // batch)
    assert run.nll.shape == run.correct.shape == (3, 40 - prompt)
    for row, one in enumerate(alone):
        assert torch.allclose(run.nll[row], one.nll[0, prompt - 1 :], atol=1e-5)
        assert torch.equal(run.correct[row], one.correct[0, prompt - 1 :])
        assert all(torch.equal(a[row], b[0]) for a, b in zip(run.evicted_at, one.evicted_at, strict=True))
    assert run.seconds > run.scheduling > 0


def test_a_run_with_another_prompt_is_scored_on_the_same_tokens():
    model, ids, policy = tiny("qwen2"), tokens(2, 40), Policy(0.3)
    run = Runner(model, Windows(ids), 10).run(policy, prompt_length=30)
    assert torch.allclose(run.nll, exact_nll(model, ids, policy, prompt_length=30)[:, 9:], atol=1e-5)


def test_what_is_changed_reaches_every_batch():
    model, ids = tiny("gpt_neox"), tokens(3, 20)
    places, calls = torch.arange(20) + 5, []

    def attend(*given):
        calls.append(len(given[0]))
        return attend_seen(*given)

    run = Runner(model, Windows(ids), batch=2).run(Policy(), position_ids=places, schedule=sees_itself, attend=attend)
    alone = exact_nll(model, ids, Policy(), position_ids=places.expand(3, 20), schedule=sees_itself)
    assert torch.allclose(run.nll, alone, atol=1e-5)
    assert sorted({*calls}) == [1, 2]


def test_the_loop_beside_it_is_joined_alike():
    model, ids = tiny("llama"), tokens(3, 30)
    both = Runner(model, Windows(ids), 5, batch=2).agreement(POLICY)
    parts = [agreement(model, part, POLICY, prompt_length=5) for part in ids.split(2)]
    for way in ("exact", "stream"):
        joined = torch.cat([getattr(part, way).nll[:, 4:] for part in parts])
        assert torch.equal(getattr(both, way).nll, joined)
    assert both.difference == max(part.difference for part in parts)
    assert both.holds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"prompt_length": 40}, "a prompt of 40 tokens is the whole window"), ({"batch": 0}, "batch=0, but should be")],
)
def test_what_cannot_be_run_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Runner(tiny("llama"), Windows(tokens(2, 40)), **arguments)


def test_tokens_of_no_text_have_no_bytes():
    with pytest.raises(ValueError, match="byte_ends is None, but should say where each token ends"):
        Windows(tokens(2, 40)).scored_bytes(1)
