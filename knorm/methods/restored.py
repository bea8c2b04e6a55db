"""A model is given back as it was found: hooks, attributes, submodules and weights that a method put there are gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_modules", "_parameters", "_buffers")


@contextmanager
def restored(model: nn.Module) -> Iterator[list[str]]:
    """Note what a model is made of, and put it back at the end, whatever happens.

    Args:
        model: the model, whose modules are looked at, not their numbers: nothing is copied.

    Yields:
        A list that is empty inside, and afterwards names each attribute that had to be put back, as
        "model.layers.0.self_attn.rotary_emb".

    A method that writes into a weight in place is not undone.
    """
    before = [(name, module, _parts(module)) for name, module in model.named_modules()]
    config = dict(vars(model.config)) if hasattr(model, "config") else {}
    changed: list[str] = []
    try:
        yield changed
    finally:
        for name, module, parts in before:
            changed += [f"{name}.{part}".lstrip(".") for part in _put_back(module, parts)]
        if config and vars(model.config) != config:
            vars(model.config).clear()
            vars(model.config).update(config)
            changed.append("config")


def _parts(module: nn.Module) -> dict[str, Any]:
    parts: dict[str, Any] = {name: dict(vars(module)[name]) for name in _TABLES}
    parts["plain"] = {name: value for name, value in vars(module).items() if name not in _TABLES}
    parts["data"] = {name: value.data for name, value in module._parameters.items() if value is not None}
    return parts


def _put_back(module: nn.Module, parts: dict[str, Any]) -> Iterator[str]:
    for table in _TABLES:
        own = vars(module)[table]
        same = len(own) == len(parts[table]) and all(own.get(n, own) is value for n, value in parts[table].items())
        if not same:
            yield from sorted(map(str, own.keys() ^ parts[table].keys()))
            own.clear()
            own.update(parts[table])
    for name in [name for name in vars(module) if name not in _TABLES and name not in parts["plain"]]:
        delattr(module, name)
        yield name
    for name, value in parts["plain"].items():
        if vars(module).get(name, parts) is not value:
            vars(module)[name] = value
            yield name
    for name, data in parts["data"].items():
        parameter = module._parameters[name]
        if parameter is not None and (parameter.data_ptr() != data.data_ptr() or parameter.shape != data.shape):
            parameter.data = data
            yield name
