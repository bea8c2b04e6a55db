"""From whatever people have to a Subject: functions, classes, legacy lists, transformers caches, evaluators, presses.

What is not called as (keys, values, keep_ratio) is wrapped in a few lines of Python. They are kept as text, since they
are both what runs here and what a counterexample shows: Subject.code.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from decimal import Decimal
from difflib import get_close_matches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import DynamicCache
from transformers.models.llama import modeling_llama as llama

from knorm.cache import KnormCache
from knorm.core import compress
from knorm.laws.subjects import Compress, Subject, takes_layer
from knorm.laws.traits import KNORM, Traits, traits_of
from knorm.perplexity import exact_nll, stream_nll

_KVPRESS = "pip install 'knorm[kvpress]' -c constraints-kvpress.txt"
_SHOULD = {
    "function": "(keys, values, keep_ratio)",
    "class": "(keep_ratio), its instances as (keys, values)",
    "legacy": "(past_key_values, keep_ratio, prune_after, skip_layers)",
    "cache function": "(cache, keep_ratio)",
    "cache": "(keep_ratio), for a transformers cache",
    "evaluator": "(model, input_ids, keep_ratio, prompt_length)",
    "press": "(compression_ratio), for a press of kvpress",
}
KINDS = tuple(_SHOULD)
_LEADING = {"function": 2, "legacy": 1, "cache function": 1, "evaluator": 2}  # arguments before the ratio
_RATIOS = ("keep_ratio", "ratio", "compression_ratio", "policy")

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
    "press": "compress = through_attention({given})",
}
_DIRECT = "compress = {given}"
_IMPORTS = {
    "Decimal(": "from decimal import Decimal",
    "DynamicCache(": "from transformers import DynamicCache",
    "Policy(": "from knorm import Policy",
    "adapt(": "from knorm.laws.adapters import adapt",
    "lru_cache(": "from functools import lru_cache",
    "through_attention(": "from knorm.laws.adapters import through_attention",
}


class _Source(NamedTuple):
    """Where a target is: the dotted path in its module, and the lines that import the path's root under an alias."""

    path: str
    lines: Callable[[str, str], str]  # (root, alias)


def adapt(target: Any, traits: Traits | Mapping[str, Any] | None = None, *, kind: str | None = None) -> Subject:
    """A Subject of whatever the target is; a Subject itself comes back as it is.

    target   of one of these kinds:
             function         (keys, values, keep_ratio[, layer]) -> keys, values[, mask]
             class            its constructor takes the ratio, its instances are called (keys, values[, layer]). One
                              instance serves all calls at a ratio, so that state that leaks shows
             legacy           (past_key_values, keep_ratio, prune_after, skip_layers), of a list of (keys, values), one
                              for each layer; prune_after and skip_layers are the traits', 0 and none by default
             cache function   (cache, keep_ratio), changes a transformers cache in place or returns one
             cache            a class of transformers caches that takes the ratio, or (keep_ratio) -> Cache
             evaluator        (model, input_ids, keep_ratio[, prompt_length]) -> NLL [batch, T-1]
             press            a press of kvpress that compresses tensors, its class or an instance
    traits   what it promises; by default its __knorm_traits__, and KNORM for knorm's own
    kind     one of KINDS; by default told from the names and annotations of the target's parameters

    Keys and values are [batch, kv_heads, length, head_dim]. A parameter named `policy` is given a knorm.Policy that
    protects and skips what the traits say, one named `compression_ratio` the share to remove. Raises TypeError for what
    cannot be called so, ValueError for an unknown kind or trait.
    """
    if isinstance(target, Subject):
        return target
    named = target if hasattr(target, "__qualname__") else type(target)
    return _subject(target, traits, kind, named.__qualname__.rpartition("<locals>.")[2], _source(target))


def _subject(target: Any, traits: Any, kind: str | None, name: str, source: _Source | None) -> Subject:
    if isinstance(target, Subject):
        return target
    if kind not in (None, *KINDS):
        raise ValueError(f"kind={kind!r}, but should be one of {', '.join(KINDS)}")
    if not callable(target):
        raise TypeError(f"{name} is not callable, but should be called as {name}{_SHOULD['function']}")
    told = _kind_of(target)
    kind = kind or told
    own = any(target is mine for mine in (compress, KnormCache, exact_nll, stream_nll))
    promised = traits_of(SimpleNamespace(__knorm_traits__=KNORM) if own else target, traits)
    body, blanks = _filled(target, kind, promised, name)
    made: dict[str, Any] = {"given": target}
    # not a closure written beside the text: what is shown would be another than what ran
    exec(_with_imports(body.format(given="given", **blanks)), made)
    code = _code(source, kind, kind != told, body, blanks) if source else ""
    return Subject(name, promised, made.get("compress"), made.get("make_cache"), made.get("evaluate"), code)


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


def _signature(target: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(target, eval_str=True)
    except Exception:  # annotations that only type checkers can read
        try:
            return inspect.signature(target)
        except (TypeError, ValueError):
            return None


def _is_press(kind: type) -> bool:
    return any(base.__name__ == "BasePress" and base.__module__.startswith("kvpress") for base in kind.__mro__)


def _kind_of(target: Any) -> str:
    if isinstance(target, type):
        return "cache" if issubclass(target, TransformersCache) else "press" if _is_press(target) else "class"
    if _is_press(type(target)):
        return "press"
    signature = _signature(target)
    if signature is None or not signature.parameters:
        return "function"
    first = next(iter(signature.parameters.values()))
    cache, returned = (
        issubclass(x, TransformersCache) if isinstance(x, type) else isinstance(x, str) and x.endswith("Cache")
        for x in (first.annotation, signature.return_annotation)
    )
    if returned and len(signature.parameters) == 1 and first.name in _RATIOS:
        return "cache"
    if cache or first.name == "cache":
        return "cache function"
    return {"model": "evaluator", "past_key_values": "legacy"}.get(first.name, "function")


def _filled(target: Any, kind: str, traits: Traits, name: str) -> tuple[str, dict[str, str]]:
    """The body for a target of that kind, and what fills it. Raises TypeError for a signature that does not fit."""
    if kind == "press":
        through_attention(target)  # refuses what it cannot run
        return _BODIES[kind], {}
    signature = _signature(target)
    parameters = signature.parameters if signature else {}
    positional = [x for x, one in parameters.items() if one.kind is not inspect.Parameter.KEYWORD_ONLY]
    word = next((x for x in _RATIOS if x in parameters and parameters[x].kind != inspect.Parameter.POSITIONAL_ONLY), "")
    options: dict[str, Any] = {"prune_after": traits.prune_after, "skip_layers": list(traits.skip_layers)}
    options = {option: value for option, value in options.items() if kind == "legacy" and option in parameters}
    leading = [0] * _LEADING.get(kind, 0)
    if signature:
        _fit(name, signature, kind, *leading, *([] if word else [0]), **({word: 0} if word else {}), **options)
    if kind == "class" and isinstance(target, type):
        called = _signature(target.__call__) if any("__call__" in vars(x) for x in target.__mro__) else None
        _fit(f"{name}.__call__", called or inspect.Signature(), kind, 0, 0, 0)
    layered = takes_layer(target.__call__ if kind == "class" else target)
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
        found, target = " ".join(f"{name}{signature}".split()), name.removesuffix(".__call__")
        raise TypeError(
            f"{found} does not fit: a target of kind {kind!r} is called as {target}{_SHOULD[kind]}. "
            f"The other kinds are {', '.join(other for other in KINDS if other != kind)}"
        ) from None


def _ratio(kind: str, word: str, traits: Traits) -> str:
    """What a parameter of that name is given. A function's policy may be a bare ratio, as in knorm.compress."""
    options = ("prune_after", "skip_layers", "protect_first", "protect_recent")
    changes = "".join(f", {option}={getattr(traits, option)!r}" for option in options if getattr(traits, option))
    if word == "policy" and (changes or kind != "function"):
        return f"Policy(keep_ratio{changes})"
    return "float(1 - Decimal(str(keep_ratio)))" if word == "compression_ratio" else "keep_ratio"


def _source(target: Any) -> _Source | None:
    """Of what can be imported again, and of instances of kvpress' own presses; otherwise None."""
    if type(target).__module__.startswith("kvpress."):
        return _Source("press", lambda root, alias: f"from kvpress import *\n{alias} = {target!r}")
    module, path = str(getattr(target, "__module__", "")), str(getattr(target, "__qualname__", ""))
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return _importable(module, path) if found is target and module != "__main__" else None


def _importable(module: str, path: str) -> _Source:
    return _Source(path, lambda root, alias: f"from {module} import {root}" + f" as {alias}" * (alias != root))


HIDDEN = 16  # width of the hidden states


@functools.lru_cache(maxsize=16)
def _attention(kv_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Any:
    """An attention module of Llama, two queries a head. Heads have the same weights: one alone is as among others."""
    heads = 2 * kv_heads
    config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width, hidden_size=heads)
    config.hidden_size = HIDDEN  # need not be a multiple of the heads, though LlamaConfig has it so
    module = llama.LlamaAttention(config, 0).eval()
    generator = torch.Generator().manual_seed(0)
    for linear in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
        copies = (1, kv_heads) if linear is module.o_proj else (kv_heads, 1)
        rows, columns = (size // number for size, number in zip(linear.weight.shape, copies, strict=True))
        block = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu") / HIDDEN**0.5
        linear.weight.data = block.repeat(copies)
    module.to(device=device, dtype=dtype)
    module.rotary_emb = llama.LlamaRotaryEmbedding(config).to(device)  # float32, as in a loaded model
    return module


def _prompt(module: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What kvpress' forward hook sees of a prompt: hidden states and keywords. Rows are alike."""
    batch, _, length, _ = keys.shape
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(length, HIDDEN, generator=generator, dtype=torch.float32, device="cpu")
    states = states.to(keys).expand(batch, -1, -1)
    places = torch.arange(length, device=keys.device)
    cache = DynamicCache()
    cache.update(keys, values, 0)
    turns = module.rotary_emb(states, places[None])
    return states, {"hidden_states": states, "past_key_values": cache, "attention_mask": None, "cache_position": places,
                    "position_ids": places[None], "position_embeddings": turns}  # fmt: skip


def _weights(module: Any, states: Tensor, keys: Tensor, values: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Eager attention's weights of the prompt: [batch, heads, length, length]."""
    length, width = keys.shape[2:]
    queries = module.q_proj(states).unflatten(-1, (module.config.num_attention_heads, width)).transpose(1, 2)
    queries, _ = llama.apply_rotary_pos_emb(queries, queries, *turns)
    unseen = torch.full((length, length), -torch.inf, dtype=keys.dtype, device=keys.device).triu(1)
    return llama.eager_attention_forward(module, queries, keys, values, unseen, module.scaling)[1]


def _compress(press: Any, module: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    states, keywords = _prompt(module, keys, values)
    try:
        return press.compress(module, states, keys, values, None, keywords)
    except Exception as error:  # some need attention weights, which only eager attention has; others refuse them
        weights = _weights(module, states, keys, values, keywords["position_embeddings"])
        try:
            return press.compress(module, states, keys, values, weights, keywords)
        except Exception:
            raise error from None


def through_attention(press: Any) -> Compress:
    """A press of kvpress as a compressor, (keys, values, keep_ratio) -> keys, values[, mask].

    press   its class or an instance, of which a copy is made for each ratio; compression_ratio is 1 - keep_ratio in
            decimal

    It compresses the prompt's cache of one attention module of Llama, with seeded weights and hidden states. The mask
    is that of presses that only mark what is evicted, as AdaKVPress. Raises TypeError for presses that have no compress
    of their own, or no ratio.
    """
    kind = press if isinstance(press, type) else type(press)
    if not _is_press(kind):
        raise TypeError(f"{kind.__name__} is no press of kvpress")
    if next(base for base in kind.__mro__ if "compress" in vars(base)).__name__ == "BasePress":
        raise TypeError(f"{kind.__name__} has no compress(module, hidden_states, keys, values, attentions, kwargs)")
    if "compression_ratio" not in (inspect.signature(press).parameters if press is kind else dir(press)):
        wraps = press is kind and "press" in inspect.signature(kind).parameters
        hint = f"; give an instance, as {kind.__name__}(KnormPress())" if wraps else ""
        raise TypeError(f"{kind.__name__} takes no compression_ratio{hint}")

    @functools.cache
    def made(keep_ratio: float) -> Any:
        removed = float(1 - Decimal(str(keep_ratio)))
        if press is kind:
            return press(compression_ratio=removed)
        own = copy.deepcopy(press)
        own.compression_ratio = removed
        return own

    @torch.no_grad()
    def compress(keys: Tensor, values: Tensor, keep_ratio: float) -> tuple[Tensor, ...]:
        module = _attention(keys.shape[1], keys.shape[3], keys.dtype, keys.device)
        module.masked_key_indices = None
        kept = _compress(made(keep_ratio), module, keys, values)
        if module.masked_key_indices is None:
            return kept
        mask = torch.ones(kept[0].shape[:3], dtype=torch.bool, device=keys.device)
        mask[module.masked_key_indices] = False
        return *kept, mask

    return compress


_FORMS = "path/to/file.py:name, package.module:name, or kvpress:PressName"


def load_target(spec: str, kind: str | None = None, traits: Traits | Mapping[str, Any] | None = None) -> Subject:
    """The Subject that a command line names.

    spec           path/to/file.py:name, package.module:name or kvpress:PressName; the name may be dotted. Modules are
                   looked for in the current folder too, those that a file imports beside it
    kind, traits   as adapt takes them

    Raises ValueError, in one line, for a target that does not exist, does not import or cannot be called.
    """
    where, _, path = spec.rpartition(":")
    if not where or not path:
        raise ValueError(f"target {spec!r}, but should be {_FORMS}")
    file = Path(where).resolve() if where.endswith(".py") or os.sep in where else None
    try:
        module = _imported(where, file)
        return _subject(_named(where, path, module), traits, kind, path, _origin(module, path, file))
    except TypeError as error:
        raise ValueError(f"target {spec!r}: {error}") from error
    except _Missing as error:
        raise ValueError(f"target {spec!r}: {error}") from error.__cause__


class _Missing(Exception):
    """A target that is not there or does not import; the message says what to do."""


def _imported(where: str, file: Path | None) -> ModuleType:
    if file and (file.suffix != ".py" or not file.is_file()):
        raise _Missing(f"there is no Python file {file}; it should be {_FORMS}")
    folder = str(file.parent) if file else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    kvpress = f"install it with {_KVPRESS}"
    try:
        module = _run(file) if file else importlib.import_module(where)
        if getattr(module, "__file__", "") is None:
            raise ModuleNotFoundError(name=where)  # a folder of that name
        return module
    except ModuleNotFoundError as error:
        missing = error.name or where
        todo = kvpress if missing.startswith("kvpress") else f"install it, or run this in the folder that has {missing}"
        raise _Missing(f"importing {where}: there is no module {missing!r}; {todo}") from error
    except SyntaxError as error:
        raise _Missing(f"{error.filename}, line {error.lineno}, is not valid Python: {error.msg}") from error
    except (Exception, SystemExit) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        todo = kvpress if where.startswith("kvpress") else "mend that first"
        raise _Missing(f"importing {where} raised {said}; {todo}") from error


def _run(file: Path) -> ModuleType:
    """A file's module, under a name of its own: it may be called as one that is loaded already."""
    name = f"knorm_target_{file.stem}"
    found: Any = spec_from_file_location(name, file)
    module = sys.modules[name] = module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _named(where: str, path: str, module: ModuleType) -> Any:
    target: Any = module
    for done, part in enumerate(path.split(".")):
        if not hasattr(target, part):
            there = [name for name in dir(target) if not name.startswith("_")]
            known = ", ".join(get_close_matches(part, there) or there[:8]) or "nothing"
            raise _Missing(f"{'.'.join([where, *path.split('.')[:done]])} has no {part!r}; it has {known}")
        target = getattr(target, part)
    return target


def _origin(module: ModuleType, path: str, file: Path | None) -> _Source:
    if file is None:
        return _importable(module.__name__, path)
    folder = f"import sys; sys.path.insert(0, {str(file.parent)!r})\n"
    if file.stem.isidentifier():
        return _Source(path, lambda root, alias: folder + _importable(file.stem, path).lines(root, alias))
    return _Source(path, lambda root, alias: f"{folder}{alias} = __import__({file.stem!r}).{root}")
