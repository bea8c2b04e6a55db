"""Methods on a CUDA device: the same damage as on the CPU, and little memory for long texts."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny, tokens

import knorm
from knorm.evaluation.ways import Ways
from knorm.evaluation.windows import Windows
from knorm.methods.door import method
from knorm.models import random_gpt_neox

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: on a machine with one, run tox -e gpu"),
]


def newest(keys, values, keep_ratio):
    count = int(keys.shape[2] * keep_ratio)
    return keys[:, :, -count:], values[:, :, -count:]


@pytest.mark.parametrize("how", ["two calls", "loop"])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_a_method_costs_on_cuda_what_it_costs_on_a_cpu(kind, how):
    model, ids, chosen = tiny(kind), tokens(2, 64), method(newest, keep_ratio=0.5)
    here = knorm.evaluate(model, ids, chosen, prompt_length=40, how=how, batch=2)
    there = knorm.evaluate(model.cuda(), ids, chosen, prompt_length=40, how=how, batch=2)
    assert (here.per_token.nll - there.per_token.nll).abs().max() <= 1e-3
    assert torch.equal(here.tokens_seen, there.tokens_seen)
    assert here.bytes_stored == there.bytes_stored


def test_two_calls_are_believed_in_half_precision():
    model = tiny("llama", torch.bfloat16).cuda()
    found = knorm.evaluate(model, tokens(2, 64), method(newest, keep_ratio=0.5), prompt_length=40, batch=2)
    assert found.how == "two calls"


def test_a_text_of_32768_tokens_takes_at_most_2_gib_beyond_model_and_caches():
    model = random_gpt_neox(32768).to("cuda", torch.bfloat16)
    ids = torch.randint(0, 50304, (1, 32768), generator=torch.Generator().manual_seed(0))
    cache = 2 * 6 * 32768 * 512 * 2
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = Ways(model, Windows(ids), 16384).evaluate(method(newest, keep_ratio=0.5), "two calls")
    extra = torch.cuda.max_memory_allocated() - before - cache
    assert found.damage.tokens == 16384
    assert extra <= 2 * 2**30, f"{extra / 2**30:.2f} GiB"
