"""The Triton kernels against the plain path, where sums are exact and where they are not."""

from __future__ import annotations

import random

import pytest
import torch

from knorm import Policy, compress, kernels
from knorm.core import select, squared_norms

pytestmark = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def whole_numbers(shape, dtype, seed):
    """Small whole numbers, no key of them zero: their squared norms are exact, and tie often."""
    drawn = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed))
    drawn[..., 0] = torch.where((drawn == 0).all(-1), 1, drawn[..., 0])
    return drawn.to(dtype).cuda()


def plainly(keys, values, positions, count, first=0, recent=0, *, highest=False):
    scores = squared_norms(keys)
    kept = select(-scores if highest else scores, count, first, recent)
    take = [x.gather(2, kept[..., None].expand(*kept.shape, x.shape[3])) for x in (keys, values)]
    return *take, kept if positions is None else positions.gather(-1, kept)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(64, torch.bfloat16), (80, torch.float32), (128, torch.bfloat16), (256, torch.float16)],
)
def test_selections_equal_the_plain_ones_bit_for_bit(dtype, width, fused, monkeypatch):
    monkeypatch.setattr(kernels, "_FUSED_BYTES", 2**40 if fused else 0)
    kernels._plan.cache_clear()
    draw = random.Random(width)
    for seed, length in enumerate((1, 65, 1000, 4096, 20_000)):
        shape = draw.choice([(1, 1), (1, 8), (5, 3), (40, 8)] if length < 4096 else [(1, 8), (2, 3)])
        keys, values = (whole_numbers((*shape, length, width), dtype, seed + i) for i in (0, 100))
        if seed % 2:
            keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values))
        count = draw.randint(1, length)
        first = draw.randint(0, min(count, 5))
        recent = draw.randint(0, min(count - first, 5))
        if first + recent >= length:
            first = recent = 0
        positions = torch.arange(length, device="cuda").expand(*shape, length) * 3 if seed % 3 else None
        options = {"highest": bool(seed % 2)}
        given = keys, values, positions, count, first, recent
        for one, other in zip(kernels.compress(*given, **options), plainly(*given, **options), strict=True):
            assert torch.equal(one, other)
    kernels._plan.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_numbers_are_chosen_but_for_near_ties(dtype):
    keys, values = (torch.randn(2, 8, 40_000, 128, device="cuda").to(dtype) for _ in "kv")
    norms = keys.double().square().sum(-1)
    for policy in (Policy(0.5), Policy(0.1, score="high_norm"), Policy(0.3, protect_first=4, protect_recent=64)):
        kept_keys, kept_values, positions = compress(keys, values, policy)
        assert (positions.diff(dim=-1) > 0).all()
        index = positions[..., None].expand_as(kept_keys)
        assert torch.equal(kept_keys, keys.gather(2, index))
        assert torch.equal(kept_values, values.gather(2, index))
        free = torch.ones(40_000, dtype=torch.bool, device="cuda")
        free[: policy.protect_first] = free[40_000 - policy.protect_recent :] = False
        chosen = torch.zeros_like(norms, dtype=torch.bool).scatter_(2, positions, True)
        assert chosen[..., ~free].all()
        scores = -norms if policy.score == "high_norm" else norms
        worst = scores.masked_fill(~(chosen & free), -torch.inf).amax(-1)
        best = scores.masked_fill(chosen | ~free, torch.inf).amin(-1)
        assert ((worst - best) / best.abs() <= 2**-20).all()


def test_equal_norms_keep_the_earliest_and_leave_nothing_behind():
    keys = torch.ones(1, 8, 30_000, 64, device="cuda")
    for _ in range(3):
        assert torch.equal(compress(keys, keys, 0.25).positions[0, 3], torch.arange(7500, device="cuda"))
    assert not any(held.control.any() for held in kernels._held.values())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e25])
def test_a_key_without_a_norm_is_named_and_the_next_call_works(bad):
    keys = torch.randn(2, 4, 9000, 64, device="cuda")
    spoilt = keys.clone()
    spoilt[1, 2, 777, 5] = bad
    with pytest.raises(ValueError, match="layer 3, position 777, head 2, batch row 1 has no norm"):
        compress(spoilt, spoilt, Policy(0.5), layer=3)
    compress(keys, keys, Policy(0.5))


def test_norms_too_small_for_float32_are_told_apart_in_float64():
    keys = torch.full((1, 1, 4096, 64), 1e-25, device="cuda")
    keys[0, 0, 4000:] = 1e-26
    assert torch.equal(compress(keys, keys, "1/64").positions[0, 0], torch.arange(4000, 4064, device="cuda"))


def test_gradients_reach_the_tokens_that_are_kept():
    keys, values = (torch.randn(1, 2, 4096, 64, device="cuda", requires_grad=True) for _ in "kv")
    kept = compress(keys, values, 0.5)
    kept.values.sum().backward()
    assert torch.equal(values.grad[..., 0].nonzero()[:, -1].view(1, 2, 2048), kept.positions)


def test_streams_threads_and_views_do_not_mix():
    keys, values = (whole_numbers((1, 8, 20_000, 64), torch.float16, seed) for seed in (1, 2))
    expected = plainly(keys, values, None, 10_000)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    results = []
    for _ in range(10):
        with torch.cuda.stream(side):
            results.append(kernels.compress(keys, values, None, 10_000))
        results.append(kernels.compress(keys, values, None, 10_000))
    torch.cuda.synchronize()
    unaligned = torch.cat([keys.new_zeros(3), keys.flatten()])[3:].view_as(keys)
    wide = torch.cat([keys, values], dim=-1)[..., :64]
    for other in (unaligned, wide):
        results.append(kernels.compress(other, values, None, 10_000))
    positions = torch.arange(1 + 8 * 20_000, device="cuda")[1:].view(1, 8, 20_000)  # 8 bytes off
    moved = kernels.compress(keys, values, positions, 10_000)
    assert torch.equal(moved[2], positions.gather(-1, expected[2]))
    for result in results:
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))
