from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny, tokens

from knorm import KnormCache, Policy
from knorm.cache import attention_through, cache_keyword

STREAMING = Policy(0.5, prune_after=12, protocol="streaming")


def feed(model, ids, cache, *sizes):
    """Logits of the tokens, fed `sizes` at a time, positions left to the model."""
    parts = ids.split(sizes or (1,) * ids.shape[1], dim=1)
    with torch.no_grad():
        return torch.cat([model(part, use_cache=True, **{cache_keyword(model): cache}).logits for part in parts], 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_positions_continue_from_the_tokens_seen(implementation):
    model, ids = tiny("llama"), tokens(2, 40)
    model.set_attn_implementation(implementation)
    cache = KnormCache(STREAMING)
    feed(model, ids, cache, 20, *(1,) * 20)
    assert cache.get_seq_length() == 40
    for layer in range(3):
        positions = cache.positions(layer)
        stored = cache.layers[layer].keys.shape[2]
        assert stored < 12
        assert positions.shape == (2, 2, stored)
        assert (positions.diff(dim=-1) > 0).all()
        assert positions.max() < 40


def test_several_tokens_after_a_prefill_attend_causally():
    model, ids = tiny("qwen2"), tokens(1, 40)
    one, seven = KnormCache(Policy(0.5)), KnormCache(Policy(0.5))
    by_one, by_seven = feed(model, ids, one, 19, *(1,) * 21), feed(model, ids, seven, 19, 7, 7, 7)
    assert torch.allclose(by_one, by_seven, atol=2e-5)
    assert torch.equal(one.positions(2), seven.positions(2))


def test_generate_equals_the_hand_written_loop():
    model, ids = tiny("gpt_neox"), tokens(1, 30)
    out = model.generate(ids, past_key_values=KnormCache(STREAMING), max_new_tokens=20, do_sample=False, pad_token_id=0)
    cache, by_hand = KnormCache(STREAMING), ids
    logits = feed(model, ids, cache, 30)
    for _ in range(20):
        by_hand = torch.cat([by_hand, logits[:, -1:].argmax(-1)], 1)
        logits = feed(model, by_hand[:, -1:], cache)
    assert torch.equal(out, by_hand)


def test_a_copy_a_reset_and_a_choice_of_rows_keep_positions_and_contents_together():
    model, ids = tiny("mistral"), tokens(3, 30)
    cache = KnormCache(STREAMING)
    feed(model, ids, cache)
    twin = copy.deepcopy(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    feed(model, ids, cache)
    for layer in range(3):
        assert torch.equal(cache.positions(layer), twin.positions(layer))
        assert torch.equal(cache.layers[layer].keys, twin.layers[layer].keys)
    before = [cache.positions(layer) for layer in range(3)]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    for layer in range(3):
        assert torch.equal(cache.positions(layer), before[layer][[2, 2, 0, 0, 0, 0]])
        assert cache.layers[layer].keys.shape[0] == 6


def test_what_the_cache_cannot_do_is_refused():
    with pytest.raises(TypeError, match=r"policy=0.5, but should be a knorm.Policy"):
        KnormCache(0.5)
    cache = KnormCache(STREAMING)
    with pytest.raises(IndexError, match="layer=0, but the cache holds 0 layers"):
        cache.positions(0)
    cache.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.layers[0].crop(-1)


def test_the_models_own_attention_comes_back_whatever_happens():
    model = tiny("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ZeroDivisionError), attention_through(model, lambda *_, **__: 1 / 0):
        model(tokens(1, 3))
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("knorm")
    with pytest.raises(RuntimeError, match="called outside knorm"):
        model(tokens(1, 3))
