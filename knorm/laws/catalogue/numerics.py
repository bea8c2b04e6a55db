"""Dtypes, devices, layouts, and numbers at the edge."""

from __future__ import annotations

from dataclasses import replace

import torch

from knorm.laws.catalogue.selection import out_of_rank
from knorm.laws.ranked import Ranked
from knorm.laws.registry import Refuted, Vacuous, check
from knorm.laws.strategies import Cache, made_for, one_apart
from knorm.laws.subjects import Raised, Subject
from knorm.tensors import alike

_BY_NORM = {"scores": "key_norm", "merges_values": False}


@check(needs=_BY_NORM)
def check_half_precision(compressor: Subject, cache: Cache) -> None:
    """Half-precision keys are ranked as float64 arithmetic ranks them, near-ties apart."""
    dtype = cache.keys.dtype if cache.keys.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    if dtype not in made_for(compressor.traits)[0]:
        raise Vacuous
    spread = torch.arange(cache.length, device=cache.keys.device).mul(37).remainder(101).double()
    along = torch.zeros(cache.keys.shape[3], device=spread.device, dtype=torch.float64)
    along[:2] = torch.tensor([1.0, 0.25])
    spread = spread[:, None] * along + 500
    scale = cache.keys.double().abs().amax().clamp(min=1.0).log2().floor().exp2() / 16
    keys = (cache.keys.double() + spread * scale).clamp(-6e4, 6e4).to(dtype)  # many norms within half precision's grain
    if wrong := out_of_rank(compressor, replace(cache, keys=keys, values=cache.values.to(dtype))):
        raise Refuted(f"half precision, {str(dtype).removeprefix('torch.')}: {wrong}")


@check(needs={**_BY_NORM, "nonfinite": "raise"}, exact=True)
def check_subnormal(compressor: Subject, cache: Cache) -> None:
    """Keys whose float32 squares vanish are still ranked by their norms."""
    if torch.bfloat16 not in made_for(compressor.traits)[0]:
        raise Vacuous
    keys = (cache.keys.double() * 2.0**-90).to(torch.bfloat16)
    if wrong := out_of_rank(compressor, replace(cache, keys=keys, values=cache.values.to(torch.bfloat16))):
        raise Refuted(f"subnormal: {wrong}")


LARGE = 2.0**6  # times keys of up to 8: their squares overflow float16, and nothing else


@check(first=one_apart)
def check_ranks_numbers(compressor: Subject, cache: Cache) -> None:
    """Finite keys, large ones too, are ranked by numbers: nothing is chosen by comparing what is none."""
    if cache.keys.double().abs().amax() > 8:
        raise Vacuous  # larger than any model's
    half = [torch.float16] if torch.float16 in made_for(compressor.traits)[0] else []
    for keys in (cache.keys, cache.keys * LARGE, *((cache.keys * LARGE).to(dtype) for dtype in half)):
        with Ranked() as ranked:
            compressor(keys, cache.values.to(keys.dtype), cache.keep_ratio)
        if ranked.nans:
            dtype = str(keys.dtype).removeprefix("torch.")
            raise Refuted(
                f"ranks numbers: {ranked.operation} was given {ranked.nans} of {ranked.numbers} scores that are not "
                f"numbers, of {dtype} keys up to {float(keys.abs().max()):g}"
            )


def _evicts(compressor: Subject, cache: Cache) -> bool:
    kept = compressor(cache.keys, cache.values, cache.keep_ratio)
    return kept.keys.shape[2] < cache.length


@check(needs={"nonfinite": "raise"})
def check_nonfinite(compressor: Subject, cache: Cache) -> None:
    """A key that is not finite raises; it is never silently kept or dropped."""
    if not _evicts(compressor, cache):
        raise Vacuous  # nothing need be scored
    for poison in (torch.nan, torch.inf, -torch.inf):
        keys = cache.keys.clone()
        keys[-1, -1, cache.length // 2, -1] = poison
        _must_raise(compressor, keys, cache, f"a key with {poison}", "nonfinite")


@check(needs={"nonfinite": "raise"})
def check_overflow(compressor: Subject, cache: Cache) -> None:
    """A finite key whose squared norm overflows float32 raises."""
    if cache.keys.dtype == torch.float16 or not _evicts(compressor, cache):
        raise Vacuous
    keys = cache.keys.clone()
    keys[-1, -1, cache.length // 2] = 2.0**64
    _must_raise(compressor, keys, cache, "a key of 2^64 in each component", "overflow")


def _must_raise(compressor: Subject, keys: torch.Tensor, cache: Cache, what: str, law: str) -> None:
    try:
        compressor(keys, cache.values, cache.keep_ratio)
    except Raised:
        return
    raise Refuted(f"{law}: {what} at position {cache.length // 2} of the last row and head did not raise")


@check()
def check_dtype(compressor: Subject, cache: Cache) -> None:
    """Dtype and device are kept."""
    kept = compressor(cache.keys, cache.values, cache.keep_ratio)
    for name, got, given in (("keys", kept.keys, cache.keys), ("values", kept.values, cache.values)):
        if (got.dtype, got.device) != (given.dtype, given.device):
            raise Refuted(f"dtype: {name} came back as {got.dtype} on {got.device}, but were {given.dtype}")


@check(needs={"deterministic": True}, exact=True)
def check_layout(compressor: Subject, cache: Cache) -> None:
    """Non-contiguous and expanded tensors give the same answer, bit for bit."""
    wide = torch.cat([cache.keys.new_full(cache.keys.shape, 7), cache.keys], -1)[..., cache.keys.shape[3] :]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (cache.keys, cache.values)]
    row = Cache(cache.keys[:1], cache.values[:1], cache.keep_ratio)
    layouts = {
        "transposed": (turned[0], turned[1]),
        "sliced": (wide, torch.cat([cache.values, cache.values], 2)[:, :, : cache.length]),
        "expanded": (row.keys.expand(2, -1, -1, -1), row.values.expand(2, -1, -1, -1)),
    }
    for name, (keys, values) in layouts.items():
        plain = compressor(keys.contiguous(), values.contiguous(), cache.keep_ratio)
        try:
            strided = compressor.raw(keys, values, cache.keep_ratio)
        except Raised as raised:
            raise Refuted(f"layout: contiguous tensors are answered, but the same {name} raised {raised}") from None
        if not (alike(plain.keys, strided.keys) and alike(plain.values, strided.values)):
            raise Refuted(
                f"layout: positions {cache.positions(plain).tolist()} retained of contiguous tensors, "
                f"but {cache.positions(strided).tolist()} of the same {name}"
            )


@check(needs={"empty": "raise"})
def check_empty(compressor: Subject, cache: Cache) -> None:
    """A cache without tokens is refused with an error."""
    for ratio in (cache.keep_ratio, 1.0):
        try:
            kept = compressor(cache.keys[:, :, :0], cache.values[:, :, :0], ratio)
        except Raised:
            continue
        raise Refuted(f"empty: 0 tokens came back as {kept.keys.shape[2]} at ratio {ratio}, but should be refused")
