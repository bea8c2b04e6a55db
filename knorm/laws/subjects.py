"""What checks are run on: a compressor behind one signature, its calls recorded; and what can be made of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import DynamicLayer

from knorm.laws.registry import Malformed
from knorm.laws.results import shortened
from knorm.laws.traits import Traits
from knorm.methods.method import Method


class Kept(NamedTuple):
    """Hold what a compressor returned.

    Attributes:
        keys: [batch, kv_heads, kept, head_dim].
        values: the same.
        mask: bool [batch, kv_heads, kept], False where a shorter head is filled up; None where all is real.

    Example:
        >>> Kept(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)).mask is None
        True
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


class Call(NamedTuple):
    """Record one call: the arguments as they were given.

    Attributes:
        keys: a copy, [batch, kv_heads, length, head_dim].
        values: the same.
        keep_ratio: the share to keep.
        layer: index of the layer; None where none was named.
        strides: of the keys and of the values that were given, in elements.
    """

    keys: Tensor
    values: Tensor
    keep_ratio: float
    layer: int | None
    strides: tuple[tuple[int, ...], tuple[int, ...]]


class Raised(Malformed):
    """Say that the compressor raised where it should have answered."""


Compress = Callable[..., Any]
MakeCache = Callable[[float], TransformersCache]
OpenCache = Callable[[float, PreTrainedModel, int, int], TransformersCache]
Evaluate = Callable[[PreTrainedModel, Tensor, int, float], Tensor]


@dataclass
class Subject:
    """Put a target behind one signature for each surface.

    Attributes:
        name: what reports call it.
        traits: what it promises.
        compress: (keys, values, keep_ratio[, layer]) -> keys, values[, mask]; None where it only is an evaluator.
        make_cache: keep_ratio -> a transformers cache that compresses itself; None for a compressor of tensors.
        open_cache: (keep_ratio, model, length, rows) -> a transformers cache that needs to know these; None where
            make_cache does.
        method: keep_ratio -> a methods.Method, opened on a model; None for what a cache can be put around.
        budgeted: True where it is given a ratio; False for a method with a budget of its own, and for a cache that
            keeps everything.
        acts_late: True where it acts while tokens are decoded.
        eager: True where it reads attention weights, which only eager attention has.
        stands_in: True where it reads weights of others, for which stand-ins are given: results say so.
        evaluate: (model, input_ids, prompt_length, keep_ratio) -> NLL [batch, T-1], for an evaluator.
        code: lines of Python that import the target and define compress(keys, values, keep_ratio).
        opens: lines that import the target and define opened(keep_ratio, length, rows), which makes a cache of it; of a
            press, lines that make `press`.
        shows: lines that show what the check that runs found, for the program that reproduces it (laws.scripts).
        calls: the calls of the check that runs, for the snippet that reproduces it.
        runs: what attention saw, by reading.
        evicted: True once a call of the check that runs evicted something.
        announce: is called with the arguments in words before each call, to say what was tried when a process died.

    Example:
        >>> subject = Subject("first tokens", Traits(), compress=lambda k, v, ratio: (k[:, :, :1], v[:, :, :1]))
        >>> subject(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0.3).keys.shape
        torch.Size([1, 1, 1, 4])
    """

    name: str
    traits: Traits
    compress: Compress | None = None
    make_cache: MakeCache | None = None
    evaluate: Evaluate | None = None
    code: str = ""
    open_cache: OpenCache | None = None
    method: Callable[[float], Method] | None = None
    budgeted: bool = True
    acts_late: bool = False
    eager: bool = False
    stands_in: bool = False
    opens: str = ""
    shows: str = ""
    calls: list[Call] = field(default_factory=list)
    runs: dict[Any, Any] = field(default_factory=dict)
    evicted: bool = False
    announce: Callable[[str], None] = lambda _: None

    def __call__(self, keys: Tensor, values: Tensor, keep_ratio: float, layer: int | None = None) -> Kept:
        """Compress copies, so that what one check finds does not depend on what another's call wrote."""
        return self.raw(keys.clone(), values.clone(), keep_ratio, layer)

    def raw(self, keys: Tensor, values: Tensor, keep_ratio: float, layer: int | None = None) -> Kept:
        """Compress the given tensors themselves, not copies.

        Args:
            keys: floating [batch, kv_heads, length, head_dim].
            values: the same.
            keep_ratio: the share to retain.
            layer: index of the layer, for a compressor that takes one.

        Returns:
            What the compressor retained.

        Raises:
            Raised: the compressor raised an exception.
            Malformed: it returned what is no compressed cache.
        """
        assert self.compress is not None
        strides = keys.stride(), values.stride()
        self.calls.append(Call(keys.detach().clone(), values.detach().clone(), keep_ratio, layer, strides))
        given = f"keys {list(keys.shape)} {str(keys.dtype).removeprefix('torch.')} at ratio {keep_ratio}"
        self.announce(given)
        if layer is None and self.traits.skip_layers:  # one that is compressed
            layer = next(i for i in range(len(self.traits.skip_layers) + 1) if i not in self.traits.skip_layers)
        more = {} if layer is None or not takes_layer(self.compress) else {"layer": layer}
        try:
            result = self.compress(keys, values, keep_ratio, **more)
        except (Exception, SystemExit) as error:
            raise Raised(f"{in_words(error)} [{given}]") from error
        kept = _kept(result, keys, values, given)
        if (kept.keys.isnan().any() or kept.values.isnan().any()) and _finite(self.calls[-1]):
            raise Malformed(f"shape: returned NaN, but what was given is finite [{given}]")
        self.evicted |= kept.keys.shape[2] < keys.shape[2] or (kept.mask is not None and not bool(kept.mask.all()))
        return kept

    @property
    def is_to_evict(self) -> bool:
        """Tell whether it is to evict: a cache without a budget may keep everything."""
        return self.traits.evicts and (self.budgeted or self.method is not None)

    def again(self) -> Subject:
        """Forget what was read.

        Returns:
            The same subject, which has read nothing yet.
        """
        return replace(self, runs={}, calls=[])

    @property
    def has_cache(self) -> bool:
        """Tell whether it is a transformers cache."""
        return self.make_cache is not None or self.open_cache is not None

    def cache(self, keep_ratio: float, model: PreTrainedModel, length: int = 64, rows: int = 1) -> TransformersCache:
        """Make a transformers cache: the target's own, or one around its compressor.

        Args:
            keep_ratio: the share to retain.
            model: the model that it is for.
            length: how many tokens it must have room for.
            rows: how many rows.

        Returns:
            An empty cache.
        """
        if self.open_cache:
            return self.open_cache(keep_ratio, model, length, rows)
        return self.make_cache(keep_ratio) if self.make_cache else CompressingCache(self, keep_ratio)


def in_words(error: BaseException) -> str:
    """Return the type and the text of `error`, even where making the text fails; beyond 4,000 characters it is cut."""
    try:
        return shortened(f"{type(error).__name__}: {error}", 4000)
    except Exception:
        return f"{type(error).__name__}, which cannot say what it is"


def takes_layer(compress: Compress) -> bool:
    """Tell whether the function `compress` takes layer=."""
    try:
        return "layer" in inspect.signature(compress).parameters
    except (TypeError, ValueError):
        return False


def _describe(result: object) -> str:
    if isinstance(result, Tensor):
        return f"{str(result.dtype).removeprefix('torch.')} {list(result.shape)}"
    if isinstance(result, (tuple, list)):
        return f"{type(result).__name__} of {', '.join(map(_describe, result)) or 'nothing'}"
    return f"{type(result).__name__} {str(result)[:60]!r}" if result is not None else "None"


def _finite(call: Call) -> bool:
    return bool(call.keys.isfinite().all() and call.values.isfinite().all())


def _kept(result: Any, keys: Tensor, values: Tensor, given: str) -> Kept:
    should = "should return (keys, values), each a floating tensor [batch, kv_heads, kept, head_dim]"
    if not isinstance(result, (tuple, list)) or len(result) < 2 or not all(isinstance(x, Tensor) for x in result[:2]):
        raise Malformed(f"shape: returned {_describe(result)}, but {should} [{given}]")
    got, mask = (result[0], result[1]), result[2] if len(result) > 2 else None
    fits = all(
        x.ndim == 4 and x.is_floating_point() and x.shape[:2] == y.shape[:2] and x.shape[3] == y.shape[3]
        for x, y in zip(got, (keys, values), strict=True)
    )
    if not fits or got[0].shape[2] != got[1].shape[2]:
        raise Malformed(
            f"shape: returned keys {_describe(got[0])} and values {_describe(got[1])} for keys {list(keys.shape)} and "
            f"values {list(values.shape)}, but should keep batch, heads and width, and as many values as keys [{given}]"
        )
    if not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
        mask = None  # knorm's own third is the positions
    elif mask.shape != got[0].shape[:3]:
        raise Malformed(f"shape: returned a mask {list(mask.shape)}, but should be {list(got[0].shape[:3])} [{given}]")
    return Kept(*got, mask)


class CompressingLayer(DynamicLayer):
    """Wrap a compressor of tensors as one layer of a transformers cache.

    Compresses after the first call, or after each where it then holds `streaming_from` tokens. Positions continue from
    the tokens seen.

    Args:
        compress: (keys, values, keep_ratio, layer) -> Kept.
        keep_ratio: given to it.
        streaming_from: compress after every call that leaves so many tokens; None for the first call only.
        index: of the layer.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, compress: Compress, keep_ratio: float, streaming_from: int | None, index: int) -> None:
        super().__init__()
        self.compress, self.keep_ratio, self.streaming_from, self.index = compress, keep_ratio, streaming_from, index
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        first, self.seen = self.seen == 0, self.seen + key_states.shape[2]
        if first if self.streaming_from is None else keys.shape[2] >= self.streaming_from:
            kept = self.compress(keys, values, self.keep_ratio, self.index)
            if kept.mask is not None:
                raise Malformed("a ragged cache has no rectangular form")
            self.keys, self.values = kept.keys, kept.values
        return keys, values

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        queries = query_length if isinstance(query_length, int) else query_length.shape[0]
        stored = self.keys.shape[2] if self.keys is not None and self.seen else 0
        return stored + queries, self.seen - stored

    def crop(self, *_: Any) -> None:
        raise NotImplementedError("a compressed cache cannot be cropped: the tokens that it evicted are gone")

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.seen = False, 0


class CompressingCache(TransformersCache):
    """Wrap a compressor of tensors as a transformers cache.

    Args:
        compress: as CompressingLayer takes it.
        keep_ratio: given to it.
        streaming_from: as CompressingLayer takes it.
    """

    def __init__(self, compress: Compress, keep_ratio: float, *, streaming_from: int | None = None) -> None:
        super().__init__(layers=[])
        self.make = lambda index: CompressingLayer(compress, keep_ratio, streaming_from, index)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        while len(self.layers) <= layer_idx:
            self.layers.append(self.make(len(self.layers)))
        return super().update(key_states, value_states, layer_idx)
