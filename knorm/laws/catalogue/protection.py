"""Attention sinks and the newest tokens."""

from __future__ import annotations

import torch

from knorm.laws.registry import Condition, Refuted, check
from knorm.laws.strategies import Cache, tagged_values
from knorm.laws.subjects import Raised, Subject

_PROTECTING = ("protect_first", "protect_recent")


@check(needs={"ragged": False, "merges_values": False}, applies=Condition(_PROTECTING, lambda t: t.protected > 0))
def check_protected_tokens(compressor: Subject, cache: Cache) -> None:
    """The first protect_first and the newest protect_recent tokens are retained, however often it compresses."""
    first, recent = compressor.traits.protect_first, compressor.traits.protect_recent
    total = cache.length + 3
    batch, heads = cache.keys.shape[:2]
    width = cache.values.shape[3]
    values = tagged_values(batch, heads, total, cache.values.dtype, width).to(cache.values.device)
    new = cache.keys.amax(2, keepdim=True)  # as easily evicted as any
    kept = compressor(cache.keys, cache.values, cache.keep_ratio)
    for seen in range(cache.length, total + 1):
        positions = cache.positions(kept)
        protected = [*range(min(first, seen)), *range(max(first, seen - recent), seen)]
        wanted = torch.tensor(protected, device=positions.device)
        there = (positions[..., None] == wanted).any(-2)
        if not there.all():
            row, head = (~there).any(-1).nonzero()[0].tolist()
            raise Refuted(
                f"protected tokens: positions {positions[row, head].tolist()} retained after "
                f"{seen - cache.length + 1} compressions, {seen} tokens seen, but should include {protected}"
            )
        if seen < total and compressor.traits.affords(kept.keys.shape[2] + 1, cache.keep_ratio):
            keys = torch.cat([kept.keys, new], 2)
            kept = compressor(keys, torch.cat([kept.values, values[:, :, seen : seen + 1]], 2), cache.keep_ratio)
        elif seen < total:
            return


@check(needs={"ragged": False}, applies=Condition(_PROTECTING, lambda t: t.protected > 1))
def check_protection_refused(compressor: Subject, cache: Cache) -> None:
    """A budget too small for what is protected is refused with a ValueError, never silently cut."""
    length = max(cache.length, compressor.traits.prune_after, compressor.traits.protected + 2)
    keys, values = cache.keys[:, :, :1].expand(-1, -1, length, -1), cache.values[:, :, :1].expand(-1, -1, length, -1)
    ratio = 0.5 / length  # one token
    try:
        kept = compressor(keys, values, ratio)
    except Raised as raised:
        if isinstance(raised.__cause__, ValueError):
            return
        raise Refuted(f"protection refused: raised {raised}, but should raise ValueError") from None
    if kept.keys.shape[2] < compressor.traits.protected:
        raise Refuted(
            f"protection refused: {kept.keys.shape[2]} of {length} tokens retained at ratio {ratio:.4f}, fewer than "
            f"the {compressor.traits.protected} protected, but should raise ValueError"
        )
