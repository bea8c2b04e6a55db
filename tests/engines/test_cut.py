"""Tokens taken out of transformers' cache by their positions: as a mask over one plain pass has it."""

from __future__ import annotations

import pytest
import torch

from knorm.engines.cut import states_after_a_cut
from knorm.engines.scorer import FRAME, ModelScorer, compared
from knorm.evaluation.damage import summed
from knorm.evaluation.windows import cut_windows
from knorm.models import load_embedded, load_text


@pytest.mark.parametrize("name", ["embedded", "embedded-llama"])
@pytest.mark.parametrize("cut", [(), ((2, 9),), ((20, 30), (0, 4))])
@pytest.mark.parametrize("prompt", [30, 59, 60])
def test_a_cut_equals_a_mask(name, cut, prompt):
    model, tokenizer = load_embedded(name)
    ids = cut_windows(tokenizer, load_text("narrative"), 61, 1).input_ids
    mask = torch.ones(61, 61).tril().bool()
    for first, last in cut:
        mask[prompt:, first:last] = False
    with torch.no_grad():
        output = model.base_model(input_ids=ids, attention_mask=mask[None, None], use_cache=False)
    expected = output.last_hidden_state[0, prompt - 1 : -1]
    torch.testing.assert_close(states_after_a_cut(model, ids[0], prompt, cut), expected, atol=2e-4, rtol=2e-4)


def test_a_plain_scorer_is_the_model_a_few_tokens_at_a_time(embedded):
    model, tokenizer = embedded
    ids = cut_windows(tokenizer, load_text("narrative"), 64, 2).input_ids
    chunks = [*ModelScorer(model).logits(ids[0], 43)]
    assert [len(chunk) for chunk in chunks] == [*[FRAME] * (21 // FRAME), 21 % FRAME]
    with torch.no_grad():
        logits = model(ids).logits[:, 42:-1]
    torch.testing.assert_close(torch.cat(chunks), logits[0], atol=1e-4, rtol=1e-4)
    (tokens,) = compared([ModelScorer(model), ModelScorer(model)], ids, 43, [(0, 1)])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 43:].flatten())
    assert summed(tokens).nll == pytest.approx(expected.item(), abs=1e-5)
    assert tokens.kl.shape == (2, 21)
    assert float(tokens.kl.abs().max()) == 0
