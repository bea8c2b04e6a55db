"""What kind of method a target is, told from its parameters, and how a target of each kind is called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

CALLED_AS = {
    "policy": "a knorm.Policy",
    "function": "(keys, values, keep_ratio), also with layer, queries and attention",
    "class": "(keep_ratio), its instances as (keys, values)",
    "legacy": "(past_key_values, keep_ratio, prune_after, skip_layers)",
    "cache function": "(cache, keep_ratio)",
    "cache": "() or (keep_ratio), for a transformers cache",
    "press": "(compression_ratio), for a press of kvpress",
}
KINDS = tuple(CALLED_AS)
RATIOS = ("keep_ratio", "ratio", "compression_ratio")  # parameters that are given a share
TOKENS = ("keep_tokens", "budget", "max_capacity", "max_capacity_prompt", "target_size")  # or a number of tokens
EXTRAS = ("layer", "queries", "attention")


def signature_of(target: Any) -> inspect.Signature | None:
    """Return the signature of `target`, its annotations evaluated where they can be; None where it has none."""
    for evaluated in (True, False):
        try:
            return inspect.signature(target, eval_str=evaluated)
        except Exception:
            continue
    return None


def is_press(kind: type) -> bool:
    """Tell whether the class `kind` is a press of kvpress, without importing kvpress."""
    return any(base.__name__ == "BasePress" and base.__module__.startswith("kvpress") for base in kind.__mro__)


def kind_of(target: Any) -> str:
    """Tell the kind of a target.

    Args:
        target: a Policy, a function, a class, an instance, or a factory of caches.

    Returns:
        One of KINDS; what cannot be told is taken for a function.
    """
    from transformers.cache_utils import Cache

    from knorm.policy import Policy

    if isinstance(target, Policy):
        return "policy"
    if isinstance(target, type):
        return "cache" if issubclass(target, Cache) else "press" if is_press(target) else "class"
    if is_press(type(target)):
        return "press"
    signature = signature_of(target)
    if signature is None:
        return "function"
    returns_cache = _names_cache(signature.return_annotation, Cache)
    first = next(iter(signature.parameters.values()), None)
    if first is None or (len(signature.parameters) == 1 and first.name in (*RATIOS, *TOKENS) and returns_cache):
        return "cache"
    if first.name == "cache" or _names_cache(first.annotation, Cache):
        return "cache function"
    if first.name == "past_key_values":
        return "legacy"
    return "cache" if returns_cache and first.name not in ("keys", "key") else "function"


def _names_cache(annotation: Any, cache: type) -> bool:
    if isinstance(annotation, type):
        return issubclass(annotation, cache)
    return isinstance(annotation, str) and annotation.endswith("Cache")


def budget_parameter(parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """Return the name among `parameters` that a budget is given by, one of RATIOS or TOKENS; None without any."""
    named = (name for name in (*RATIOS, *TOKENS) if name in parameters)
    return next((name for name in named if parameters[name].kind != inspect.Parameter.POSITIONAL_ONLY), None)
