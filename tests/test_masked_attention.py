from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from knorm import Policy, evicted_at, masked_attention
from knorm.masked_attention import attend_compiled, attend_seen, block_mask, by_lifetime

pytestmark = pytest.mark.cpus

SCHEDULES = {
    "streaming": (Policy("0.7", 64, protocol="streaming"), 1),
    "prefill": (Policy("0.5"), 200),
    "never": (Policy(), 1),
}


def drawn(length, heads=2, kv_heads=2):
    draw = torch.Generator().manual_seed(length)
    query = torch.randn(2, heads, length, 8, generator=draw, dtype=torch.float64)
    key, value = torch.randn(2, 2, kv_heads, length, 8, generator=draw, dtype=torch.float64)
    return query, key, value


def by_definition(query, key, value, lost, scale=None):
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    place = torch.arange(length)
    seen = (place <= place[:, None]) & (place[:, None] < lost[..., None, :])
    key, value, seen = (x.repeat_interleave(groups, 1) for x in (key, value, seen))
    scores = (query @ key.mT * (scale or query.shape[-1] ** -0.5)).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("size", [16, 100, 512])
@pytest.mark.parametrize("name", SCHEDULES)
def test_blocks_of_queries_are_attention_by_its_definition(name, size, monkeypatch):
    monkeypatch.setitem(masked_attention._QUERIES, "cpu", size)
    query, key, value = drawn(300, heads=4)
    policy, prompt = SCHEDULES[name]
    lost = evicted_at(key.square().sum(-1), policy, prompt)
    assert torch.allclose(
        attend_seen(query, key, value, lost, None), by_definition(query, key, value, lost), atol=1e-12
    )


@pytest.mark.parametrize("evicts", [True, False])
def test_the_products_are_scaled_as_the_model_says(evicts):
    query, key, value = drawn(60, heads=4)
    never = torch.full(key.shape[:3], 60)
    lost = evicted_at(key.square().sum(-1), Policy("0.5"), 40) if evicts else None
    should = by_definition(query, key, value, lost if evicts else never, scale=0.7)
    assert torch.allclose(attend_seen(query, key, value, lost, 0.7), should, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("length", [256, 300])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_block_mask_sees_what_the_schedule_says(name, length, monkeypatch):
    monkeypatch.setattr(
        masked_attention, "_compiled", lambda: flex_attention
    )  # uncompiled: the same mask, whole scores
    query, key, value = (x.float() for x in drawn(length))
    policy, prompt = SCHEDULES[name]
    lost = evicted_at(key.square().sum(-1), policy, prompt)
    got = attend_compiled(query, key, value, lost, None)
    assert torch.allclose(got, by_definition(query, key, value, lost), atol=1e-5)


def test_tiles_are_empty_whole_or_mixed_as_minima_and_maxima_say():
    lost = torch.full((1, 1, 512), 512)
    lost[..., :128] = 200  # the first block is gone before the third
    lost[..., 130] = 300
    mask = block_mask(lost, torch.arange(512).expand(lost.shape))
    mixed, whole = mask.kv_num_blocks[0, 0].tolist(), mask.full_kv_num_blocks[0, 0].tolist()
    assert mixed == [1, 2, 2, 2]  # its own; and the first; and the second, twice: token 130 is gone, the others not
    assert whole == [0, 0, 0, 1]  # the third block, seen from the fourth


def test_keys_that_live_long_share_tiles():
    places = torch.arange(4096)
    lost = torch.where(places % 64 == 0, 4096, (places + 100).clamp(max=4096))[None, None]
    order = by_lifetime(lost)
    assert torch.equal(order.sort(-1).values, places.expand(lost.shape))
    strewn = block_mask(lost, places.expand(lost.shape))
    packed = block_mask(lost.gather(2, order), order)
    few, many = (int((m.kv_num_blocks + m.full_kv_num_blocks).sum()) for m in (packed, strewn))
    assert many == 32 * 33 // 2, "in time order no tile is empty"
    assert few < many / 2


def test_short_texts_and_full_precision_never_wait_for_a_compiler(monkeypatch):
    monkeypatch.setattr(masked_attention, "_compiled", lambda: pytest.fail("compiled"))
    query, key, value = (x.bfloat16() for x in drawn(300))
    lost = evicted_at(key.float().square().sum(-1), Policy("0.5"), 200)
    assert attend_seen(query, key, value, lost, None).isfinite().all()
