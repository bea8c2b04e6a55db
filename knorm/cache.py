"""KnormCache: a transformers cache that compresses itself."""

from __future__ import annotations

import copy
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from knorm.core import compress
from knorm.model_attention import Call, call_of, not_a_row_of_ones
from knorm.model_attention import attention as attention
from knorm.model_attention import attention_through as attention_through  # older timing code asks for it here
from knorm.model_attention import cache_keyword as cache_keyword
from knorm.policy import Policy, whole
from knorm.tensors import refuse_unlike


class KnormLayer(DynamicLayer):
    """Hold what `policy` retains of the tokens that the layer `index` has seen, and their positions in the sequence.

    Attributes:
        keys: [batch, kv_heads, stored, head_dim].
        values: the same.
        seen: tokens fed so far, padding included.
        fresh: the newest of them, stored since something was last evicted: crop reaches as far.
        spare: slots in front that hold padding, by row; None without padding.
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

    def update(
        self, key_states: Tensor, value_states: Tensor, call: Call | None = None, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the new tokens, hand everything to the attention of this call, then compress what stays stored."""
        new = key_states.shape[2]
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
            for all_rows, each in zip((keys, values, kept), part, strict=True):
                all_rows[rows, :, slots - counts[rows[0]] :] = each
        self.keys, self.values, self._kept = keys, values, kept
        self.spare = [slots - count for count in counts]
        self.fresh = 0

    def _budget(self, length: int) -> int:
        return length if self.index in self.policy.skip_layers else self.policy.budget(length)

    def get_seq_length(self) -> int:
        """Count the tokens seen, not the tokens stored: positions continue from here."""
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
    """Hold what a cache costs, in bytes.

    Attributes:
        stored: keys and values that are stored.
        positions: their positions, 8 bytes a token and head.
        full: keys and values of all tokens seen, which a cache without compression would store.
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
    """Compress each layer of a transformers cache after each call, as a policy says.

    The first call is the prompt: a prefill policy compresses after it and never again, a streaming policy after every
    call. Positions continue from the tokens seen. Calls may feed any number of tokens; batches may be selected,
    repeated and reordered (beam search). Padded batches, and skip_layers with several tokens a call or eager attention,
    need `with knorm.attention(model):` around the call.

    Args:
        policy: when and what to evict.

    Raises:
        TypeError: a policy that is no Policy.
        ValueError: from a call, before anything is written: padding or skip_layers outside `attention`; a batch size,
            shape, dtype, device or model other than that of the tokens stored; skipped layers that the model does not
            have; protections larger than the budget; linear attention; a sequence longer than a sliding window.
        RuntimeError: from the call after one that broke off half-way: the layers disagree.

    Example:
        >>> model, tokenizer = load_embedded()
        >>> cache = KnormCache(Policy(0.5))
        >>> ids = tokenizer("The cat sat on the mat.", return_tensors="pt").input_ids
        >>> _ = model(input_ids=ids, **{knorm.cache_keyword(model): cache})
        >>> cache.get_seq_length() > cache.positions(layer=0).shape[2]
        True
    """

    layers: list[KnormLayer]  # type: ignore[assignment]

    def __init__(self, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy={policy!r}, but should be a knorm.Policy, e.g. Policy(keep_ratio=0.5)")
        super().__init__(layers=[])
        self.policy = policy
        self._last = -1  # the layer updated last
        self._call: Call | None = None  # the forward pass under way, inside attention

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values; return what this call attends to, and compress what stays stored."""
        layer_idx = layer_idx if type(layer_idx) is int else whole("layer_idx", layer_idx)
        if layer_idx == 0 or layer_idx >= len(self.layers):
            refuse_unlike(key_states, value_states)
        if layer_idx == 0:
            self._call = self._refuse_call(key_states.shape[2])
        elif not self.layers:
            raise ValueError(f"layer {layer_idx} of an empty cache, but the first call should begin with layer 0")
        elif layer_idx >= len(self.layers) and self.layers[0].seen > key_states.shape[2]:
            raise ValueError(f"layer {layer_idx} is new to a cache of {len(self.layers)} layers: call reset() first")
        while len(self.layers) <= layer_idx:
            self.layers.append(KnormLayer(self.policy, len(self.layers)))
        updated = self.layers[layer_idx].update(key_states, value_states, self._call)
        self._last = layer_idx
        return updated

    def _refuse_call(self, new: int) -> Call | None:
        """Refuse a call that cannot end well before anything is written; what it knows of padding, inside attention."""
        module, mask = _caller()
        call = call_of(module)
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
                raise not_a_row_of_ones(mask)
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
        return call

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
        """Return the positions in the sequence of what `layer` retains: int64 [batch, kv_heads, kept], ascending.

        In a padded batch they count from each row's first token, and padding that fills a row up is -1. Raises
        IndexError for a layer that the cache does not hold.
        """
        if not 0 <= layer < len(self.layers):
            raise IndexError(f"layer={layer}, but the cache holds {len(self.layers)} layers so far")
        positions = self.layers[layer].positions
        if positions is None:
            raise IndexError(f"layer={layer}, but the cache is empty: nothing has been fed since reset()")
        return positions

    def memory(self) -> Memory:
        """Return what the cache costs, in bytes, beside what it would cost without compression."""
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

        The result is exact back to the last eviction. Raises ValueError beyond it, before anything is taken: what a
        compression evicted is gone. For the same reason assisted decoding, which rewinds, is refused.
        """
        if any(_to_remove(tokens, layer.seen) for layer in self.layers):
            copies = [copy.copy(layer) for layer in self.layers]
            for layer in copies:
                layer.crop(tokens)
            self.layers = copies
