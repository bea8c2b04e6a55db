"""What `knorm verify` asks of attention inside a model, and of runs that must be refused.

As in own.py, each check_<claim> returns the evidence and raises Refuted; its first line is the claim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from knorm.laws import oracle
from knorm.laws.model import gap, small_model
from knorm.laws.oracle import Rules
from knorm.laws.own import must_raise
from knorm.laws.registry import Refuted
from knorm.model_attention import attention, cache_keyword
from knorm.perplexity import exact_run
from knorm.policy import Policy

# Eager attention takes its softmax in float32; in float64, transformers' own mask of a pad becomes infinite there.
CLOSE = {"sdpa": 1e-8, "eager": 1e-4}
LEADS = (0, 5)


def _inputs() -> tuple[Tensor, Tensor]:
    ids, mask = torch.arange(1, 41).view(2, 20), torch.ones(2, 20, dtype=torch.int64)
    for row, lead in enumerate(LEADS):
        mask[row, :lead] = 0
    return ids, mask


@torch.no_grad()
def _logits(model: PreTrainedModel, cache: DynamicCache | None = None) -> Tensor:
    """Feed a padded batch to a model as transformers' users do: [2, 20, vocabulary]."""
    ids, mask = _inputs()
    options: dict[str, Any] = {"use_cache": False} if cache is None else {cache_keyword(model): cache}
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits: Tensor = model(ids, attention_mask=mask, position_ids=places, **options).logits
    return logits


def check_contexts() -> str:
    """attention(model) changes no call without a KnormCache, no run and no other thread, and ends where it ends."""
    widest, ids = 0.0, _inputs()[0]
    for implementation, close in CLOSE.items():
        model = copy.deepcopy(small_model("cpu"))
        model = model.float() if implementation == "eager" else model.double()
        model.set_attn_implementation(implementation)
        truth = [
            oracle.run(model, ids[row : row + 1, lead:], Rules(), [20 - lead]).logits[0]
            for row, lead in enumerate(LEADS)
        ]

        def compare(logits: Tensor, where: str, truth: list[Tensor] = truth, close: float = close) -> float:
            difference = max(gap(logits[row, lead:], truth[row]) for row, lead in enumerate(LEADS))
            if difference > close:
                raise Refuted(f"{where}: logits of a padded batch are off by {difference:.3g} from those of its rows")
            return difference

        with attention(model), ThreadPoolExecutor(1) as thread:
            calls: dict[str, Callable[[], Tensor]] = {
                "a call without a cache": lambda model=model: _logits(model),  # type: ignore[misc]
                "a DynamicCache": lambda model=model: _logits(model, DynamicCache()),  # type: ignore[misc]
                "another thread": lambda model=model: thread.submit(_logits, model).result(),  # type: ignore[misc]
            }
            for what, call in calls.items():
                widest = max(widest, compare(call(), f"{what} inside attention(), {implementation}"))
            _check_run(model)
        widest = max(widest, compare(_logits(model), f"after attention(), {implementation}"))
        if model.config._attn_implementation != implementation:
            raise Refuted(f"after attention() the model attends by {model.config._attn_implementation!r}")
    return f"largest difference of a logit {widest:.1e}"


def _check_run(model: PreTrainedModel) -> None:
    rules, ids = Rules(0.5, 6, (1,), protocol="streaming"), _inputs()[0]
    truth = oracle.nll_of(oracle.run(model, ids, rules, [1] * 20).logits, ids)
    difference = gap(exact_run(model, ids, rules.policy()).nll.double(), truth)
    if difference > 1e-4:
        raise Refuted(f"one pass inside attention(): a token's NLL is off by {difference:.3g}")


def check_run_refusals() -> str:
    """What one pass cannot evaluate exactly it refuses: training mode, autocast, masks that are none."""
    model, (ids, mask) = small_model("cpu"), _inputs()
    training = copy.deepcopy(model).train()

    def under_autocast() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            exact_run(model, ids, Policy())

    refused: dict[str, Callable[[], Any]] = {
        "a run of a model in training mode": lambda: exact_run(training, ids, Policy()),
        "a run under autocast": under_autocast,
        "an attention mask of 0 and 2": lambda: exact_run(model, ids, Policy(), attention_mask=2 * mask),
        "padding behind a text": lambda: exact_run(model, ids, Policy(), attention_mask=mask.flip(1)),
    }
    for what, call in refused.items():
        must_raise(what, ValueError, call)
    return f"{len(refused)} refusals"
