"""What a server tells of tokens: which it can be asked for, and its predictions, in little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_MOST_NUMBERS = 2**22  # log-probabilities in an answer: 1,024 tokens of a vocabulary of 4,096
ID = "token_id:"  # what vLLM calls a token instead of its text


class Predicted(NamedTuple):
    """Hold a token, and what was predicted in its place.

    token      the token itself
    logprob    its log-probability; None for the first token of a prompt
    known      tokens that are told of, int64 [known]
    logprobs   log-probabilities of these, float64 [known]
    """

    token: int
    logprob: float | None
    known: NDArray[np.int64]
    logprobs: NDArray[np.float64]


def columns(known: Iterable[int], logprobs: Iterable[float]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Put what is told of tokens in columns.

    Args:
        known: the tokens.
        logprobs: their log-probabilities.

    Returns:
        int64 [known] and float64 [known].

    Raises:
        TypeError: what is no number.
        OverflowError: a token beyond int64.

    Example:
        >>> columns([7, 3], [-0.5, -1.0])
        (array([7, 3]), array([-0.5, -1. ]))
    """
    return np.array(array("q", known), np.int64), np.array(array("d", logprobs))


class Likeliest:
    """Hold what is told of tokens in a tenth of a dictionary's memory.

    Args:
        pairs: tokens as ID names them, and their log-probabilities.

    Attributes:
        known: the tokens.
        logprobs: their log-probabilities.
    """

    def __init__(self, pairs: list[tuple[str, float]]) -> None:
        self.known, self.logprobs = columns(
            map(int, [key[len(ID) :] for key, _ in pairs]), [value for _, value in pairs]
        )


def as_told(pairs: list[tuple[str, Any]]) -> Any:
    """Make of the `pairs` of an object of JSON what stands for it: Likeliest of tokens, else a dictionary."""
    if pairs and pairs[0][0].startswith(ID):
        try:
            return Likeliest(pairs)
        except (TypeError, OverflowError, ValueError):
            return None
    return dict(pairs)


@dataclass(frozen=True)
class Able:
    """Say what can be asked of a server.

    Attributes:
        forced: it generates the tokens that it is given.
        prompts: it scores the tokens of a prompt.
        known: how many of the likeliest tokens it tells; None for the whole vocabulary.
        vocabulary: tokens in it; None where it tells the likeliest alone.
        why: it cannot be forced; empty where it can.
    """

    forced: bool
    prompts: bool
    known: int | None
    vocabulary: int | None
    why: str = ""

    @property
    def told(self) -> str:
        """Say how much of a prediction is told."""
        if self.known is None:
            return "all tokens' log-probabilities are told"
        most = "the likeliest token alone is" if self.known == 1 else f"the {self.known} likeliest tokens are"
        return f"{most} told, the others as one: KL is a lower bound"


def fits(able: Able, length: int) -> int | None:
    """Say how many of the likeliest tokens an answer has room for.

    Args:
        able: what the server can.
        length: tokens that are told of.

    Returns:
        The number; None for the whole vocabulary.

    Example:
        >>> fits(Able(True, True, None, 49152), 512)
        8192
    """
    most = max(1, _MOST_NUMBERS // length)
    if able.known is None:
        return None if (able.vocabulary or 0) <= most else most
    return min(able.known, most)
