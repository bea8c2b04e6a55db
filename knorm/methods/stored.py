"""Bytes that a cache stores, whatever it is made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def stored_bytes(cache: Any) -> int:
    """Count the bytes of all tensors that a cache reaches: those that it stores, whatever they are called."""
    todo, done, tensors = [cache], set(), 0
    while todo:
        value = todo.pop()
        if id(value) in done:
            continue
        done.add(id(value))
        if isinstance(value, Tensor):
            tensors += value.nbytes
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, (list, tuple, set)):
            todo += value
        elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
            todo += vars(value).values()
    return tensors
