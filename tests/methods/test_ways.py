"""Runs of methods against loops that are written here, apart from knorm, and damage against float64."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny, tokens
from torch.nn import functional
from transformers import DynamicCache, QuantizedCache, StaticCache

import knorm
from knorm import KnormCache, Policy, exact_nll
from knorm.evaluation.damage import head_of
from knorm.evaluation.ways import Ways
from knorm.evaluation.windows import Windows
from knorm.methods.budget import Budget
from knorm.methods.caches import stored_bytes
from knorm.methods.door import method
from knorm.methods.method import MethodError

PROMPT, LENGTH = 40, 64


def logits_of_loop(model, ids, cache, compress=None, prompt=PROMPT, positions=None):
    """Feed the prompt, let `compress` change the cache, then single tokens: logits [batch, T - prompt, vocabulary]."""
    keyword = knorm.model_attention.cache_keyword(model)
    parts = [model(input_ids=ids[:, :prompt], **{keyword: cache}).logits[:, -1:]]
    if compress:
        compress(cache)
    for at in range(prompt, ids.shape[1] - 1):
        place = torch.full((len(ids), 1), at if positions is None else positions(cache))
        parts.append(model(input_ids=ids[:, at : at + 1], position_ids=place, **{keyword: cache}).logits)
    return torch.cat(parts, 1)


def nll_of(logits, ids, prompt=PROMPT):
    return -logits.double().log_softmax(-1).gather(-1, ids[:, prompt:, None])[..., 0]


def keep_newest(keys, values, keep_ratio):
    count = math.ceil(keys.shape[2] * keep_ratio)
    return keys[:, :, -count:], values[:, :, -count:]


def drop_in_place(cache, count):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, -count:], layer.values[:, :, -count:]


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "qwen3"])
def model(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


IDS = tokens(2, LENGTH)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["two calls", "loop"])
def test_a_function_equals_a_loop_written_apart(model, how, attention):
    with torch.no_grad():
        logits = logits_of_loop(model, IDS, DynamicCache(), lambda cache: drop_in_place(cache, 20))
        full = model(input_ids=IDS).logits[:, PROMPT - 1 : -1]
    model.set_attn_implementation(attention)
    found = knorm.evaluate(model, IDS, method(keep_newest, keep_ratio=0.5), prompt_length=PROMPT, how=how, batch=2)
    model.set_attn_implementation("sdpa")
    assert (found.per_token.nll - nll_of(logits, IDS)).abs().max() <= 1e-4
    assert (found.per_token.nll_full - nll_of(full, IDS)).abs().max() <= 1e-4
    assert found.how == how
    assert found.changed
    # queries 40 to 62 see 20 retained tokens and those since the prompt
    assert found.tokens_seen.unique().tolist() == [20 + sum(range(1, 24)) / 23]
    per_token = bytes_of_a_token(model)
    assert found.bytes_stored == pytest.approx(per_token * float(found.tokens_seen.mean()))
    assert found.bytes_full / found.tokens_before == pytest.approx(per_token)


def bytes_of_a_token(model):
    with torch.no_grad():
        cache = DynamicCache()
        model(input_ids=IDS[:1, :1], **{knorm.model_attention.cache_keyword(model): cache})
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("how", ["schedule", "two calls", "loop"])
@pytest.mark.parametrize("options", [{}, {"skip_layers": (0,)}, {"score": "random"}], ids=str)
def test_knorms_own_policies_equal_one_pass_in_every_way(model, how, options):
    policy = Policy("0.4", **options)
    nll = exact_nll(model, IDS, policy, prompt_length=PROMPT)[:, PROMPT - 1 :]
    found = knorm.evaluate(model, IDS, method(policy), prompt_length=PROMPT, how=how, batch=2)
    assert (found.per_token.nll - nll.double()).abs().max() <= 1e-4


def test_a_streaming_policy_acts_again_and_the_loop_is_taken(llama):
    policy = Policy("0.6", prune_after=24, protocol="streaming")
    nll = exact_nll(llama, IDS, policy, prompt_length=PROMPT)[:, PROMPT - 1 :]
    by_schedule = knorm.evaluate(llama, IDS, method(policy), prompt_length=PROMPT)
    assert (by_schedule.how, by_schedule.check) == ("schedule", "")
    assert (by_schedule.per_token.nll - nll).abs().max() <= 1e-4
    found = knorm.evaluate(llama, IDS, method(lambda: KnormCache(policy), kind="cache"), prompt_length=PROMPT)
    assert found.how == "loop"
    assert found.check.startswith("acts again after the prompt: in two calls window 1 differs by up to ")
    assert (found.per_token.nll - nll).abs().max() <= 1e-4
    assert torch.allclose(found.tokens_seen, by_schedule.tokens_seen)


@pytest.mark.parametrize(
    "make",
    [
        lambda config: StaticCache(config, max_cache_len=LENGTH),
        lambda config: QuantizedCache("fp8", config),
        lambda config: DynamicCache(config=config),
    ],
    ids=["static", "fp8", "dynamic"],
)
def test_caches_of_transformers_equal_their_own_loop(llama, make):
    with torch.no_grad():
        nll = nll_of(logits_of_loop(llama, IDS, make(llama.config)), IDS)
    found = knorm.evaluate(llama, IDS, method(make, kind="cache"), prompt_length=PROMPT, how="loop", batch=2)
    assert (found.per_token.nll - nll).abs().max() <= 1e-4


def test_a_sliding_window_is_seen_as_it_masks():
    model = tiny("mistral", sliding_window=16)
    with torch.no_grad():
        nll = nll_of(logits_of_loop(model, IDS, DynamicCache(config=model.config)), IDS)
    found = knorm.evaluate(model, IDS, method("transformers:DynamicCache"), prompt_length=PROMPT, batch=2)
    assert (found.per_token.nll - nll).abs().max() <= 1e-4
    assert not found.changed, "the model's own window, with or without a cache"
    assert found.tokens_seen.unique().tolist() == [16.0]


def test_a_quantised_cache_is_read_back_before_it_is_judged(llama):
    fp8 = method('transformers:QuantizedCache(backend="fp8")')
    found = knorm.evaluate(llama, IDS, fp8, prompt_length=PROMPT, batch=2)
    assert found.changed
    assert found.damage.kl > 1e-6
    assert found.bytes_stored < 0.3 * found.bytes_full


def test_layers_of_unequal_length_equal_a_loop_of_single_tokens(llama):
    counts = (30, 10, 20)

    def compress(keys, values, keep_ratio, layer):
        return keys[:, :, -counts[layer] :], values[:, :, -counts[layer] :]

    def change(cache):
        for layer, count in zip(cache.layers, counts, strict=True):
            layer.keys, layer.values = layer.keys[:, :, -count:], layer.values[:, :, -count:]

    with torch.no_grad():
        nll = nll_of(logits_of_loop(llama, IDS, DynamicCache(), change), IDS)  # SDPA takes them one by one
    found = knorm.evaluate(llama, IDS, method(compress, keep_ratio=0.5), prompt_length=PROMPT, batch=2)
    assert found.how == "two calls"
    assert (found.per_token.nll - nll).abs().max() <= 1e-4
    assert (found.tokens_seen[:, 0] - 12).tolist() == [30, 10, 20]


def test_a_function_is_given_the_queries_and_the_weights_that_attention_has(llama):
    seen = {}

    def compress(keys, values, keep_ratio, queries, attention, layer):
        seen[layer] = (queries, attention)
        return keys, values

    knorm.evaluate(llama, IDS, method(compress, keep_ratio=0.5), prompt_length=PROMPT, how="two calls", batch=2)
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        weights = llama(input_ids=IDS[:, :PROMPT], output_attentions=True).attentions
        rotated = {}
        for layer, block in enumerate(llama.model.layers):
            hidden = llama(input_ids=IDS[:, :PROMPT], output_hidden_states=True).hidden_states[layer]
            states = block.input_layernorm(hidden)
            queries = block.self_attn.q_proj(states).unflatten(-1, (-1, 16)).transpose(1, 2)
            turns = llama.model.rotary_emb(states, torch.arange(PROMPT)[None])
            apply = __import__(type(llama).__module__, fromlist=["x"]).apply_rotary_pos_emb
            rotated[layer] = apply(queries, queries, *turns)[0]
    llama.set_attn_implementation("sdpa")
    for layer in range(3):
        assert torch.allclose(seen[layer][1], weights[layer], atol=1e-5)
        assert torch.allclose(seen[layer][0], rotated[layer], atol=1e-4)


def test_a_mask_of_heads_hides_tokens_without_freeing_them(llama):
    def mark(keys, values, keep_ratio):
        mask = torch.ones(keys.shape[:3], dtype=torch.bool)
        mask[:, 0, :30] = False
        return keys, values, mask

    def evict(keys, values, keep_ratio):  # the same for one head alone: the other sees all
        return keys, values

    found = knorm.evaluate(llama, IDS, method(mark, keep_ratio=0.5), prompt_length=PROMPT, batch=2)
    free = knorm.evaluate(llama, IDS, method(evict, keep_ratio=0.5), prompt_length=PROMPT, batch=2)
    assert found.changed
    assert not free.changed
    assert "did not act in 64 tokens" in free.check
    assert found.bytes_stored == free.bytes_stored
    assert (free.tokens_seen - found.tokens_seen).unique(dim=0).tolist() == [[30.0, 0.0]]


def test_damage_equals_float64_on_the_same_logits(llama):
    with torch.no_grad():
        logits = logits_of_loop(llama, IDS, DynamicCache(), lambda cache: drop_in_place(cache, 20)).double()
        full = llama(input_ids=IDS).logits[:, PROMPT - 1 : -1].double()
    found = knorm.evaluate(llama, IDS, method(keep_newest, keep_ratio=0.5), prompt_length=PROMPT, how="loop", batch=2)
    p, q = functional.log_softmax(full, -1), functional.log_softmax(logits, -1)
    kl = (p.exp() * (p - q)).sum(-1)
    change = (nll_of(logits, IDS) - nll_of(full, IDS)).mean(1)
    true = IDS[:, PROMPT:, None]
    delta = (q.gather(-1, true).exp() - p.gather(-1, true).exp()).flatten()
    d, ordered = found.damage, kl.flatten().sort().values
    for ours, theirs in (
        (d.kl, kl.mean()), (d.kl_largest, kl.max()), (d.delta_nll, change.mean()), (d.delta_p, delta.mean()),
        (d.delta_p_rms, delta.square().mean().sqrt()), (d.kl_median, ordered[23]), (d.kl_99, ordered[47]),
        (d.same_top, (p.argmax(-1) == q.argmax(-1)).double().mean()), (d.nll, nll_of(logits, IDS).mean()),
        (d.accuracy, (q.argmax(-1) == true[..., 0]).double().mean()),
    ):  # fmt: skip
        assert ours == pytest.approx(float(theirs), abs=1e-6)
    half = 12.706204736 * float(change.std()) / math.sqrt(2)
    assert d.delta_nll_high - d.delta_nll == pytest.approx(half, rel=1e-6), "Student's, one degree of freedom"


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_the_head_is_the_models_own_whatever_it_does_to_its_logits(kind):
    model = tiny(kind, head_dim=16, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.no_grad():
        states = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
        with head_of(model) as head:
            own = head(states[0])
        assert torch.equal(own, model(input_ids=IDS).logits[0])
    assert "forward" not in vars(model.base_model)


def test_the_control_is_the_full_cache_in_other_batches(llama):
    for batch in (1, 2):
        found = Ways(llama, Windows(IDS), PROMPT, batch=batch).control()
        assert found.damage.kl < 1e-9
        assert not found.changed
    one = Ways(llama, Windows(IDS[:1]), PROMPT).control()
    assert one.damage.windows == 1
    assert one.damage.kl_low is None


def test_generators_are_seeded_alike_and_left_as_they_were(llama):
    def chance(keys, values, keep_ratio):
        kept = torch.randperm(keys.shape[2])[:20].sort().values
        return keys[:, :, kept], values[:, :, kept]

    before = torch.get_rng_state()
    found = knorm.evaluate(llama, IDS, method(chance, keep_ratio=0.5), prompt_length=PROMPT)
    assert found.how == "two calls", "the loop draws as the two calls do"
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_is_judged_by_its_own_rounding():
    model = tiny("llama", torch.bfloat16)
    found = knorm.evaluate(model, IDS, method(keep_newest, keep_ratio=0.5), prompt_length=PROMPT, batch=2)
    assert found.how == "two calls"
    assert not knorm.evaluate(model, IDS, method("transformers:DynamicCache"), prompt_length=PROMPT, batch=2).changed


def test_what_fails_says_where_and_leaves_the_model_alone(llama):
    def broken(keys, values, keep_ratio):
        llama.model.layers[0].self_attn.left_behind = 1
        llama.model.register_forward_hook(lambda *_: None)
        raise RuntimeError("no such luck")

    with pytest.raises(MethodError, match=r"broken raised RuntimeError: no such luck \(test_ways.py, line \d+\)"):
        knorm.evaluate(llama, IDS, method(broken, keep_ratio=0.5), prompt_length=PROMPT)
    assert not hasattr(llama.model.layers[0].self_attn, "left_behind")
    assert not llama.model._forward_hooks
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda k, v: None, "returned NoneType, but should return (keys, values) or (keys, values, mask)"),
        (lambda k, v: k, "returned one tensor [2, 2, 40, 16], but should"),
        (lambda k, v: (k[:1], v[:1]), "returned keys [1, 2, 40, 16] torch.float32 for [2, 2, 40, 16]"),
        (lambda k, v: (k[:, :, :0], v[:, :, :0]), "returned 0 keys and 0 values"),
        (lambda k, v: (k[:, :, :3], v[:, :, :4]), "returned 3 keys and 4 values"),
        (lambda k, v: (k.double(), v), "torch.float64 for"),
        (lambda k, v: (k, v, k[..., 0]), "returned a mask [2, 2, 40] torch.float32, but should return bool"),
    ],
)
def test_nonsense_is_named(llama, result, words):
    def odd(keys, values, keep_ratio):
        return result(keys, values)

    with pytest.raises(MethodError) as raised:
        knorm.evaluate(llama, IDS, method(odd, keep_ratio=0.5), prompt_length=PROMPT, batch=2)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_mistake_inside_the_with_is_not_the_methods(llama):
    with pytest.raises(ZeroDivisionError), method(keep_newest, keep_ratio=0.5).open(llama):
        _ = 1 / 0


def test_open_has_two_phases_for_whoever_calls_the_model(llama):
    chosen = method(keep_newest, keep_ratio=0.5)
    with torch.no_grad(), chosen.open(llama) as cache:
        one = llama(input_ids=IDS[:, :PROMPT], past_key_values=cache).logits[:, -1:]
        rest = torch.arange(PROMPT, LENGTH - 1).expand(2, -1)
        two = llama(input_ids=IDS[:, PROMPT:-1], past_key_values=cache, position_ids=rest).logits
    found = knorm.evaluate(llama, IDS, chosen, prompt_length=PROMPT, how="two calls", batch=2)
    assert (nll_of(torch.cat([one, two], 1), IDS) - found.per_token.nll).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_length": 0}, "prompt_length=0, but should be between 1 and 62"),
        ({"prompt_length": 64}, "is the whole window"),
        ({"how": "guess"}, "how='guess', but should be one of auto"),
        ({"how": "schedule"}, "keep_newest has no schedule"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_runs_that_cannot_be_are_refused(llama, options, words):
    with pytest.raises(ValueError, match=words):
        knorm.evaluate(llama, IDS, method(keep_newest, keep_ratio=0.5), **{"prompt_length": PROMPT, **options})


def test_the_last_tokens_alone_may_be_scored(llama):
    chosen = method(keep_newest, keep_ratio=0.5)
    whole = Ways(llama, Windows(IDS), PROMPT).evaluate(chosen)
    last = Ways(llama, Windows(IDS), PROMPT, scored=5).evaluate(chosen)
    assert torch.equal(last.per_token.kl, whole.per_token.kl[:, -5:])
    with pytest.raises(ValueError, match="scored=30, but only 24 tokens follow a prompt of 40"):
        Ways(llama, Windows(IDS), PROMPT, scored=30)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_long_calls_are_masked_a_part_of_the_queries_at_a_time(llama, attention, monkeypatch):
    def evaluated():
        llama.set_attn_implementation(attention)
        chosen = method(keep_newest, keep_ratio=0.5)
        found = knorm.evaluate(llama, IDS, chosen, prompt_length=PROMPT, how="two calls", batch=2)
        llama.set_attn_implementation("sdpa")
        return found

    whole = evaluated()
    monkeypatch.setattr("knorm.methods.watch._MASK", 100)  # two queries of 50 slots
    parts = evaluated()
    assert (whole.per_token.nll - parts.per_token.nll).abs().max() <= 1e-5
    assert torch.equal(whole.tokens_seen, parts.tokens_seen)


def test_budgets():
    assert Budget("0.55").ratio(100) * 100 == 55
    assert Budget(keep_tokens=7).ratio(3) == 1
    for length in (8, 100, 256, 1000):
        for kept in range(1, length, 7):
            assert int(length * (1 - Budget(keep_tokens=kept).removed(length))) == kept
    for wrong in ({}, {"keep_ratio": 0.5, "keep_tokens": 3}, {"keep_tokens": 0}, {"keep_ratio": 2}):
        with pytest.raises(ValueError):
            Budget(**wrong)


def test_stored_bytes_counts_each_tensor_once():
    cache = DynamicCache()
    keys = torch.zeros(1, 2, 3, 4)
    cache.update(keys, keys, 0)
    cache.same = cache.layers[0].keys
    assert stored_bytes(cache) == 2 * keys.nbytes


class InBytes(torch.Tensor):
    """Stands for float32 numbers, of which it holds a byte each and a scale, as quanto's tensors do."""

    @staticmethod
    def __new__(cls, stored, scale):
        return torch.Tensor._make_wrapper_subclass(cls, stored.shape, dtype=scale.dtype)

    def __init__(self, stored, scale):
        self.stored, self.scale = stored, scale

    def __tensor_flatten__(self):
        return ["stored", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts, *_):
        return InBytes(**parts)

    __torch_dispatch__ = None


def test_of_a_tensor_that_stands_for_more_bytes_those_held_are_counted():
    stored, scale = torch.zeros(1, 2, 3, 4, dtype=torch.int8), torch.ones(1)
    quantised = InBytes(stored, scale)
    assert quantised.nbytes == 96
    assert stored_bytes([quantised, {"again": quantised}]) == 24 + 4


def test_a_window_in_which_nothing_reads_the_cache_is_refused(embedded):
    with pytest.raises(
        ValueError, match="prompt_length=1, but should be between 1 and 0: a prompt to compress, and two"
    ):
        knorm.evaluate(embedded[0], torch.tensor([[1, 2]]), method(Policy(0.5)), prompt_length=1)


def test_what_are_no_tokens_is_refused(embedded):
    with pytest.raises((TypeError, ValueError), match="input_ids"):
        knorm.evaluate(embedded[0], None, method(Policy(0.5)), prompt_length=1)


class Short(DynamicCache):
    """Gives the prompt's own queries fewer keys than its mask has."""

    def update(self, keys, values, layer, *rest, **more):
        keys, values = super().update(keys, values, layer, *rest, **more)
        return keys[:, :, -8:], values[:, :, -8:]


def test_a_cache_on_which_the_model_fails_is_told_so():
    model = tiny("gpt_neox")
    with pytest.raises(MethodError, match=r"Short: with its cache the model raised RuntimeError: The size of tensor"):
        knorm.evaluate(model, tokens(1, 40), method(Short), prompt_length=20, how="two calls")
