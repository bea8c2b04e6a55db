"""KnormCache: a transformers cache that compresses itself; attention for what transformers' one mask cannot say.

Transformers makes one mask for all layers, from the length of the first. Where layers differ in length (skip_layers),
or rows in how many tokens are padding, that mask is wrong: `with attention(model):` gives every layer its own.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from knorm.core import compress
from knorm.policy import Policy

# (module, query, key, value, attention_mask, **keywords) -> (output [batch, queries, heads, head_dim], weights or None)
Attention = Callable[..., tuple[Tensor, Tensor | None]]

_attention: ContextVar[Attention] = ContextVar("knorm_attention")
_switching = threading.RLock()


def _call_attention(module: nn.Module, *states: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
    try:
        attention = _attention.get()
    except LookupError:
        raise RuntimeError(
            "attention implementation 'knorm' was called outside knorm: "
            "call model.set_attn_implementation('sdpa') first"
        ) from None
    return attention(module, *states, **keywords)


class _Call:
    """What one forward pass inside `attention(model)` knows of padding.

    own     the attention implementation that the model came with
    leads   padding tokens at the left of each row; None: there are none
    total   tokens that the attention mask speaks of; None: there is no mask
    spare   for each layer, how many of its slots in front hold padding, by row
    """

    def __init__(self, own: str) -> None:
        self.own = own
        self.leads: list[int] | None = None
        self.total: int | None = None
        self.spare: dict[int, list[int] | None] = {}


_call: ContextVar[_Call | None] = ContextVar("knorm_call", default=None)


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


def _mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """The attention makes its own mask. Without an entry here, transformers would drop padding in silence."""
    call = _call.get()
    if call is not None:
        call.leads = None if attention_mask is None else _leads(attention_mask)
        call.total = None if attention_mask is None else attention_mask.shape[1]
        call.spare = {}


AttentionInterface.register("knorm", _call_attention)
AttentionMaskInterface.register("knorm", _mask)


@contextmanager
def attention_through(model: PreTrainedModel, attention: Attention | None) -> Iterator[None]:
    """Let the model attend through `attention` (None: PyTorch's SDPA); its own setting comes back whatever happens.

    The setting lies in the model's configuration, so one thread at a time holds it.
    """
    with _switching:
        own = model.config._attn_implementation
        token = _attention.set(attention) if attention else None
        try:
            model.set_attn_implementation("knorm" if attention else "sdpa")
            yield
        finally:
            model.set_attn_implementation(own)
            if token:
                _attention.reset(token)


def _not_a_row_of_ones(mask: Tensor) -> ValueError:
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
    call = _call.get()
    assert call is not None
    if attention_mask is not None:
        raise _not_a_row_of_ones(attention_mask)
    queries, slots = query.shape[2], key.shape[2]
    spare = call.leads and [max(0, lead - (call.total or slots) + slots) for lead in call.leads]
    spare = call.spare.get(getattr(module, "layer_idx", -1), spare)
    mask = None
    if spare or call.own == "eager" or 1 < queries < slots:
        slot = torch.arange(slots, device=key.device)
        now = slot[slots - queries :, None]
        mask = (slot <= now)[None, None]
        if spare:  # a padding token sees itself, so that its row of the softmax is not empty
            mask = mask & (slot >= torch.tensor(spare, device=key.device)[:, None, None, None]) | (slot == now)
    if call.own == "sdpa":
        return AttentionInterface()["sdpa"](module, query, key, value, mask, **keywords)
    least = torch.finfo(query.dtype).min
    added = torch.zeros(mask.shape, dtype=query.dtype, device=key.device).masked_fill_(~mask, least)  # type: ignore
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, added, **keywords)


@contextmanager
def attention(model: PreTrainedModel) -> Iterator[None]:
    """Give each layer of the model a mask of its own: for padded batches, and for skip_layers.

        with knorm.attention(model):
            model.generate(**batch, past_key_values=KnormCache(policy))

    The model's own attention, "sdpa" or "eager", runs under that mask, and is set again at the end. Inside, a
    KnormCache sees the padding: it goes first, is never attended to, and every row comes out as it would alone. Other
    caches, and calls without one, work as before. Raises ValueError for other implementations, and inside for padding
    that is not on the left, before anything is written to a cache.
    """
    own = model.config._attn_implementation
    if own not in ("sdpa", "eager"):
        raise ValueError(
            f"the model attends by {own!r}, but should by 'sdpa' or 'eager': model.set_attn_implementation()"
        )
    token = _call.set(_Call(own))
    try:
        with attention_through(model, _attend_last):
            yield
    finally:
        _call.reset(token)


def cache_keyword(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache: "past_key_values", or "cache" in newer releases of transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class KnormLayer(DynamicLayer):
    """One layer's cache: what is retained of the tokens seen, and their positions in the sequence.

    keys, values   [batch, kv_heads, stored, head_dim]
    seen           tokens fed so far, padding included
    fresh          the newest of them, stored since something was last evicted: crop reaches as far
    spare          slots in front that hold padding, by row; None: there are none
    """

    is_sliding = False
    is_croppable = False
    keys: Any
    values: Any

    def __init__(self, policy: Policy, index: int) -> None:
        super().__init__()
        self.policy, self.index = policy, index
        self._forget()

    def _forget(self) -> None:
        self.seen = self.fresh = 0
        self.spare: list[int] | None = None
        self.leads: list[int] | None = None  # of the sequence, by row
        self._kept: Tensor | None = None  # positions of what was left when something was last evicted

    @property
    def stored(self) -> int:
        return 0 if self.seen == 0 or self.keys is None else self.keys.shape[2]

    @property
    def positions(self) -> Tensor | None:
        """int64 [batch, kv_heads, stored], ascending; counted from each row's first token, -1 for padding."""
        if self.seen == 0 or self.keys is None:
            return None
        positions = torch.arange(self.seen - self.fresh, self.seen, device=self.keys.device)
        positions = positions.expand(*self.keys.shape[:2], -1)
        if self.leads is not None:
            leads = torch.tensor(self.leads, device=self.keys.device)[:, None, None]
            positions = (positions - leads).clamp(min=-1)
        return positions if self._kept is None else torch.cat([self._kept, positions], dim=-1)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the new tokens, hand everything to the attention of this call, then compress what stays stored."""
        new, call = key_states.shape[2], _call.get()
        if self.seen == 0:
            self.leads = call.leads if call else None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # Copies: what a model gives may be a view of something larger.
            self.keys, self.values = key_states.clone(), value_states.clone()
        else:
            self.keys, self.values = self._append(key_states, value_states)
        keys, values = self.keys, self.values
        if self.leads is not None:
            before = self.spare or [0] * len(self.leads)
            self.spare = [
                had + min(new, max(0, lead - self.seen)) for had, lead in zip(before, self.leads, strict=True)
            ]
        if call:
            call.spare[self.index] = self.spare
        self.seen += new
        self.fresh += new
        if self.seen == new or self.policy.protocol == "streaming":
            self._compress()
        return keys, values

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Both or neither; torch.cat compares the shapes, and would let dtypes pass."""
        held_keys, held_values = self.keys, self.values
        if keys.dtype is held_keys.dtype and values.dtype is held_values.dtype:
            try:
                return torch.cat([held_keys, keys], dim=2), torch.cat([held_values, values], dim=2)
            except RuntimeError as error:
                if "memory" in str(error):
                    raise
        raise ValueError(
            f"keys {list(keys.shape)} {keys.dtype}, values {list(values.shape)} {values.dtype} on {keys.device} for "
            f"layer {self.index}, but the cache holds keys {list(held_keys.shape)} {held_keys.dtype}, values "
            f"{list(held_values.shape)} {held_values.dtype} on {held_keys.device}, of another batch or model: "
            "call reset() before another sequence"
        ) from None

    def _compress(self) -> None:
        stored = self.keys.shape[2]
        if self.spare is not None:
            self._compress_rows(stored, [stored - spare for spare in self.spare])
        elif stored >= self.policy.prune_after and self._budget(stored) < stored:
            kept = compress(self.keys, self.values, self.policy, positions=self.positions, layer=self.index)
            self.keys, self.values, self._kept = kept
            self.fresh = 0

    def _compress_rows(self, stored: int, real: list[int]) -> None:
        """Each row as it would be alone; rows that keep fewer tokens than others have padding in front."""
        counts = [self._budget(length) if length else 0 for length in real]
        slots, positions = max(counts), self.positions
        if slots == stored or positions is None:
            return
        keys, values = (x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in (self.keys, self.values))
        kept = positions.new_full((*positions.shape[:2], slots), -1)
        for length in sorted(set(real) - {0}):
            rows = [row for row, each in enumerate(real) if each == length]
            parts = [x[rows][:, :, stored - length :] for x in (self.keys, self.values, positions)]
            part = compress(parts[0], parts[1], self.policy, positions=parts[2], layer=self.index)
            for whole, each in zip((keys, values, kept), part, strict=True):
                whole[rows, :, slots - counts[rows[0]] :] = each
        self.keys, self.values, self._kept = keys, values, kept
        self.spare = [slots - count for count in counts]
        self.fresh = 0

    def _budget(self, length: int) -> int:
        return length if self.index in self.policy.skip_layers else self.policy.budget(length)

    def get_seq_length(self) -> int:
        """Tokens seen, not tokens stored: positions continue from here."""
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset of the mask: the stored tokens count as the newest of those seen, as in a sliding window.

        Before 5.3, transformers gives the queries' positions in place of their number.
        """
        queries = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.stored + queries, self.seen - self.stored

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen:
            self.batch_select_indices(
                torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats)
            )

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.seen:
            return
        self.keys, self.values = self.keys[indices], self.values[indices]
        if self._kept is not None:
            self._kept = self._kept[indices]
        if self.leads is not None:
            rows = torch.arange(len(self.leads))[indices.cpu()].tolist()
            self.leads = [self.leads[row] for row in rows]
            self.spare = [self.spare[row] for row in rows] if self.spare else None

    def crop(self, tokens: int) -> None:
        """Take back the newest tokens; see KnormCache.crop, which looks at all layers first."""
        remove = _to_remove(tokens, self.seen)
        if remove > self.fresh:
            raise ValueError(
                f"crop would take back {remove} tokens, but layer {self.index} has evicted some since: only the newest "
                f"{self.fresh} can go. Compressed caches do not rewind; feed the sequence again after reset()"
            )
        if remove == self.seen:
            self.reset()
        elif remove:
            if self.leads is not None and self.seen - remove <= max(self.leads):
                raise ValueError(f"crop would take back {remove} tokens, all of some row's: reset() empties the cache")
            self.keys, self.values = self.keys[:, :, :-remove], self.values[:, :, :-remove]
            self.seen -= remove
            self.fresh -= remove


def _to_remove(tokens: int, seen: int) -> int:
    """How many tokens crop(tokens) takes back of those seen: -n takes n, n > 0 leaves n (as older transformers)."""
    return min(-tokens, seen) if tokens <= 0 else max(0, seen - tokens)


class Memory(NamedTuple):
    """What a cache costs, in bytes.

    stored      keys and values that are stored
    positions   their positions, 8 bytes a token and head
    full        keys and values of all tokens seen, which a cache without compression would store
    """

    stored: int
    positions: int
    full: int


class _Caller(NamedTuple):
    module: nn.Module | None
    mask: Tensor | None


def _caller() -> _Caller:
    """The attention module that is updating the cache, and the mask that transformers has made for it.

    Neither is among an update's arguments, and after it is too late: a wrong mask is silent, or breaks off half-way.
    """
    frame = sys._getframe(2)
    for _ in range(8):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and hasattr(module, "config"):
            mask = frame.f_locals.get("attention_mask")
            return _Caller(module, mask if isinstance(mask, Tensor) else None)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return _Caller(None, None)


class KnormCache(Cache):
    """A transformers cache that compresses each layer after each call, as its policy says.

        model.generate(**inputs, past_key_values=KnormCache(Policy(0.5, protocol="streaming", prune_after=512)))

    The first call is the prompt: a prefill policy compresses after it and never again, a streaming policy after every
    call. Positions continue from the tokens seen. Calls may feed any number of tokens; batches may be selected,
    repeated and reordered (beam search). Padded batches, and skip_layers with several tokens a call or eager attention,
    want `with knorm.attention(model):` around the call; without it they raise ValueError. So do, before anything is
    written: a batch size, shape, dtype, device or model other than that of the tokens stored, a policy that skips
    layers which the model does not have, protections larger than the budget, sliding windows once a sequence outgrows
    them, and linear attention. After a call that broke off half-way the next raises RuntimeError: the layers disagree.
    """

    layers: list[KnormLayer]  # type: ignore[assignment]

    def __init__(self, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy={policy!r}, but should be a knorm.Policy, e.g. Policy(keep_ratio=0.5)")
        super().__init__(layers=[])
        self.policy = policy
        self._last = -1  # the layer updated last

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == 0:
            self._refuse_call(key_states.shape[2])
        elif layer_idx >= len(self.layers) and self.layers[0].seen > key_states.shape[2]:
            raise ValueError(f"layer {layer_idx} is new to a cache of {len(self.layers)} layers: call reset() first")
        while len(self.layers) <= layer_idx:
            self.layers.append(KnormLayer(self.policy, len(self.layers)))
        updated = self.layers[layer_idx].update(key_states, value_states)
        self._last = layer_idx
        return updated

    def _refuse_call(self, new: int) -> None:
        """Refuse a call that cannot end well before anything is written."""
        call, (module, mask) = _call.get(), _caller()
        if module is not None:
            self._refuse_model(module.config, self.get_seq_length() + new)
        if self._last < len(self.layers) - 1:
            raise RuntimeError(
                f"the call before broke off after layer {self._last} of {len(self.layers)}, so that layers disagree: "
                "call reset(), and feed the sequence again"
            )
        first = self.layers[0] if self.layers else KnormLayer(self.policy, 0)
        if call is None:
            self._refuse_without_attention(first, new, mask)
        else:
            if mask is not None:
                raise _not_a_row_of_ones(mask)
            if call.total is not None and call.total != first.seen + new:
                raise ValueError(
                    f"attention_mask speaks of {call.total} tokens, but should of all {first.seen + new} so far: "
                    f"{first.seen} in the cache and {new} new ones"
                )
            if first.seen and call.total is not None and call.leads != first.leads:
                raise ValueError(
                    f"attention_mask has {call.leads or 0} padding tokens in its rows, but the rows in the cache began "
                    f"with {first.leads or 0}"
                )
        if first.seen == 0:  # later calls of a streaming policy can always afford what it protects
            leads = call.leads if call else None
            for lead in {0} if leads is None else set(leads):
                if new > lead:
                    self.policy.budget(new - lead)

    def _refuse_without_attention(self, first: KnormLayer, new: int, mask: Tensor | None) -> None:
        here = "call the model inside `with knorm.attention(model):`"
        lengths = sorted({layer.stored for layer in self.layers})
        if first.leads is not None:
            raise ValueError(f"the batch in the cache is padded: {here}")
        if len(lengths) > 1 and (new > 1 or mask is not None):
            raise ValueError(
                f"{f'{new} tokens at once' if new > 1 else 'a mask'} for layers that store {lengths[0]} to "
                f"{lengths[-1]} tokens, but transformers makes one mask for all layers: {here}"
            )
        if first.seen == 0 and mask is not None and mask.ndim == 4:
            last = mask[..., -1, -new:]  # the newest token sees all that are none of padding
            if not (last if mask.dtype == torch.bool else last == 0).all():
                raise ValueError(f"the batch is padded, which a cache alone does not see: {here}")

    def _refuse_model(self, config: Any, length: int) -> None:
        layers = getattr(config, "num_hidden_layers", None)
        if layers is not None and self.policy.skip_layers and self.policy.skip_layers[-1] >= layers:
            raise ValueError(
                f"skip_layers={self.policy.skip_layers}, but the model has {layers} layers: 0 to {layers - 1}"
            )
        if layers is not None and self.layers and layers != len(self.layers):
            raise ValueError(
                f"the model has {layers} layers, but the cache holds {len(self.layers)}: it is another model's, or a "
                "call broke off. Call reset() first"
            )
        kinds = set(getattr(config, "layer_types", None) or ())
        if other := sorted(kinds - {"full_attention", "sliding_attention"}):
            raise ValueError(
                f"the model has {', '.join(other)} layers, but only attention to a cache of keys compresses"
            )
        window = getattr(config, "sliding_window", None)
        if window is not None and (not kinds or "sliding_attention" in kinds) and length > window:
            raise ValueError(
                f"{length} tokens, but the model attends to a sliding window of {window}: beyond it, slots and "
                "positions no longer agree, and a compressed cache would attend to other tokens than it should"
            )

    def positions(self, layer: int) -> Tensor:
        """Positions in the sequence of what the layer retains: int64 [batch, kv_heads, kept], ascending.

        In a padded batch they count from each row's first token, and padding that fills a row up is -1.
        """
        if not 0 <= layer < len(self.layers):
            raise IndexError(f"layer={layer}, but the cache holds {len(self.layers)} layers so far")
        positions = self.layers[layer].positions
        if positions is None:
            raise IndexError(f"layer={layer}, but the cache is empty: nothing has been fed since reset()")
        return positions

    def memory(self) -> Memory:
        """What the cache costs, in bytes, beside what it would without compression."""
        stored = positions = full = 0
        for layer in self.layers:
            if layer.seen:
                size = layer.keys.nbytes + layer.values.nbytes
                stored += size
                full += size // layer.stored * layer.seen
                positions += 0 if layer._kept is None else layer._kept.nbytes
        return Memory(stored, positions, full)

    def reset(self) -> None:
        """Forget the sequence; the next call is a prompt."""
        self.layers, self._last = [], -1

    def crop(self, tokens: int) -> None:
        """Take back the newest tokens: crop(-n) takes n, crop(n) leaves n of those seen, crop(0) does nothing.

        Exact back to the last eviction. Raises ValueError beyond it, before anything is taken: what a compression
        evicted is gone. For the same reason assisted decoding, which rewinds, is refused.
        """
        if any(_to_remove(tokens, layer.seen) for layer in self.layers):
            copies = [copy.copy(layer) for layer in self.layers]
            for layer in copies:
                layer.crop(tokens)
            self.layers = copies
