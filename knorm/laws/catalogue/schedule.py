"""The schedule of a run, and the run."""

from __future__ import annotations

import torch

from knorm.laws.oracle import Rules, live
from knorm.laws.registry import Refuted, Vacuous, check
from knorm.laws.strategies import Cache
from knorm.laws.subjects import Subject

_KNORM = {"scores": "key_norm", "rounding": "ceil", "ties": "earlier", "time_order": True}


@check(needs={**_KNORM, "merges_values": False, "ragged": False}, exact=True)
def check_replay(compressor: Subject, cache: Cache) -> None:
    """A schedule, replayed step by step by a list of living tokens, is the compressor on the growing cache."""
    traits, length = compressor.traits, min(cache.length, 12)
    keys, values = cache.keys[:, :, :length], cache.values[:, :, :length]
    after = max(2, traits.prune_after, traits.protected + 1)
    if not traits.affords(after, cache.keep_ratio):
        raise Vacuous
    rules = Rules(cache.keep_ratio, after, (), traits.protect_first, traits.protect_recent, protocol="streaming")
    norms = cache.norms()[..., :length].tolist()
    lost = torch.tensor([[live(rules, head, [1] * length).lost for head in row] for row in norms], device=keys.device)
    held = held_values = keys[:, :, :0]
    for token in range(length):
        held = torch.cat([held, keys[:, :, token : token + 1]], 2)
        held_values = torch.cat([held_values, values[:, :, token : token + 1]], 2)
        if held.shape[2] >= after:
            kept = compressor(held, held_values, cache.keep_ratio)
            held, held_values = kept.keys, kept.values
        positions = (held_values[..., 2] * 256 + held_values[..., 3]).long()
        stored = torch.zeros_like(lost, dtype=torch.bool).scatter_(-1, positions.clamp(0, length - 1), True)
        should = (lost > token + 1) & (torch.arange(length, device=lost.device) <= token)
        if token + 1 < length and not torch.equal(stored, should):
            row, head = (stored != should).any(-1).nonzero()[0].tolist()
            got, wanted = (x[row, head].nonzero()[:, 0].tolist() for x in (stored, should))
            raise Refuted(
                f"replay: after token {token} the growing cache holds positions {got}, but a list of living tokens "
                f"{wanted} (row {row}, head {head}, prune_after {after})"
            )
