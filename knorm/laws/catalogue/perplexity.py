"""The token NLLs of a compressed run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache

from knorm.laws import oracle
from knorm.laws.model import apart, feed, keeps_all, small_model, steps
from knorm.laws.oracle import Rules, nll_of
from knorm.laws.registry import Malformed, Refuted, Silent, Vacuous, check
from knorm.laws.strategies import Text, distinct
from knorm.laws.subjects import CompressingCache, Subject

EQUAL = 1e-4  # nats, as perplexity's, but the laws' own: what they judge does not set their tolerance


def _loop(text: Text, cache: TransformersCache) -> Tensor:
    ids = text.input_ids
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    model = small_model(str(ids.device))
    return nll_of(feed(model, ids, cache, steps(text.prompt, ids.shape[1], 1), position_ids=positions), ids)


def _nll(subject: Subject, text: Text, keep_ratio: float) -> Tensor:
    if subject.evaluate is None:
        cache = subject.cache(keep_ratio, small_model(str(text.input_ids.device)), rows=len(text.input_ids))
        nll = _loop(text, cache)
        if keep_ratio == 1 and not (subject.budgeted or keeps_all(cache, text.input_ids.shape[1])):
            raise Silent  # a budget of its own, which no ratio lifts
        return nll
    subject.announce(f"{text}")
    nll = subject.evaluate(small_model(str(text.input_ids.device)), text.input_ids, text.prompt, keep_ratio)
    if not isinstance(nll, Tensor):
        raise Malformed(f"shape: returned {type(nll).__name__}, but should return the NLL of each token, a tensor")
    return nll


def _compare(got: Tensor, should: Tensor, prompt: int, what: str) -> None:
    if got.shape != should.shape:
        raise Refuted(f"{what}: {list(got.shape)} NLLs, but should be {list(should.shape)}")
    difference = apart(got[:, prompt - 1 :], should[:, prompt - 1 :])
    if difference.max() > EQUAL:
        row, at = (difference == difference.max()).nonzero()[0].tolist()
        at += prompt - 1
        raise Refuted(
            f"{what}: the NLL of token {at + 1} of row {row} is {got[row, at]:.5f}, but should be {should[row, at]:.5f}"
        )
    if got[:, prompt - 1 :].isnan().any():
        raise Vacuous("both runs predict NaN")


@check("nll", needs={"ragged": False})
def check_full_ratio_plain(subject: Subject, text: Text) -> None:
    """At ratio 1 each token has the uncompressed model's NLL."""
    with torch.no_grad():
        logits = small_model(str(text.input_ids.device))(text.input_ids, use_cache=False).logits
    _compare(_nll(subject, text, 1.0), nll_of(logits, text.input_ids), text.prompt, "full ratio, plain model")


@check("nll", needs={"scores": "key_norm", "rounding": "ceil", "merges_values": False, "ragged": False})
def check_one_pass(subject: Subject, text: Text) -> None:
    """The run's NLLs, token by token, are those of one pass under the schedule of its key norms."""
    traits, model = subject.traits, small_model(str(text.input_ids.device))
    text = replace(text, input_ids=distinct(text.input_ids))  # alike tokens have one norm: either may go
    protected = traits.protect_first, traits.protect_recent
    calls = steps(text.prompt, text.input_ids.shape[1], 1)

    def expected(rules: Rules) -> Tensor:
        return nll_of(oracle.run(model, text.input_ids, rules, calls).logits, text.input_ids)

    exact = expected(Rules(text.keep_ratio, traits.prune_after, traits.skip_layers, *protected))
    _compare(_nll(subject, text, text.keep_ratio), exact, text.prompt, "one pass")
    if subject.compress is not None and subject.make_cache is None and not traits.skip_layers:
        start = max(4, traits.prune_after, traits.protected + 1)
        if not traits.affords(start, text.keep_ratio):
            return
        exact = expected(Rules(text.keep_ratio, start, traits.skip_layers, *protected, protocol="streaming"))
        loop = _loop(text, CompressingCache(subject, text.keep_ratio, streaming_from=start))
        _compare(loop, exact, text.prompt, "one pass, streaming")


@check("evaluator")
def check_same_tokens(subject: Subject, text: Text) -> None:
    """The same tokens are scored at every ratio."""
    scored = {ratio: _nll(subject, text, ratio).isfinite().sum(-1).tolist() for ratio in (1.0, text.keep_ratio)}
    full, compressed = scored.values()
    if full != compressed:
        raise Refuted(
            f"same tokens: {full} tokens of each row are scored at ratio 1, but {compressed} at {text.keep_ratio}: "
            "their means say nothing of one another"
        )
