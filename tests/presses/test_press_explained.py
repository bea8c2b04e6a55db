"""What the queries of kvpress' presses see is recovered: evicting, masking, renumbering, merging, acting again."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny, tokens

from knorm.bench.latency import Prompt
from knorm.bench.methods import MethodArm
from knorm.evaluation.explain_methods import explain_method
from knorm.evaluation.ways import Ways
from knorm.evaluation.windows import Windows
from knorm.methods.door import method

pytest.importorskip("kvpress", reason="kvpress is not installed: run tox -e kvpress")

PROMPT, LENGTH = 80, 100


class Numbered:
    """A tokenizer of bare numbers."""

    def decode(self, ids):
        return " ".join(map(str, torch.as_tensor(ids).flatten().tolist()))


@pytest.fixture(scope="module")
def ways():
    model = tiny("llama", hidden_size=256, num_hidden_layers=3, head_dim=64)
    return Ways(model, Windows(tokens(2, LENGTH)), PROMPT, tokenizer=Numbered())


@pytest.mark.parametrize(
    ("expression", "acts", "recovered", "rest"),
    [
        ("KnormPress(0.5)", "evicts", "40 of its 80 tokens are seen, by layer and head", None),
        ("AdaKVPress(KnormPress(0.5))", "evicts", "of its 80 tokens are seen, by layer and head", None),
        ("PyramidKVPress(0.5, window_size=8)", "evicts", "of its 80 tokens are seen, by layer and head", None),
        (
            "KeyRerotationPress(KnormPress(0.5))",
            "evicts",
            "40 of its 80 tokens are seen, by layer and head",
            "positions",
        ),
        ("MergingPress(KnormPress(0.5))", "evicts", "40 of its 80 tokens are seen, by layer and head", "content"),
        (
            "DecodingPress(KnormPress(), compression_interval=4, target_size=40)",
            "evicts",
            "; the last query sees",
            None,
        ),
        ("ThinKPress(key_channel_compression_ratio=0.5)", "changes", "changed: keys", "keys"),
    ],
)
def test_a_press_is_explained(ways, expression, acts, recovered, rest):
    found = explain_method(ways, method(f"kvpress:{expression}"))
    assert found.acts == acts
    assert found.seen.endswith(recovered) or recovered in found.seen
    kinds = [effect.kind for effect in found.explanation.effects]
    if acts == "evicts":
        assert {"order", "recency", "sinks", "choice", "layers"} <= {*kinds}
        remedies = [effect for effect in found.explanation.effects if effect.kind in ("content", "positions")]
        assert [e.kind for e in remedies if e.recovered is not None] == ([rest] if rest else [])
        assert next(effect for effect in found.explanation.effects if effect.kind == "order").is_rounding
    else:
        assert found.explanation.verdict[0].startswith(f"The {rest} cost most: ")


def test_a_press_that_reads_the_prompt_by_itself_says_so(ways):
    with pytest.raises(ValueError, match="cannot be recovered: it reads the prompt by an attention of its own"):
        explain_method(ways, method("kvpress:KVComposePress", keep_ratio=0.5))
    assert ways.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "expression",
    ["AdaKVPress(KnormPress(0.5))", "DecodingPress(KnormPress(), compression_interval=2, target_size=40)"],
)
def test_a_press_is_an_arm_that_leaves_nothing_on_the_model_between_turns(ways, expression):
    model = ways.model
    arm = MethodArm(model, [Prompt(tokens(1, PROMPT), 9)], method(f"kvpress:{expression}"), None)
    arm.prompt(0)
    assert any(hasattr(m, "masked_key_indices") or m._forward_hooks for m in model.modules()), "while it is open"
    arm.generation(0)
    assert not any(getattr(m, "masked_key_indices", None) or m._forward_hooks for m in model.modules())
    if expression.startswith("Decoding"):
        assert max(arm.stored().retained) <= 42, "it acts while decoding"
