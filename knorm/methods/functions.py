"""Functions and classes that compress a layer's keys and values after the prompt, or change a whole cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from knorm.methods.budget import Budget, NeedsBudget, TakesNoBudget, budget_argument
from knorm.methods.kinds import EXTRAS, budget_parameter, signature_of
from knorm.methods.method import Method, MethodError, Session, Tokenizer
from knorm.methods.watch import fitted, has_windows, watching
from knorm.model_attention import attention_over, own_attention

QUERIES = 64  # of the prompt's last tokens, which a function is given if it asks for queries


class _Compressing(Method):
    """A method that is called with a budget when the prompt has been read."""

    def __init__(self, name: str, target: Any, budget: Budget | None, options: Mapping[str, Any]) -> None:
        super().__init__(name, budget, target)
        signature = signature_of(target)
        self.target, self.options = target, dict(options)
        self.parameters = dict(signature.parameters) if signature else {}
        self.word = budget_parameter(self.parameters)
        given = self.word is not None and self.word in self.options
        if budget is None and not given and (self.word is not None or not self.parameters):
            raise NeedsBudget(f"{name} is called with a budget: give keep_ratio or keep_tokens")
        if budget is not None and given:
            raise TakesNoBudget(f"{name} names a budget of its own, {self.word}: drop keep_ratio and keep_tokens")

    def budgeted(self, target: Any, leading: tuple[Any, ...], length: int, extras: Mapping[str, Any]) -> Any:
        """Call `target` with what it is given by position, its budget, and what it asks for by name."""
        keywords = {**self.options, **{name: extras[name] for name in extras if name in self.parameters}}
        if self.budget is None:
            return target(*leading, **keywords)
        argument = budget_argument(self.word, self.budget, length)
        if self.word is None:
            return target(*leading, argument, **keywords)
        return target(*leading, **{self.word: argument}, **keywords)


class FunctionMethod(_Compressing):
    """Run a function of (keys, values, keep_ratio), which may ask for `layer`, `queries` and `attention` by name."""

    kind = "function"

    def start(self, model: PreTrainedModel, length: int, batch: int, tokenizer: Tokenizer | None) -> Session:
        return _LayerSession(model, self, frozenset(EXTRAS) & self.parameters.keys())

    def compress(self, keys: Tensor, values: Tensor, extras: Mapping[str, Any]) -> Any:
        """Call the function on one layer's cache.

        Args:
            keys: [batch, kv_heads, length, head_dim].
            values: the same, but for head_dim.
            extras: what the function may ask for by name: layer, queries, attention.

        Returns:
            What it returned: (keys, values), with a mask or not; not looked at yet.
        """
        return self.budgeted(self.target, (keys, values), keys.shape[2], extras)


class ClassMethod(FunctionMethod):
    """Run a class whose constructor takes the budget; one instance serves all layers, called as (keys, values).

    Args:
        name: the target as it was written.
        target: the class.
        budget: what one compression retains; None where `options` name it.
        options: keywords of the constructor that the target names.
    """

    kind = "class"

    def __init__(self, name: str, target: Any, budget: Budget | None, options: Mapping[str, Any]) -> None:
        super().__init__(name, target, budget, options)
        called = signature_of(getattr(target, "__call__", target))  # noqa: B004
        self.extras = frozenset(EXTRAS) & (called.parameters.keys() if called else set())
        self._made: dict[int, Any] = {}

    def start(self, model: PreTrainedModel, length: int, batch: int, tokenizer: Tokenizer | None) -> Session:
        self._made = {}
        return _LayerSession(model, self, self.extras)

    def compress(self, keys: Tensor, values: Tensor, extras: Mapping[str, Any]) -> Any:
        length = keys.shape[2]
        if length not in self._made:
            self._made[length] = self.budgeted(self.target, (), length, {})
        return self._made[length](keys, values, **{name: extras[name] for name in self.extras})


class _LayerSession(Session):
    """Compresses each layer when the prompt's own attention has read it whole."""

    def __init__(self, model: PreTrainedModel, method: FunctionMethod, wanted: frozenset[str]) -> None:
        super().__init__(model, DynamicCache())
        self.method, self.wanted = method, wanted
        self.hidden: dict[int, Tensor] = {}  # by layer: True where a head sees the slot, of those after the prompt
        self._prefill.enter_context(attention_over(model, self._attend))

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **keywords: Any
    ) -> tuple[Tensor, Tensor | None]:
        attended = own_attention(module)(module, query, key, value, mask, **keywords)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        extras: dict[str, Any] = {}
        if "layer" in self.wanted:
            extras["layer"] = layer
        if "queries" in self.wanted:
            extras["queries"] = query[:, :, -QUERIES:]
        if "attention" in self.wanted:
            extras["attention"] = _weights(query, key, keywords.get("scaling"))
        self._store(layer, self.method.compress(key, value, extras), key, value)
        return attended

    def _store(self, layer: int, result: Any, key: Tensor, value: Tensor) -> None:
        name = self.method.name
        if not isinstance(result, (tuple, list)) or len(result) not in (2, 3) or not all(map(torch.is_tensor, result)):
            should = "(keys, values) or (keys, values, mask)"
            raise MethodError(f"{name} returned {_shown(result)}, but should return {should}")
        kept_keys, kept_values = result[:2]
        for what, kept, given in (("keys", kept_keys, key), ("values", kept_values, value)):
            rest = [*given.shape[:2], given.shape[3]]
            if kept.ndim != 4 or [*kept.shape[:2], kept.shape[3]] != rest or kept.dtype != given.dtype:
                raise MethodError(
                    f"{name} returned {what} {list(kept.shape)} {kept.dtype} for {list(given.shape)} {given.dtype}: "
                    "only the length may change"
                )
        if kept_keys.shape[2] != kept_values.shape[2] or not kept_keys.shape[2]:
            raise MethodError(f"{name} returned {kept_keys.shape[2]} keys and {kept_values.shape[2]} values")
        stored: Any = self.cache.layers[layer]
        stored.keys, stored.values = kept_keys, kept_values
        if len(result) == 3:
            if result[2].shape != kept_keys.shape[:3] or result[2].dtype != torch.bool:
                raise MethodError(
                    f"{name} returned a mask {list(result[2].shape)} {result[2].dtype}, but should return "
                    f"bool {list(kept_keys.shape[:3])}"
                )
            self.hidden[layer] = result[2]

    def begin_decoding(self) -> None:
        if self.watched or self.hidden:
            windows = has_windows(self.model)
            self._decode.enter_context(watching(self.model, self.seen, self._visible, masked=windows))

    def _visible(self, module: nn.Module, key: Tensor) -> Tensor | None:
        mask = self.hidden.get(int(module.layer_idx))  # type: ignore[arg-type]
        if mask is None:
            return None
        new = mask.new_ones(*mask.shape[:2], key.shape[2] - mask.shape[2])
        return torch.cat([mask, new], -1)


def _weights(query: Tensor, key: Tensor, scaling: float | None) -> Tensor:
    """Return causal attention weights of the prompt, [batch, heads, queries, slots], in the dtype of the queries."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * (scaling or query.shape[-1] ** -0.5)
    mask = fitted(None, query, key, None, added=True)
    assert mask is not None
    return (scores + mask).softmax(-1, dtype=torch.float32).to(query.dtype)


def _shown(result: Any) -> str:
    if torch.is_tensor(result):
        return f"one tensor {list(result.shape)}"
    if isinstance(result, (tuple, list)):
        return f"{len(result)} results ({', '.join(type(part).__name__ for part in result[:4])})"
    return type(result).__name__


class CacheFunctionMethod(_Compressing):
    """Run a function of (cache, keep_ratio), which changes a transformers cache in place or returns another."""

    kind = "cache function"

    def start(self, model: PreTrainedModel, length: int, batch: int, tokenizer: Tokenizer | None) -> Session:
        return _WholeSession(model, self.changed)

    def changed(self, cache: Cache, tokens: int) -> Any:
        """Call the function on `cache`, of a prompt of `tokens`; return what it returns, or the cache itself for None.

        Raises MethodError where it returns something else.
        """
        result = self.budgeted(self.target, (cache,), tokens, {})
        if result is None:
            return cache
        if not isinstance(result, Cache):
            raise MethodError(f"{self.name} returned {_shown(result)}, but should return a transformers cache or None")
        return result


class LegacyMethod(CacheFunctionMethod):
    """Run a function of a list of (keys, values), one for each layer, as caches were before transformers had them.

    Args:
        name: the target as it was written.
        target: the function.
        budget: what one compression retains; None where `options` name it.
        options: keywords that the target names; prune_after and skip_layers are 0 and [] where it needs them.
    """

    kind = "legacy"

    def __init__(self, name: str, target: Any, budget: Budget | None, options: Mapping[str, Any]) -> None:
        super().__init__(name, target, budget, options)
        for option, default in (("prune_after", 0), ("skip_layers", [])):
            parameter = self.parameters.get(option)
            if parameter and parameter.default is inspect.Parameter.empty:
                self.options.setdefault(option, default)

    def changed(self, cache: Cache, tokens: int) -> Cache:
        layers: list[Any] = [*cache.layers]
        past = [(layer.keys, layer.values) for layer in layers]
        result = self.budgeted(self.target, (past,), tokens, {})
        result = past if result is None else result
        if len(result) != len(past):
            raise MethodError(f"{self.name} returned {len(result)} layers for {len(past)}")
        for layer, pair in zip(layers, result, strict=True):
            layer.keys, layer.values = pair
        return cache


class _WholeSession(Session):
    """Changes the whole cache when the prompt has been read."""

    def __init__(self, model: PreTrainedModel, change: Callable[[Cache, int], Any]) -> None:
        super().__init__(model, DynamicCache())
        self._change = change
        self._prefill.callback(self._end)

    def _end(self) -> None:
        if self.prompted:
            self.cache = self._change(self.cache, self.tokens)
