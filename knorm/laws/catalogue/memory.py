"""Whose bytes are whose."""

from __future__ import annotations

import torch

from knorm.laws.registry import Refuted, Vacuous, check
from knorm.laws.strategies import Cache
from knorm.laws.subjects import Subject


@check()
def check_inputs_unwritten(compressor: Subject, cache: Cache) -> None:
    """Inputs are never written."""
    keys, values = cache.keys.clone(), cache.values.clone()
    compressor.raw(keys, values, cache.keep_ratio)
    for name, now, before in (("keys", keys, cache.keys), ("values", values, cache.values)):
        if not torch.equal(now, before):
            at = (now != before).nonzero()[0].tolist()
            raise Refuted(
                f"inputs unwritten: {name}{at} was {before[tuple(at)]:g} and is {now[tuple(at)]:g} afterwards, "
                "but should be left as it was"
            )


@check(needs={"frees_memory": True})
def check_own_bytes(compressor: Subject, cache: Cache) -> None:
    """Results own exactly the bytes that they retain: no view keeps the full buffer alive."""
    kept = compressor(cache.keys, cache.values, cache.keep_ratio)
    if kept.keys.shape[2] == cache.length:
        return
    for name, result in (("keys", kept.keys), ("values", kept.values)):
        held, own = result.untyped_storage().nbytes(), result.numel() * result.element_size()
        if held != own:
            raise Refuted(f"own bytes: {name} retain {own} bytes, but keep {held} alive; return a copy, not a view")


@check(needs={"frees_memory": True, "ragged": False})
def check_frees_memory(compressor: Subject, cache: Cache) -> None:
    """Asked-for compression frees memory: fewer slots come back than went in."""
    should = compressor.traits.count(cache.length, cache.keep_ratio)
    share = cache.keep_ratio * cache.length
    if not cache.length > max(2, share + 1) or (should is None and (cache.length < 32 or cache.keep_ratio > 0.5)):
        raise Vacuous  # a cache may be held in pages
    kept = compressor(cache.keys, cache.values, cache.keep_ratio)
    if kept.keys.shape[2] >= cache.length and should != cache.length:
        raise Refuted(
            f"frees memory: {kept.keys.shape[2]} slots came back of {cache.length} at ratio {cache.keep_ratio}, "
            "but should be fewer"
        )
