"""Engines that keep running: several scorers ask the same process, one after the other, and none starts its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knorm.engines.scorer import Asked, EngineScorer


class Kept:
    """Keep an engine's process for scorers that differ in what they ask alone.

    Args:
        scorer: of the engine; it is closed with this.

    Example:
        >>> kept = Kept(EngineScorer(target, file, Place(), 192))  # doctest: +SKIP
        >>> both = [kept.scorer(Asked("loop")), kept.scorer(Asked("two calls"))]  # doctest: +SKIP
    """

    def __init__(self, scorer: EngineScorer) -> None:
        self._scorer = scorer
        self._answer: _Answer | None = None

    @property
    def alive(self) -> bool:
        """Tell whether the process can be asked: it runs, and has said all of its last answer or is heard still."""
        return self._scorer.process.running

    def scorer(self, asked: Asked) -> LentScorer:
        """Return a scorer that asks this process as `asked` says."""
        return LentScorer(self, asked)

    def begin(self, asked: Asked, tokens: Tensor, prompt: int) -> Iterator[Tensor]:
        """Set the process to work on a window; an answer that is not heard to its end is put aside first.

        Args:
            asked: how it scores.
            tokens: int64 [T].
            prompt: how many of them are not scored.

        Returns:
            What EngineScorer.logits generates.

        Raises:
            EngineError: what EngineScorer.logits raises.
        """
        if self._answer:
            self._answer.put_aside()
        self._scorer.asked = asked
        self._answer = _Answer(self._scorer.logits(tokens, prompt))
        return self._answer

    def tokenize(self, text: str, *, begin: bool) -> list[int]:
        """Cut `text` into tokens as EngineScorer.tokenize does; `begin`: the same."""
        return self._scorer.tokenize(text, begin=begin)

    def settle(self) -> None:
        """End the process where an answer was not heard to its end: it cannot be asked again."""
        if self._scorer.process.answering:
            self.close()

    def close(self) -> None:
        """End the process."""
        self._scorer.close()


class LentScorer:
    """Score with an engine that others ask too; a Scorer.

    Args:
        kept: the engine.
        asked: how it scores.
    """

    def __init__(self, kept: Kept, asked: Asked) -> None:
        self.kept, self.asked = kept, asked

    def logits(self, tokens: Tensor, prompt: int) -> Iterator[Tensor]:
        """Send the `tokens` of a window, and generate logits for those after its `prompt`, as EngineScorer does."""
        return self.kept.begin(self.asked, tokens, prompt)

    def tokenize(self, text: str, *, begin: bool) -> list[int]:
        """Cut `text` into tokens as EngineScorer.tokenize does; `begin`: the same."""
        return self.kept.tokenize(text, begin=begin)

    def close(self) -> None:
        """Leave the process running, unless it cannot be asked again."""
        self.kept.settle()


class _Answer:
    """Generate the chunks of an answer; what is left of it waits in a file once another one is asked for."""

    def __init__(self, chunks: Iterator[Tensor]) -> None:
        self.chunks = chunks

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return next(self.chunks)

    def put_aside(self) -> None:
        file = tempfile.TemporaryFile()  # noqa: SIM115
        for chunk in self.chunks:
            np.save(file, chunk.numpy())
        end = file.tell()
        file.seek(0)
        self.chunks = _loaded(file, end)


def _loaded(file: Any, end: int) -> Iterator[Tensor]:
    with file:
        while file.tell() < end:
            yield torch.from_numpy(np.load(file))
