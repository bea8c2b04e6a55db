"""The kinds of target that laws are about, and how each is called; needs no PyTorch."""

from __future__ import annotations

from knorm.methods import kinds

CALLED_AS = {kind: called for kind, called in kinds.CALLED_AS.items() if kind != "policy"} | {
    "function": "(keys, values, keep_ratio)",
    "cache": "(keep_ratio), for a transformers cache",
    "evaluator": "(model, input_ids, keep_ratio, prompt_length)",
}
KINDS = tuple(CALLED_AS)
