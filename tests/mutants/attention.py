from __future__ import annotations

import torch

from knorm import KnormCache, Policy
from mutants import PROMISES, mutant
from mutants.parts import WindowCache, WindowLayer


class BackwardsLayer(WindowLayer):
    def update(self, key_states, value_states, *_, **__):
        if self.seen and self.keep_ratio < 1:
            key_states, value_states = key_states.flip(2), value_states.flip(2)
        return super().update(key_states, value_states)


@mutant("masked_attention", "differ in their logits", "rajveer43/VeloxQuant-MLX #137", surface="make_cache")
class FreedSlotsFromTheBack(WindowCache):
    """After an eviction new tokens go to the freed slots, the last one first: slots and causal mask are out of step."""

    layer = BackwardsLayer


@mutant("masked_attention", "differ in their logits", "multi-token non-causal masks", surface="make_cache", **PROMISES)
class MaskFromSlotZero(KnormCache):
    """The mask begins at position 0 and not at the first stored token: several queries see one another's future."""

    def __init__(self, keep_ratio):
        super().__init__(Policy(keep_ratio))

    def get_mask_sizes(self, *arguments):
        return super().get_mask_sizes(*arguments)[0], 0


class ZeroingLayer(WindowLayer):
    def update(self, key_states, value_states, *_, **__):
        keys, values = super().update(key_states, value_states)
        if self.seen == key_states.shape[2] and self.keep_ratio < 1:
            self.keys, self.values = (torch.cat([x[:, :, :-2] * 0, x[:, :, -2:]], 2) for x in (keys, values))
        return keys, values


@mutant("masked_attention", "holds a key", "fake keys, as kvpress masks heads", surface="make_cache")
class ZeroesTheEvicted(WindowCache):
    """Evicted tokens are overwritten with zeros, which are attended to."""

    layer = ZeroingLayer


class MergingLayer(WindowLayer):
    def update(self, key_states, value_states, *_, **__):
        if self.seen and self.keep_ratio < 1:
            self.values[:, :, 1] = self.values[:, :, :2].mean(2)
        return super().update(key_states, value_states)


@mutant("slot_order", "slots reversed", surface="make_cache", merges_values=True)
class MergesNeighbouringSlots(WindowCache):
    """Before a token is added, the oldest value is merged into its neighbour's, whichever slot that is."""

    layer = MergingLayer
