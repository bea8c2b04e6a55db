"""Whoever is inside `with knorm.attention(model):` attends by it; other threads and other models notice nothing."""

from __future__ import annotations

import contextvars
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from test_cache import SKIPPING, STREAMING, feed, generate, padded
from tiny import tiny, tokens
from transformers import AttentionInterface, DynamicCache

import knorm
from knorm import KnormCache, Policy, exact_nll
from knorm.model_attention import attention_through

LEADS = (0, 4, 9)


@pytest.fixture
def other_thread():
    """Runs a function in a thread of its own, and hands its result, or what it raises, back."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda call, *arguments, **options: pool.submit(call, *arguments, **options).result(timeout=60)


def attending(implementation="sdpa", kind="llama", **options):
    model = tiny(kind, **options)
    model.set_attn_implementation(implementation)
    return model


def batch():
    return padded(tokens(3, 24), LEADS)


def plain(model):
    ids, mask = batch()
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits[mask.bool()]


def compressed(model):
    ids, mask = batch()
    with knorm.attention(model):
        return feed(model, ids, KnormCache(SKIPPING), 20, 1, 3, mask=mask)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_the_same_model_in_another_thread_attends_by_its_own(implementation, kind, other_thread):
    model = attending(implementation, kind)
    before, generated = plain(model), generate(model, *batch()[:1], DynamicCache(), 5)
    with knorm.attention(model):
        assert torch.equal(other_thread(plain, model), before)
        assert torch.equal(other_thread(generate, model, batch()[0], DynamicCache(), 5), generated)
    with attention_through(model, lambda *_, **__: 1 / 0):
        assert torch.equal(other_thread(plain, model), before)
    with attention_through(model, None):
        assert torch.equal(other_thread(plain, model), before)
    assert model.config._attn_implementation == implementation


def test_another_model_is_not_waited_for_nor_touched(other_thread):
    model, other = attending(), attending("eager", "gpt_neox")
    expected, unmasked = compressed(other), plain(other)
    with knorm.attention(model):
        assert torch.equal(other_thread(compressed, other), expected)
        assert torch.equal(other_thread(plain, other), unmasked)
        assert torch.equal(compressed(other), expected)
        assert torch.equal(plain(other), unmasked)
        assert other.config._attn_implementation == "eager"


def test_a_cache_of_a_model_outside_attention_does_not_look_at_the_model_inside():
    model, other, ids = attending(), attending(kind="gpt_neox"), tokens(3, 24)
    alone = feed(other, ids, KnormCache(STREAMING), 20, 1, 3)
    padding, mask = batch()
    with knorm.attention(model):
        held = KnormCache(STREAMING)
        feed(model, padding[:, :20], held, 20, mask=mask[:, :20])
        assert torch.equal(feed(other, ids, KnormCache(STREAMING), 20, 1, 3), alone)
        with pytest.raises(ValueError, match="the batch is padded, which a cache alone does not see"):
            feed(other, padding, KnormCache(STREAMING), 24, mask=mask)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_one_model_compresses_in_several_threads_at_once(implementation):
    model = attending(implementation)
    expected, evaluated = compressed(model), exact_nll(model, tokens(2, 24), STREAMING)
    together = threading.Barrier(4)

    def run(number):
        together.wait(timeout=60)
        for _ in range(5):
            if number % 2:
                assert torch.equal(compressed(model), expected)
            else:
                assert torch.equal(exact_nll(model, tokens(2, 24), STREAMING), evaluated)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4), timeout=120))
    assert model.config._attn_implementation == implementation


def test_contexts_may_close_in_any_order(other_thread):
    model = attending("eager")
    first, second = knorm.attention(model), knorm.attention(model)
    first.__enter__()
    other_thread(second.__enter__)
    first.__exit__(None, None, None)
    assert model.config._attn_implementation == "knorm"  # the other thread is inside
    before = plain(model)
    other_thread(second.__exit__, None, None, None)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(plain(model), before)


def test_contexts_of_one_model_nest():
    model, (ids, mask) = attending("eager"), batch()
    expected, evaluated = compressed(model), exact_nll(model, ids, Policy())
    with knorm.attention(model):
        assert torch.equal(compressed(model), expected)
        assert torch.equal(exact_nll(model, ids, Policy()), evaluated)
        with attention_through(model, None):
            assert torch.allclose(plain(model), plain(attending("sdpa")), atol=1e-5)
        assert torch.equal(feed(model, ids, KnormCache(SKIPPING), 20, 1, 3, mask=mask), expected)
    assert model.config._attn_implementation == "eager"


def test_an_exception_inside_leaves_nothing_behind(other_thread):
    model = attending("eager")
    before = plain(model)
    with pytest.raises(ZeroDivisionError), knorm.attention(model), attention_through(model, lambda *_, **__: 1 / 0):
        model(tokens(1, 3))
    assert torch.equal(plain(model), before)
    assert torch.equal(other_thread(plain, model), before)


def test_a_model_that_cannot_be_switched_keeps_what_it_had(monkeypatch):
    model = attending("eager")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), knorm.attention(model):
        raise AssertionError("inside")
    assert model.config._attn_implementation == "eager"
    monkeypatch.undo()
    compressed(model)


def test_a_thread_that_runs_in_a_copy_of_the_context_is_inside_and_has_calls_of_its_own():
    model, (ids, mask) = attending(), batch()
    expected = [compressed(model), feed(model, ids, KnormCache(STREAMING), 24)]
    together = threading.Barrier(2)

    def meet(*_):  # each forward pass of one thread lies between two of the other
        together.wait(timeout=60)

    model.model.layers[0].register_forward_hook(meet)

    def run(padding):
        if padding:
            return feed(model, ids, KnormCache(SKIPPING), 20, 1, 3, mask=mask)
        return torch.cat([feed(model, ids, KnormCache(STREAMING), 24) for _ in range(3)])

    with knorm.attention(model), ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(contextvars.copy_context().run, run, padding) for padding in (True, False)]
        results = [each.result(timeout=60) for each in runs]
    assert torch.equal(results[0], expected[0])
    assert all(torch.equal(part, expected[1]) for part in results[1].split(3))


def test_two_models_of_one_configuration_are_each_right(other_thread):
    model = attending("eager")
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    assert twin.config is model.config
    expected, before = compressed(model), plain(model)
    with knorm.attention(model):
        assert torch.allclose(plain(twin), before, atol=1e-5)
        assert torch.equal(other_thread(plain, twin), before)
        assert torch.equal(compressed(twin), expected)
    assert twin.config._attn_implementation == "eager"


def test_what_others_have_registered_for_the_models_own_is_what_runs(other_thread):
    model, seen = attending(), []
    registered = AttentionInterface()["sdpa"]

    def replaced(*states, **keywords):
        seen.append(threading.get_ident())
        return registered(*states, **keywords)

    AttentionInterface.register("sdpa", replaced)
    try:
        with knorm.attention(model):
            other_thread(plain, model)
            assert len(seen) == 3
            compressed(model)
            assert len(seen) > 3
    finally:
        AttentionInterface.register("sdpa", registered)


def test_a_model_may_be_copied_while_a_thread_is_inside():
    model = attending("eager")
    before = plain(model)
    with ExitStack() as stack:
        stack.enter_context(knorm.attention(model))
        twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    assert torch.equal(plain(twin), before)
