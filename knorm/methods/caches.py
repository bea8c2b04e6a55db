"""Caches of transformers, and of others that follow its interface: a class, or a function that makes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from knorm.methods.budget import Budget, NeedsBudget, TakesNoBudget, budget_argument
from knorm.methods.kinds import budget_parameter, signature_of
from knorm.methods.method import Method, Session, Tokenizer

_KNOWN = {  # to each run, and how a program writes it
    "config": "model.config",
    "max_cache_len": "length",
    "max_batch_size": "rows",
    "batch_size": "rows",
    "device": "model.device",
    "dtype": "model.dtype",
}


class CacheMethod(Method):
    """Make a new cache for each run; what its constructor needs and the run knows is filled in.

    Args:
        name: the target as it was written.
        make: a class of caches, or a function that makes one.
        budget: what the cache is to retain; None for one that takes none, or is given its own.
        given: keywords that the target names.

    Raises:
        NeedsBudget: it is made with a budget, and was given none.
        TakesNoBudget: it takes none, or has its own.
        TypeError: its constructor needs what no run knows.
    """

    kind = "cache"

    def __init__(self, name: str, make: Callable[..., Any], budget: Budget | None, given: dict[str, Any]) -> None:
        super().__init__(name, budget, make)
        self.make, self.given = make, dict(given)
        signature = signature_of(make)
        self.parameters = signature.parameters if signature else {}
        self.word = budget_parameter(self.parameters)
        if budget is not None and (self.word is None or self.word in given):
            raise TakesNoBudget(f"{name} takes no budget: drop keep_ratio and keep_tokens")
        lacking = [
            parameter.name
            for parameter in self.parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            and parameter.name not in (*_KNOWN, *given)
        ]
        if self.word in lacking and budget is None:
            raise NeedsBudget(f"{name} is made with a budget: give keep_ratio or keep_tokens")
        if lacking := [parameter for parameter in lacking if parameter != self.word]:
            raise TypeError(
                f"{name} needs {', '.join(lacking)}, but a cache is made from {', '.join(_KNOWN)}, a budget, and what "
                f"the target gives, as {name.partition('(')[0]}({lacking[0]}=...)"
            )

    @property
    def wanted(self) -> dict[str, str]:
        """Name the parameters that a run fills in, and how a program writes what it has for each."""
        return {
            name: _KNOWN[name]
            for name, parameter in self.parameters.items()
            if name in _KNOWN and name not in self.given and (name == "config" or parameter.default is parameter.empty)
        }

    def start(self, model: PreTrainedModel, length: int, batch: int, tokenizer: Tokenizer | None) -> Session:
        config = model.config.get_text_config(decoder=True)
        known = dict(zip(_KNOWN, (config, length, batch, batch, model.device, model.dtype), strict=True))
        filled = {name: known[name] for name in self.wanted}
        if self.budget is not None and self.word is not None:
            filled[self.word] = budget_argument(self.word, self.budget, length)
        cache = self.make(**filled, **self.given)
        if not isinstance(cache, Cache):
            kind = type(cache).__name__
            raise ValueError(f"{self.name} made a {kind}, but should make a cache of transformers (transformers.Cache)")
        return Session(model, cache)


def stored_bytes(cache: Any) -> int:
    """Count the bytes of all tensors that a cache reaches: those that it stores, whatever they are called.

    Args:
        cache: any object.

    Returns:
        The bytes, each tensor counted once.

    Example:
        >>> stored_bytes({"keys": torch.zeros(2, 3), "more": [torch.zeros(1)]})
        28
    """
    return sum(tensor.nbytes for tensor in tensors_of(cache))


def tensors_of(cache: Any) -> Iterator[Tensor]:
    """Generate all tensors that a cache reaches, each once; modules and functions are not followed.

    A tensor that wraps others, as quantised ones do, tells the bytes of what it stands for: its parts are what is held.

    Args:
        cache: any object.

    Yields:
        Tensors of any shape.
    """
    todo, done = [cache], set()
    while todo:
        value = todo.pop()
        if id(value) in done:
            continue
        done.add(id(value))
        if is_traceable_wrapper_subclass(value):
            todo += [getattr(value, name) for name in value.__tensor_flatten__()[0]]
        elif isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, (list, tuple, set)):
            todo += value
        elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
            todo += vars(value).values()
