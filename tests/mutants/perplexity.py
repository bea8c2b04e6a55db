from __future__ import annotations

import torch
from torch.nn import functional

from knorm import Policy, stream_nll
from mutants import mutant


def plain_nll(model, input_ids):
    with torch.no_grad():
        logits = model(input_ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")


@mutant(
    "one_pass", "but should be", "a public report on a KV plug-in whose perplexity looked perfect",
    surface="evaluate", scores="key_norm", rounding="ceil",
)  # fmt: skip
def compressed_cache_never_used(model, input_ids, prompt_length, keep_ratio):
    """The cache is compressed, and the model never reads it."""
    return plain_nll(model, input_ids)


@mutant("one_pass", "but should be", surface="evaluate", scores="key_norm", rounding="ceil")
def first_layer_left_out(model, input_ids, prompt_length, keep_ratio):
    """Layer 0 is skipped, and nobody is told."""
    return stream_nll(model, input_ids, Policy(keep_ratio, skip_layers=(0,)), prompt_length=prompt_length)


@mutant("full_ratio_plain", "but should be", surface="evaluate")
def scored_by_its_own_logits(model, input_ids, prompt_length, keep_ratio):
    """Labels are not shifted: each token is scored by the logits after it."""
    with torch.no_grad():
        logits = model(input_ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, 1:].transpose(1, 2), input_ids[:, 1:], reduction="none")


@mutant("same_tokens", "are scored at ratio 1", "baselines over another token count", surface="evaluate")
def prompt_scored_at_ratio_1_only(model, input_ids, prompt_length, keep_ratio):
    """The baseline is scored from the first token on, a compressed run after its prompt."""
    nll = stream_nll(model, input_ids, Policy(keep_ratio), prompt_length=prompt_length)
    if keep_ratio < 1:
        nll[:, : prompt_length - 1] = torch.nan
    return nll


@mutant("same_tokens", "are scored at ratio 1", "a baseline over 512 tokens, runs over 256", surface="evaluate")
def baseline_over_more_tokens(model, input_ids, prompt_length, keep_ratio):
    """A plain pass reads the whole text, a compressed run all but its last token."""
    if keep_ratio == 1:
        return plain_nll(model, input_ids)
    return stream_nll(model, input_ids[:, :-1], Policy(keep_ratio), prompt_length=prompt_length)
