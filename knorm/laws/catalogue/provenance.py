"""Where what is retained comes from."""

from __future__ import annotations

import torch
from torch import Tensor

from knorm.laws.registry import Malformed, Refuted, check
from knorm.laws.strategies import Cache, beyond_a_byte
from knorm.laws.subjects import Kept, Raised, Subject


def first_place(wrong: Tensor) -> tuple[int, int]:
    """Find the batch row and the head of the first entry that breaks a law: `wrong` is bool [batch, heads, ...]."""
    row, head = wrong.flatten(2).any(-1).nonzero()[0].tolist()
    return row, head


@check()
def check_accepts(compressor: Subject, cache: Cache) -> None:
    """Every valid cache is answered: any batch, heads, length and dtype, without an error."""
    try:
        compressor(cache.keys, cache.values, cache.keep_ratio)
    except Raised as raised:
        raise Refuted(f"accepts: raised {raised}, but should answer") from raised.__cause__
    except Malformed:
        pass  # the next law's


@check()
def check_shape(compressor: Subject, cache: Cache) -> None:
    """Keys and values come back with their batch, heads and width, one value for each key, no NaN of finite ones."""
    try:
        compressor(cache.keys, cache.values, cache.keep_ratio)
    except Raised:
        pass  # the law before's
    except Malformed as malformed:
        raise Refuted(str(malformed)) from None


def _slots(kept: Kept) -> Tensor:
    return torch.ones_like(kept.keys[..., 0], dtype=torch.bool) if kept.mask is None else kept.mask


@check(needs={"merges_values": False})
def check_pairing(compressor: Subject, cache: Cache) -> None:
    """Every retained key and value come from one token of the same row and head."""
    kept = compressor(cache.keys, cache.values, cache.keep_ratio)
    real = _slots(kept)
    source = cache.positions(kept).clamp(0, cache.length - 1)[..., None]
    wrong = torch.zeros_like(real)
    for got, given in ((kept.keys, cache.keys), (kept.values, cache.values)):
        wrong |= real & (given.gather(2, source.expand(*source.shape[:3], given.shape[3])) != got).any(-1)
    if wrong.any():
        row, head = first_place(wrong)
        slot = int(wrong[row, head].nonzero()[0])
        tags = kept.values[row, head, slot].tolist()
        raise Refuted(
            f"pairing: row {row}, head {head}, slot {slot} holds key {kept.keys[row, head, slot].tolist()} with the "
            f"value tagged (row, head, position / 256, rest) {tags}, but no token of that row and head has both"
        )


@check(needs={"merges_values": False}, first=beyond_a_byte)
def check_no_duplicates(compressor: Subject, cache: Cache) -> None:
    """No token is retained twice."""
    kept = compressor(cache.keys, cache.values, cache.keep_ratio)
    ordered = cache.positions(kept).sort(-1).values
    twice = (ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)
    if twice.any():
        at = first_place(twice)
        raise Refuted(
            f"no duplicates: positions {cache.positions(kept)[at].tolist()} retained of {cache.length} tokens, "
            "but should be distinct"
        )
