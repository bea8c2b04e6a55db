"""The order of what is retained."""

from __future__ import annotations

import torch

from knorm.laws.catalogue.provenance import first_place
from knorm.laws.registry import Refuted, Vacuous, check
from knorm.laws.strategies import Cache
from knorm.laws.subjects import Subject


@check(needs={"time_order": True, "merges_values": False})
def check_time_order(compressor: Subject, cache: Cache) -> None:
    """Retained positions ascend."""
    if cache.keep_ratio == 1:
        raise Vacuous  # the law of identity
    positions = cache.positions(compressor(cache.keys, cache.values, cache.keep_ratio))
    before = torch.nn.functional.pad(positions.cummax(-1).values[..., :-1], (1, 0), value=-1)
    wrong = (positions >= 0) & (positions < before)
    if wrong.any():
        kept = [p for p in positions[first_place(wrong)].tolist() if p >= 0]
        raise Refuted(
            f"time order: positions {kept} retained from {cache.length} tokens at ratio {cache.keep_ratio}, "
            f"but should ascend: {sorted(kept)}"
        )
