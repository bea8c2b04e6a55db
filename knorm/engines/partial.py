"""Predictions of which only the likeliest tokens are known, compared: a lower bound on what differs.

What is not known is put into one bucket, its probability being what the known ones leave. KL of the two coarser
predictions is never above KL of the whole ones (the data-processing inequality).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knorm.engines.process import EngineError
from knorm.evaluation.damage import PerToken, compare

_LEAST = 1e-6  # of the bucket: the known ones are float32, whose sum is no more exact


@dataclass(frozen=True)
class Top:
    """Hold predictions of a few tokens in a row, of which the likeliest tokens and the true one are known.

    Attributes:
        tokens: for each prediction, int64 [known]; none stands there twice.
        logprobs: the same tokens' log-probabilities, float64 [known].
    """

    tokens: Sequence[Tensor]
    logprobs: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.tokens)


def compare_known(full: Tensor | Top, run: Tensor | Top, true: Tensor) -> PerToken:
    """Compare predictions by what is known of both.

    Args:
        full: logits [n, vocabulary], or what is known of n predictions.
        run: the same of the run that is judged.
        true: the true tokens, int64 [n].

    Returns:
        What evaluation.damage.compare returns, [1, n] each; kl is a lower bound. `same_top` and `correct` are exact:
        the likeliest token is known.

    Raises:
        EngineError: tokens beyond the vocabulary, or a true one of which nothing is known.

    Example:
        >>> top = Top([torch.tensor([3, 1])], [torch.tensor([0.5, 0.25]).log()])
        >>> round(float(compare_known(torch.zeros(1, 8), top, torch.tensor([1])).nll.exp()), 4)
        4.0
    """
    rows = [_compare_row(_row(full, place), _row(run, place), token) for place, token in enumerate(true)]
    return PerToken(*(torch.cat(column, 1) for column in zip(*rows, strict=True)))


_Row = tuple[Tensor | None, Tensor]  # tokens, or None for all; log-probabilities


def _row(side: Tensor | Top, place: int) -> _Row:
    if isinstance(side, Top):
        return side.tokens[place], side.logprobs[place].double()
    return None, side[place].double().log_softmax(-1)


def _at(row: _Row, tokens: Tensor) -> Tensor:
    """Return the log-probabilities of tokens that are known."""
    known, logprobs = row
    if known is not None:
        order = known.argsort()
        return logprobs[order[torch.searchsorted(known[order], tokens)]]
    if len(tokens) and int(tokens.max()) >= len(logprobs):
        raise EngineError(
            f"token {int(tokens.max())} is predicted, but the vocabulary of the model beside it has {len(logprobs):,}: "
            "they are two models"
        )
    return logprobs[tokens]


def _top(row: _Row) -> int:
    known, logprobs = row
    place = int(logprobs.argmax())
    return place if known is None else int(known[place])


def _coarse(row: _Row, tokens: Tensor) -> Tensor:
    logprobs = _at(row, tokens)
    rest = (1 - logprobs.exp().sum()).clamp(min=_LEAST)
    return torch.cat([logprobs, rest.log()[None]])[None, None]


def _compare_row(full: _Row, run: _Row, true: Tensor) -> PerToken:
    known = [tokens for tokens, _ in (full, run) if tokens is not None]
    shared = known[0] if len(known) == 1 else known[0][torch.isin(known[0], known[1])]
    place = (shared == true).nonzero()
    if not len(place):
        raise EngineError(f"the log-probability of token {int(true)}, the next one of the text, is not told")
    p, q = (_coarse(row, shared) for row in (full, run))
    tokens = compare(lambda logits: logits, p, q, place[:1], len(shared) + 1)
    top, correct = _top(full) == _top(run), _top(run) == int(true)
    return tokens._replace(same_top=torch.tensor([[top]]), correct=torch.tensor([[correct]]))
