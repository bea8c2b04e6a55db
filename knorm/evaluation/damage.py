"""How far a run's predictions are from the full cache's, token by token and in all, on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from knorm.evaluation.sums import Damage, Sums, damage_of

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


def sums_of(tokens: PerToken) -> Sums:
    """Add up a comparison, window by window.

    Args:
        tokens: those of one run and the full cache, [windows, scored].

    Returns:
        The sums.

    Example:
        >>> ones = torch.ones(2, 3, dtype=torch.float64)
        >>> sums_of(PerToken(ones, ones, ones, ones == 1, ones == 1, ones)).nll
        array([3., 3.])
    """
    change, delta = tokens.nll - tokens.nll_full, tokens.delta_p
    columns = (tokens.nll, tokens.nll_full, change, tokens.kl, tokens.same_top, tokens.correct, delta, delta.square())
    sums = [column.double().sum(1).numpy() for column in columns]
    return Sums(*sums, tokens.kl.numpy())  # type: ignore[call-arg]


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
