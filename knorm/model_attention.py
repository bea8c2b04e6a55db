"""Who attends in a model, and under which mask: knorm's entry in transformers' registries.

Transformers makes one mask for all layers, from the length of the first. Where layers differ in length (skip_layers),
or rows in how many tokens are padding, that mask is wrong: `with attention(model):` gives every layer its own.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# (module, query, key, value, attention_mask, **keywords) -> (output [batch, queries, heads, head_dim], weights or None)
Attention = Callable[..., tuple[Tensor, Tensor | None]]
Observer = Attention  # the same, with the attention function that it stands around in front


class _Context(NamedTuple):
    """One open `with`, as the thread that opened it sees it.

    configs     the model's configurations, by id
    attention   how the model attends; None: by PyTorch's SDPA
    own         what `attention(model)` runs under a mask for each layer; None: the attention makes its own mask
    masked      the attention is given the masks that the model's own implementation would be
    """

    configs: frozenset[int]
    attention: Attention | None
    own: str | None
    masked: bool = False


@dataclass
class Call:
    """Hold what one forward pass inside `attention(model)` knows of padding.

    leads   padding tokens at the left of each row; None: there are none
    total   tokens that the attention mask speaks of; None: there is no mask
    spare   for each layer, how many of its slots in front hold padding, by row
    """

    leads: list[int] | None = None
    total: int | None = None
    spare: dict[int, list[int] | None] = field(default_factory=dict)


@dataclass
class _Switched:
    """A configuration that says "knorm" for now, what it said before, and how many contexts want it so."""

    config: PreTrainedConfig
    own: str
    contexts: int = 0


# A configuration is seen by all threads, so it only says that knorm decides. What it decides belongs to the thread: who
# is in no context of this model attends by the model's own implementation, under that implementation's mask.
_switched: dict[int, _Switched] = {}
_lock = threading.Lock()
_contexts: ContextVar[tuple[_Context, ...]] = ContextVar("knorm_contexts", default=())
_calls: ContextVar[dict[int, Call]] = ContextVar("knorm_calls")  # by configuration; replaced, never written to
_observers: ContextVar[tuple[tuple[frozenset[int], Observer], ...]] = ContextVar("knorm_observers", default=())


def _context_of(config: object) -> _Context | None:
    return next((context for context in reversed(_contexts.get()) if id(config) in context.configs), None)


def implementation_of(config: PreTrainedConfig) -> str:
    """Name the attention that `config` came with, "sdpa" or another: knorm may have switched it for now."""
    switched = _switched.get(id(config))
    return str(switched.own if switched else config._attn_implementation)


def _implementation(module: nn.Module, name: str) -> Attention:
    """What is registered under a name; eager attention stands beside each model's class instead."""
    if name == "eager":
        homes = (sys.modules[kind.__module__] for kind in type(module).__mro__)
        return next(home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward"))
    attention: Attention = AttentionInterface()[name]
    return attention


def _call_attention(module: nn.Module, *states: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
    context = _context_of(module.config)
    if context and context.attention:
        return context.attention(module, *states, **keywords)
    own = "sdpa" if context else implementation_of(module.config)  # type: ignore[arg-type]
    if own == "knorm":
        raise RuntimeError(
            "attention implementation 'knorm' was called outside knorm: "
            "call model.set_attn_implementation('sdpa') first"
        )
    return _implementation(module, own)(module, *states, **keywords)


def _mask(*args: Any, config: Any = None, attention_mask: Tensor | None = None, **keywords: Any) -> Any:
    """No mask where the attention makes its own; without an entry here, transformers would drop padding in silence."""
    context = _context_of(config)
    if context is None or context.attention is None or context.masked:
        make = AttentionMaskInterface().get("sdpa" if context and not context.masked else implementation_of(config))
        if make is None or make is _mask:
            return None
        return make(*args, config=config, attention_mask=attention_mask, **keywords)
    if context.own is not None:
        call = Call()
        if attention_mask is not None:
            call.leads, call.total = _leads(attention_mask), attention_mask.shape[1]
        _calls.set({**_calls.get({}), id(config): call})
    return None


def call_of(module: nn.Module | None) -> Call | None:
    """Find the forward pass that is under way in a module, if it is inside `attention(model)`.

    Args:
        module: one with the model's configuration; None: that of the innermost context.

    Returns:
        What the pass knows of padding; None outside.

    Example:
        >>> call_of(None) is None
        True
    """
    contexts = _contexts.get()
    config = getattr(module, "config", None)
    context = _context_of(config) if module is not None else contexts[-1] if contexts else None
    if context is None or context.own is None:
        return None
    calls = _calls.get({})
    known = [key for key in calls if key in context.configs] if module is None else [id(config)]
    return next((calls[key] for key in reversed(known) if key in calls), Call())  # no mask asked for: no padding


def _leads(mask: Tensor) -> list[int] | None:
    """Padding at the left of each row of an attention mask [batch, length]; None: no row has any."""
    real = mask.bool()
    *leads, unordered = torch.cat([(~real).sum(1), (real[:, 1:] < real[:, :-1]).sum()[None]]).tolist()
    if unordered:
        row = int((real[:, 1:] < real[:, :-1]).any(1).nonzero()[0])
        raise ValueError(
            f"row {row} of attention_mask has padding after its first token, but padding should be on the left: "
            "set tokenizer.padding_side = 'left'"
        )
    return leads if any(leads) else None


AttentionInterface.register("knorm", _call_attention)
AttentionMaskInterface.register("knorm", _mask)


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The model's configurations, the outermost first: parts of a model may have their own."""
    every = (getattr(module, "config", None) for module in (model, *model.modules()))
    return list({id(config): config for config in every if isinstance(config, PreTrainedConfig)}.values())


def _switch(model: PreTrainedModel, configs: list[PreTrainedConfig]) -> None:
    with _lock:
        for config in configs:
            _switched.setdefault(id(config), _Switched(config, config._attn_implementation)).contexts += 1
        ALL_ATTENTION_FUNCTIONS["knorm"] = _call_attention  # a package imported since may have put its own over it
        if any(config._attn_implementation != "knorm" for config in configs):
            model.set_attn_implementation("knorm")


def _switch_back(configs: list[PreTrainedConfig]) -> None:
    with _lock:
        for config in configs:
            switched = _switched[id(config)]
            switched.contexts -= 1
            if not switched.contexts:
                config._attn_implementation = switched.own
                del _switched[id(config)]


@contextmanager
def _open(
    model: PreTrainedModel, attention: Attention | None, own: str | None = None, *, masked: bool = False
) -> Iterator[None]:
    configs = _configs(model)
    context = _Context(frozenset(map(id, configs)), attention, own, masked)
    switch = attention is not None or any(config._attn_implementation != "sdpa" for config in configs)
    try:
        if switch:
            _switch(model, configs)
        _contexts.set((*_contexts.get(), context))
        yield
    finally:
        _contexts.set(tuple(other for other in _contexts.get() if other is not context))
        if switch:
            _switch_back(configs)


@contextmanager
def attention_through(model: PreTrainedModel, attention: Attention | None) -> Iterator[None]:
    """Let the model attend through a function; the model's own setting comes back whatever happens.

    Only calls from the thread that is inside (more exactly, from its `contextvars` context) attend so. Other threads
    may use the model meanwhile, by its own implementation or inside a context of theirs.

    Args:
        model: a model of transformers.
        attention: as transformers' attention functions; None: PyTorch's SDPA.
    """
    with _open(model, attention):
        yield


def own_attention(module: nn.Module) -> Attention:
    """Return what a module would attend by outside all contexts: PyTorch's SDPA or the model's eager attention.

    Args:
        module: an attention module.

    Returns:
        Transformers' own function, whatever other packages have registered over it; inside `observed`, the
        observer around it.
    """
    attention = _implementation(module, implementation_of(module.config))  # type: ignore[arg-type]
    observers = [observe for configs, observe in _observers.get() if id(module.config) in configs]
    return partial(observers[-1], attention) if observers else attention


@contextmanager
def attention_over(model: PreTrainedModel, attention: Attention, *, masked: bool = True) -> Iterator[None]:
    """Let the model attend through `attention`, which may call `own_attention(module)` with what it was given.

    Args:
        model: one that attends by "sdpa" or "eager".
        attention: called as transformers calls an attention function, (module, query, key, value, mask, **keywords).
        masked: it is given the masks of the model's own implementation; else None, and padding is refused by
            KnormCache, which then takes the attention to make a mask for each layer.

    Raises:
        ValueError: the model attends by another implementation.

    As in `attention_through`, other threads are left alone, and the model's own setting comes back.
    """
    own = implementation_of(model.config)
    if own not in ("sdpa", "eager"):
        raise ValueError(
            f"the model attends by {own!r}, but should by 'sdpa' or 'eager': model.set_attn_implementation()"
        )
    with _open(model, attention, None if masked else own, masked=masked):
        yield


@contextmanager
def observed(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Let an observer stand around the model's own attention, under all that a method puts over it meanwhile.

    Args:
        model: one that attends by "sdpa" or "eager".
        observer: called as (attention, module, query, key, value, mask, **keywords) wherever `own_attention` is; it is
            to return what `attention` returns.

    Raises:
        ValueError: the model attends by another implementation.
    """

    def plain(module: nn.Module, *states: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        return own_attention(module)(module, *states, **keywords)

    entry = (frozenset(map(id, _configs(model))), observer)
    with attention_over(model, plain):
        _observers.set((*_observers.get(), entry))
        try:
            yield
        finally:
            _observers.set(tuple(other for other in _observers.get() if other is not entry))


@contextmanager
def attention_beside(model: PreTrainedModel, change: Callable[..., tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let the model attend as it would here, to the keys and values that `change` returns.

    Args:
        model: one that attends by "sdpa" or "eager", also inside another context of this module.
        change: called with (module, query, key, value); returns the key and the value to attend to, of their shapes.
    """
    outer = _context_of(model.config)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
    ) -> tuple[Tensor, Tensor | None]:
        key, value = change(module, query, key, value)
        inner = outer.attention if outer and outer.attention else own_attention(module)
        return inner(module, query, key, value, attention_mask, **keywords)

    with _open(model, attend, outer.own if outer else None, masked=outer.masked if outer else True):
        yield


def not_a_row_of_ones(mask: Tensor) -> ValueError:
    """Return the error for a `mask` [batch, 1, queries, keys] that somebody has made, where knorm makes one a layer."""
    return ValueError(
        f"attention_mask is {list(mask.shape)}, but should be [batch, length], 1 for each token: knorm.attention makes "
        "the masks of the layers itself"
    )


def _attend_last(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention, under the mask of this layer: its last slots are this call's tokens.

    query [batch, heads, queries, head_dim]; key, value [batch, kv_heads, slots, head_dim].
    """
    call, context = call_of(module), _context_of(module.config)
    assert call is not None
    assert context is not None
    if attention_mask is not None:
        raise not_a_row_of_ones(attention_mask)
    queries, slots = query.shape[2], key.shape[2]
    spare = call.leads and [max(0, lead - (call.total or slots) + slots) for lead in call.leads]
    spare = call.spare.get(getattr(module, "layer_idx", -1), spare)
    mask = None
    if spare or context.own == "eager" or 1 < queries < slots:
        slot = torch.arange(slots, device=key.device)
        now = slot[slots - queries :, None]
        mask = (slot <= now)[None, None]
        if spare:  # a padding token sees itself, so that its row of the softmax is not empty
            mask = mask & (slot >= torch.tensor(spare, device=key.device)[:, None, None, None]) | (slot == now)
    if context.own == "sdpa":
        return _implementation(module, "sdpa")(module, query, key, value, mask, **keywords)
    least = torch.finfo(query.dtype).min
    added = torch.zeros(mask.shape, dtype=query.dtype, device=key.device).masked_fill_(~mask, least)  # type: ignore
    return _implementation(module, "eager")(module, query, key, value, added, **keywords)


@contextmanager
def attention(model: PreTrainedModel) -> Iterator[None]:
    """Give each layer of the model a mask of its own: for padded batches, and for skip_layers.

    The model's own attention, "sdpa" or "eager", runs under that mask, and is set again at the end. Inside, a
    KnormCache sees the padding: it goes first, is never attended to, and every row comes out as it would alone. Other
    caches, and calls without one, work as before. Only the thread that is inside attends so; other threads may use the
    model, or other models, meanwhile.

    Args:
        model: one that attends by "sdpa" or "eager".

    Raises:
        ValueError: another implementation; inside, padding that is not on the left, before a cache is written to.

    Example:
        >>> model, _ = load_embedded()
        >>> ids, mask = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        >>> cache = KnormCache(Policy(0.5))
        >>> with attention(model):
        ...     _ = model(input_ids=ids, attention_mask=mask, **{cache_keyword(model): cache})
        >>> cache.positions(layer=0)[0, 0].tolist()[0]
        -1
    """
    own = implementation_of(model.config)
    if own not in ("sdpa", "eager"):
        raise ValueError(
            f"the model attends by {own!r}, but should by 'sdpa' or 'eager': model.set_attn_implementation()"
        )
    with _open(model, _attend_last, own):
        yield


def cache_keyword(model: PreTrainedModel) -> str:
    """Name the keyword by which the model's forward takes its cache.

    Args:
        model: a model of transformers.

    Returns:
        "past_key_values", or "cache" in newer releases of transformers.

    Example:
        >>> cache_keyword(load_embedded()[0]) in ("cache", "past_key_values")
        True
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
