"""When nothing may change."""

from __future__ import annotations

import torch

from knorm.laws.registry import Condition, Refuted, check
from knorm.laws.strategies import Cache
from knorm.laws.subjects import Kept, Subject


def _changed(kept: Kept, cache: Cache) -> str | None:
    if torch.equal(kept.keys, cache.keys) and torch.equal(kept.values, cache.values):
        return None
    return f"positions {cache.positions(kept)[0, 0].tolist()} (row 0, head 0) of {cache.length} tokens came back"


@check(needs={"ragged": False})
def check_full_ratio(compressor: Subject, cache: Cache) -> None:
    """Ratio 1 returns the input bit for bit, in another order only where time order is not promised."""
    kept = compressor(cache.keys, cache.values, 1.0)
    if not compressor.traits.time_order and kept.keys.shape == cache.keys.shape:
        order = cache.positions(kept).argsort(-1)[..., None]
        kept = Kept(*(x.gather(2, order.expand_as(x)) for x in (kept.keys, kept.values)))
    if changed := _changed(kept, cache):
        raise Refuted(f"full ratio: {changed} at ratio 1, but should come back as they were")


@check(applies=Condition(("prune_after",), lambda t: t.prune_after > 1))
def check_short_caches(compressor: Subject, cache: Cache) -> None:
    """A cache shorter than prune_after comes back bit for bit."""
    few = min(cache.length, compressor.traits.prune_after - 1)
    short = Cache(cache.keys[:, :, :few], cache.values[:, :, :few], cache.keep_ratio)
    if changed := _changed(compressor(short.keys, short.values, short.keep_ratio), short):
        after = compressor.traits.prune_after
        raise Refuted(f"short caches: {changed} below prune_after={after}, but should come back as they were")


@check(applies=Condition(("skip_layers",), lambda t: bool(t.skip_layers)))
def check_skipped_layers(compressor: Subject, cache: Cache) -> None:
    """In a skipped layer nothing changes."""
    for layer in compressor.traits.skip_layers:
        if changed := _changed(compressor(cache.keys, cache.values, cache.keep_ratio, layer), cache):
            raise Refuted(f"skipped layers: {changed} in layer {layer}, but should come back as they were")
