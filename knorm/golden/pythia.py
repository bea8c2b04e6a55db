"""Pythia-70M and the texts of the report about it, where they are at hand, and the report's claims judged on them."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

from knorm.evaluation.published.judge import claims_text, judge_claims
from knorm.evaluation.published.measure import load_seed_texts, measure_claims
from knorm.evaluation.published.schema import PYTHIA, bug_report
from knorm.models import load_model

_MODEL, _TEXTS = "KNORM_PYTHIA70M", {"wikitext": ("KNORM_WIKITEXT", "wikitext2"), "pg19": ("KNORM_PG19", "pg19")}


def load_texts() -> dict[str, str]:
    """Load both texts of the report, from the files that the environment names, else from the Hub or its cache.

    Raises ValueError where one is not there; it names the variable to set.
    """
    sources = {name: os.environ.get(variable) or hub for name, (variable, hub) in _TEXTS.items()}
    try:
        return load_seed_texts(bug_report().protocol, sources)
    except ValueError as error:
        lacking = " and ".join(variable for variable, _ in _TEXTS.values() if not os.environ.get(variable))
        raise ValueError(f"{error}; set {lacking} to a .txt or .parquet" if lacking else str(error)) from None


def load_weights(device: str) -> tuple[Any, Any]:
    """Load what KNORM_PYTHIA70M names, a folder, .gguf or pinned Hub id; else the Hub's Pythia-70M, or its cache.

    Returns the model in float32 on `device`, and its tokenizer. Raises ValueError where the weights are not there.
    """
    name = os.environ.get(_MODEL)
    try:
        return _model_of(name or PYTHIA, device)
    except ValueError as error:
        raise ValueError(str(error) if name else f"{error}; set {_MODEL} to a folder, a .gguf or a Hub id") from None


@lru_cache(maxsize=1)
def _model_of(name: str, device: str) -> tuple[Any, Any]:
    return load_model(name, device=device)


def judged_claims(device: str) -> str:
    """Judge the report's claims on the same weights and texts, timed on `device`; return a table as text."""
    report, (model, tokenizer) = bug_report(), load_weights(device)
    return claims_text(judge_claims(report.claims, measure_claims(model, tokenizer, load_texts(), report.protocol)))
