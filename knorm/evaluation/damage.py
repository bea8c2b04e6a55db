"""How far a run's predictions are from the full cache's, token by token and in all, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from knorm.statistics import interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPast

_LOGITS = 2**22  # at most so many at a time, in float64

Head = Callable[[Tensor], Tensor]


class PerToken(NamedTuple):
    """Hold what is compared for each scored token; float64 [windows, scored] unless a line says otherwise.

    nll        of the run, in nats
    nll_full   of the full cache
    kl         KL(full || run) of the two predictions, in nats
    same_top   bool: both predict the same token as the likeliest
    correct    bool: the run predicts the true token as the likeliest
    delta_p    probability of the true token, the run's less the full cache's
    """

    nll: Tensor
    nll_full: Tensor
    kl: Tensor
    same_top: Tensor
    correct: Tensor
    delta_p: Tensor


@dataclass(frozen=True)
class Damage:
    """Sum up what a method costs in quality; intervals are 95%, clustered by window, None for one window.

    Attributes:
        windows: how many.
        tokens: scored in all of them.
        nll: mean in nats per token.
        ppl: exp of it.
        delta_nll: mean difference from the full cache, paired by token.
        delta_nll_low: lower end of its interval; delta_nll_high: the upper.
        kl: mean KL(full || run), in nats per token.
        kl_low: lower end of its interval; kl_high: the upper.
        kl_median: of the tokens; kl_99 and kl_999: their 99% and 99.9% quantiles; kl_largest: the largest.
        accuracy: share of tokens that the run predicts as the likeliest.
        same_top: share of tokens for which both predict the same token as the likeliest.
        delta_p: mean change of the true token's probability; delta_p_rms: root of its mean square.
    """

    windows: int
    tokens: int
    nll: float
    ppl: float
    delta_nll: float
    delta_nll_low: float | None
    delta_nll_high: float | None
    kl: float
    kl_low: float | None
    kl_high: float | None
    kl_median: float
    kl_99: float
    kl_999: float
    kl_largest: float
    accuracy: float
    same_top: float
    delta_p: float
    delta_p_rms: float


class Sums(NamedTuple):
    """Hold what a comparison adds up to in each window, from which any windows' Damage follows.

    nll, nll_full, kl, same_top, correct, delta_p are sums over the window's tokens of what PerToken holds, delta_nll of
    nll - nll_full, delta_p_squared of its square: float64 [windows]. tokens is PerToken's kl, for its quantiles.
    """

    nll: Tensor
    nll_full: Tensor
    delta_nll: Tensor
    kl: Tensor
    same_top: Tensor
    correct: Tensor
    delta_p: Tensor
    delta_p_squared: Tensor
    tokens: Tensor


def sums_of(tokens: PerToken) -> Sums:
    """Add up a comparison, window by window.

    Args:
        tokens: those of one run and the full cache, [windows, scored].

    Returns:
        The sums.

    Example:
        >>> ones = torch.ones(2, 3, dtype=torch.float64)
        >>> sums_of(PerToken(ones, ones, ones, ones == 1, ones == 1, ones)).nll
        tensor([3., 3.], dtype=torch.float64)
    """
    change, delta = tokens.nll - tokens.nll_full, tokens.delta_p
    columns = (tokens.nll, tokens.nll_full, change, tokens.kl, tokens.same_top, tokens.correct, delta, delta.square())
    sums = [column.double().sum(1) for column in columns]
    return Sums(*sums, tokens.kl)  # type: ignore[call-arg]


def summed(tokens: PerToken) -> Damage:
    """Sum up a comparison.

    Args:
        tokens: those of one run and the full cache.

    Returns:
        Means, quantiles and intervals over all of them.

    Example:
        >>> zero = torch.zeros(2, 3, dtype=torch.float64)
        >>> summed(PerToken(zero, zero, zero, zero == 0, zero == 0, zero)).same_top
        1.0
    """
    return damage_of(sums_of(tokens))


def damage_of(sums: Sums) -> Damage:
    """Compute means, quantiles and intervals from the sums of windows, in their order.

    Args:
        sums: of all windows that are to be summed up, of equally many tokens each.

    Returns:
        What `summed` returns for the same windows at once, to the bit.
    """
    count, each = sums.tokens.numel(), sums.tokens.shape[1]
    low, high = interval(sums.delta_nll / each)
    kl_low, kl_high = interval(sums.kl / each)
    ordered = sums.tokens.flatten().sort().values
    at = [float(ordered[min(count - 1, math.ceil(share * count) - 1)]) for share in (0.5, 0.99, 0.999)]
    mean = float(sums.nll.sum()) / count
    return Damage(
        windows=len(sums.nll),
        tokens=count,
        nll=mean,
        ppl=math.exp(mean) if mean < 700 else math.inf,
        delta_nll=float(sums.delta_nll.sum()) / count,
        delta_nll_low=low,
        delta_nll_high=high,
        kl=float(sums.kl.sum()) / count,
        kl_low=kl_low,
        kl_high=kl_high,
        kl_median=at[0],
        kl_99=at[1],
        kl_999=at[2],
        kl_largest=float(ordered[-1]),
        accuracy=float(sums.correct.sum()) / count,
        same_top=float(sums.same_top.sum()) / count,
        delta_p=float(sums.delta_p.sum()) / count,
        delta_p_rms=math.sqrt(float(sums.delta_p_squared.sum()) / count),
    )


@contextmanager
def head_of(model: PreTrainedModel) -> Iterator[Head]:
    """Give what a model does after its last hidden states, while the context is open.

    It is the model's own forward with the layers left out, so whatever a model does to its logits is done here too.

    Args:
        model: a causal language model of transformers.

    Yields:
        A function from hidden states [n, width] to logits [n, vocabulary].

    Raises:
        ValueError: a model without a language-model head.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    base: Any = model.base_model
    given: dict[str, Tensor] = {}
    if base is model:
        raise ValueError(f"{type(model).__name__} has no language-model head: load it as a causal language model")

    def forward(*_: Any, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=given["states"])

    def head(states: Tensor) -> Tensor:
        given["states"] = states[None]
        ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
        return logits

    own = vars(base).get("forward")
    base.forward = forward
    try:
        yield head
    finally:
        if own is None:
            del base.forward
        else:
            base.forward = own


@torch.no_grad()
def compare(head: Head, full: Tensor, run: Tensor, targets: Tensor, vocabulary: int) -> PerToken:
    """Compare two runs' predictions of the same tokens, a few at a time: the logits of a long text would not fit.

    Args:
        head: from hidden states [n, width] to logits [n, vocabulary].
        full: hidden states of the full cache's run, [batch, scored, width].
        run: the same of the run that is judged.
        targets: the true tokens, int64 [batch, scored].
        vocabulary: its size.

    Returns:
        What can be said of each token, each [batch, scored], on the CPU.
    """
    size, parts = max(1, _LOGITS // vocabulary), []
    for ours, theirs, true in zip(
        full.flatten(0, 1).split(size), run.flatten(0, 1).split(size), targets.flatten().split(size), strict=True
    ):
        p, q = (head(states).double().log_softmax(-1) for states in (ours, theirs))
        chosen, given = (x.gather(-1, true[:, None])[:, 0] for x in (p, q))
        likeliest = q.argmax(-1)
        top, correct = p.argmax(-1) == likeliest, likeliest == true
        kl = (p.exp() * p.sub_(q)).sum(-1).clamp_(min=0)
        parts.append((-given, -chosen, kl, top, correct, given.exp() - chosen.exp()))
    columns = (torch.cat(column).view(targets.shape).cpu() for column in zip(*parts, strict=True))
    return PerToken(*columns)
