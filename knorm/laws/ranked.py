"""What a method ranks: the numbers that torch is asked to sort, or to take the largest of, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

RANKING = {"topk", "sort", "argsort", "msort", "kthvalue", "median", "argmax", "argmin", "max", "min", "quantile"}


class Ranked(TorchFunctionMode):
    """Watch what is ranked inside a `with` block.

    Calls of torch are watched as they are written, which takes a third of the time that watching its operations does;
    what torch itself has written in Python is watched by its operations.

    Attributes:
        nans: how many of the numbers that were first ranked with one among them are none; 0 where all are numbers.
        numbers: how many numbers that were.
        operation: the function of torch that ranked them.

    Example:
        >>> import torch
        >>> with Ranked() as ranked:
        ...     _ = torch.tensor([1.0, torch.nan]).topk(1)
        >>> ranked.nans, ranked.numbers, ranked.operation
        (1, 2, 'topk')
    """

    def __init__(self) -> None:
        super().__init__()
        self.nans, self.numbers, self.operation = 0, 0, ""
        self._below = _Below(self.note)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if isinstance(func, FunctionType):
            with self._below:
                return func(*args, **(kwargs or {}))
        self.note(getattr(func, "__name__", ""), args, kwargs)
        return func(*args, **(kwargs or {}))

    def note(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> None:
        """Note a call, if it is the first that ranks what is no number.

        Args:
            name: of the function.
            args: that it is called with.
            kwargs: likewise.
        """
        if name in RANKING and not self.nans and args and isinstance(args[0], Tensor) and _ranks(name, args, kwargs):
            self.nans = int(args[0].isnan().sum()) if args[0].is_floating_point() else 0
            self.numbers, self.operation = args[0].numel(), name


class _Below(TorchDispatchMode):
    def __init__(self, note: Callable[..., None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.note(func.overloadpacket.__name__, args, kwargs)
        return func(*args, **(kwargs or {}))


def _ranks(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> bool:
    """Tell whether places are asked for: max() of all numbers, or of two tensors, says nothing of places."""
    return name not in ("max", "min") or (len(args) > 1 and isinstance(args[1], int)) or "dim" in (kwargs or {})
