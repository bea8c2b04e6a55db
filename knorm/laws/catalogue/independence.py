"""What may not influence the answer."""

from __future__ import annotations

import torch

from knorm.laws.registry import Refuted, check
from knorm.laws.strategies import Cache
from knorm.laws.subjects import Kept, Subject
from knorm.tensors import alike


def _differ(first: Kept, second: Kept) -> bool:
    return not all(
        (a is None and b is None) or (a is not None and b is not None and alike(a, b))
        for a, b in zip(first, second, strict=True)
    )


def _part(kept: Kept, *place: slice) -> Kept:
    return Kept(kept.keys[place], kept.values[place], None if kept.mask is None else kept.mask[place])


def _places(cache: Cache, kept: Kept) -> list[list[list[int]]]:
    return cache.positions(kept).tolist()


@check(needs={"deterministic": True})
def check_repeatable(compressor: Subject, cache: Cache) -> None:
    """Calling twice gives the same."""
    first, second = (compressor(cache.keys, cache.values, cache.keep_ratio) for _ in range(2))
    if _differ(first, second):
        raise Refuted(
            f"repeatable: the first call retained positions {_places(cache, first)}, but the second "
            f"{_places(cache, second)}"
        )


@check(needs={"batch_independent": True, "deterministic": True, "ragged": False})
def check_rows_alone(compressor: Subject, cache: Cache) -> None:
    """A row compressed in a batch equals the row compressed alone."""
    together = compressor(cache.keys, cache.values, cache.keep_ratio)
    for row in {0, cache.keys.shape[0] - 1}:
        rows = slice(row, row + 1)
        alone, there = compressor(cache.keys[rows], cache.values[rows], cache.keep_ratio), _part(together, rows)
        if _differ(alone, there):
            raise Refuted(
                f"rows alone: row {row} alone retains positions {_places(cache, alone)[0]}, "
                f"but in the batch {_places(cache, there)[0]}"
            )


@check(needs={"heads_independent": True, "deterministic": True, "ragged": False})
def check_heads_alone(compressor: Subject, cache: Cache) -> None:
    """A head compressed among others equals the head compressed alone."""
    together = compressor(cache.keys, cache.values, cache.keep_ratio)
    for head in {0, cache.keys.shape[1] - 1}:
        part = (slice(None), slice(head, head + 1))
        alone, there = compressor(cache.keys[part], cache.values[part], cache.keep_ratio), _part(together, *part)
        if _differ(alone, there):
            both = list(zip(_places(cache, alone), _places(cache, there), strict=True))
            row = next((i for i, (apart, among) in enumerate(both) if apart != among), 0)
            raise Refuted(
                f"heads alone: head {head} alone retains positions {both[row][0]}, but among others {both[row][1]} "
                f"(row {row})"
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
def check_answers_stay(compressor: Subject, cache: Cache) -> None:
    """An earlier answer is not changed by a later call."""
    first = compressor(cache.keys, cache.values, cache.keep_ratio)
    before = Kept(first.keys.clone(), first.values.clone())
    compressor(cache.keys.flip(2), cache.values.flip(2), cache.keep_ratio)
    if _differ(before, Kept(first.keys, first.values)):
        raise Refuted(
            f"answers stay: positions {_places(cache, before)} were returned, but after another call of the same shape "
            f"the same tensors hold {_places(cache, first)}"
        )


@check()
def check_generator_left_alone(compressor: Subject, cache: Cache) -> None:
    """The global generator is not reset: what is drawn afterwards still depends on the caller's seed."""
    devices = [cache.keys.device] if cache.keys.is_cuda else []
    with torch.random.fork_rng(devices):
        first, second = (_drawn_after(seed, compressor, cache) for seed in (1, 2))
    if torch.equal(first, second):
        raise Refuted(
            f"generator left alone: torch.rand gives {first.tolist()} after a compression, whether "
            "torch.manual_seed(1) or (2) came before it, but should differ: seed a torch.Generator of your own"
        )


def _drawn_after(seed: int, compressor: Subject, cache: Cache) -> torch.Tensor:
    torch.manual_seed(seed)
    compressor(cache.keys, cache.values, cache.keep_ratio)
    return torch.rand(2, device=cache.keys.device)


@check(needs={"scores": ("key_norm", "keys"), "merges_values": False})
def check_values_ignored(compressor: Subject, cache: Cache) -> None:
    """Values do not influence the selection of a method that scores keys."""
    kept = compressor(cache.keys, cache.values, cache.keep_ratio)
    changed = compressor(cache.keys, -3 * cache.values.flip(2), cache.keep_ratio)
    if not alike(kept.keys, changed.keys):
        raise Refuted(
            f"values ignored: keys {kept.keys[0, 0].tolist()} retained (row 0, head 0), "
            f"but with other values {changed.keys[0, 0].tolist()}"
        )
