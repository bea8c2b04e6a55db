from __future__ import annotations

import copy

import pytest
import torch
from oracle import oracle_logits
from tiny import tiny, tokens
from transformers import DynamicCache

import knorm
from knorm import KnormCache, Policy
from knorm.model_attention import attention_through, cache_keyword

STREAMING = Policy(0.5, prune_after=12, protocol="streaming")
SKIPPING = Policy(0.5, prune_after=12, protocol="streaming", skip_layers=(0,), protect_first=2, protect_recent=2)
CLOSE = {"sdpa": 1e-9, "eager": 1e-4}  # eager attention takes its softmax in float32
POLICIES = [Policy(0.5), Policy(0.3, protect_recent=3), STREAMING]


KEYS = torch.zeros(1, 2, 6, 4)


def feed(model, ids, cache, *sizes, mask=None):
    """Logits of the tokens, fed `sizes` at a time; positions are the model's or, with padding, generate's."""
    logits, start = [], 0
    for size in sizes or (1,) * ids.shape[1]:
        stop, more = start + size, {}
        if mask is not None:
            more = {"attention_mask": mask[:, :stop], "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]}
        with torch.no_grad():
            out = model(ids[:, start:stop], use_cache=True, **{cache_keyword(model): cache}, **more)
        logits.append(out.logits)
        start = stop
    return torch.cat(logits, 1)


def generate(model, ids, cache, new, **options):
    options = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "pad_token_id": 0,
        "max_new_tokens": new,
        "eos_token_id": -1,
        **options,
    }
    keyword = "cache" if cache_keyword(model) == "cache" else "past_key_values"
    return model.generate(ids, **{keyword: cache}, **options)


def padded(ids, leads):
    """The rows with padding in front, and the mask that says so."""
    mask = torch.ones_like(ids)
    for row, lead in enumerate(leads):
        mask[row, :lead] = 0
    return ids * mask, mask


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "mistral", "qwen3"])
def test_any_number_of_tokens_a_call_equals_the_masked_oracle(kind, implementation, policy):
    model, ids, sizes = tiny(kind, torch.float64), tokens(2, 50), (17, 1, 2, 7, 1, 1, 21)
    model.set_attn_implementation(implementation)
    cache = KnormCache(policy)
    assert torch.allclose(
        feed(model, ids, cache, *sizes), oracle_logits(model, ids, policy, sizes), atol=CLOSE[implementation]
    )
    assert cache.get_seq_length() == 50
    positions = cache.positions(2)
    assert (positions.diff(dim=-1) > 0).all()
    assert positions.max() < 50


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_layers_of_unequal_length_equal_the_oracle_inside_attention(kind, implementation):
    model, ids, sizes = tiny(kind, torch.float64), tokens(2, 50), (17, 1, 2, 7, 1, 22)
    model.set_attn_implementation(implementation)
    cache = KnormCache(SKIPPING)
    with knorm.attention(model):
        logits = feed(model, ids, cache, *sizes)
    assert torch.allclose(logits, oracle_logits(model, ids, SKIPPING, sizes), atol=CLOSE[implementation])
    assert model.config._attn_implementation == implementation
    assert [cache.layers[i].stored < 50 for i in range(3)] == [False, True, True]


@pytest.mark.parametrize("policy", [*POLICIES, SKIPPING, Policy(0.5, score="random", seed=3)], ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_row_of_a_padded_batch_equals_itself_alone(implementation, policy):
    model, ids, leads = tiny("llama", torch.float64), tokens(4, 50), (0, 4, 12, 9)
    model.set_attn_implementation(implementation)
    batch, mask = padded(ids, leads)
    cache = KnormCache(policy)
    with knorm.attention(model):
        together = feed(model, batch, cache, 23, 1, 1, 5, 20, mask=mask)
    for row, lead in enumerate(leads):
        alone = KnormCache(policy)
        with knorm.attention(model):
            expected = feed(model, ids[row : row + 1, lead:], alone, 23 - lead, 1, 1, 5, 20)
        assert torch.allclose(together[row, lead:], expected[0], atol=CLOSE[implementation])
        for layer in range(3):
            own, given = alone.positions(layer)[0], cache.positions(layer)[row]
            assert torch.equal(given[:, given.shape[1] - own.shape[1] :], own)
            assert (given[:, : given.shape[1] - own.shape[1]] == -1).all()


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "qwen3", pytest.param("embedded", marks=pytest.mark.processes)])
def test_greedy_generation_of_200_tokens_equals_the_oracle(kind, embedded):
    model = (
        copy.deepcopy(embedded[0]).double()
        if kind == "embedded"
        else tiny(kind, torch.float64, max_position_embeddings=256)
    )
    ids, leads, policy = tokens(2, 30), (0, 9), Policy(0.5, prune_after=24, protocol="streaming", protect_recent=4)
    single = generate(model, ids[:1], KnormCache(policy), 200)
    batch, mask = padded(ids, leads)
    with knorm.attention(model):
        rows = generate(model, batch, KnormCache(policy), 200, attention_mask=mask)
    assert torch.equal(rows[:1], single)
    for row, lead in enumerate(leads):
        text = rows[row : row + 1, lead:]
        prompt = 30 - lead
        best = oracle_logits(model, text[:, :-1], policy, (prompt, *(1,) * 199))[0, prompt - 1 :].argmax(-1)
        assert torch.equal(best, text[0, prompt:])


def test_generate_with_a_skipped_layer_needs_no_attention_for_one_token_a_call():
    model, ids = tiny("gpt_neox", torch.float64), tokens(1, 30)
    out = generate(model, ids, KnormCache(SKIPPING), 30)
    best = oracle_logits(model, out[:, :-1], SKIPPING, (30, *(1,) * 29))[:, 29:].argmax(-1)
    assert torch.equal(best, out[:, 30:])


def test_beam_search_scores_its_beams_as_the_oracle_does():
    model, ids = tiny("qwen2", torch.float64), tokens(2, 20)
    out = generate(
        model, ids, KnormCache(STREAMING), 12, num_beams=3, num_return_sequences=3, output_scores=True,
        return_dict_in_generate=True, length_penalty=0.0,
    )  # fmt: skip
    logits = oracle_logits(model, out.sequences[:, :-1], STREAMING, (20, *(1,) * 11))[:, 19:]
    each = logits.log_softmax(-1).gather(2, out.sequences[:, 20:, None]).sum((1, 2))
    assert torch.allclose(each.float(), out.sequences_scores, atol=1e-4)
    full = generate(model, ids, KnormCache(Policy(1.0)), 12, num_beams=3)
    assert torch.equal(full, generate(model, ids, DynamicCache(), 12, num_beams=3))


def test_without_compression_it_is_a_dynamic_cache():
    model, ids = tiny("llama"), tokens(2, 30)
    assert torch.equal(generate(model, ids, KnormCache(Policy(1.0)), 20), generate(model, ids, DynamicCache(), 20))
    batch, mask = padded(ids, (3, 0))
    plain = generate(model, batch, DynamicCache(), 20, attention_mask=mask)
    with knorm.attention(model):
        assert torch.equal(plain, generate(model, batch, DynamicCache(), 20, attention_mask=mask))
        assert torch.equal(plain, generate(model, batch, KnormCache(Policy(1.0)), 20, attention_mask=mask))


def test_a_copy_a_reset_and_a_choice_of_rows_keep_positions_and_contents_together():
    model, ids = tiny("mistral"), tokens(3, 30)
    cache = KnormCache(STREAMING)
    first = feed(model, ids, cache)
    twin = copy.deepcopy(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory() == (0, 0, 0)
    assert torch.equal(feed(model, ids, cache), first)
    for layer in range(3):
        assert torch.equal(cache.positions(layer), twin.positions(layer))
        assert torch.equal(cache.layers[layer].keys, twin.layers[layer].keys)
    before = [cache.positions(layer) for layer in range(3)]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    for layer in range(3):
        assert torch.equal(cache.positions(layer), before[layer][[2, 2, 0, 0, 0, 0]])
        assert cache.layers[layer].keys.shape[0] == 6
    rows, more = [2, 2, 0, 0, 0, 0], tokens(3, 9, seed=1)
    together = feed(model, more, twin, 4, 5)
    assert torch.allclose(feed(model, more[rows], cache, 4, 5), together[rows], atol=1e-4)
    assert torch.equal(cache.positions(2), twin.positions(2)[rows])


@pytest.mark.parametrize("rows", [[1, 1, 2], [2, 0, 1]])
def test_rows_of_a_padded_batch_may_be_chosen(rows):
    model, ids = tiny("llama", torch.float64), tokens(3, 40)
    batch, mask = padded(ids, (0, 7, 3))
    whole, part = KnormCache(STREAMING), KnormCache(STREAMING)
    with knorm.attention(model):
        feed(model, batch[:, :20], whole, 20, mask=mask)
        feed(model, batch[rows, :20], part, 20, mask=mask[rows])
        whole.batch_select_indices(torch.tensor(rows))
        more = {"attention_mask": mask[rows], "position_ids": (mask.cumsum(1) - 1)[rows, 20:]}
        one, other = (model(ids[rows, 20:], **{cache_keyword(model): cache}, **more).logits for cache in (whole, part))
    assert torch.allclose(one, other, atol=1e-9)


@pytest.mark.parametrize("policy", [Policy(0.5), STREAMING, SKIPPING], ids=str)
def test_crop_is_exact_back_to_the_last_eviction_and_refused_beyond(policy):
    model, ids = tiny("llama", torch.float64), tokens(2, 40)
    cache, plain = KnormCache(policy), KnormCache(policy)
    feed(model, ids[:, :15], cache, 15)
    feed(model, ids[:, :15], plain, 15)
    steps = 3 if policy.protocol == "prefill" else 2
    feed(model, tokens(2, steps, seed=9), cache, *(1,) * steps)
    cache.crop(-steps)
    with knorm.attention(model):
        assert torch.allclose(
            feed(model, ids[:, 15:], cache, 9, 16), feed(model, ids[:, 15:], plain, 9, 16), atol=1e-12
        )
    held = [layer.stored for layer in cache.layers]
    with pytest.raises(ValueError, match=r"crop would take back 30 tokens, but layer . has evicted some since: only"):
        cache.crop(10)
    assert [layer.stored for layer in cache.layers] == held
    cache.crop(0)
    assert cache.get_seq_length() == 40
    fresh = KnormCache(Policy(0.5, prune_after=100))
    feed(model, ids, fresh, 40)
    fresh.crop(-40)
    assert fresh.get_seq_length() == 0


def test_assisted_decoding_is_refused_since_it_rewinds():
    model, ids = tiny("llama"), tokens(1, 20)
    with pytest.raises(ValueError, match=r"crop|rewind|roll"):
        generate(model, ids, KnormCache(STREAMING), 8, assistant_model=tiny("llama", seed=1))


def test_a_prompt_is_stored_without_what_its_tensors_are_views_of():
    larger = torch.randn(1, 2, 60, 4)
    cache = KnormCache(Policy(0.5, prune_after=10))
    cache.update(larger[:, :, :6], larger[:, :, :6], 0)
    for stored in (cache.layers[0].keys, cache.layers[0].values):
        assert stored.untyped_storage().nbytes() == stored.nbytes == larger.nbytes // 10


def test_memory_counts_what_is_stored():
    model = tiny("llama")
    cache = KnormCache(Policy(0.25))
    feed(model, tokens(2, 40), cache, 40)
    token = 2 * 2 * 16 * 4  # rows, heads, head_dim, bytes
    assert cache.memory() == (3 * 2 * 10 * token, 3 * 10 * 2 * 2 * 8, 3 * 2 * 40 * token)


def unchanged(cache, call, error, message):
    """The call raises, and leaves the cache as it was."""
    before = [(layer.seen, layer.keys.clone()) for layer in cache.layers if layer.seen]
    with pytest.raises(error, match=message):
        call()
    after = [(layer.seen, layer.keys) for layer in cache.layers if layer.seen]
    assert len(before) == len(after)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(before, after, strict=True))


def test_another_batch_model_or_dtype_is_refused_before_anything_is_written():
    model, cache = tiny("llama"), KnormCache(STREAMING)
    feed(model, tokens(2, 20), cache, 20)
    for other, ids, message in (
        (
            model,
            tokens(3, 1),
            r"keys \[3, 2, 1, 16\] torch.float32, .* on cpu for layer 0, but the cache holds keys \[2, 2, ",
        ),
        (tiny("llama", torch.float64), tokens(2, 1), "float64.*call reset"),
        (tiny("mistral"), tokens(2, 1), "another batch or model"),
        (tiny("llama", num_hidden_layers=2), tokens(2, 1), "the model has 2 layers, but the cache holds 3"),
        (tiny("llama", num_hidden_layers=4), tokens(2, 1), "the model has 4 layers, but the cache holds 3"),
    ):
        unchanged(cache, lambda other=other, ids=ids: feed(other, ids, cache, 1), ValueError, message)
    feed(model, tokens(2, 1), cache, 1)


def test_a_policy_that_cannot_work_with_the_model_is_refused_before_anything_is_written():
    model, ids = tiny("llama"), tokens(1, 20)
    for policy, message in (
        (Policy(0.5, skip_layers=(0, 3)), r"skip_layers=\(0, 3\), but the model has 3 layers: 0 to 2"),
        (Policy(0.5, skip_layers=range(4)), "but the model has 3 layers"),
        (Policy(0.1, protect_first=4), "protect_first=4 and protect_recent=0 need 4 tokens"),
    ):
        cache = KnormCache(policy)
        unchanged(cache, lambda cache=cache: feed(model, ids, cache, 20), ValueError, message)


def test_a_sliding_window_is_refused_once_it_slides():
    model, cache = tiny("mistral", sliding_window=24), KnormCache(STREAMING)
    feed(model, tokens(1, 24), cache, 20, 4)
    unchanged(cache, lambda: feed(model, tokens(1, 1), cache), ValueError, r"25 tokens, but .* a sliding window of 24")


def test_linear_attention_is_refused():
    model = tiny(
        "qwen3_next",
        num_experts=2,
        num_experts_per_tok=1,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["full_attention", "linear_attention", "full_attention"],
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    with pytest.raises(
        ValueError, match="the model has linear_attention layers, but only attention to a cache of keys"
    ):
        feed(model, tokens(1, 9), KnormCache(STREAMING), 9)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_one_mask_cannot_say_is_refused_with_the_way_out(implementation):
    model, ids = tiny("llama"), tokens(2, 30)
    model.set_attn_implementation(implementation)
    batch, mask = padded(ids, (0, 5))
    way_out = r"call the model inside `with knorm.attention\(model\):`"
    cache = KnormCache(STREAMING)
    message = "the batch is padded, which a cache alone does not see: " + way_out
    unchanged(cache, lambda: feed(model, batch, cache, 20, mask=mask), ValueError, message)
    unequal = KnormCache(SKIPPING)
    feed(model, ids[:, :20], unequal, 20)
    message = "2 tokens at once for layers that store 10 to 20 tokens"
    unchanged(unequal, lambda: feed(model, ids[:, 20:], unequal, 2), ValueError, message + ".*" + way_out)
    if implementation == "eager":
        unchanged(unequal, lambda: feed(model, ids[:, 20:], unequal, 1), ValueError, "a mask for layers.*" + way_out)
    held = KnormCache(STREAMING)
    with knorm.attention(model):
        feed(model, batch, held, 20, mask=mask)
    unchanged(
        held, lambda: feed(model, ids[:, :1], held, 1), ValueError, "the batch in the cache is padded: " + way_out
    )


def test_padding_that_is_not_on_the_left_is_refused_before_anything_is_written():
    model, ids, cache = tiny("llama"), tokens(2, 20), KnormCache(STREAMING)
    with knorm.attention(model):
        for row in ([1] * 15 + [0] * 5, [0, 0, 1, 0] + [1] * 16):
            mask = torch.tensor([[1] * 20, row])
            unchanged(
                cache, lambda mask=mask: feed(model, ids, cache, 20, mask=mask), ValueError, "row 1 of attention_mask"
            )
        batch, mask = padded(ids, (0, 5))
        feed(model, batch, cache, 20, mask=mask)
        for leads in ((0, 6), (0, 0), (5, 0)):
            other = torch.cat([padded(ids, leads)[1], torch.ones(2, 1, dtype=torch.int64)], 1)
            call = lambda other=other: model(ids[:, :1], attention_mask=other, **{cache_keyword(model): cache})  # noqa: E731
            unchanged(cache, call, ValueError, "padding tokens in its rows, but the rows in the cache began with")
        whole = torch.ones(2, 1, 1, 21, dtype=torch.bool)
        call = lambda: model(ids[:, :1], attention_mask=whole, **{cache_keyword(model): cache})  # noqa: E731
        unchanged(cache, call, ValueError, r"attention_mask is \[2, 1, 1, 21\], but should be \[batch, length\]")
        call = lambda: model(ids[:, :1], attention_mask=mask, **{cache_keyword(model): cache})  # noqa: E731
        unchanged(cache, call, ValueError, "attention_mask speaks of 20 tokens, but should of all 21 so far")


def test_a_call_that_broke_off_is_noticed():
    model, ids, cache = tiny("llama"), tokens(1, 20), KnormCache(STREAMING)
    feed(model, ids, cache, 20)
    broken = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feed(model, ids, cache, 1)
    broken.remove()
    with pytest.raises(RuntimeError, match=r"the call before broke off after layer 1 of 3.*reset"):
        feed(model, ids, cache, 1)
    cache.reset()
    feed(model, ids, cache, 20)


def test_what_is_no_policy_layer_or_attention_is_refused():
    with pytest.raises(TypeError, match=r"policy=0.5, but should be a knorm.Policy"):
        KnormCache(0.5)
    cache = KnormCache(STREAMING)
    with pytest.raises(IndexError, match="layer=0, but the cache holds 0 layers"):
        cache.positions(0)
    model = tiny("llama")
    model.set_attn_implementation("flex_attention")
    with (
        pytest.raises(ValueError, match="attends by 'flex_attention', but should by 'sdpa' or 'eager'"),
        knorm.attention(model),
    ):
        pass


@pytest.mark.parametrize(
    ("keys", "values", "layer", "error", "message"),
    [
        (KEYS, KEYS, 1, ValueError, "layer 1 of an empty cache, but the first call should begin with layer 0"),
        (KEYS, KEYS, True, ValueError, "layer_idx"),
        (KEYS, KEYS, "0", TypeError, "layer_idx='0', but should be an integer"),
        (None, KEYS, 0, TypeError, "keys NoneType, but should be a torch.Tensor"),
        (KEYS.to("meta"), KEYS, 0, ValueError, "keys is a meta tensor"),
        (KEYS[0], KEYS[0], 0, ValueError, "should be floating"),
        (KEYS, KEYS[:, :1], 0, ValueError, "alike but for head_dim"),
        (KEYS.int(), KEYS, 0, ValueError, "should be floating"),
    ],
)
def test_what_no_model_gives_is_refused_before_anything_is_written(keys, values, layer, error, message):
    cache = KnormCache(STREAMING)
    with pytest.raises(error, match=message):
        cache.update(keys, values, layer)
    assert not cache.layers


def test_the_models_own_attention_comes_back_whatever_happens():
    model = tiny("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ZeroDivisionError), attention_through(model, lambda *_, **__: 1 / 0):
        model(tokens(1, 3))
    with pytest.raises(ZeroDivisionError), knorm.attention(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("knorm")
    with pytest.raises(RuntimeError, match="called outside knorm"):
        model(tokens(1, 3))
