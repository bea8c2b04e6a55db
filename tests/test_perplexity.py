from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, VOCABULARY, tiny, tokens
from torch.nn import functional

from knorm import Policy, exact_nll, masked_attention, perplexity, stream_nll
from knorm.core import squared_norms
from knorm.evaluation.windows import cut_windows
from knorm.models import load_text
from knorm.perplexity import agreement, exact_run, parting_gap, stream_run
from knorm.schedule import evicted_at

POLICIES = {
    "streaming": (Policy(0.5, prune_after=8, protocol="streaming", skip_layers=(0,)), 1),
    "protected": (Policy(0.6, prune_after=10, protocol="streaming", protect_first=1, protect_recent=3), 20),
    "prefill": (Policy(0.3, protect_recent=2), 40),
    "highest": (Policy(0.7, prune_after=8, protocol="streaming", score="high_norm"), 5),
    "random": (Policy(0.7, prune_after=4, protocol="streaming", score="random", seed=3), 1),
}


def left_padded(ids: torch.Tensor, *pads: int) -> torch.Tensor:
    return (torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]).long()


@pytest.mark.cpus
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_one_pass_equals_the_loop(kind, policy, padded):
    model, ids = tiny(kind), tokens(3, 60)
    model.set_attn_implementation("eager" if padded else "sdpa")
    mask = left_padded(ids, 0, 5, 31) if padded else None
    policy, prompt = POLICIES[policy]
    both = agreement(model, ids, policy, prompt_length=prompt, attention_mask=mask)
    assert both.difference <= 1e-4
    assert both.gap <= 2**-20
    assert any((lost < 60).any() for lost in both.exact.evicted_at), "something was evicted"


@pytest.mark.cpus
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_in_float64_one_pass_equals_the_loop_to_rounding(kind):
    model, ids = tiny(kind, torch.float64), tokens(2, 60, seed=1)
    policy, prompt = POLICIES["protected"]
    both = agreement(model, ids, policy, prompt_length=prompt)
    assert both.difference <= 1e-6, "results are float32"
    assert both.gap <= 1e-12


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from(["0.9", "0.5", "0.1"]), st.integers(2, 40), st.integers(1, 59))
def test_one_pass_equals_the_loop_whatever_the_policy(seed, ratio, prune_after, prompt):
    model, ids = tiny("llama", seed=seed), tokens(1, 60, seed)
    assert agreement(model, ids, Policy(ratio, prune_after, protocol="streaming"), prompt_length=prompt).holds


@pytest.mark.cpus
@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("padded", [False, True])
def test_ratio_1_equals_the_plain_model(kind, padded):
    model, ids = tiny(kind), tokens(2, 50)
    mask = left_padded(ids, 0, 17)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask if padded else None, position_ids=positions if padded else None).logits
    plain = functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    nll = exact_nll(model, ids, Policy(), attention_mask=mask if padded else None)
    real = mask[:, :-1].bool() if padded else torch.ones_like(nll, dtype=torch.bool)
    assert torch.equal(nll.isnan(), ~real)
    assert (nll - plain)[real].abs().max() <= 2e-5


@pytest.mark.cpus
def test_each_padded_row_equals_itself_alone():
    model, ids = tiny("qwen2"), tokens(3, 40)
    pads = (0, 9, 23)
    policy = Policy(0.5, prune_after=8, protocol="streaming", score="random", seed=1)
    for nll in (exact_nll, stream_nll):
        together = nll(model, ids, policy, prompt_length=12, attention_mask=left_padded(ids, *pads))
        for row, n in enumerate(pads):
            alone = nll(model, ids[row : row + 1, n:], policy, prompt_length=max(1, 12 - n))
            assert torch.allclose(together[row, n:], alone[0], atol=2e-5)
            assert together[row, :n].isnan().all()


def oracle(model, ids, policy, prompt):
    """NLL in float64 by masks written out: every layer's attention weights set to zero where the schedule says so."""
    length = ids.shape[1]
    query, key = torch.arange(length)[:, None], torch.arange(length)

    def attend(module, q, k, v, _, scaling, **__):
        lost = evicted_at(squared_norms(k), policy, prompt)
        if module.layer_idx in policy.skip_layers:
            lost = torch.full_like(lost, length)
        seen = ((key <= query) & (query < lost[:, :, None, :])).repeat_interleave(q.shape[1] // k.shape[1], 1)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        weights = (q @ k.mT * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2), None

    with perplexity.attention_through(model, attend), torch.no_grad():
        logits = model(ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("block", [7, 512])
def test_blocks_of_queries_equal_the_dense_mask_in_float64(kind, block, monkeypatch):
    monkeypatch.setitem(masked_attention._QUERIES, "cpu", block)
    monkeypatch.setattr(perplexity, "_LOGITS", 11 * VOCABULARY)
    model, ids = tiny(kind, torch.float64), tokens(2, 60)
    for policy, prompt in (POLICIES["streaming"], POLICIES["prefill"]):
        assert torch.allclose(
            exact_nll(model, ids, policy, prompt_length=prompt).double(), oracle(model, ids, policy, prompt), atol=1e-6
        )


@pytest.mark.cpus
def test_blocks_of_queries_hold_for_padded_rows_too(monkeypatch):
    model, ids = tiny("llama"), tokens(3, 60)
    policy, prompt = POLICIES["protected"]
    options = {"prompt_length": prompt, "attention_mask": left_padded(ids, 0, 8, 40)}
    whole = exact_nll(model, ids, policy, **options)
    monkeypatch.setitem(masked_attention._QUERIES, "cpu", 9)
    assert torch.allclose(whole, exact_nll(model, ids, policy, **options), atol=2e-5, equal_nan=True)


def test_a_schedule_overrides_the_policy():
    model, ids = tiny("llama"), tokens(1, 30)
    window = lambda layer, keys: (torch.arange(30) + 4).clamp(max=30).expand(keys.shape[:3]).contiguous()  # noqa: E731
    run = exact_run(model, ids, Policy(), schedule=window)
    assert all((lost[..., :-4] == torch.arange(4, 30)).all() for lost in run.evicted_at)
    assert (run.nll[:, 4:] - exact_nll(model, ids, Policy())[:, 4:]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="schedule returned"):
        exact_nll(model, ids, Policy(), schedule=lambda layer, keys: torch.zeros(3))
    with pytest.raises(ValueError, match="evicted a token before its own query"):
        exact_nll(model, ids, Policy(), schedule=lambda layer, keys: torch.zeros(keys.shape[:3], dtype=torch.int64))


def test_the_loops_record_is_its_schedule():
    model, ids = tiny("gpt_neox"), tokens(2, 40)
    policy, prompt = POLICIES["streaming"]
    run = stream_run(model, ids, policy, prompt_length=prompt)
    assert (run.evicted_at[0] == 40).all(), "layer 0 is skipped"
    assert (run.evicted_at[1] < 40).any()


@pytest.mark.cpus
def test_in_half_precision_evictions_that_differ_are_counted():
    model, ids = tiny("llama", torch.bfloat16), tokens(2, 60)
    both = agreement(model, ids, Policy(0.5, prune_after=8, protocol="streaming"))
    assert both.evictions >= 0
    assert both.exact.nll.dtype == torch.float32
    assert both.difference < 1


@pytest.mark.cpus
def test_on_the_embedded_model_and_real_text(embedded):
    model, tokenizer = embedded
    ids = cut_windows(tokenizer, load_text("encyclopedia"), 160, 2).input_ids
    for policy, prompt in ((Policy(0.7, prune_after=32, protocol="streaming"), 1), (Policy(0.5), 64)):
        both = agreement(model, ids, policy, prompt_length=prompt)
        assert both.holds, both
    assert torch.equal(both.exact.correct, both.stream.correct)


PADDED = {"attention_mask": left_padded(tokens(2, 24), 6, 0)}
SHORT_STREAM = Policy(0.5, prune_after=6, protocol="streaming")


def test_not_a_number_is_no_agreement():
    model, ids = tiny("llama"), tokens(2, 24)
    model.lm_head.weight.data[:] = torch.nan
    assert not agreement(model, ids, SHORT_STREAM).holds
    assert not agreement(model, ids, SHORT_STREAM, **PADDED).holds


def test_a_schedule_of_ones_own_leaves_padding_unseen():
    model, ids = tiny("llama"), tokens(2, 24)
    never = exact_nll(model, ids, Policy(), schedule=lambda _, keys: torch.full(keys.shape[:3], 24), **PADDED)
    assert torch.allclose(never, exact_nll(model, ids, Policy(), **PADDED), atol=2e-5, equal_nan=True)


def test_what_pads_hold_spoils_nothing():
    model, ids = tiny("llama"), tokens(2, 24).clamp(min=1)
    clean = exact_nll(model, ids, SHORT_STREAM, **PADDED)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = torch.nan
    for pad in (0, -100):
        ids[0, :6] = pad
        for nll in (exact_nll, stream_nll):
            assert torch.allclose(nll(model, ids, SHORT_STREAM, **PADDED), clean, atol=2e-5, equal_nan=True)


def test_what_is_likeliest_counts_as_right():
    model, ids = tiny("llama"), tokens(2, 30)
    with torch.no_grad():
        likeliest = model(ids).logits.argmax(-1)[:, :-1]
    ids[:, 1::2] = likeliest[:, ::2]  # a few that are right, as far as what stands before them stays
    with torch.no_grad():
        right = model(ids).logits.argmax(-1)[:, :-1] == ids[:, 1:]
    assert right.any()
    assert torch.equal(exact_run(model, ids, Policy()).correct, right)


def test_a_model_in_half_precision_is_scored_in_float32():
    nll = exact_nll(tiny("llama", torch.bfloat16), tokens(2, 30), Policy())
    assert nll.dtype == torch.float32
    assert not torch.equal(nll, nll.bfloat16().float()), "finer than the model's own numbers"


def test_the_gap_is_the_widest_where_rows_first_part():
    never, parted = torch.full((2, 1, 4), 4), torch.full((2, 1, 4), 4)
    ours, theirs = parted.clone(), parted.clone()
    ours[0, 0, 0] = theirs[0, 0, 1] = 2  # row 0: norms 4 and 3; row 1: 10 and 9
    ours[1, 0, 0] = theirs[1, 0, 1] = 3
    norms = torch.tensor([[[4.0, 3, 1, 1]], [[10.0, 9, 1, 1]]])
    for order in ((0, 1), (1, 0)):
        layers = [(ours, theirs, norms), (never, never, norms)]
        assert parting_gap(*zip(*(layers[i] for i in order), strict=True)) == 0.25


def test_a_models_own_return_dict_does_not_matter():
    model, ids = tiny("llama"), tokens(1, 20)
    should = exact_nll(model, ids, SHORT_STREAM)
    model.config.return_dict = False
    assert torch.equal(exact_nll(model, ids, SHORT_STREAM), should)
    assert agreement(model, ids, SHORT_STREAM).holds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_ids": torch.arange(24)}, r"position_ids \[24\] torch.int64, but should be int64 \[2, 24\]"),
        ({"position_ids": torch.zeros(2, 1, dtype=torch.int64)}, r"position_ids \[2, 1\]"),
        ({"position_ids": torch.zeros(2, 24)}, "should be int64"),
        ({"position_ids": torch.arange(24).expand(2, 24) + 200}, r"from 200 to 223, but .* positions 0 to 127"),
        ({"schedule": lambda *_: None}, "schedule returned NoneType"),
        ({"schedule": lambda _, keys: torch.full(keys.shape[:3], 29)}, "up to 29, but should be at most T=24"),
        ({"attention_mask": [[1] * 24] * 2}, "attention_mask list"),
        (
            {"attention_mask": torch.ones(2, 24, dtype=torch.complex64)},
            "attention_mask torch.complex64, but should be 0",
        ),
        ({"attention_mask": -torch.ones(2, 24)}, "has other numbers than 0, for padding, and 1"),
        ({"attention_mask": torch.full((2, 24), torch.nan)}, "has other numbers than 0, for padding, and 1"),
        ({"position_ids": [list(range(24))] * 2}, "position_ids list, but should be"),
        ({"position_ids": torch.ones(2, 24, dtype=torch.bool)}, "torch.bool, but should be int64"),
        ({"schedule": 3}, "schedule=3, but should be a function"),
        ({"prompt_length": "3"}, "prompt_length='3', but should be an integer"),
        ({"policy": Policy(0.5), "prompt_length": 7, **PADDED}, "fewer than two tokens of its prompt are left"),
    ],
)
def test_what_was_once_taken_in_silence_is_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        exact_nll(tiny("llama"), tokens(2, 24), **{"policy": SHORT_STREAM, **options})


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (tokens(1, 1), {}, "a text needs at least two tokens"),
        (tokens(0, 9), {}, "a text needs at least two tokens"),
        (tokens(1, 9)[0], {}, r"input_ids \[9\] torch.int64, but should be int64 \[batch, tokens\]"),
        (tokens(1, 9).float(), {}, "torch.float32, but should be int64"),
        (tokens(1, 129), {}, "129 tokens, but LlamaForCausalLM has 128 positions"),
        (torch.tensor([[1, VOCABULARY]]), {}, "token id 97, but the vocabulary has ids 0 to 96"),
        (torch.tensor([[1, -2]]), {}, "token id -2"),
        (tokens(1, 9), {"prompt_length": 0}, "prompt_length=0, but should be between 1 and the 9 tokens"),
        (tokens(1, 9), {"prompt_length": 10}, "prompt_length=10"),
        (tokens(1, 9), {"policy": Policy(0.5)}, "protocol='prefill' compresses once, after the prompt"),
        (
            tokens(1, 9),
            {"policy": Policy(1.0, skip_layers=(3,))},
            r"skip_layers=\(3,\), but the model has layers 0 to 2",
        ),
        (tokens(1, 9), {"attention_mask": torch.ones(1, 8)}, r"attention_mask \[1, 8\], but should be \[1, 9\]"),
        (tokens(1, 3), {"attention_mask": torch.tensor([[1, 1, 0]])}, "pad on the left"),
        (tokens(1, 3), {"attention_mask": torch.tensor([[0, 0, 1]])}, "fewer than two tokens"),
    ],
)
@pytest.mark.parametrize("nll", [exact_nll, stream_nll])
def test_bad_input_is_refused(nll, ids, options, message):
    with pytest.raises(ValueError, match=message):
        nll(tiny("llama"), ids, **{"policy": Policy(), **options})


def test_a_prefill_whose_protections_exceed_its_budget_raises_and_the_model_is_as_before():
    model = tiny("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"need 9 tokens, but keep_ratio=0\.5 retains 5 of 10"):
        exact_nll(model, tokens(1, 20), Policy(0.5, protect_recent=9), prompt_length=10)
    assert model.config._attn_implementation == "eager"


def test_a_policy_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"policy=0.5, but should be a knorm.Policy"):
        exact_nll(tiny("llama"), tokens(1, 9), 0.5)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("gpt2", {}, "'gpt2' is not one of gpt_neox, llama, mistral, qwen2, qwen3"),
        ("gemma2", {"head_dim": 16, "num_key_value_heads": 2}, "'gemma2' is not one of"),
        ("mistral", {"sliding_window": 16}, "sliding window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding window"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
    ],
)
def test_models_that_cannot_be_evaluated_exactly_are_refused_with_the_reason(kind, options, reason):
    with pytest.raises(ValueError, match=f"cannot be evaluated exactly: .*{reason}"):
        exact_nll(tiny(kind, **options), tokens(1, 9), Policy())


def test_what_is_no_model_or_has_no_weights_is_refused():
    with pytest.raises(TypeError, match="model NoneType, but should be a model of transformers"):
        exact_nll(None, tokens(1, 9), SHORT_STREAM)
    with pytest.raises(ValueError, match="its weights are on the device 'meta'"):
        exact_nll(tiny("llama").to("meta"), tokens(1, 9), SHORT_STREAM)


def test_training_mode_is_refused_wherever_it_is():
    model = tiny("llama")
    model.model.layers[1].train()
    for training in (tiny("llama").train(), model):
        with pytest.raises(ValueError, match=r"in training mode: call model.eval\(\)"):
            exact_nll(training, tokens(1, 9), Policy())


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="no language-model head"):
        exact_nll(tiny("llama").model, tokens(1, 9), Policy())


@pytest.mark.parametrize("nll", [exact_nll, stream_nll])
def test_autocast_is_refused_by_the_one_pass_and_by_the_loop(nll):
    model, ids = tiny("llama"), tokens(2, 24)
    should = nll(model, ids, SHORT_STREAM)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r"torch\.autocast computes in bfloat16 .* weights' dtype, float32"):
            nll(model, ids, SHORT_STREAM)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(nll(model, ids, SHORT_STREAM), should)
