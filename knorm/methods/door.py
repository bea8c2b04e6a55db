"""The one door: a Method out of a target, whatever form it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from knorm.methods.budget import Budget, NeedsBudget, TakesNoBudget
from knorm.methods.caches import CacheMethod
from knorm.methods.functions import CacheFunctionMethod, ClassMethod, FunctionMethod, LegacyMethod
from knorm.methods.kinds import CALLED_AS, KINDS, kind_of, signature_of
from knorm.methods.method import Method
from knorm.methods.policies import PolicyMethod
from knorm.methods.presses import PressMethod
from knorm.methods.targets import load_target, parse_target
from knorm.policy import Policy, Ratio

_MADE: dict[str, Callable[[str, Any, Budget | None, dict[str, Any]], Method]] = {
    "policy": lambda name, target, budget, options: PolicyMethod(name, target, budget),
    "function": FunctionMethod,
    "class": ClassMethod,
    "legacy": LegacyMethod,
    "cache function": CacheFunctionMethod,
    "cache": CacheMethod,
    "press": PressMethod,
}


def method(
    target: Any,
    *,
    keep_ratio: Ratio | None = None,
    keep_tokens: int | None = None,
    kind: str | None = None,
    name: str | None = None,
) -> Method:
    """Make a Method out of whatever makes a cache smaller.

    Args:
        target: the thing itself (a Policy, a function of keys and values, a class, a function that changes a cache, a
            class of transformers caches or a factory of them, a press of kvpress), or its name as a command line has
            it: "knorm", "path/to/file.py:name", "package.module:name", "kvpress:SnapKVPress(window_size=32)".
        keep_ratio: share of the cache that one compression retains, in (0, 1].
        keep_tokens: the number of tokens instead. With neither, the method needs a budget of its own.
        kind: one of kinds.KINDS; by default it follows from the target's parameters.
        name: the name that tables show; by default the target as it was written.

    Returns:
        A Method, to be opened on a model or given to `knorm.evaluate`.

    Raises:
        ValueError: a target that does not parse, does not import or does not exist; a budget for a target that takes
            none, or none for a target that needs one; an unknown kind.
        TypeError: a target that cannot be called as its kind is.

    Example:
        >>> method(Policy(0.5)).kind
        'policy'
    """
    budget = None if keep_ratio is None and keep_tokens is None else Budget(keep_ratio, keep_tokens)
    if kind not in (None, *KINDS):
        raise ValueError(f"kind {kind!r}, but should be one of {', '.join(KINDS)}")
    options: dict[str, Any] = {}
    if isinstance(target, str):
        name = name or target
        if target == "knorm":
            target = Policy()
        else:
            target, options = load_target(parse_target(target))
    name = name or getattr(target, "__qualname__", "").rpartition("<locals>.")[2] or _shown(target)
    if not callable(target) and not isinstance(target, Policy):
        raise TypeError(f"{name} is a {type(target).__name__}, but should be called as {name}{CALLED_AS['function']}")
    kind = kind or kind_of(target)
    if unknown := _unknown(target, options):
        raise ValueError(f"{name} has no parameter {', '.join(unknown)}; it has {', '.join(_parameters(target))}")
    return _MADE[kind](name, target, budget, options)


def with_budgets(target: str, kind: str | None, budgets: Sequence[dict[str, Any]], *, optional: bool) -> list[Method]:
    """Make a method for each budget; where there is none, one that keeps half of the cache if it wants to be told.

    Args:
        target: as a command line has it, no pattern.
        kind: as `method` takes it.
        budgets: keywords of `method`, each keep_ratio or keep_tokens.
        optional: a method that has a budget of its own is made once, with that one.

    Returns:
        The methods.

    Raises:
        TakesNoBudget: a method that has a budget of its own, where budgets are not optional.
        ValueError, TypeError: as `method`.

    Example:
        >>> [made.label for made in with_budgets("transformers:DynamicCache", None, [], optional=True)]
        ['transformers:DynamicCache']
    """
    try:
        if budgets:
            return [method(target, kind=kind, **budget) for budget in budgets]
    except TakesNoBudget:
        if not optional:
            raise
    try:
        return [method(target, kind=kind)]
    except NeedsBudget:
        return [method(target, kind=kind, keep_ratio="0.5")]


def _shown(target: Any) -> str:
    return repr(target) if len(repr(target)) <= 60 else type(target).__name__


def _parameters(target: Any) -> list[str]:
    signature = signature_of(target)
    return [*signature.parameters] if signature else []


def _unknown(target: Any, options: dict[str, Any]) -> list[str]:
    signature = signature_of(target)
    if signature is None or any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return []
    return sorted(options.keys() - signature.parameters.keys())
