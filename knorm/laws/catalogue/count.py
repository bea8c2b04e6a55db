"""How many tokens are retained."""

from __future__ import annotations

from knorm.laws.registry import Refuted, check
from knorm.laws.strategies import Cache, awkward_counts, larger_ratio
from knorm.laws.subjects import Kept, Subject


def _total(kept: Kept) -> int:
    return kept.keys[..., 0].numel() if kept.mask is None else int(kept.mask.sum())


@check(needs={"rounding": ("ceil", "floor", "half_even"), "ragged": False}, first=awkward_counts)
def check_retained_count(compressor: Subject, cache: Cache) -> None:
    """The retained count is the promised rounding of ratio x length, in exact arithmetic."""
    kept = compressor(cache.keys, cache.values, cache.keep_ratio).keys.shape[2]
    should = compressor.traits.count(cache.length, cache.keep_ratio)
    if kept != should and kept > 0:
        raise Refuted(f"retained count: {kept} of {cache.length} tokens retained, but should be {should}")


@check()
def check_at_least_one(compressor: Subject, cache: Cache) -> None:
    """At least one token of every head is retained."""
    kept = compressor(cache.keys, cache.values, cache.keep_ratio)
    counts = cache.retained(kept).sum(-1) if kept.mask is not None else kept.keys.shape[2]
    if not (counts.all() if kept.mask is not None else counts):  # type: ignore[union-attr]
        raise Refuted(f"at least one: none of {cache.length} tokens retained, but should be 1 or more")


@check()
def check_monotone_count(compressor: Subject, cache: Cache) -> None:
    """Counts never fall as the ratio rises, nor as the length rises, by more than the promised grain."""
    grain = (compressor.traits.granularity - 1) * cache.keys.shape[0] * cache.keys.shape[1]
    wider, shorter = larger_ratio(cache.keep_ratio), cache.length - 1
    kept = _total(compressor(cache.keys, cache.values, cache.keep_ratio))
    more = _total(compressor(cache.keys, cache.values, wider))
    if kept > more + grain:
        raise Refuted(f"monotone count: {kept} tokens retained at ratio {cache.keep_ratio}, but {more} at {wider}")
    traits = compressor.traits
    if shorter >= max(1, traits.prune_after, traits.min_length) and traits.affords(shorter, cache.keep_ratio):
        fewer = _total(compressor(cache.keys[:, :, :-1], cache.values[:, :, :-1], cache.keep_ratio))
        if fewer > kept + grain:
            raise Refuted(
                f"monotone count: {fewer} tokens retained of {shorter} a head, but {kept} of {cache.length}, "
                f"batch and heads {[*cache.keys.shape[:2]]}"
            )


@check()
def check_equal_counts(compressor: Subject, cache: Cache) -> None:
    """Every head and row retains the same count, or the compressor is declared ragged and masks what fills up."""
    kept = compressor(cache.keys, cache.values, cache.keep_ratio)
    if kept.mask is None:
        return
    counts = kept.mask.sum(-1)
    if not compressor.traits.ragged and (counts != kept.mask.shape[2]).any():
        raise Refuted(
            f"equal counts: a mask leaves {counts.tolist()} of {kept.mask.shape[2]} slots to each row and head, "
            "but the compressor is not declared ragged"
        )
