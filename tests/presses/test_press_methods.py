"""Presses of kvpress as methods: each that needs no foreign weights runs, acts, and equals a loop written apart."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny, tokens
from transformers import DynamicCache

import knorm
from knorm.methods.budget import NeedsBudget
from knorm.methods.door import method
from knorm.methods.known import PRESSES, WEIGHTS
from knorm.methods.method import MethodError
from knorm.methods.targets import expanded

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed: run tox -e kvpress")

PROMPT, LENGTH = 80, 100
IDS = tokens(1, LENGTH)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", hidden_size=256, num_hidden_layers=3, head_dim=64)


def nll_of_loop(model, press, *, while_decoding=False, positions=None):
    """The prompt inside `with press(model)`, as kvpress' own pipeline has it, then single tokens."""
    cache, keyword = DynamicCache(), "past_key_values"
    with torch.no_grad():
        if while_decoding:
            first = model(input_ids=IDS[:, :PROMPT], **{keyword: cache}).logits
        else:
            with press(model):
                first = model(input_ids=IDS[:, :PROMPT], **{keyword: cache}).logits
        parts, start = [first[:, -1:]], cache.get_seq_length() if positions else PROMPT
        opened = press(model) if while_decoding else torch.no_grad()
        with opened:
            for at in range(PROMPT, LENGTH - 1):
                place = torch.tensor([[start + at - PROMPT]])
                parts.append(model(input_ids=IDS[:, at : at + 1], position_ids=place, **{keyword: cache}).logits)
    logits = torch.cat(parts, 1).double()
    for module in model.modules():
        if getattr(module, "masked_key_indices", None) is not None:
            module.masked_key_indices = None
    return -logits.log_softmax(-1).gather(-1, IDS[:, PROMPT:, None])[..., 0]


@pytest.mark.parametrize(
    ("expression", "options"),
    [
        ("KnormPress(0.5)", {}),
        ("SnapKVPress(0.5, window_size=16)", {}),
        ("ExpectedAttentionPress(0.5)", {}),
        ("AdaKVPress(KnormPress(0.5))", {}),
        ("KeyRerotationPress(KnormPress(0.5))", {"positions": True}),
        ("PyramidKVPress(0.5, window_size=8)", {}),
        ("DecodingPress(KnormPress(), compression_interval=4, target_size=40)", {"while_decoding": True}),
    ],
)
def test_a_press_equals_a_loop_written_apart(model, expression, options):
    expected = nll_of_loop(model, eval(expression, vars(kvpress)), **options)
    found = knorm.evaluate(model, IDS, method(f"kvpress:{expression}"), prompt_length=PROMPT)
    assert (found.per_token.nll - expected).abs().max() <= 1e-4
    assert found.how == ("loop" if options.get("while_decoding") else "two calls")
    assert found.changed


RUNNABLE = [spec for spec in expanded("kvpress:*") if not any(name in spec for name in WEIGHTS)]
TEXT = {"FinchPress", "KVzipPress", "KVgradPress"}  # these read a tokenizer: test_presses_that_read_text
SHORTER = {  # for a prompt of 80 tokens
    "target_size=128": "target_size=40",
    "[0.4, 0.5, 0.6, 0.5, 0.5, 0.5, 0.5]": "[0.4, 0.5, 0.6]",
    "lazy_threshold=0.5, n_recent=64": "lazy_threshold=0.1, n_recent=8",
    "SnapKVPress()": "SnapKVPress(window_size=16)",
    "SnapKVPress(0.3)": "SnapKVPress(0.3, window_size=16)",
    "kvpress:SnapKVPress": "kvpress:SnapKVPress(window_size=16)",
    "kvpress:PyramidKVPress": "kvpress:PyramidKVPress(window_size=16)",
}


@pytest.mark.parametrize("spec", [spec for spec in RUNNABLE if not any(name in spec for name in TEXT)])
def test_every_press_that_needs_no_foreign_weights_runs_and_acts(spec):
    model = tiny("llama", hidden_size=256, num_hidden_layers=3, head_dim=64)
    for long, short in SHORTER.items():
        spec = spec.replace(long, short) if spec.endswith(long) or not long.startswith("kvpress:") else spec
    try:
        chosen = method(spec)
    except NeedsBudget:
        chosen = method(spec, keep_ratio=0.5)
    found = knorm.evaluate(model, IDS, chosen, prompt_length=PROMPT)
    assert found.changed, found.check
    assert found.damage.kl > 1e-3
    assert not [m for m in model.modules() if m._forward_hooks or getattr(m, "masked_key_indices", None)]
    assert not hasattr(model.model.layers[0].self_attn, "rotary_emb")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["QFilterPress", "FastKVzipPress", "LUKVPress", "DuoAttentionPress"])
def test_a_press_that_needs_weights_says_which_and_from_where(model, name):
    options = {} if name == "DuoAttentionPress" else {"keep_ratio": 0.5}
    with pytest.raises(MethodError, match=f"kvpress:{name} reads ") as raised:
        knorm.evaluate(model, IDS, method(f"kvpress:{name}", **options), prompt_length=PROMPT)
    assert WEIGHTS[name] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_budgets_of_presses():
    assert method("kvpress:KnormPress", keep_ratio="0.3").press.compression_ratio == 0
    for wrong, words in (
        (lambda: method("kvpress:KnormPress"), "removes nothing, at compression_ratio 0"),
        (lambda: method("kvpress:AdaKVPress", keep_ratio=0.5), r"write it with one, as AdaKVPress\(KnormPress\(\)\)"),
        (lambda: method("kvpress:ThinKPress", keep_ratio=0.5), "takes no compression_ratio"),
        (lambda: method(f"kvpress:{PRESSES['DecodingPress']}", keep_ratio=0.5), "give keep_tokens, not keep_ratio"),
        (lambda: method("kvpress:KnormPres"), "has no 'KnormPres'; it has KnormPress"),
        (lambda: method("kvpress:KnormPress(1.5)"), "KnormPress refused: Compression ratio must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()


@pytest.mark.parametrize("kept", [1, 17, 40, 79])
def test_a_budget_in_tokens_is_kept_exactly(model, kept):
    found = knorm.evaluate(model, IDS, method("kvpress:KnormPress", keep_tokens=kept), prompt_length=PROMPT)
    assert found.tokens_seen.unique().tolist() == [kept + 10.0]


def test_masked_heads_are_hidden_from_more_queries_than_fake_keys_can_be(model):
    ids = tokens(1, 300)
    found = knorm.evaluate(model, ids[:, :128], method("kvpress:AdaKVPress(KnormPress(0.5))"), prompt_length=40)
    assert found.how == "two calls"
    assert found.bytes_stored == pytest.approx(found.bytes_full)
    assert float(found.tokens_seen.mean()) == pytest.approx(20 + 44, abs=1)
