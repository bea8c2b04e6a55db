"""Tells an effect from rounding: of attention, by slots in another order; of weights, by others; of a token's NLL."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from knorm.masked_attention import attend_seen

ROUNDING = 1e-4  # nats of a token that rounding may do in any dtype; one pass and loop agree within it in float32
_SCORES = 2**26  # of attention in float64 at most, where one head has fewer: half a gigabyte


def attend_shuffled(query: Tensor, key: Tensor, value: Tensor, evicted: Tensor | None, scale: float | None) -> Tensor:
    """Compute what masked_attention.attend_seen does, over slots in an order that has nothing to do with time.

    Args:
        query: [batch, heads, T, head_dim].
        key: [batch, kv_heads, T, head_dim].
        value: [batch, kv_heads, T, head_dim].
        evicted: a schedule, int64 [batch, kv_heads, T]; None: nothing is ever evicted.
        scale: factor of the products; None: head_dim ** -0.5.

    Returns:
        [batch, heads, T, head_dim].
    """
    (batch, heads, length, _), kv_heads = query.shape, key.shape[1]
    order = torch.randperm(length, generator=torch.Generator().manual_seed(length)).to(query.device)
    lost = torch.full((1, 1, length), length, device=query.device) if evicted is None else evicted[..., order]
    key, value = (x[:, :, order].repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    blocks = []
    for queries in torch.arange(length, device=query.device).split(max(1, 2**27 // (batch * heads * length))):
        seen = (order <= queries[:, None]) & (queries[:, None] < lost[..., None, :])
        seen = seen.repeat_interleave(heads // seen.shape[1] if seen.shape[1] > 1 else 1, 1)
        blocks.append(
            functional.scaled_dot_product_attention(query[:, :, queries], key, value, attn_mask=seen, scale=scale)
        )
    return torch.cat(blocks, 2)


@dataclass
class OrderProbe:
    """Attends over shuffled slots in float64, and compares each output with that of slots in the order of time.

    No rounding of the model's dtype can hide an effect of the order here, or pass for one, whatever the device: keys,
    values and queries of any dtype are exact in float64, both orders are given the same ones, layer by layer, and the
    outputs may differ by the rounding of float64 alone (_order_bound).

    difference   largest difference seen so far, relative to the largest value that was attended to
    holds        no output differed by more than its bound
    """

    difference: float = 0.0
    holds: bool = True

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, evicted: Tensor | None, scale: float | None
    ) -> Tensor:
        """Arguments and result are those of masked_attention.attend_seen; rounded once, to the query's dtype."""
        groups, length = query.shape[1] // key.shape[1], query.shape[2]
        heads = max(1, _SCORES // (groups * length**2))  # of keys, at a time
        rows = []
        for row in range(len(query)):
            given = (query[row : row + 1], key[row : row + 1], value[row : row + 1])
            q, k, v = (x.split(n, 1) for x, n in zip(given, (heads * groups, heads, heads), strict=True))
            lost = [None] * len(k) if evicted is None else evicted[row : row + 1].split(heads, 1)
            rows.append(torch.cat([self._compare(*some, scale) for some in zip(q, k, v, lost, strict=True)], 1))
        return torch.cat(rows)

    def _compare(self, query: Tensor, key: Tensor, value: Tensor, lost: Tensor | None, scale: float | None) -> Tensor:
        q, k, v = query.double(), key.double(), value.double()
        shuffled, ordered = (attend(q, k, v, lost, scale) for attend in (attend_shuffled, attend_seen))
        size, difference = float(v.abs().max()), float((shuffled - ordered).abs().max())
        self.holds &= difference <= size * _order_bound(q, k, scale)  # False for nan
        self.difference = max(self.difference, difference / size if size else 0.0)
        return shuffled.to(query.dtype)


def _order_bound(query: Tensor, key: Tensor, scale: float | None) -> float:
    """How far apart rounding may set two attentions over the same n keys in float64, relative to the largest value.

    With u = eps / 2: a score is a sum of head_dim products, off by at most (head_dim + 2) u S, where S bounds scale
    times the sum of the products' magnitudes (Cauchy-Schwarz); less the largest score, by twice that and 2 u S. A
    weight's exponential is off by as much, relatively; so is the weights' sum, and each of the two sums of n terms adds
    n u, a few u cover the exponential and the division. Two attentions: twice all that. (Higham, Accuracy and Stability
    of Numerical Algorithms, section 3.1.)
    """
    width, count = key.shape[-1], key.shape[-2]
    most = float(query.norm(dim=-1).max() * key.norm(dim=-1).max()) * (scale or width**-0.5)
    return torch.finfo(torch.float64).eps * (4 * (width + 3) * most + 2 * count + 8)


class Rounding(NamedTuple):
    """Hold what rounding does to a token's NLL, in nats: `largest` of any, `typical` on average.

    By default what it may do in float32. In half precision it is measured in the run itself, as the change from
    attention summed in the model's dtype to attention summed in float64 and rounded once. Its size depends on the
    model, the text and the device's instructions: the embedded model's largest on two windows in bfloat16 was 0.4 to
    1.1 on one CPU.
    """

    largest: float = ROUNDING
    typical: float = ROUNDING

    @classmethod
    def measured(cls, change: Tensor) -> Rounding:
        """Measure rounding by a `change` of tokens' NLLs [windows, tokens] that it is the only cause of."""
        return cls(max(ROUNDING, float(change.abs().max())), max(ROUNDING, float(change.abs().mean())))

    def covers(self, change: Tensor) -> bool:
        """Tell whether a `change` of tokens' NLLs is no larger than this, in its largest token and on average."""
        return float(change.abs().max()) <= self.largest and float(change.abs().mean()) <= self.typical


def rounded_otherwise(model: Any, seed: int, dtype: torch.dtype | None = None) -> Any:
    """Copy a model with each weight moved to the number next to it, up or down by a draw.

    Every product and sum then rounds otherwise, by as much as on another CPU.

    Args:
        model: a model of PyTorch.
        seed: of the draw.
        dtype: in which the weights are moved, and stored; None: their own.

    Returns:
        The copy.

    Example:
        >>> weight = next(rounded_otherwise(torch.nn.Linear(1, 1), 1, torch.bfloat16).parameters())
        >>> weight.dtype
        torch.bfloat16
    """
    other = copy.deepcopy(model).to(dtype=dtype)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            up = (torch.rand(weight.shape, generator=draw) < 0.5).to(weight.device)
            towards = torch.where(up, torch.inf, -torch.inf).to(weight.dtype)
            weight.copy_(torch.nextafter(weight, towards))
    return other
