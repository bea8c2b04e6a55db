from __future__ import annotations

from math import ceil

import pytest
import torch
from commands import in_a_new_process, new_environment
from hypothesis import example, given
from hypothesis import strategies as st

from knorm import Policy, compress, evicted_at
from knorm.core import squared_norms
from knorm.laws.traits import exact_share
from knorm.schedule import cache_lengths, never, recent_cached


@st.composite
def policies(draw):
    options = {
        "keep_ratio": draw(st.sampled_from(["1", "0.95", "0.9", "0.55", "0.5", "0.3", "0.1"])),
        "protect_first": draw(st.integers(0, 3)),
        "protect_recent": draw(st.integers(0, 3)),
    }
    if draw(st.booleans()):
        return Policy(prune_after=draw(st.integers(0, 12)), **options)
    enough = next(n for n in range(2, 100) if Policy(options["keep_ratio"]).budget(n) >= 6)
    return Policy(prune_after=draw(st.integers(enough, enough + 12)), protocol="streaming", **options)


def budget(policy: Policy, length: int) -> int:
    protected = policy.protect_first + policy.protect_recent
    if length < policy.prune_after or length <= protected:
        return length
    if (count := ceil(exact_share(length, policy.keep_ratio))) < protected:
        raise ValueError
    return count


def replay(scores: list[float], policy: Policy, prompt: int) -> list[int]:
    """The run itself, in plain Python: feed, and when the policy says so keep the best of what is there."""
    lost, cache = [len(scores)] * len(scores), []
    for token in range(len(scores)):
        cache.append(token)
        if token + 1 < prompt or (policy.protocol == "prefill" and token + 1 > prompt):
            continue
        newest = cache[max(0, len(cache) - policy.protect_recent) :]
        protected = [s for s in cache if s in cache[: policy.protect_first] or s in newest]
        others = sorted((s for s in cache if s not in protected), key=lambda s: (scores[s], s))
        kept = sorted([*protected, *others][: budget(policy, len(cache))])
        for s in cache:
            if s not in kept:
                lost[s] = token + 1
        cache = kept
    return lost


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=40), policies(), st.data())
@example([1, 1, 1, 1, 1, 1, 0], Policy(0.5, prune_after=4, protocol="streaming"), None)
def test_the_schedule_is_the_run_replayed(scores, policy, data):
    prompt = data.draw(st.integers(1, len(scores))) if data else 2
    try:
        should = replay(scores, policy, prompt)
    except ValueError:
        with pytest.raises(ValueError, match=r"need .* tokens, but keep_ratio"):
            evicted_at(torch.tensor([scores], dtype=torch.float32), policy, prompt)
        return
    for dtype in (torch.float32, torch.float64):
        assert evicted_at(torch.tensor([scores], dtype=dtype), policy, prompt).tolist() == [should]


def test_a_prefill_protects_the_newest_tokens_of_its_prompt():
    scores = torch.arange(8.0)  # the newest would go first
    policy = Policy(0.5, protect_first=1, protect_recent=2)
    assert evicted_at(scores, policy, prompt_length=6).tolist() == [8, 6, 6, 6, 8, 8, 8, 8]


@given(st.integers(0, 2**32 - 1), policies(), st.integers(1, 30))
def test_the_schedule_is_the_compressor_on_the_growing_cache(seed, policy, prompt):
    keys = torch.randint(-3, 4, (2, 2, 30, 3), generator=torch.Generator().manual_seed(seed)).float()
    try:
        lost = evicted_at(squared_norms(keys), policy, prompt)
    except ValueError:
        return  # a prefill that cannot protect what it must
    kept = compress(keys[:, :, :prompt], keys[:, :, :prompt], policy)
    for query in range(prompt, 31):
        seen = torch.arange(query) < torch.full_like(lost[..., :query], query)
        if query < 30:
            seen = lost[..., :query] > query
            cached = torch.zeros_like(seen).scatter(-1, kept.positions, True)
            assert torch.equal(cached, seen), f"before query {query}"
            new = keys[:, :, query : query + 1]
            positions = torch.cat([kept.positions, torch.full((2, 2, 1), query)], -1)
            grown = (torch.cat([kept.keys, new], 2), torch.cat([kept.values, new], 2))
            if policy.protocol == "streaming":
                kept = compress(*grown, policy, positions=positions)
            else:
                kept = kept._replace(keys=grown[0], values=grown[1], positions=positions)


@given(st.integers(0, 2**32 - 1), policies(), st.integers(1, 20), st.lists(st.integers(0, 15), min_size=1, max_size=4))
def test_a_padded_row_is_scheduled_as_if_it_stood_alone(seed, policy, prompt, pads):
    scores = torch.randint(0, 6, (len(pads), 2, 20), generator=torch.Generator().manual_seed(seed)).float()
    try:
        lost = evicted_at(scores, policy, prompt, padding=torch.tensor(pads))
    except ValueError:
        return  # a prefill that cannot protect what it must
    for row, n in enumerate(pads):
        assert torch.equal(lost[row, :, :n], torch.arange(1, n + 1).expand(2, n))
        assert torch.equal(lost[row, :, n:], n + evicted_at(scores[row, :, n:], policy, max(1, prompt - n)))


@given(st.integers(0, 2**32 - 1), policies())
def test_lengths_and_recency_count_what_the_queries_see(seed, policy):
    scores = torch.rand(3, 25, generator=torch.Generator().manual_seed(seed))
    lost = evicted_at(scores, policy if policy.protocol == "streaming" else Policy(0.5), 10)
    queries = torch.arange(25)
    seen = (queries[:, None] >= queries) & (queries[:, None] < lost[:, None, :])
    newest = queries[:, None] - queries < 6
    assert torch.equal(cache_lengths(lost), seen.sum(-1))
    assert torch.equal(recent_cached(lost, 6), (seen & newest).sum(-1))


def test_a_cache_grows_where_the_ratio_rounds_up():
    lost = evicted_at(torch.arange(200.0), Policy("0.99", prune_after=32, protocol="streaming"))
    assert cache_lengths(lost).max() == 100, "ceil(0.99 * 99) is 99: at 100 the first token can go"


@pytest.mark.parametrize(
    ("scores", "prompt", "message"),
    [
        (torch.zeros(2, 5), 0, "prompt_length=0, but should be between 1 and the 5 tokens"),
        (torch.zeros(2, 5), 6, "prompt_length=6"),
        (torch.tensor([0.0, torch.nan]), 1, "should be finite"),
        (torch.tensor([0, 1]), 1, "should be finite floating-point"),
    ],
)
def test_bad_input_is_refused(scores, prompt, message):
    with pytest.raises(ValueError, match=message):
        evicted_at(scores, Policy(0.5), prompt)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match=r"policy=0\.5, but should be a knorm\.Policy"):
        evicted_at(torch.zeros(4), 0.5)
    with pytest.raises(TypeError, match="prompt_length='2', but should be an integer"):
        evicted_at(torch.zeros(4), Policy(0.5), "2")
    with pytest.raises(TypeError, match=r"scores ndarray, but should be a torch\.Tensor"):
        evicted_at(torch.zeros(4).numpy(), Policy(0.5))
    with pytest.raises(ValueError, match=r"a tensor \[\.\.\., T\]"):
        evicted_at(torch.tensor(1.0), Policy(0.5))
    with pytest.raises(ValueError, match=r"torch\.vmap maps over scores"):
        torch.func.vmap(lambda scores: evicted_at(scores, Policy(0.5), 2))(torch.rand(3, 8))


@pytest.mark.parametrize(
    ("padding", "message"),
    [
        ([1, 2], "padding list, but should be a torch.Tensor"),
        (torch.tensor([1, 2, 3]), r"padding \[3\] for scores \[2, 1, 8\], but should be int64 \[2\]"),
        (torch.tensor([[1, 2]]), r"padding \[1, 2\] for scores"),
        (torch.tensor([1.0, 2.0]), "padding torch.float32 on cpu, but should be int64"),
        (torch.tensor([True, False]), "padding torch.bool"),
        (torch.tensor([-1, 2]), r"padding \[-1, 2\], but should be from 0 to the 8 tokens"),
        (torch.tensor([9, 2]), r"padding \[9, 2\], but should be from 0 to the 8 tokens"),
    ],
)
def test_padding_that_is_no_count_of_each_row_is_refused(padding, message):
    with pytest.raises((TypeError, ValueError), match=message):
        evicted_at(torch.rand(2, 1, 8), Policy(0.5), 4, padding=padding)


def test_the_layout_of_the_scores_does_not_matter():
    scores, policy = torch.rand(3, 8, 2), Policy(0.5, prune_after=4, protocol="streaming")
    turned = scores.transpose(1, 2)
    assert torch.equal(evicted_at(turned, policy), evicted_at(turned.contiguous(), policy))


def test_never_evicted_is_the_schedule_of_the_full_cache():
    scores = torch.zeros(2, 3, 5)
    assert torch.equal(never(scores.shape), evicted_at(scores, Policy()))
    padding = torch.tensor([0, 3])
    assert torch.equal(never(scores.shape, padding=padding), evicted_at(scores, Policy(), padding=padding))
    assert never((2, 0)).shape == (2, 0)


@pytest.mark.processes
def test_what_is_compiled_lies_in_the_users_cache_folder(tmp_path):
    code = """
        from pathlib import Path
        import knorm, torch
        from knorm import Policy, evicted_at

        before = {*Path(knorm.__file__).parent.rglob("*.nb?")}
        evicted_at(torch.arange(6.0), Policy(0.5, 4, protocol="streaming"))
        assert {*Path(knorm.__file__).parent.rglob("*.nb?")} == before
    """
    done = in_a_new_process(code, env=new_environment(XDG_CACHE_HOME=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert [*tmp_path.joinpath("knorm").rglob("schedule._evict*.nbc")]
