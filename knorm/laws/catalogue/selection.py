"""Which tokens are retained."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from knorm.laws.catalogue.provenance import first_place
from knorm.laws.registry import Refuted, Vacuous, check
from knorm.laws.strategies import Cache, larger_ratio
from knorm.laws.subjects import Subject
from knorm.laws.traits import Traits

NEAR_TIE = 2.0**-20  # relative, as perplexity's, but the laws' own: what they judge does not set their tolerance


_BY_NORM = {"scores": "key_norm", "merges_values": False}


def evictable(traits: Traits, length: int, device: torch.device) -> Tensor:
    """Tell which tokens may be evicted.

    Args:
        traits: what protects the first and the newest.
        length: tokens of the cache.
        device: of the answer.

    Returns:
        False where a token is protected: bool [length].
    """
    place = torch.arange(length, device=device)
    return (place >= traits.protect_first) & (place < length - traits.protect_recent)


def out_of_rank(compressor: Subject, cache: Cache) -> str | None:
    """Say what is wrong where `compressor` drops a key of `cache` with a norm smaller than a retained one's.

    Returns None where nothing is, near-ties apart.
    """
    kept = cache.retained(compressor(cache.keys, cache.values, cache.keep_ratio))
    free = evictable(compressor.traits, cache.length, kept.device)
    norms = cache.norms().sqrt()
    highest = norms.masked_fill(~(kept & free), -1.0).amax(-1)
    lowest = norms.masked_fill(kept | ~free, torch.inf).amin(-1)
    wrong = highest > lowest * (1 + NEAR_TIE)
    if not wrong.any():
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    return (
        f"positions {kept[at].nonzero()[:, 0].tolist()} retained of norms {[float(f'{n:.6g}') for n in norms[at]]}: "
        f"a norm of {highest[at]:.6g} stays, but one of {lowest[at]:.6g} goes"
    )


@check(needs=_BY_NORM, exact=True)
def check_lowest_norms(compressor: Subject, cache: Cache) -> None:
    """No dropped key has a smaller norm than a retained one."""
    if wrong := out_of_rank(compressor, cache):
        raise Refuted(f"lowest norms: {wrong}")


@check(needs={**_BY_NORM, "ties": "earlier"}, exact=True)
def check_ties(compressor: Subject, cache: Cache) -> None:
    """Of keys of one norm, the earlier positions stay."""
    kept = cache.retained(compressor(cache.keys, cache.values, cache.keep_ratio))
    free = evictable(compressor.traits, cache.length, kept.device)
    norms = cache.norms()
    same = norms[..., :, None] == norms[..., None, :]  # [.., dropped earlier, retained later]
    earlier = torch.ones(cache.length, cache.length, dtype=torch.bool, device=kept.device).triu(1)
    wrong = same & earlier & (~kept & free)[..., :, None] & (kept & free)[..., None, :]
    if wrong.any():
        row, head, dropped, stays = wrong.nonzero()[0].tolist()
        raise Refuted(
            f"ties: positions {dropped} and {stays} have one norm, {norms[row, head, stays].sqrt():.6g}; "
            f"{stays} stays, but {dropped} should (row {row}, head {head} retains "
            f"{kept[row, head].nonzero()[:, 0].tolist()})"
        )


@check(needs={"scores": ("key_norm", "keys"), "merges_values": False, "ragged": False})
def check_nesting(compressor: Subject, cache: Cache) -> None:
    """What is kept at a ratio is contained in what is kept at a larger one."""
    wider = larger_ratio(cache.keep_ratio)
    few = cache.retained(compressor(cache.keys, cache.values, cache.keep_ratio))
    many = cache.retained(compressor(cache.keys, cache.values, wider))
    wrong = few & ~many
    if wrong.any():
        at = first_place(wrong)
        small, large = (x[at].nonzero()[:, 0].tolist() for x in (few, many))
        raise Refuted(f"nesting: positions {small} retained at ratio {cache.keep_ratio}, but {large} at {wider}")


@check(needs={"scores": ("key_norm", "keys"), "ragged": False})
def check_keys_decide(compressor: Subject, cache: Cache) -> None:
    """At half the budget what is retained depends on the keys, at every length beyond what is protected."""
    traits, length = compressor.traits, min(cache.length, 40)
    if length < max(3, traits.prune_after, 2 * traits.protected + 2, 2 * traits.granularity + 1):
        raise Vacuous
    values = cache.values[:1, :1, :length]
    generator = torch.Generator().manual_seed(length)
    shape, seen = (1, 1, length, cache.keys.shape[3]), []
    for _ in range(12):
        keys = torch.randint(-8, 9, shape, generator=generator).to(cache.keys)
        kept = replace(cache, keys=keys, values=values, keep_ratio=0.5)
        seen.append(kept.retained(compressor(keys, values, 0.5))[0, 0].nonzero()[:, 0].tolist())
    if len(seen[0]) < length and all(positions == seen[0] for positions in seen):
        raise Refuted(
            f"keys decide: positions {seen[0]} of {length} tokens are retained at ratio 0.5 whatever the keys are, in "
            "12 draws, but keys should decide"
        )


@check(needs=_BY_NORM, exact=True)
def check_scaling(compressor: Subject, cache: Cache) -> None:
    """Scaling all keys by a power of two changes nothing."""
    before = cache.retained(compressor(cache.keys, cache.values, cache.keep_ratio))
    for factor in (0.25, 16.0, 512.0):
        after = cache.retained(compressor(cache.keys * factor, cache.values, cache.keep_ratio))
        if not torch.equal(before, after):
            at = first_place(before != after)
            plainly, larger = (x[at].nonzero()[:, 0].tolist() for x in (before, after))
            norms = [float(f"{n:.6g}") for n in cache.norms()[at].sqrt()]
            raise Refuted(
                f"scaling: positions {plainly} retained of norms {norms}, but {larger} of {factor:g} times those"
            )


@check(needs=_BY_NORM, exact=True)
def check_rotation(compressor: Subject, cache: Cache) -> None:
    """Rotating each key, by quarter turns that leave its norm exact, changes nothing."""
    half = cache.keys.shape[3] // 2
    quarter = torch.arange(cache.length, device=cache.keys.device) % 4  # quarter turns are exact in every dtype
    left, right = cache.keys[..., :half], cache.keys[..., half:]
    turns = torch.stack(
        [torch.cat(pair, -1) for pair in ((left, right), (-right, left), (-left, -right), (right, -left))]
    )
    turned = turns[quarter, :, :, torch.arange(cache.length, device=cache.keys.device)].permute(1, 2, 0, 3)
    before = cache.retained(compressor(cache.keys, cache.values, cache.keep_ratio))
    after = cache.retained(compressor(turned.contiguous(), cache.values, cache.keep_ratio))
    if not torch.equal(before, after):
        at = first_place(before != after)
        stay, now = (x[at].nonzero()[:, 0].tolist() for x in (before, after))
        raise Refuted(
            f"rotation: positions {stay} retained, but {now} after quarter turns of keys {turned[at].tolist()}"
        )


@check(needs={**_BY_NORM, "protect_first": 0, "protect_recent": 0})
def check_permutation(compressor: Subject, cache: Cache) -> None:
    """Where norms are distinct, permuting the tokens permutes the retained set."""
    keys = torch.zeros_like(cache.keys)
    if cache.length > 200:
        raise Vacuous  # not so many whole numbers are distinct in every dtype
    keys[..., 0] = torch.arange(cache.length, device=keys.device).roll(cache.length // 2)
    plain = cache.retained(compressor(keys, cache.values, cache.keep_ratio))
    turned = cache.retained(compressor(keys.flip(2), cache.values.flip(2), cache.keep_ratio))
    if not torch.equal(plain, turned):
        at = first_place(plain != turned)
        plainly, permuted = (x[at].nonzero()[:, 0].tolist() for x in (plain, turned))
        norms = [int(n) for n in keys[(*at, slice(None), 0)]]
        raise Refuted(
            f"permutation: positions {plainly} retained of norms {norms}, but {permuted} where time is reversed"
        )
