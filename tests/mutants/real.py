"""Caches as people write them: correct ones, and each beside it with a bug that was shipped somewhere."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer

from mutants import mutant
from mutants.parts import TurnedLayer, WindowCache, WindowLayer

W = 4  # tokens that stay where less than all is asked for; at ratio 1 all stay


class Newest(WindowLayer):
    """The newest W tokens stay, after every call."""

    def room(self):
        return W if self.keep_ratio < 1 else 10**9

    def update(self, key_states, value_states, *_, **__):
        keys, values = DynamicLayer.update(self, key_states, value_states)
        self.seen += key_states.shape[2]
        self.trim()
        return keys, values

    def trim(self):
        if self.stored > self.room():
            self.keys, self.values = (x[:, :, -self.room() :].clone() for x in (self.keys, self.values))


class StreamingWindow(WindowCache):
    """The newest tokens stay, after every call."""

    layer = Newest


class AtOnce(Newest):
    def update(self, key_states, value_states, *_, **__):
        super().update(key_states, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length):
        queries = query_length if isinstance(query_length, int) else query_length.shape[0]
        length = min(self.room(), self.stored + queries)
        return length, self.seen + queries - length


@mutant("sees_itself", "does not see its own token", "lablup/mlxcel #412", surface="make_cache")
class EvictsBeforeItAttends(WindowCache):
    """A prompt longer than the window is cut before its own attention: its first tokens see nothing of themselves."""

    layer = AtOnce


class Ring(Newest):
    """A ring of W slots, unrolled for attention from its oldest slot on."""

    def update(self, key_states, value_states, *_, **__):
        if self.keep_ratio == 1:
            return super().update(key_states, value_states)
        before = [] if self.ring is None else [self.unrolled()]
        keys, values = (
            torch.cat([*(pair[which] for pair in before), states], 2)
            for which, states in enumerate((key_states, value_states))
        )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        newest = [x[:, :, -W:] for x in (keys, values)]
        turn = self.seen % W if newest[0].shape[2] == W else 0
        self.ring = [x.roll(turn, 2) for x in newest]  # a token lies in slot position % W
        self.keys, self.values = self.ring
        return keys, values

    ring = None

    def oldest(self):
        return self.seen % W if self.stored == W else 0

    def unrolled(self):
        return [x.roll(-self.oldest(), 2) for x in (self.keys, self.values)]

    def reset(self):
        super().reset()
        self.ring = None


class RingWindow(WindowCache):
    """The newest tokens stay, in a ring."""

    layer = Ring


class RingFromTheStart(Ring):
    def update(self, key_states, value_states, *_, **__):
        keys, values = super().update(key_states, value_states)
        if self.keep_ratio < 1 and self.seen > W + 1:  # as if nothing had wrapped
            order = torch.arange(keys.shape[2], device=keys.device)
            order[: keys.shape[2] - key_states.shape[2]] = order[: keys.shape[2] - key_states.shape[2]].roll(1)
            return keys[:, :, order], values
        return keys, values


@mutant("sees_tokens", "off by", "a ring read from the wrong start", surface="make_cache")
class ReadsTheRingFromItsStart(WindowCache):
    """After the ring has wrapped, its keys are read from another slot than its values."""

    layer = RingFromTheStart


class Pages(Newest):
    """Pages of four: the oldest goes whole, as soon as three are full."""

    page = 4

    def trim(self):
        while self.keep_ratio < 1 and self.stored >= 3 * self.page:
            self.keys, self.values = (x[:, :, self.page :].clone() for x in (self.keys, self.values))


class PagedWindow(WindowCache):
    """Pages of tokens are evicted whole."""

    layer = Pages


class WidePages(Pages):
    def trim(self):
        if self.keep_ratio < 1 and self.stored > 8:  # a window of 8, a page of 16: what is left of it is nothing
            whole = self.stored // 16 * 16
            self.keys, self.values = (x[:, :, max(whole, self.stored - 8) :].clone() for x in (self.keys, self.values))


@mutant("keeps_the_budget", "were seen", "a page larger than the window", surface="make_cache", acts="streaming")
class PageLargerThanItsWindow(WindowCache):
    """Pages are wider than the window: at each border nothing is left, and then it grows beyond what it was."""

    layer = WidePages


class FromKeys(Newest):
    def trim(self):
        if self.stored > self.room():
            self.keys, self.values = (self.keys[:, :, -self.room() :].clone() for _ in range(2))


@mutant("sees_tokens", "a value that is no token's", "values put together from keys", surface="make_cache")
class ValuesFromKeys(WindowCache):
    """Where it evicts, values are gathered out of the keys."""

    layer = FromKeys


class ByPosition(Newest):
    def trim(self):
        if self.stored > self.room():
            first = self.seen - self.room()  # a position, but what is stored begins elsewhere after the first time
            self.keys, self.values = (x[:, :, min(first, self.stored - 1) :].clone() for x in (self.keys, self.values))


@mutant("keeps_the_budget", "were seen", "trimmed by position instead of rows", surface="make_cache", acts="streaming",
        protect_recent=2)  # fmt: skip
class KeepsTwiceByPosition(WindowCache):
    """The window is right after the prompt and twice as long afterwards."""

    class layer(ByPosition):  # noqa: N801
        def trim(self):
            if self.stored > self.room() * (1 if self.seen == self.stored else 2):
                super().trim()
                self.keys, self.values = (x[:, :, -self.room() :].clone() for x in (self.keys, self.values))


@mutant("sees_protected", "does not see token", "trimmed by position instead of rows", surface="make_cache",
        protect_recent=3)  # fmt: skip
class TrimsByPosition(WindowCache):
    """The window is cut at a position of the text, which is no slot once something is gone."""

    layer = ByPosition


class NoRollback(Newest):
    def crop(self, *_):
        pass


@mutant("crop", "cropped and fed again", "a rollback that silently does nothing", surface="make_cache")
class RollsNothingBack(WindowCache):
    """crop was left empty: nobody is told that nothing was rolled back."""

    layer = NoRollback


class Croppable(Newest):
    """crop is exact as long as nothing was evicted."""

    is_croppable = True

    def crop(self, tokens):
        count = -tokens if tokens < 0 else self.seen - tokens
        if self.seen > self.stored:
            raise ValueError("what was evicted is gone")
        self.keys, self.values = (x[:, :, : self.stored - count] for x in (self.keys, self.values))
        self.seen -= count


class CroppableWindow(WindowCache):
    """The newest tokens stay, and crop is exact until one has gone."""

    layer = Croppable


class Lazy(Newest):
    """Evicts at the beginning of the next call."""

    def update(self, key_states, value_states, *_, **__):
        if self.seen:
            self.trim()
        keys, values = DynamicLayer.update(self, key_states, value_states)
        self.seen += key_states.shape[2]
        return keys, values

    def get_mask_sizes(self, query_length):
        queries = query_length if isinstance(query_length, int) else query_length.shape[0]
        stored = min(self.stored, self.room())
        return stored + queries, self.seen - stored


class LazyWindow(WindowCache):
    """The newest tokens stay; the others go when the next call comes."""

    layer = Lazy


class Sinks(Newest):
    """The first two tokens and the newest three stay."""

    def trim(self):
        if self.keep_ratio < 1 and self.stored > 5:
            self.keys, self.values = (torch.cat([x[:, :, :2], x[:, :, -3:]], 2) for x in (self.keys, self.values))


class SinksAndWindow(WindowCache):
    """Sinks and a window, after every call."""

    layer = Sinks


class Alternate(WindowLayer):
    """Of the prompt every other token stays."""

    def choose(self, keys):
        places = torch.arange((keys.shape[2] - 1) % 2, keys.shape[2], 2, device=keys.device)
        return places.expand(*keys.shape[:2], -1)


class EveryOther(WindowCache):
    """Every other token of the prompt goes."""

    layer = Alternate


class Fourth(Newest):
    """Evicts in the prompt's call and in every fourth after it."""

    calls = 0

    def trim(self):
        if self.calls % 4 == 0:
            super().trim()
        self.calls += 1

    def reset(self):
        super().reset()
        self.calls = 0


class EveryFourthCall(WindowCache):
    """The newest tokens stay, every so many calls."""

    layer = Fourth


class Spare(Newest):
    """Grows in a buffer with room to spare, of which attention is given the part that is filled."""

    def update(self, key_states, value_states, *_, **__):
        keys, values = super().update(key_states, value_states)
        padded = [torch.nn.functional.pad(x, (0, 0, 0, 16)) for x in (self.keys, self.values)]
        self.keys, self.values = (x[:, :, :-16] for x in padded)
        return keys, values


class SpareRoom(WindowCache):
    """The newest tokens stay, in buffers with room to spare."""

    layer = Spare


class Away(Newest):
    """Stores outside torch, as what is offloaded lies elsewhere."""

    def update(self, key_states, value_states, *_, **__):
        keys, values = super().update(key_states, value_states)
        if key_states.device.type == "cpu":
            self.keys, self.values = (torch.from_numpy(x.numpy().copy()) for x in (self.keys, self.values))
        return keys, values


class Offloaded(WindowCache):
    """The newest tokens stay, elsewhere."""

    layer = Away


def rounded(states):
    """To 8 bits, with a scale for each token and head."""
    scale = states.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (states / scale).round() * scale


class Eight(Newest):
    """What is stored is rounded, what the call itself attends to too."""

    def update(self, key_states, value_states, *_, **__):
        return super().update(rounded(key_states), rounded(value_states))


class EightBits(WindowCache):
    """The newest tokens stay, in 8 bits each number."""

    layer = Eight


class Residual(Newest):
    """The newest two tokens are exact, older ones rounded: two stores, which row operations move both."""

    old = None

    def update(self, key_states, value_states, *_, **__):
        keys, values = super().update(key_states, value_states)
        self.keys, self.values = (
            torch.cat([rounded(x[:, :, :-2]), x[:, :, -2:]], 2) if x.shape[2] > 2 else x
            for x in (self.keys, self.values)
        )
        return keys, values


class ExactAtItsEnd(WindowCache):
    """The newest tokens stay, the last two exact and the others in 8 bits."""

    layer = Residual


class OnlyAtFirst(Newest):
    def update(self, key_states, value_states, *_, **__):
        first = not self.seen
        keys, values = super().update(key_states, value_states)
        if first:
            self.keys, self.values = self.keys, self.values * 0.9
        return keys, values


@mutant("sees_tokens", "its value is off by", "exact only in the prompt's own call", surface="make_cache", lossy=0.01)
class ExactInThePromptOnly(WindowCache):
    """What the prompt's own call is given is exact, what later ones read is off by a tenth."""

    layer = OnlyAtFirst


class TurnedNewest(TurnedLayer):
    """Turned to the first places, after every call."""

    def update(self, key_states, value_states, *_, **__):
        before = self.seen
        self.seen = 0  # so that each call is compressed as the first is
        keys, values = super().update(key_states, value_states)
        self.seen += before
        return keys, values


class TurnedWindow(WindowCache):
    """The newest tokens stay after every call, their keys turned to the first places."""

    layer = TurnedNewest


class TwoParts(Newest):
    """The prompt's tokens and the later ones are held apart."""

    def batch_select_indices(self, indices):
        self.keys, self.values = self.keys[indices], self.values[indices]

    def batch_repeat_interleave(self, repeats):
        self.keys, self.values = (x.repeat_interleave(repeats, 0) for x in (self.keys, self.values))

    def reorder_cache(self, order):
        self.batch_select_indices(order.to(self.keys.device))


class OwnRowOperations(WindowCache):
    """The newest tokens stay; rows are moved by code of its own."""

    layer = TwoParts
