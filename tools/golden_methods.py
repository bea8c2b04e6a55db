"""Methods for tools/declared_power.py: a cache, and what goes wrong with it, with kvpress' SnapKVPress and with fp8.

Each fault is an argument; with the defaults the methods are right.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer

ROUNDING = {"floor": math.floor, "ceil": math.ceil}


class _NormLayer(DynamicLayer):
    def __init__(self, keep_ratio: float, window: int, rounding: str, scale: float) -> None:
        super().__init__()
        self.keep_ratio, self.window, self.round, self.scale = keep_ratio, window, ROUNDING[rounding], scale

    def update(self, key_states, value_states, *args, **kwargs):
        first = not self.is_initialized
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if first:
            old = keys.shape[2] - self.window
            kept = max(1, self.round(keys.shape[2] * self.keep_ratio) - self.window)
            lowest = keys[:, :, :old].norm(dim=-1).topk(min(kept, old), largest=False).indices.sort().values
            newest = torch.arange(old, keys.shape[2]).expand(*lowest.shape[:2], -1)
            places = torch.cat([lowest, newest], -1)[..., None].expand(-1, -1, -1, keys.shape[3])
            self.keys, self.values = keys.gather(2, places) * self.scale, values.gather(2, places)
        return keys, values


class Norms(DynamicCache):
    """Keeps of the prompt the newest tokens and those of the lowest key norms; `plain` is a layer that keeps all."""

    def __init__(self, config, keep_ratio, window=8, rounding="ceil", plain=-1, scale=1.0):
        super().__init__()
        right = [_NormLayer(keep_ratio, window, rounding, scale) for _ in range(config.num_hidden_layers)]
        self.layers = [DynamicLayer() if index == plain else layer for index, layer in enumerate(right)]
        self.layer_class_to_replicate = None


if hasattr(cache_utils, "Fp8QuantizedLayer"):  # not before transformers 5.24

    class _Fp8Layer(cache_utils.Fp8QuantizedLayer):
        def __init__(self, rounding: str, scale: float, exact: int) -> None:
            super().__init__()
            self.rounding, self.factor, self.exact = rounding, scale, exact
            self.kept = None

        def _quantize(self, tensor, scale=None):
            calibrated = scale is None
            quantised, scale = super()._quantize(tensor, scale)
            if calibrated and self.factor != 1:
                quantised, scale = super()._quantize(tensor, scale * self.factor)
            if self.rounding == "down":
                over = quantised.float().abs() > (tensor.float() / scale).abs()
                quantised = (quantised.view(torch.uint8) - over.to(torch.uint8)).view(self.fp8_dtype)
            return quantised, scale

        def update(self, key_states, value_states, *args, **kwargs):
            first = not self.is_initialized
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            if self.exact and first:
                self.kept = keys.shape[2] - self.exact, keys[:, :, -self.exact :], values[:, :, -self.exact :]
            elif self.exact:
                place, *exact = self.kept
                for stored, right in zip((keys, values), exact, strict=True):
                    stored[:, :, place : place + self.exact] = right
            return keys, values

    class Fp8(cache_utils.QuantizedCache):
        """The fp8 cache of transformers; `exact` tokens at the end of the prompt and the layer `plain` stay exact."""

        def __init__(self, config, rounding="nearest", scale=1.0, exact=0, plain=-1):
            super().__init__("fp8", config)
            right = [_Fp8Layer(rounding, scale, exact) for _ in self.layers]
            self.layers = [DynamicLayer() if index == plain else layer for index, layer in enumerate(right)]


with suppress(ImportError):
    from kvpress import SnapKVPress
    from kvpress.presses.scorer_press import compute_n_kept

    @dataclass
    class Snap(SnapKVPress):
        """SnapKV of kvpress; `plain` is a layer that keeps all, `scale` multiplies the queries that score."""

        rounding: str = "floor"
        plain: int = -1
        scale: float = 1.0

        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            if module.layer_idx == self.plain:
                return keys, values
            scores = self.score(module, hidden_states * self.scale, keys, values, attentions, kwargs)
            kept = compute_n_kept(keys.shape[2], self.compression_ratio)
            if self.rounding == "ceil":
                kept = math.ceil(keys.shape[2] * (1 - self.compression_ratio))
            places = scores.topk(kept, dim=-1).indices[..., None].expand(-1, -1, -1, module.head_dim)
            return keys.gather(2, places).contiguous(), values.gather(2, places).contiguous()
