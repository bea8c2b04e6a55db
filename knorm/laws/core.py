"""The laws of one compression, for a compressor that keeps the lowest key norms in time order."""

from __future__ import annotations

import torch
from torch import Tensor

from knorm.laws.registry import Compressor, Refuted, check
from knorm.laws.strategies import Cache, larger_ratio
from knorm.policy import retained_count


def _positions(compressor: Compressor, cache: Cache, keep_ratio: float | None = None) -> Tensor:
    return cache.positions(compressor(cache.keys, cache.values, keep_ratio or cache.keep_ratio)[1])


def _first(wrong: Tensor) -> tuple[int, int]:
    """Batch row and head of the first entry that breaks a law: wrong bool [batch, heads, ...]."""
    row, head = wrong.flatten(2).any(-1).nonzero()[0].tolist()
    return row, head


@check
def check_retained_count(compressor: Compressor, cache: Cache) -> None:
    """The retained count is ceil(ratio x length) in exact arithmetic, and at least one."""
    keys, values = compressor(cache.keys, cache.values, cache.keep_ratio)[:2]
    should = retained_count(cache.length, cache.keep_ratio)
    if keys.shape[2] != should or values.shape[2] != should:
        raise Refuted(
            f"retained count: {keys.shape[2]} keys and {values.shape[2]} values retained of {cache.length} tokens "
            f"at ratio {cache.keep_ratio}, but should be {should}"
        )


@check
def check_monotone_count(compressor: Compressor, cache: Cache) -> None:
    """Retained counts never fall as the ratio or the length rises."""
    ratios = (cache.keep_ratio, larger_ratio(cache.keep_ratio))
    small, large = (compressor(cache.keys, cache.values, ratio)[0].shape[2] for ratio in ratios)
    if small > large:
        raise Refuted(
            f"monotone count: {small} of {cache.length} tokens at ratio {ratios[0]}, but {large} at {ratios[1]}"
        )
    if cache.length > 1:
        shorter = compressor(cache.keys[:, :, :-1], cache.values[:, :, :-1], cache.keep_ratio)[0].shape[2]
        if shorter > small:
            raise Refuted(
                f"monotone count: {shorter} of {cache.length - 1} tokens at ratio {cache.keep_ratio}, "
                f"but {small} of {cache.length}"
            )


@check
def check_pairing(compressor: Compressor, cache: Cache) -> None:
    """Every retained key and value come from one token of the same row and head, and no token comes twice."""
    keys, values = compressor(cache.keys, cache.values, cache.keep_ratio)[:2]
    positions = cache.positions(values)
    source = positions.clamp(max=cache.length - 1)[..., None].expand(*positions.shape, cache.keys.shape[3])
    wrong = (cache.keys.gather(2, source) != keys).any(-1) | (cache.values.gather(2, source) != values).any(-1)
    twice = positions.sort(-1).values.diff(dim=-1) == 0
    if wrong.any() or twice.any():
        row, head = _first(wrong if wrong.any() else twice)
        raise Refuted(
            f"pairing: row {row}, head {head} retained values tagged (row, head, position) "
            f"{[(int(v[0]), int(v[1]), int(v[2] * 256 + v[3])) for v in values[row, head]]} "
            f"with keys {keys[row, head].tolist()}, of keys {cache.keys[row, head].tolist()}"
        )


@check
def check_time_order(compressor: Compressor, cache: Cache) -> None:
    """Retained positions ascend."""
    positions = _positions(compressor, cache)
    wrong = positions.diff(dim=-1) <= 0
    if wrong.any():
        kept = positions[_first(wrong)].tolist()
        raise Refuted(
            f"time order: positions {kept} retained from {cache.length} tokens at ratio {cache.keep_ratio}, "
            f"but should ascend: {sorted(kept)}"
        )


@check
def check_identity(compressor: Compressor, cache: Cache) -> None:
    """Ratio 1 returns the input bit for bit."""
    keys, values = compressor(cache.keys, cache.values, 1.0)[:2]
    if not (torch.equal(keys, cache.keys) and torch.equal(values, cache.values)):
        kept = cache.positions(values)[0, 0].tolist()
        raise Refuted(f"identity: ratio 1 returned positions {kept} (row 0, head 0) of {cache.length} tokens")


@check
def check_lowest_norms(compressor: Compressor, cache: Cache) -> None:
    """What is retained are the lowest key norms; of equal norms, the earlier positions."""
    kept = _positions(compressor, cache).sort(-1).values
    should = cache.norms().argsort(dim=-1, stable=True)[..., : kept.shape[-1]].sort(-1).values
    if not torch.equal(kept, should):
        at = _first(kept != should)
        raise Refuted(
            f"lowest norms: positions {kept[at].tolist()} retained of squared norms {cache.norms()[at].tolist()} "
            f"at ratio {cache.keep_ratio}, but should be {should[at].tolist()}"
        )


@check
def check_nesting(compressor: Compressor, cache: Cache) -> None:
    """What is kept at a ratio is contained in what is kept at a larger one."""
    wider = larger_ratio(cache.keep_ratio)
    few, many = _positions(compressor, cache), _positions(compressor, cache, wider)
    wrong = ~(few[..., :, None] == many[..., None, :]).any(-1)
    if wrong.any():
        at = _first(wrong)
        raise Refuted(
            f"nesting: positions {few[at].tolist()} retained at ratio {cache.keep_ratio}, "
            f"but {many[at].tolist()} at {wider}"
        )


@check
def check_scaling(compressor: Compressor, cache: Cache) -> None:
    """Scaling all keys by a power of two changes nothing."""
    before = _positions(compressor, cache)
    for factor in (0.25, 16.0):
        after = cache.positions(compressor(cache.keys * factor, cache.values, cache.keep_ratio)[1])
        if not torch.equal(before, after):
            at = _first(before != after)
            raise Refuted(
                f"scaling: keys times {factor} retained positions {after[at].tolist()} "
                f"instead of {before[at].tolist()}, squared norms {cache.norms()[at].tolist()}"
            )


@check
def check_permutation(compressor: Compressor, cache: Cache) -> None:
    """Where norms are distinct, permuting the tokens permutes the retained set."""
    length = cache.length
    keys = torch.zeros_like(cache.keys)
    keys[..., 0] = torch.arange(length).roll(length // 2)  # distinct norms in every dtype
    plain = cache.positions(compressor(keys, cache.values, cache.keep_ratio)[1])
    turned = cache.positions(compressor(keys.flip(2), cache.values.flip(2), cache.keep_ratio)[1])
    if not torch.equal(plain.sort(-1).values, turned.sort(-1).values):
        raise Refuted(
            f"permutation: norms {keys[0, 0, :, 0].tolist()} retained positions {plain[0, 0].tolist()}, "
            f"and reversed in time {turned[0, 0].sort().values.tolist()}"
        )


@check
def check_independence(compressor: Compressor, cache: Cache) -> None:
    """A row and a head compressed alone equal those compressed in a batch; values have no say; twice gives the same."""
    keys = compressor(cache.keys, cache.values, cache.keep_ratio)[0]
    alone = compressor(cache.keys[-1:, -1:], cache.values[-1:, -1:], cache.keep_ratio)[:2]
    other = compressor(cache.keys, cache.values.flip(0, 1), cache.keep_ratio)
    again = compressor(cache.keys, cache.values, cache.keep_ratio)
    cases = (("alone", alone[0], keys[-1:, -1:]), ("other values", other[0], keys), ("again", again[0], keys))
    for name, got, should in cases:
        if not torch.equal(got, should):
            raise Refuted(f"independence: the last row and head, {name}: {got[-1, -1]}, in the batch: {should[-1, -1]}")


@check
def check_layout(compressor: Compressor, cache: Cache) -> None:
    """Dtype is kept, and tensors with other strides give the same answer bit for bit."""
    keys, values = compressor(cache.keys, cache.values, cache.keep_ratio)[:2]
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (cache.keys, cache.values))
    again = compressor(*strided, cache.keep_ratio)
    if keys.dtype != cache.keys.dtype or values.dtype != cache.values.dtype:
        raise Refuted(f"layout: {cache.keys.dtype} came back as {keys.dtype} and {values.dtype}")
    if not (torch.equal(keys, again[0]) and torch.equal(values, again[1])):
        raise Refuted(f"layout: contiguous keys gave {keys.tolist()}, transposed ones {again[0].tolist()}")


@check
def check_memory(compressor: Compressor, cache: Cache) -> None:
    """Inputs are never written, and results own exactly the bytes that they retain."""
    keys, values = cache.keys.clone(), cache.values.clone()
    results = compressor(keys, values, cache.keep_ratio)[:2]
    if not (torch.equal(keys, cache.keys) and torch.equal(values, cache.values)):
        raise Refuted(f"memory: the compressor wrote to its input, {cache}")
    for result in results:
        held, own = result.untyped_storage().nbytes(), result.numel() * result.element_size()
        if held != own:
            raise Refuted(f"memory: {own} bytes are retained, but {held} are kept alive, {cache}")


@check
def check_nonfinite(compressor: Compressor, cache: Cache) -> None:
    """A key that is not finite raises; it is never silently kept."""
    if retained_count(cache.length, cache.keep_ratio) == cache.length:
        return  # nothing is scored
    for poison in (torch.nan, torch.inf, -torch.inf):
        keys = cache.keys.clone()
        keys[-1, -1, cache.length // 2, -1] = poison
        try:
            compressor(keys, cache.values, cache.keep_ratio)
        except ValueError:
            continue
        raise Refuted(f"non-finite: a key with {poison} at position {cache.length // 2} did not raise, {cache}")
