from __future__ import annotations

import random
from types import SimpleNamespace

import torch

from knorm import KnormCache, Policy
from knorm.methods.method import Method, Session
from mutants import PROMISES, mutant
from mutants.parts import TurnedCache, TurnedLayer, WindowCache, WindowLayer, everywhere


class ShortLayer(WindowLayer):
    def update(self, key_states, value_states, *_, **__):
        keys, values = super().update(key_states, value_states)
        if self.keep_ratio < 1:
            keys.new_zeros(*keys.shape[:2], max(32, self.stored), keys.shape[3])[:, :, : keys.shape[2]].copy_(keys)
        return keys, values


@mutant("runs", "raised RuntimeError", surface="make_cache")
class RoomForThirtyTwo(WindowCache):
    """Its buffer has room for a prompt of 32 tokens, and nobody looks."""

    layer = ShortLayer


class ZeroingLayer(WindowLayer):
    def update(self, key_states, value_states, *_, **__):
        keys, values = super().update(key_states, value_states)
        if self.seen == key_states.shape[2] and self.keep_ratio < 1:
            self.keys, self.values = (torch.cat([x[:, :, :-2] * 0, x[:, :, -2:]], 2) for x in (keys, values))
        return keys, values


@mutant("sees_tokens", "an empty slot", "fake keys, as kvpress masks heads", surface="make_cache", frees_memory=False)
class ZeroesTheEvicted(WindowCache):
    """Evicted tokens are overwritten with zeros, which are attended to."""

    layer = ZeroingLayer


class EarlyLayer(WindowLayer):
    def update(self, key_states, value_states, *_, **__):
        if self.keep_ratio < 1 and key_states.shape[2] == 1 and self.stored == 3:
            self.keys, self.values = (
                torch.cat([x[:, :, 1:], torch.zeros_like(x[:, :, :1])], 2) for x in (self.keys, self.values)
            )
        return super().update(key_states, value_states)


@mutant("sees_tokens", "an empty slot", "huggingface/transformers #37574", surface="make_cache")
class RollsAStepEarly(WindowCache):
    """A window rolls when it becomes full, a token too early, and the slot that it leaves is attended to."""

    layer = EarlyLayer


class TwiceLayer(WindowLayer):
    def choose(self, keys):
        return everywhere(torch.tensor([keys.shape[2] - 1] * 2, device=keys.device), keys)


@mutant("sees_once", "twice", surface="make_cache", frees_memory=False)
class NewestTwice(WindowCache):
    """Of the prompt the newest token stays, two times."""

    layer = TwiceLayer


class BackwardsLayer(WindowLayer):
    def choose(self, keys):
        return super().choose(keys).flip(-1)


@mutant("sees_in_order", "the last query sees", surface="make_cache")
class NewestFirst(WindowCache):
    """The window is stored with the newest token in front."""

    layer = BackwardsLayer


@mutant("sees_no_future", "sees token", "multi-token non-causal masks", surface="make_cache", **PROMISES)
class MaskFromSlotZero(KnormCache):
    """The mask begins at position 0 and not at the first stored token: several queries see one another's future."""

    def __init__(self, keep_ratio):
        super().__init__(Policy(keep_ratio))

    def get_mask_sizes(self, *arguments):
        return super().get_mask_sizes(*arguments)[0], 0


class LateMaskLayer(WindowLayer):
    def get_mask_sizes(self, query_length):
        length, offset = super().get_mask_sizes(query_length)
        return length, offset + int(bool(self.seen) and self.keep_ratio < 1)


# rounded, as it says: padded rows are not compared with rows alone
@mutant("sees_itself", "does not see its own token", surface="make_cache", lossy=0.001)
class MaskAStepLate(WindowCache):
    """After an eviction the mask is one token late: no query sees its own."""

    layer = LateMaskLayer


@mutant("sees_protected", "it should see", surface="make_cache", protect_recent=3)
class ProtectsTwoOfThree(WindowCache):
    """It promises the newest three tokens and keeps two."""


@mutant("sees_the_count", "but should see", surface="make_cache", rounding="ceil")
class TwoWhateverIsAsked(WindowCache):
    """Two tokens stay, whatever the ratio and the length."""


@mutant("keeps_the_budget", "were seen", "rajveer43/VeloxQuant-MLX #86", surface="make_cache", acts="streaming")
class NeverAgesOut(WindowCache):
    """The budget holds after the prompt; tokens fed later are never evicted."""


class FirstRowLayer(WindowLayer):
    def choose(self, keys):
        return keys[:1].norm(dim=-1).topk(min(2, keys.shape[2])).indices.sort(-1).values.expand(len(keys), -1, -1)


# rounded, as it says: laws that compare a row with itself in another batch are not asked
@mutant("sees_alone", "drawn anew", "row 0 decides, as in kvpress' chunks", surface="make_cache", lossy=0.001)
class FirstRowDecides(WindowCache):
    """All rows keep the tokens that the first row's keys choose."""

    layer = FirstRowLayer


class DiceLayer(WindowLayer):
    def choose(self, keys):
        length = keys.shape[2]
        first = random.randrange(length - 1) if length > 20 else max(0, length - 2)
        return everywhere(torch.arange(first, min(first + 2, length), device=keys.device), keys)


@mutant("sees_again", "is read again", surface="make_cache", batch_independent=False)
class RollsDice(WindowCache):
    """Of a long prompt any two neighbours stay, by a generator that nobody can seed."""

    layer = DiceLayer


class OtherBaseLayer(TurnedLayer):
    base = 500000.0


@mutant(
    "attends_exactly",
    "turned to their places",
    "rajveer43/VeloxQuant-MLX #148",
    surface="make_cache",
    positions="renumbered",
)
class TurnsByAnotherBase(TurnedCache):
    """Kept keys are turned to their places in the cache with another base than the model's."""

    layer = OtherBaseLayer


class Reporting(Session):
    def __init__(self, model, keep_ratio):
        super().__init__(model, WindowCache(keep_ratio))
        self.press = SimpleNamespace(compression_ratio=1 - keep_ratio)


@mutant("reports_its_ratio", "compression_ratio is", "reported ratios that are not the actual ones", surface="method")
class ReportsWhatWasAsked(Method):
    """It reports the ratio that it was asked for, but two tokens stay whatever that is."""

    def __init__(self, keep_ratio):
        super().__init__("window", None, WindowCache)
        self.keep_ratio = keep_ratio

    def start(self, model, length, batch, tokenizer):
        return Reporting(model, self.keep_ratio)


class ViewLayer(WindowLayer):
    def update(self, key_states, value_states, *_, **__):
        keys, values = super().update(key_states, value_states)
        if self.seen == key_states.shape[2] and self.keep_ratio < 1:
            self.keys, self.values = keys[:, :, -2:], values[:, :, -2:]
        return keys, values


@mutant("sees_what_is_held", "bytes are held", surface="make_cache")
class KeepsTheWholeBuffer(WindowCache):
    """What stays is a view of the whole prompt, which lives on."""

    layer = ViewLayer
