"""What may not influence the answer."""

from __future__ import annotations

import torch

from knorm.laws.registry import Refuted, check
from knorm.laws.strategies import Cache
from knorm.laws.subjects import Kept, Subject


def _differ(one: Kept, other: Kept) -> bool:
    return not all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


def _part(kept: Kept, *place: slice) -> Kept:
    return Kept(kept.keys[place], kept.values[place], None if kept.mask is None else kept.mask[place])


def _places(cache: Cache, kept: Kept) -> list[list[list[int]]]:
    return cache.positions(kept).tolist()


@check(needs={"batch_independent": True, "ragged": False})
def check_rows_alone(compressor: Subject, cache: Cache) -> None:
    """A row compressed in a batch equals the row compressed alone."""
    together = compressor(cache.keys, cache.values, cache.keep_ratio)
    for row in {0, cache.keys.shape[0] - 1}:
        one = slice(row, row + 1)
        alone, there = compressor(cache.keys[one], cache.values[one], cache.keep_ratio), _part(together, one)
        if _differ(alone, there):
            raise Refuted(
                f"rows alone: row {row} alone retains positions {_places(cache, alone)[0]}, "
                f"but in the batch {_places(cache, there)[0]}"
            )


@check(needs={"heads_independent": True, "ragged": False})
def check_heads_alone(compressor: Subject, cache: Cache) -> None:
    """A head compressed among others equals the head compressed alone."""
    together = compressor(cache.keys, cache.values, cache.keep_ratio)
    for head in {0, cache.keys.shape[1] - 1}:
        one = (slice(None), slice(head, head + 1))
        alone, there = compressor(cache.keys[one], cache.values[one], cache.keep_ratio), _part(together, *one)
        if _differ(alone, there):
            both = list(zip(_places(cache, alone), _places(cache, there), strict=True))
            row = next((i for i, (one_way, other) in enumerate(both) if one_way != other), 0)
            raise Refuted(
                f"heads alone: head {head} alone retains positions {both[row][0]}, but among others {both[row][1]} "
                f"(row {row})"
            )


@check(needs={"deterministic": True})
def check_repeatable(compressor: Subject, cache: Cache) -> None:
    """Calling twice gives the same."""
    one, two = (compressor(cache.keys, cache.values, cache.keep_ratio) for _ in range(2))
    if _differ(one, two):
        raise Refuted(
            f"repeatable: the first call retained positions {_places(cache, one)}, but the second {_places(cache, two)}"
        )


@check(needs={"deterministic": True})
def check_no_leak(compressor: Subject, cache: Cache) -> None:
    """Another sequence in between changes nothing."""
    longer = torch.cat([cache.keys, cache.keys], 2), torch.cat([cache.values, cache.values], 2)
    compressor(longer[0], longer[1], cache.keep_ratio)  # what is remembered by shape is of another one now
    before = compressor(cache.keys, cache.values, cache.keep_ratio)
    compressor(longer[0], longer[1], cache.keep_ratio)
    compressor(cache.keys.flip(2), cache.values, cache.keep_ratio)
    after = compressor(cache.keys, cache.values, cache.keep_ratio)
    if _differ(before, after):
        raise Refuted(
            f"no leak: positions {_places(cache, before)} retained, but after another sequence {_places(cache, after)}"
        )


@check()
def check_generator_left_alone(compressor: Subject, cache: Cache) -> None:
    """The global generator is not reset: what is drawn afterwards still depends on the caller's seed."""
    devices = [cache.keys.device] if cache.keys.is_cuda else []
    with torch.random.fork_rng(devices):
        one, two = (_drawn_after(seed, compressor, cache) for seed in (1, 2))
    if torch.equal(one, two):
        raise Refuted(
            f"generator left alone: torch.rand gives {one.tolist()} after a compression, whether torch.manual_seed(1) "
            "or (2) came before it, but should differ: seed a torch.Generator of your own"
        )


def _drawn_after(seed: int, compressor: Subject, cache: Cache) -> torch.Tensor:
    torch.manual_seed(seed)
    compressor(cache.keys, cache.values, cache.keep_ratio)
    return torch.rand(2, device=cache.keys.device)


@check(needs={"scores": ("key_norm", "keys"), "merges_values": False})
def check_values_ignored(compressor: Subject, cache: Cache) -> None:
    """Values do not influence the selection of a method that scores keys."""
    kept = compressor(cache.keys, cache.values, cache.keep_ratio)
    other = compressor(cache.keys, -3 * cache.values.flip(2), cache.keep_ratio)
    if not torch.equal(kept.keys, other.keys):
        raise Refuted(
            f"values ignored: keys {kept.keys[0, 0].tolist()} retained (row 0, head 0), "
            f"but with other values {other.keys[0, 0].tolist()}"
        )
