"""From whatever people have to a Subject: functions, classes, legacy lists, transformers caches, evaluators, presses.

What is not called as (keys, values, keep_ratio) is wrapped in a few lines of Python. They are kept as text, since they
are both what runs here and what a counterexample shows: Subject.code.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

from knorm.cache import KnormCache
from knorm.core import compress
from knorm.laws.known import known_traits
from knorm.laws.standins import stand_in, stood_in
from knorm.laws.subjects import Subject, takes_layer
from knorm.laws.targets import CALLED_AS, KINDS
from knorm.laws.traits import KNORM, METHOD, Traits, traits_of
from knorm.methods import kinds
from knorm.methods.budget import Budget, NeedsBudget, TakesNoBudget
from knorm.methods.caches import CacheMethod
from knorm.methods.kinds import budget_parameter, is_press, kind_of, signature_of
from knorm.methods.method import Method
from knorm.methods.presses import PressMethod, acts_while_decoding, nested
from knorm.perplexity import exact_nll, stream_nll

_RATIOS = (*kinds.RATIOS, "policy")
_LEADING = {"function": 2, "legacy": 1, "cache function": 1, "evaluator": 2}  # arguments before the ratio

_FEED = "for index in range(layer + 1):\n        cache.update(keys, values, index)"
_BODIES = {
    "function": """def compress(keys, values, keep_ratio{layer}):
    return {given}(keys, values, {ratio}{layer})""",
    "class": """made = lru_cache(None)(lambda keep_ratio: {given}({ratio}))
def compress(keys, values, keep_ratio{layer}):
    return made(keep_ratio)(keys, values{layer})""",
    "legacy": """def compress(keys, values, keep_ratio, layer=0):
    past = [(keys.clone(), values.clone()) for _ in range(layer)] + [(keys, values)]
    result = {given}(past, {ratio}{options})
    return (past if result is None else result)[layer]""",
    "cache function": f"""def compress(keys, values, keep_ratio, layer=0):
    cache = DynamicCache()
    {_FEED}
    result = {{given}}(cache, {{ratio}})
    layers = getattr(result, "layers", cache.layers)
    return layers[layer].keys, layers[layer].values""",
    "cache": f"""def make_cache(keep_ratio):
    return {{given}}({{ratio}})
def compress(keys, values, keep_ratio, layer=0):
    cache = make_cache(keep_ratio)
    {_FEED}
    return cache.layers[layer].keys, cache.layers[layer].values""",
    "evaluator": """def evaluate(model, input_ids, prompt_length, keep_ratio):
    return {given}(model, input_ids, {ratio}{options})""",
}
_DIRECT = "compress = {given}"
_OPENED = "def opened(keep_ratio, length, rows):\n    return "
_IMPORTS = {
    "Decimal(": "from decimal import Decimal",
    "DynamicCache(": "from transformers import DynamicCache",
    "Policy(": "from knorm import Policy",
    "adapt(": "from knorm.laws.adapters import adapt",
    "lru_cache(": "from functools import lru_cache",
}


class _Source(NamedTuple):
    """Where a target is: the dotted path in its module, and the lines that import the path's root under an alias."""

    path: str
    lines: Callable[[str, str], str]  # (root, alias)


def adapt(target: Any, traits: Traits | Mapping[str, Any] | None = None, *, kind: str | None = None) -> Subject:
    """Make a Subject of whatever the target is; a Subject itself comes back as it is.

    Kinds of targets:
        function         (keys, values, keep_ratio[, layer]) -> keys, values[, mask]
        class            its constructor takes the ratio, its instances are called (keys, values[, layer]). One
                         instance serves all calls at a ratio, so that state that leaks shows
        legacy           (past_key_values, keep_ratio, prune_after, skip_layers), of a list of (keys, values), one
                         for each layer; prune_after and skip_layers are the traits', 0 and none by default
        cache function   (cache, keep_ratio), changes a transformers cache in place or returns one
        cache            a class of transformers caches, or (keep_ratio) -> Cache; one that takes no ratio keeps
                         all that it is given, or has a budget of its own
        evaluator        (model, input_ids, keep_ratio[, prompt_length]) -> NLL [batch, T-1]
        press            a press of kvpress, its class or an instance

    Keys and values are [batch, kv_heads, length, head_dim]. A parameter named `policy` is given a knorm.Policy that
    protects and skips what the traits say, one named `compression_ratio` the share to remove.

    Args:
        target: of one of these kinds.
        traits: what it promises; by default its __knorm_traits__, and KNORM for knorm's own.
        kind: one of KINDS; by default told from the names and annotations of the target's parameters.

    Returns:
        The target behind one signature.

    Raises:
        TypeError: it cannot be called so.
        ValueError: an unknown kind or trait.

    Example:
        >>> adapt(knorm.compress).traits.rounding
        'ceil'
    """
    if isinstance(target, Subject):
        return target
    named = target if hasattr(target, "__qualname__") else type(target)
    return _subject(target, traits, kind, named.__qualname__.rpartition("<locals>.")[2], _source(target))


def _subject(
    target: Any,
    traits: Any,
    kind: str | None,
    name: str,
    source: _Source | None,
    options: Mapping[str, Any] | None = None,
) -> Subject:
    """Make a Subject; options: keywords that a class of caches or a press is always given."""
    if isinstance(target, Subject):
        return target
    if kind not in (None, *KINDS):
        raise ValueError(f"kind={kind!r}, but should be one of {', '.join(KINDS)}")
    if not callable(target):
        raise TypeError(f"{name} is not callable, but should be called as {name}{CALLED_AS['function']}")
    own_kind = _kind_of(target)
    kind = kind or own_kind
    own = any(target is mine for mine in (compress, KnormCache, exact_nll, stream_nll))
    base = METHOD if kind in ("cache", "press") else None
    if base is not None:
        base = replace(base, **known_traits(_classes(target), options))
    # compress refuses a cache without tokens; a call without tokens leaves KnormCache as it is
    ours = replace(KNORM, empty=None) if target is KnormCache else KNORM
    promised = traits_of(SimpleNamespace(__knorm_traits__=ours) if own else target, traits, base)
    if kind == "press":
        return _press(target, promised, name, source, options or {})
    if kind == "cache" and _keeps_everything(target, options or {}):
        return _bare_cache(target, promised, name, source, options or {})
    if options:
        target = functools.partial(target, **options)
    body, blanks = _filled(target, kind, promised, name)
    made: dict[str, Any] = {"given": target}
    # not a closure written beside the text: what is shown would be another than what ran
    exec(_with_imports(body.format(given="given", **blanks)), made)
    code = _code(source, kind, kind != own_kind, body, blanks) if source else ""
    opens = _imported(source)
    opens = _with_imports(f"{opens}\n{_OPENED}target({blanks['ratio']})") if opens and kind == "cache" else ""
    return Subject(
        name, promised, made.get("compress"), made.get("make_cache"), made.get("evaluate"), code, opens=opens
    )


def _classes(target: Any) -> list[str]:
    """Name the classes of transformers and kvpress that a target is made of."""
    kinds = [target if isinstance(target, type) else type(target)]
    if is_press(kinds[0]) and not isinstance(target, type):
        kinds = [type(press) for press in nested(target)]
    every = [base for kind in kinds for base in kind.__mro__]
    return [base.__name__ for base in every if base.__module__.partition(".")[0] in ("kvpress", "transformers")]


def _keeps_everything(target: Any, options: Mapping[str, Any]) -> bool:
    """Tell whether a class of caches takes no ratio: it keeps all that it is given, or has a budget of its own."""
    signature = signature_of(target)
    if not isinstance(target, type) or signature is None:
        return False
    known = {"config", "max_cache_len", "max_batch_size", "batch_size", "device", "dtype", *options}
    word = budget_parameter(signature.parameters)
    named = {n: p for n, p in signature.parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    needed = {name for name, parameter in named.items() if parameter.default is parameter.empty}
    return (word is None or word in options) and "policy" not in signature.parameters and needed <= known


def _bare_cache(target: Any, traits: Traits, name: str, source: _Source | None, options: Mapping[str, Any]) -> Subject:
    """A cache without a ratio; what its constructor needs and the run knows is filled in."""
    method = CacheMethod(name, target, None, dict(options))

    def open_cache(keep_ratio: float, model: Any, length: int, rows: int) -> Any:
        return method.start(model, length, rows, None).cache

    code = _imported(source)
    given = ", ".join(f"{parameter}={written}" for parameter, written in method.wanted.items())
    opens = f"{code}\n{_OPENED}target({given})" if code else ""
    return Subject(name, traits, open_cache=open_cache, code=code, budgeted=False, opens=opens)


def _press(target: Any, traits: Traits, name: str, source: _Source | None, options: Mapping[str, Any]) -> Subject:
    """A press, opened on a model as its users open it. Raises TypeError for what is no press, or cannot be made."""
    kind = target if isinstance(target, type) else type(target)
    if not is_press(kind):
        raise TypeError(f"{kind.__name__} is no press of kvpress")

    def made(budget: Budget | None) -> PressMethod:
        made = PressMethod(name, target, budget, dict(options))
        made.prepare = stand_in
        return made

    def method(keep_ratio: float) -> Method:
        return made(Budget(str(keep_ratio)))

    budgeted = True
    try:
        example = method(0.5)
    except TakesNoBudget:
        budgeted = False
        try:
            example = made(None)
        except NeedsBudget as error:
            raise TypeError(str(error)) from error
        own = example

        def method(keep_ratio: float) -> Method:
            return own
    except ValueError as error:
        raise TypeError(str(error)) from error

    press: Any = example
    late = any(acts_while_decoding(inner) for inner in press.parts())
    code = _imported(source)
    opens = f"{code}\npress = target{'()' * isinstance(target, type)}" if code else ""
    return Subject(
        name,
        traits,
        method=method,
        code=code,
        budgeted=budgeted,
        acts_late=late,
        eager=press.reads_weights,
        opens=opens,
        stands_in=bool(stood_in(press.press)),
    )


def _imported(source: _Source | None) -> str:
    """The lines that import a target under the name `target`."""
    if source is None:
        return ""
    root, dot, rest = source.path.partition(".")
    alias = "target" if not rest else root
    lines = source.lines(root, alias)
    return lines if not rest else f"{lines}\ntarget = {alias}{dot}{rest}"


def _code(source: _Source, kind: str, forced: bool, body: str, blanks: Mapping[str, str]) -> str:
    """Subject.code: the import, the body, and what `knorm.laws.reproduce` is given as target."""
    root, dot, rest = source.path.partition(".")
    alias = root + "_" * bool(re.search(rf"\b({root})\b", f"{body} target"))  # of a name that the body uses itself
    direct = body == _DIRECT
    if direct and not rest:
        alias, body = "compress", ""
    given = alias + dot + rest
    last = given if kind in ("cache", "evaluator") else "compress"
    if forced and (direct or last == given):
        last = f"adapt({last}, kind={kind!r})"
    lines = [body.format(given=given, **blanks)] if body and kind != "evaluator" else []
    return source.lines(root, alias) + "\n" + _with_imports("\n".join([*lines, f"target = {last}"]))


def _with_imports(text: str) -> str:
    return "\n".join([*(line for word, line in _IMPORTS.items() if word in text), text])


def _kind_of(target: Any) -> str:
    """Tell the kind of a target; what scores a model's texts is known by its first parameter."""
    kind = kind_of(target)
    signature = None if isinstance(target, type) or kind == "press" else signature_of(target)
    if signature is not None and next(iter(signature.parameters), "") == "model":
        return "evaluator"
    if signature is not None and not signature.parameters:
        return "function"  # refused: nothing could be given to it
    return kind


def _filled(target: Any, kind: str, traits: Traits, name: str) -> tuple[str, dict[str, str]]:
    """The body for a target of that kind, and what fills it. Raises TypeError for a signature that does not fit."""
    signature = signature_of(target)
    parameters = signature.parameters if signature else {}
    positional = [x for x, parameter in parameters.items() if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
    word = next((x for x in _RATIOS if x in parameters and parameters[x].kind != inspect.Parameter.POSITIONAL_ONLY), "")
    options: dict[str, Any] = {"prune_after": traits.prune_after, "skip_layers": list(traits.skip_layers)}
    options = {option: value for option, value in options.items() if kind == "legacy" and option in parameters}
    leading = [0] * _LEADING.get(kind, 0)
    if signature:
        _fit(name, signature, kind, *leading, *([] if word else [0]), **({word: 0} if word else {}), **options)
    made: Any = target.func if isinstance(target, functools.partial) else target
    if kind == "class" and isinstance(made, type):
        called = signature_of(made.__call__) if any("__call__" in vars(x) for x in made.__mro__) else None
        _fit(f"{name}.__call__", called or inspect.Signature(), kind, 0, 0, 0)
    layered = takes_layer(made.__call__ if kind == "class" else target)
    written = "".join(f", {option}={value!r}" for option, value in options.items())
    if kind == "evaluator" and "prompt_length" in parameters:
        written = ", prompt_length=prompt_length"
    ratio = _ratio(kind, word, traits)
    direct = kind == "function" and ratio == "keep_ratio" and (not word or positional[2:3] == [word])
    # by keyword and only where it is given, so that the target's own default holds otherwise
    blanks = {"ratio": f"{word}={ratio}" if word else ratio, "options": written, "layer": ", **layer" * layered}
    return _DIRECT if direct else _BODIES[kind], blanks


def _fit(name: str, signature: inspect.Signature, kind: str, *arguments: Any, **named: Any) -> None:
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        given, target = " ".join(f"{name}{signature}".split()), name.removesuffix(".__call__")
        raise TypeError(
            f"{given} does not fit: a target of kind {kind!r} is called as {target}{CALLED_AS[kind]}. "
            f"The other kinds are {', '.join(word for word in KINDS if word != kind)}"
        ) from None


def _ratio(kind: str, word: str, traits: Traits) -> str:
    """What a parameter of that name is given. A function's policy may be a bare ratio, as in knorm.compress."""
    options = ("prune_after", "skip_layers", "protect_first", "protect_recent")
    changes = "".join(f", {option}={getattr(traits, option)!r}" for option in options if getattr(traits, option))
    if word == "policy" and (changes or kind != "function"):
        return f"Policy(keep_ratio{changes})"
    return "float(1 - Decimal(str(keep_ratio)))" if word == "compression_ratio" else "keep_ratio"


def _source(target: Any) -> _Source | None:
    """Find the code of what can be imported again, and of instances of kvpress' own presses; otherwise None."""
    if type(target).__module__.startswith("kvpress."):
        return _Source("press", lambda root, alias: f"from kvpress import *\n{alias} = {target!r}")
    module, path = str(getattr(target, "__module__", "")), str(getattr(target, "__qualname__", ""))
    value: Any = sys.modules.get(module)
    for part in path.split("."):
        value = getattr(value, part, None)
    return _importable(module, path) if value is target and module != "__main__" else None


def _importable(module: str, path: str) -> _Source:
    return _Source(path, lambda root, alias: f"from {module} import {root}" + f" as {alias}" * (alias != root))
