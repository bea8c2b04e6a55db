"""Which tensors can be computed with: numbers in rows, not the promise of some."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FUNCTORCH: Any = torch._C._functorch  # type: ignore[attr-defined,unused-ignore]


def refuse_unreadable(**tensors: object) -> None:
    """Refuse what is no tensor, and tensors whose numbers cannot be read one by one.

    Args:
        tensors: by the name that the error calls them.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: it is meta, fake, sparse, nested, quantised, or of another kind without rows of numbers.

    Example:
        >>> refuse_unreadable(keys=torch.zeros(1, device="meta"))
        Traceback (most recent call last):
        ValueError: keys is a meta tensor, but should be a dense tensor with numbers in it
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} {type(tensor).__name__}, but should be a torch.Tensor")
        kind = None
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # fake, masked, jagged, distributed ...
            kind = type(tensor).__name__
        elif tensor.is_nested:
            kind = "nested tensor"
        elif tensor.layout is not torch.strided:
            kind = f"{str(tensor.layout).removeprefix('torch.')} tensor"
        elif tensor.is_meta:
            kind = "meta tensor"
        elif tensor.is_quantized:
            kind = "quantised tensor"
        if kind:
            raise ValueError(f"{name} is a {kind}, but should be a dense tensor with numbers in it")


def alike(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors have the same shape and numbers, and NaN in the same places.

    Args:
        first: numbers of any dtype, of any shape.
        second: those they are compared with, of any shape.

    Returns:
        torch.equal, where NaN equals NaN.

    Example:
        >>> alike(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]))
        True
    """
    if torch.equal(first, second):
        return True
    return first.shape == second.shape and bool(((first == second) | (first.isnan() & second.isnan())).all())


def refuse_mapped(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that `torch.vmap` maps over, where numbers decide what is done.

    Args:
        name: what the error calls the tensor.
        tensor: any tensor; derivatives may be taken of it.

    Raises:
        ValueError: the tensor stands for many, whose numbers differ.

    Example:
        >>> refuse_mapped("keys", torch.zeros(1))
    """
    while _FUNCTORCH.is_functorch_wrapped_tensor(tensor):
        if _FUNCTORCH.is_batchedtensor(tensor):
            raise ValueError(
                f"torch.vmap maps over {name}, but each may retain other tokens: make the mapped dimension part of the "
                f"batch, as in {name}.flatten(0, 1)"
            )
        tensor = _FUNCTORCH.get_unwrapped(tensor)


def refuse_unlike(keys: Tensor, values: Tensor) -> None:
    """Refuse keys and values that no model gives to a cache.

    Args:
        keys: to be floating [batch, kv_heads, tokens, head_dim].
        values: the same; their head_dim may be another.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: they are of another kind, shape or dtype.

    Example:
        >>> refuse_unlike(torch.zeros(1, 2, 6, 4), torch.zeros(1, 2, 6, 8))
    """
    refuse_unreadable(keys=keys, values=values)
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3] or not keys.is_floating_point():
        raise ValueError(
            f"keys {list(keys.shape)} {keys.dtype} and values {list(values.shape)} {values.dtype}, but should be "
            "floating [batch, kv_heads, tokens, head_dim], alike but for head_dim"
        )
