"""The schedule of a run: at which query each token is lost, computed from the scores alone.

    evicted_at[..., s]   the first query position that can no longer see token s; T if never
    query t sees token s   <=>   s <= t < evicted_at[s]

Holds for scores that do not change as the cache does (core.token_scores): then the whole run of "decode a token,
compress" is known from the keys. Everything else about the run (masks, lengths, coverage) is derived from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from platformdirs import user_cache_dir
from torch import Tensor

from knorm.core import select
from knorm.policy import Policy, whole
from knorm.tensors import refuse_mapped, refuse_unreadable

Int64Array = np.ndarray[Any, np.dtype[np.int64]]


@lru_cache(maxsize=64)
def _events(policy: Policy, length: int, prompt_length: int) -> tuple[Int64Array, Int64Array, Int64Array]:
    """When tokens are evicted, and how many: the same for every row, whatever its scores.

    Returns the first query after each eviction, how many tokens it takes, and for each token the first eviction that
    can take it (protected tokens: none).
    """
    events, cached = [], prompt_length
    for query in range(prompt_length, length):  # the compression before this query
        budget = policy.budget(cached)
        if budget < cached:
            events.append((query, cached - budget))
        cached = budget + 1
    times, sizes = np.array(events, dtype=np.int64).reshape(-1, 2).T
    first = np.searchsorted(times, np.arange(length) + 1 + policy.protect_recent)
    first[: policy.protect_first] = len(times)
    return times, sizes, first


def _jit(function: Any) -> Any:
    """Compile at the first call, and keep the result in the user's cache folder: uninstalling leaves nothing behind."""
    options: Any = numba.config
    given, folder = options.CACHE_DIR, user_cache_dir("knorm", appauthor=False)
    options.CACHE_DIR = given or folder  # read once, for each function
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except (RuntimeError, OSError):  # no folder to cache in: a read-only home
        return numba.njit(nogil=True)(function)
    finally:
        options.CACHE_DIR = given


@_jit
def _evict(order: Int64Array, times: Int64Array, sizes: Int64Array, first: Int64Array, evicted_at: Int64Array) -> None:
    """Every eviction takes the highest scores then cached: extract-max, solved off-line by union-find.

    The highest score of all falls to the first eviction after its token entered, and so on downwards; an eviction that
    has all its tokens passes later ones on to the next (Cormen et al., Introduction to Algorithms, problem 21-1).
    """
    events = len(times)
    room, following = np.empty(events, np.int64), np.empty(events + 1, np.int64)
    for row in range(order.shape[0]):
        room[:] = sizes
        following[:] = np.arange(events + 1)
        remaining = sizes.sum()
        for token in order[row, ::-1]:
            if remaining == 0:
                break
            event = first[token]
            while following[event] != event:
                following[event] = following[following[event]]
                event = following[event]
            if event < events:
                evicted_at[row, token] = times[event]
                remaining -= 1
                room[event] -= 1
                if room[event] == 0:
                    following[event] = event + 1


def evicted_at(scores: Tensor, policy: Policy, prompt_length: int = 1, *, padding: Tensor | None = None) -> Tensor:
    """Compute the schedule of a run over T tokens: at which query each token is lost. Tokens of low score stay.

    Args:
        scores: floating [..., T], one per token, fixed for the run (policy.score is not consulted).
        policy: when and how much to evict; of equal scores, the later token goes first.
        prompt_length: tokens of the first call, 1 to T; the first compression comes after it.
        padding: int64 [batch], how many tokens at the start of each row of scores [batch, heads, T] are padding. A
            padded row is compressed as if it stood alone; a pad sees itself only and is seen by no other token.

    Returns:
        int64 [..., T]: the first query that can no longer see the token, T for a token that is never evicted.

    Raises:
        ValueError: scores that are not finite, a prompt_length outside 1 to T, or protections of a prefill that exceed
            its budget.
        TypeError: a policy that is no Policy, or scores that are no tensor.

    Example:
        >>> evicted_at(torch.tensor([2.0, 3.0, 1.0, 0.0]), Policy(0.5), prompt_length=2).tolist()
        [4, 2, 4, 4]
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"policy={policy!r}, but should be a knorm.Policy, e.g. Policy(keep_ratio=0.5)")
    refuse_unreadable(scores=scores, **({} if padding is None else {"padding": padding}))
    refuse_mapped("scores", scores)
    if not scores.ndim or not scores.is_floating_point():
        raise ValueError("scores should be finite floating-point numbers, one per token: a tensor [..., T]")
    length = scores.shape[-1]
    if not 1 <= (prompt_length := whole("prompt_length", prompt_length)) <= length:
        raise ValueError(f"prompt_length={prompt_length}, but should be between 1 and the {length} tokens of the run")
    if not scores.isfinite().all():
        raise ValueError("scores should be finite floating-point numbers, one per token")
    if padding is not None:
        _check_padding(padding, scores)
    return schedule_scores(scores, policy, prompt_length, padding)


def _check_padding(padding: Tensor, scores: Tensor) -> None:
    should = f"int64 {list(scores.shape[:1])} on {scores.device}, for scores [batch, heads, T]"
    if scores.ndim != 3 or padding.shape != scores.shape[:1]:
        raise ValueError(f"padding {list(padding.shape)} for scores {list(scores.shape)}, but should be {should}")
    if padding.dtype not in (torch.int64, torch.int32) or padding.device != scores.device:
        raise ValueError(f"padding {padding.dtype} on {padding.device}, but should be {should}")
    if len(padding) and not 0 <= int(padding.min()) <= int(padding.max()) <= scores.shape[-1]:
        raise ValueError(f"padding {padding.tolist()}, but should be from 0 to the {scores.shape[-1]} tokens of a row")


def schedule_scores(scores: Tensor, policy: Policy, prompt_length: int, padding: Tensor | None) -> Tensor:
    """Compute evicted_at of arguments known to be right: on CUDA each check would wait for the device.

    Args:
        scores: finite, floating [..., T]; with padding [batch, kv_heads, T].
        policy: when and what to evict.
        prompt_length: tokens of the first call, 1 to T.
        padding: pads at the left of each row, int64 [batch]; None: there are none.

    Returns:
        int64, of the scores' shape, as evicted_at.

    Raises:
        ValueError: protections of a prefill that exceed its budget.
    """
    length = scores.shape[-1]
    if padding is not None:
        evicted = torch.arange(1, length + 1, device=scores.device).expand(scores.shape).contiguous()
        for pads in padding.unique().tolist():
            rows, prompt = padding == pads, max(1, prompt_length - pads)
            evicted[rows, :, pads:] = pads + schedule_scores(scores[rows, :, pads:], policy, prompt, None)
        return evicted
    if policy.protocol == "prefill":
        evicted = never(scores.shape, scores.device)
        budget = policy.budget(prompt_length)
        if budget < prompt_length:
            prompt = scores[..., :prompt_length]
            evicted[..., :prompt_length] = prompt_length
            evicted.scatter_(-1, select(prompt, budget, policy.protect_first, policy.protect_recent), length)
        return evicted
    times, sizes, first = _events(policy, length, prompt_length)
    order = scores.argsort(dim=-1, stable=True).reshape(-1, length).cpu().numpy()
    rows = np.full(order.shape, length)  # by NumPy: threads of PyTorch took 8 ms to start, thrice the rest, on 16 cores
    _evict(order, times, sizes, first, rows)
    return torch.from_numpy(rows).view(scores.shape).to(scores.device)


def never(shape: Sequence[int], device: torch.device | str = "cpu", *, padding: Tensor | None = None) -> Tensor:
    """Return the schedule that evicts nothing.

    Args:
        shape: of the schedule, [..., T].
        device: of the schedule.
        padding: int64 [batch] for a shape [batch, heads, T]; a pad sees itself only, as in evicted_at.

    Returns:
        int64 of that shape, T for every token.

    Example:
        >>> never((1, 3)).tolist()
        [[3, 3, 3]]
    """
    evicted = torch.full((*shape,), shape[-1], dtype=torch.int64, device=device)
    if padding is not None:
        places = torch.arange(shape[-1], device=device)
        evicted = torch.where(places < padding[:, None, None], places + 1, evicted)
    return evicted


def evicted_like(
    evicted_at: Tensor, scores: Tensor, *, protect_first: int = 0, protect_recent: int = 0
) -> tuple[Tensor, int]:
    """Choose other tokens than a schedule does, as many at each query in each row; low scores stay.

    Args:
        evicted_at: a schedule, int64 [..., T].
        scores: floating [..., T], of the same shape.
        protect_first: tokens at the start that are not evicted; a row whose queries see few tokens protects at most
            half of the fewest.
        protect_recent: newest tokens that are not evicted, likewise.

    Returns:
        The schedule, int64 [..., T], and how many tokens were protected in the row that protects most.
    """
    length, most = evicted_at.shape[-1], 0
    rows = evicted_at.reshape(-1, length).cpu().numpy()
    order = scores.argsort(dim=-1, stable=True).reshape(-1, length).cpu().numpy()
    found = never(rows.shape)
    for row, lost in enumerate(rows):
        times, sizes = np.unique(lost[lost < length], return_counts=True)
        fewest = int((times - sizes.cumsum()).min()) if len(times) else length
        oldest, newest = (min(count, fewest // 2) for count in (protect_first, protect_recent))
        first = np.searchsorted(times, np.arange(length) + 1 + newest)
        first[:oldest] = len(times)
        _evict(order[row : row + 1], times, sizes.astype(np.int64), first, found[row : row + 1].numpy())
        most = max(most, oldest, newest)
    return found.view(evicted_at.shape).to(evicted_at.device), most


def cache_lengths(evicted_at: Tensor) -> Tensor:
    """Count the tokens that each query sees, itself included.

    Args:
        evicted_at: a schedule, int64 [..., T].

    Returns:
        int64 [..., T].

    Example:
        >>> cache_lengths(torch.tensor([1, 3, 3])).tolist()
        [1, 1, 2]
    """
    length = evicted_at.shape[-1]
    lost = torch.zeros(*evicted_at.shape[:-1], length + 1, dtype=torch.int64, device=evicted_at.device)
    lost.scatter_add_(-1, evicted_at, torch.ones_like(evicted_at))
    return torch.arange(1, length + 1, device=evicted_at.device) - lost[..., :length].cumsum(-1)


def recent_cached(evicted_at: Tensor, newest: int = 16) -> Tensor:
    """Count how many of the `newest` tokens up to itself each query sees.

    Args:
        evicted_at: a schedule, int64 [..., T].
        newest: how many tokens count as the newest.

    Returns:
        int64 [..., T].

    Example:
        >>> recent_cached(torch.tensor([1, 3, 3]), newest=2).tolist()
        [1, 1, 2]
    """
    length = evicted_at.shape[-1]
    queries = torch.arange(length, device=evicted_at.device)
    seen = torch.zeros_like(evicted_at)
    for age in range(min(newest, length)):
        seen[..., age:] += evicted_at[..., : length - age] > queries[age:]
    return seen
