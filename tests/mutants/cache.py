from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicLayer

from knorm import KnormCache, Policy
from mutants import PROMISES, mutant
from mutants.parts import WindowCache, WindowLayer, everywhere


@mutant("positions", "get_seq_length() is", "l2compress with skip_layers=[]", surface="make_cache")
class CountsWhatIsStored(WindowCache):
    """The next position is taken from what the first layer stores."""

    def get_seq_length(self, layer_idx=None):
        if layer_idx is None and self.layers:
            return self.layers[0].stored
        return super().get_seq_length(layer_idx or 0)


@mutant("positions", "get_seq_length() is", "huggingface/transformers get_seq_length", surface="make_cache", **PROMISES)
class LengthOfTheTensor(KnormCache):
    """The length is that of the tensor, in the positions and in the mask."""

    def __init__(self, keep_ratio):
        super().__init__(Policy(keep_ratio))

    def get_seq_length(self, layer_idx=0):
        stored = self.layers[layer_idx].keys if layer_idx < len(self.layers) else None
        return 0 if stored is None else stored.shape[-2]

    def get_mask_sizes(self, *arguments):
        return super().get_mask_sizes(*arguments)[0], 0


class ScoresRotatedKeys(WindowLayer):
    def choose(self, keys):
        return max(0, keys.shape[2] - 2) + keys[:, :, -2:].sum(-1).argmax(-1, keepdim=True)


@mutant("shift", "positions from 0 and from 9", surface="make_cache", scores="keys")
class SumOfRotatedKeys(WindowCache):
    """Keys are scored by the sum of their components, which the rotation to their positions changes."""

    layer = ScoresRotatedKeys


class ReversingLayer(WindowLayer):
    def update(self, key_states, value_states, *_, **__):
        if self.seen and self.keep_ratio == 1:
            key_states, value_states = key_states.flip(2), value_states.flip(2)
        return super().update(key_states, value_states)


@mutant("chunks", "at a time, and the plain model", surface="make_cache", ragged=True)
class ChunksNewestFirst(WindowCache):
    """At ratio 1, tokens of one call are stored newest first, but for the prompt's."""

    layer = ReversingLayer


class BlockLayer(DynamicLayer):
    def update(self, key_states, value_states, *_, **__):
        used = self.get_seq_length()
        if not used:
            return super().update(key_states, value_states)
        keys, values = super().update(torch.zeros_like(key_states), torch.zeros_like(value_states))
        slots = used // 4 * 4 + torch.arange(used, used + key_states.shape[2]) % 4
        keys[:, :, slots], values[:, :, slots] = key_states, value_states
        return keys, values


@mutant("chunks", "at a time, and the plain model", "awslabs/keys_values #140", surface="make_cache")
class WritesRoundTheBlock(Cache):
    """A write that does not fit into the last block goes on at that block's start."""

    def __init__(self, keep_ratio):
        super().__init__(layer_class_to_replicate=BlockLayer)


class SinkLayer(WindowLayer):
    def choose(self, keys):
        return everywhere(torch.tensor([0, keys.shape[2] - 1][: keys.shape[2]], device=keys.device), keys)


@mutant("left_padding", "pads in the batch, and alone", "pads kept as attention sinks", surface="make_cache")
class PadsAsSinks(WindowCache):
    """The first token of a row is kept as its sink, pad or not."""

    layer = SinkLayer


class OffsetLayer(WindowLayer):
    def get_mask_sizes(self, query_length):
        return super().get_mask_sizes(query_length)[0], 0


@mutant("left_padding", "pads in the batch, and alone", "lablup/mlxcel #75", surface="make_cache")
class PaddingFromTheStart(WindowCache):
    """What is stored is masked as if it were the start of the padded row."""

    layer = OffsetLayer


@mutant("rows_move", "after reorder_cache", surface="make_cache")
class BeamsStayPut(WindowCache):
    """reorder_cache was never written."""

    def reorder_cache(self, beam_idx):
        pass


class KeysMoveLayer(WindowLayer):
    def batch_select_indices(self, indices):
        self.keys = self.keys[indices]
        self.values = self.values[: len(indices)]


@mutant("rows_move", "after batch_select_indices", surface="make_cache")
class OnlyKeysMove(WindowCache):
    """Rows are chosen among the keys; of the values the first ones stay."""

    layer = KeysMoveLayer


@mutant("copy", "after the original went on", surface="make_cache")
class CopiesShareLayers(WindowCache):
    """A deep copy holds the layers of its original."""

    def __deepcopy__(self, memo):
        twin = type(self)(0.5)
        twin.layers = self.layers
        return twin


class RemembersLayer(WindowLayer):
    def reset(self):
        seen = self.seen
        super().reset()
        self.seen = seen


@mutant("reset", "a second sequence after reset()", "NVIDIA/kvpress #221", surface="make_cache")
class RemembersWhatItSaw(WindowCache):
    """reset() empties the cache, but it goes on counting: the second prompt is not compressed."""

    layer = RemembersLayer


class CroppedBySlot(WindowLayer):
    def crop(self, tokens):
        length = tokens if tokens > 0 else self.seen + tokens
        self.keys, self.values, self.seen = self.keys[:, :, :length], self.values[:, :, :length], length


@mutant("crop", "was not refused", "huggingface/transformers #47433", surface="make_cache")
class CropsBySlot(WindowCache):
    """crop cuts the stored slots at a position: nothing goes, and nobody is told."""

    layer = CroppedBySlot


class InheritedCrop(WindowLayer):
    def crop(self, tokens):
        DynamicLayer.crop(self, tokens)


@mutant("crop", "was not refused", surface="make_cache")
class CropsWhatIsLeft(WindowCache):
    """crop is inherited from a cache that forgets nothing."""

    layer = InheritedCrop


class OversizedCrop(WindowLayer):
    def crop(self, tokens):
        length = tokens if tokens > 0 else self.seen + tokens
        if length < self.prompt:
            raise ValueError("what was evicted is gone")
        if length < self.stored:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        self.seen = length

    def update(self, key_states, value_states, *_, **__):
        if not self.seen:
            self.prompt = key_states.shape[2]
        return super().update(key_states, value_states)


@mutant("crop", "one token fed and cropped", "huggingface/transformers #47433", surface="make_cache")
class CropLeavesStaleTokens(WindowCache):
    """A crop to more positions than are stored is taken for nothing to do."""

    layer = OversizedCrop
