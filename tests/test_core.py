from __future__ import annotations

from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from knorm import Policy, compress, core
from knorm.core import select, squared_norms
from knorm.laws.strategies import Cache, caches, larger_ratio, tagged_values
from knorm.laws.traits import exact_share

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def lowest(norms: list[float], count: int, first: int = 0, recent: int = 0) -> list[int]:
    """The same choice in plain Python: protected tokens, then the lowest norms, the earlier of equal ones."""
    protected = set(range(first)) | set(range(len(norms) - recent, len(norms)))
    others = sorted((norm, i) for i, norm in enumerate(norms) if i not in protected)
    return sorted([*protected, *(i for _, i in others)][:count])


@given(caches(), st.integers(0, 3), st.integers(0, 3))
def test_protected_tokens_and_the_lowest_norms_are_kept_in_time_order(cache: Cache, first, recent):
    policy = Policy(cache.keep_ratio, protect_first=first, protect_recent=recent)
    count = ceil(exact_share(cache.length, cache.keep_ratio))
    if cache.length > first + recent > count:
        with pytest.raises(ValueError, match="Protect fewer, or raise keep_ratio"):
            compress(cache.keys, cache.values, policy)
        return
    kept = compress(cache.keys, cache.values, policy)
    if cache.length <= first + recent:
        count = cache.length
    should = [[lowest(norms, count, first, recent) for norms in heads] for heads in cache.norms().tolist()]
    assert kept.positions.tolist() == should
    assert torch.equal(cache.positions(kept), kept.positions)


@given(caches(), st.sampled_from(["low_norm", "high_norm", "random"]), st.integers(0, 5))
def test_every_score_nests_and_keeps_the_count_in_time_order(cache: Cache, score, seed):
    few, many = (
        compress(cache.keys, cache.values, Policy(ratio, score=score, seed=seed)).positions
        for ratio in (cache.keep_ratio, larger_ratio(cache.keep_ratio))
    )
    assert few.shape[-1] == ceil(exact_share(cache.length, cache.keep_ratio))
    assert (few.diff(dim=-1) > 0).all()
    assert (few[..., :, None] == many[..., None, :]).any(-1).all()
    if score == "random":
        assert (few == few[:1]).all(), "rows are alike"


@given(caches(), st.integers(0, 2), st.integers(0, 2))
def test_positions_stay_those_of_the_sequence_through_a_second_compression(cache: Cache, first, recent):
    policy = Policy(cache.keep_ratio, protect_first=first, protect_recent=recent)
    assume(exact_share(ceil(exact_share(cache.length, cache.keep_ratio)), cache.keep_ratio) > first + recent - 1)
    once = compress(cache.keys, cache.values, policy)
    twice = compress(once.keys, once.values, policy, positions=once.positions)
    assert torch.equal(cache.positions(twice), twice.positions)
    protected = [*range(first), *range(cache.length - recent, cache.length)]
    assert torch.isin(torch.tensor(protected), twice.positions).all()


@given(st.sampled_from(DTYPES), st.integers(0, 2**32 - 1), st.integers(2, 40))
@example(torch.bfloat16, 3, 40)
def test_the_selection_is_that_of_float64_near_ties_apart(dtype, seed, length):
    keys = torch.randn(2, 2, length, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    norms = keys.double().norm(dim=-1)
    kept = compress(keys, keys, 0.5).positions
    dropped = torch.ones_like(norms, dtype=torch.bool).scatter(-1, kept, False)
    highest_kept = norms.gather(-1, kept).amax(-1)
    lowest_dropped = norms.masked_fill(~dropped, torch.inf).amin(-1)
    assert (highest_kept <= lowest_dropped * (1 + 2**-20)).all()


@given(st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
def test_rotating_keys_changes_nothing_where_the_gap_at_the_cut_is_wide(dtype, seed):
    keys = torch.randn(1, 2, 12, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    angles = torch.arange(12, dtype=torch.float64)
    pairs = torch.view_as_complex(keys.view(1, 2, 12, 2, 2))
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).reshape(keys.shape)
    ranked = keys.norm(dim=-1).sort(-1).values
    assume((ranked[..., 6] / ranked[..., 5] > 1 + 20 * torch.finfo(dtype).eps).all())
    before, after = (compress(x.to(dtype), x.to(dtype), 0.5).positions for x in (keys, turned))
    assert torch.equal(before, after)


def test_high_norm_keeps_the_highest():
    keys = torch.tensor([3.0, 1, 2, 0]).view(1, 1, 4, 1)
    assert compress(keys, keys, Policy(0.5, score="high_norm")).positions.tolist() == [[[0, 2]]]


def drawn(seed, layer, head, position):
    """Splitmix64 of them, in plain Python; its lowest 53 bits."""
    word = 2**64 - 1
    state = ((seed * 1_000_003 + layer) * 6364136223846793005 + head * 0x61C8864680B583EB + position) & word
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ state >> shift) * factor & word
    return (state ^ state >> 31) & 2**53 - 1


@pytest.mark.parametrize(("seed", "layer"), [(0, 0), (0, 3), (7, 0), (7, 3)])
def test_the_random_draw_is_that_of_seed_layer_head_and_position(seed, layer):
    keys = torch.randn(2, 3, 24, 2)
    kept = compress(keys, keys, Policy(0.25, score="random", seed=seed), layer=layer).positions
    rows = [sorted(sorted(range(24), key=lambda s: drawn(seed, layer, head, s))[:6]) for head in range(3)]
    assert kept.tolist() == [rows, rows]


def test_keys_beyond_a_few_rows_at_a_time_are_ranked_alike(monkeypatch):
    monkeypatch.setattr(core, "_CACHED", 8)  # four keys of two numbers
    keys = torch.tensor([5.0, 4, 3, 6, 9, 8, 7, 2, 3.5, 0]).view(1, 1, 10, 1).expand(1, 1, 10, 2)
    assert compress(keys, keys, 0.5).positions.tolist() == [[[1, 2, 7, 8, 9]]]


def test_every_skipped_layer_is_skipped():
    keys = torch.randn(1, 1, 8, 2)
    policy = Policy(0.5, skip_layers=(1, 2))
    assert [compress(keys, keys, policy, layer=layer).keys.shape[2] for layer in range(4)] == [4, 8, 8, 4]


def test_equal_norms_keep_the_earlier_position():
    keys = torch.ones(1, 1, 9, 4)
    assert compress(keys, keys, 0.5).positions.tolist() == [[[0, 1, 2, 3, 4]]]


def test_a_second_compression_without_positions_counts_anew():
    keys = torch.tensor([3.0, 1, 2, 0]).view(1, 1, 4, 1)
    once = compress(keys, keys, 0.5)
    assert once.positions.tolist() == [[[1, 3]]]
    assert compress(once.keys, once.values, 0.5).positions.tolist() == [[[1]]]
    assert compress(once.keys, once.values, 0.5, positions=once.positions).positions.tolist() == [[[3]]]


def test_short_caches_and_skipped_layers_come_back_bit_for_bit():
    keys, values = torch.randn(1, 2, 7, 4), tagged_values(1, 2, 7, torch.float32)
    policy = Policy(0.3, prune_after=8, skip_layers=(1,))
    kept = compress(keys, values, policy)
    assert torch.equal(kept.keys, keys)
    assert torch.equal(kept.values, values)
    assert compress(keys, values, Policy(0.3, skip_layers=(1,)), layer=1).keys.shape[2] == 7
    assert compress(keys, values, Policy(0.3, skip_layers=(1,)), layer=0).keys.shape[2] == 3


def test_norms_do_not_overflow_in_half_precision():
    keys = torch.tensor([[60000.0, 60000.0], [300.0, 0.0], [50000.0, 0.0]], dtype=torch.float16).view(1, 1, 3, 2)
    assert keys.norm(dim=-1).isinf().any(), "what a norm in the keys' own dtype gives"
    assert compress(keys, keys, "0.5").positions.tolist() == [[[1, 2]]]


def test_norms_do_not_underflow():
    small = torch.tensor([3e-25, 1e-25, 2e-25, 0.0], dtype=torch.bfloat16).view(1, 1, 4, 1)
    assert (small.float() ** 2 == 0).all(), "what float32 squares give"
    assert compress(small, small, 0.5).positions.tolist() == [[[1, 3]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_key_that_is_not_finite_raises_with_its_place(dtype, poison):
    keys = torch.zeros(2, 3, 5, 4, dtype=dtype)
    keys[1, 2, 3, 0] = poison
    with pytest.raises(ValueError, match=r"at layer 4, position 3, head 2, batch row 1 has no norm: it is not finite"):
        compress(keys, keys, 0.5, layer=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_finite_key_whose_squared_norm_overflows_float32_raises(dtype):
    keys = torch.zeros(1, 1, 3, 2, dtype=dtype)
    keys[0, 0, 1] = 1e20
    with pytest.raises(ValueError, match="position 1, head 0, batch row 0 has no norm: its squared norm overflows"):
        compress(keys, keys, 0.5)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ((1, 2, 4, 8), (1, 2, 5, 8), "the same batch, kv_heads and length"),
        ((1, 2, 4, 8), (1, 1, 4, 8), "the same batch, kv_heads and length"),
        ((2, 2, 4, 8), (1, 2, 4, 8), r"keys \[2, 2, 4, 8\] torch.float32, values \[1, 2, 4, 8\]"),
        ((2, 4, 8), (2, 4, 8), r"should be \[batch, kv_heads, length, head_dim\]"),
        ((1, 2, 0, 8), (1, 2, 0, 8), "without tokens"),
        ((1, 2, 4, 8), (1, 2, 4, 0), "without tokens"),
    ],
)
def test_shapes_that_do_not_agree_are_refused(keys, values, message):
    with pytest.raises(ValueError, match=message):
        compress(torch.zeros(keys), torch.zeros(values), 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_of_many_bytes_are_those_of_a_gather(dtype):
    keys, values = (torch.randn(2, 3, 6000, 128).to(dtype) for _ in "kv")  # NumPy allocates what is kept
    kept = compress(keys, values, 0.5)
    for one, other in zip(kept[:2], (keys, values), strict=True):
        assert one.dtype == dtype
        assert one.is_contiguous()
        assert torch.equal(one, other.gather(2, kept.positions[..., None].expand_as(one)))


@pytest.mark.parametrize("length", [100, 40_000])
def test_gradients_reach_the_tokens_that_are_kept(length):
    keys, values = (torch.randn(1, 1, length, 64, requires_grad=True) for _ in "kv")
    kept = compress(keys, values, 0.5)
    (kept.keys.sum() + 2 * kept.values.sum()).backward()
    chosen = torch.zeros(1, 1, length, 1).index_fill(2, kept.positions.flatten(), 1.0).expand_as(keys)
    assert torch.equal(keys.grad, chosen)
    assert torch.equal(values.grad, 2 * chosen)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_derivatives_forwards_and_maps_work_at_every_size():
    keys = torch.randn(1, 1, 40_000, 64)
    positions = compress(keys, keys, 0.5).positions
    summed = lambda values: compress(keys, values, 0.5).values.sum()  # noqa: E731
    assert torch.func.jvp(summed, (keys,), (torch.ones_like(keys),))[1] == positions.numel() * 64
    both = torch.func.vmap(lambda values: compress(keys, values, 0.5).values)(torch.stack([keys, 2 * keys]))
    assert torch.equal(2 * both[0], both[1])
    with pytest.raises(ValueError, match=r"torch\.vmap maps over keys, .* keys\.flatten\(0, 1\)"):
        torch.func.vmap(lambda keys: compress(keys, keys, 0.5).values)(torch.stack([keys, 2 * keys]))
    gradient = torch.func.grad(lambda keys: compress(keys, keys, 0.5).values.sum())
    with pytest.raises(ValueError, match=r"torch\.vmap maps over keys"):
        torch.func.vmap(gradient)(torch.stack([keys, 2 * keys]))


@pytest.mark.parametrize("layer", [0.5, -1, "0", [0], True])
def test_a_layer_that_is_no_index_is_refused(layer):
    keys = torch.randn(1, 1, 4, 8)
    with pytest.raises((TypeError, ValueError), match=r"layer=.*, but should be an integer"):
        compress(keys, keys, Policy(0.5, score="random"), layer=layer)


def test_a_layer_may_come_from_numpy():
    keys, policy = torch.randn(1, 1, 40, 8), Policy(0.5, score="random")
    ours, theirs = (compress(keys, keys, policy, layer=layer).positions for layer in (np.int64(3), 3))
    assert torch.equal(ours, theirs)


def test_positions_elsewhere_are_refused():
    keys, positions = torch.randn(1, 1, 4, 8), torch.arange(4, device="meta").view(1, 1, 4)
    with pytest.raises(ValueError, match="positions is a meta tensor"):
        compress(keys, keys, 0.5, positions=positions)


def test_integer_keys_and_foreign_positions_are_refused():
    keys = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="both should be float16, bfloat16"):
        compress(keys.long(), keys.long(), 0.5)
    with pytest.raises(ValueError, match=r"positions \[1, 1, 3\] torch.int64, but should be int64 \[1, 1, 4\]"):
        compress(keys, keys, 0.5, positions=torch.zeros(1, 1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"positions \[1, 1, 4\] torch.float32"):
        compress(keys, keys, 0.5, positions=torch.zeros(1, 1, 4))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_select_equals_a_stable_sort(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    tensor = torch.tensor(scores, dtype=torch.float32)
    assert select(tensor, count).tolist() == tensor.argsort(stable=True)[:count].sort().values.tolist()


def test_squared_norms_accept_any_leading_shape():
    assert squared_norms(torch.tensor([3.0, 4.0])).item() == 25
    assert squared_norms(torch.ones(2, 3, 4, 5)).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="position 1 has no norm"):
        squared_norms(torch.tensor([[0.0], [torch.nan]]))


def test_what_is_no_tensor_or_of_another_dtype_is_refused():
    keys = torch.zeros(1, 1, 4, 2)
    with pytest.raises(TypeError, match=r"keys ndarray, but should be a torch\.Tensor"):
        compress(keys.numpy(), keys.numpy(), 0.5)
    for other in (keys.long(), keys.to(torch.float8_e4m3fn)):
        with pytest.raises(ValueError, match="both should be float16"):
            compress(keys, other, 0.5)
