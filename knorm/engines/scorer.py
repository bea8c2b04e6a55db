"""Scorers: whatever gives logits for the tokens of a window after its prompt, a few at a time; and their comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from knorm.engines.conditions import EngineTarget, Place
from knorm.engines.partial import Top, compare_known
from knorm.engines.process import EngineError
from knorm.evaluation.damage import PerToken, compare, head_of

FRAME = 4  # tokens whose logits are held at a time: of 49,152 in float64, beside both runs, 8 MB
EngineHow = Literal["loop", "two calls"]


class Scorer(Protocol):
    """Give the logits that predict the tokens of a window after its prompt."""

    def logits(self, tokens: Tensor, prompt: int) -> Iterator[Tensor]:
        """Set to work on a window, and generate its logits.

        Args:
            tokens: int64 [T].
            prompt: how many of them are not scored.

        Returns:
            Logits that predict tokens `prompt` to T - 1, float32 [at most FRAME, vocabulary] each.
        """
        ...


@dataclass(frozen=True)
class Asked:
    """Say what is asked of an engine beside the tokens.

    Attributes:
        how: "loop": forced decode, one token a call. "two calls": the prompt and the rest in batches, as an engine
            scores a prompt.
        companions: windows that are fed in the same calls, int64 [T] each; only with "loop".
        cut: positions [first, last) that leave the cache after the prompt, the last ones first; only with "loop".
        renumber: what follows a cut moves up.
    """

    how: EngineHow = "loop"
    companions: tuple[Tensor, ...] = ()
    cut: tuple[tuple[int, int], ...] = ()
    renumber: bool = False


class EngineScorer:
    """Score with an engine, in a process of its own that ends with the context.

    Args:
        target: the engine, the model and the settings.
        file: of the model.
        place: where it runs.
        context: tokens that a window may have.
        asked: how it scores.
        sequences: how many it can feed in one call; as many as `asked` needs, if that is more.
        wait: until it has loaded the model; else call `wait` before it is asked.

    Attributes:
        said: what the engine says of itself.

    Raises:
        EngineError: as EngineTarget.start; a context longer than the model was trained for.
    """

    def __init__(
        self,
        target: EngineTarget,
        file: Path,
        place: Place,
        context: int,
        asked: Asked | None = None,
        *,
        sequences: int = 1,
        wait: bool = True,
    ) -> None:
        self.target, self.asked, self.context = target, asked or Asked(), context
        sequences = max(sequences, 1 + len(self.asked.companions))
        self.process = target.start(file, place, context=context, sequences=sequences)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until the model is loaded.

        Raises:
            EngineError: as the class; the process is ended then.
        """
        try:
            self.said = self.target.opened(self.process)
            if self.context > self.said["trained"]:
                raise EngineError(
                    f"{self.target.engine}: windows of {self.context:,} tokens, but {self.target.model} holds a "
                    f"context of {self.said['trained']:,}: give --window {self.said['trained']} or less"
                )
        except BaseException:
            self.process.close()
            raise
        self.vocabulary: int = self.said["vocabulary"]

    def logits(self, tokens: Tensor, prompt: int) -> Iterator[Tensor]:
        """Send the `tokens` of a window to the engine, and generate logits for those after its `prompt`.

        Raises:
            EngineError: tokens beyond the engine's vocabulary; what EngineProcess raises.
        """
        rows = [tokens, *self.asked.companions]
        largest = max(int(row.max()) for row in rows)
        if largest >= self.vocabulary:
            raise EngineError(
                f"token {largest} is not in the vocabulary of {self.target.spec}, which has {self.vocabulary:,}: "
                "the tokens are another model's"
            )
        self.process.begin(
            "score", sequences=[row.tolist() for row in rows], prompt=prompt, frame=FRAME,
            how="decode" if self.asked.how == "loop" else "batch", cut=[*self.asked.cut], renumber=self.asked.renumber,
        )  # fmt: skip
        return self._heard(len(tokens) - prompt)

    def _heard(self, wanted: int) -> Iterator[Tensor]:
        done = 0
        for fields, numbers in self.process.parts():
            logits = np.frombuffer(numbers, np.float32).reshape(fields["rows"], self.vocabulary)
            done += len(logits)
            yield torch.from_numpy(logits.copy())
        if done != wanted:
            raise EngineError(f"{self.target.engine} scored {done} tokens of {wanted}")

    def tokenize(self, text: str, *, begin: bool) -> list[int]:
        """Cut `text` into tokens as the engine does; `begin`: with what it puts in front of a text."""
        return list(self.process.ask("tokenize", text=text, begin=begin)["tokens"])

    def close(self) -> None:
        """End the engine's process."""
        self.process.close()


class ModelScorer:
    """Score with a model of transformers, by one plain pass a window.

    Args:
        model: a causal language model.
        states: gives the hidden states that predict the scored tokens, [scored, width], of tokens and prompt; by
            default the plain model's.
    """

    def __init__(self, model: PreTrainedModel, states: Any = None) -> None:
        self.model, self.states = model, states or self._plain

    def logits(self, tokens: Tensor, prompt: int) -> Iterator[Tensor]:
        """Run the model on the `tokens` of a window, and generate logits for those after its `prompt`."""
        states = self.states(tokens, prompt)
        return self._heads(states)

    @torch.no_grad()
    def _plain(self, tokens: Tensor, prompt: int) -> Tensor:
        output = self.model.base_model(input_ids=tokens[None], use_cache=False, return_dict=True)
        states: Tensor = output.last_hidden_state[0, prompt - 1 : -1]
        return states

    def _heads(self, states: Tensor) -> Iterator[Tensor]:
        for part in states.split(FRAME):
            with torch.no_grad(), head_of(self.model) as head:
                logits = head(part).float()
            yield logits

    def close(self) -> None:
        """Do nothing: a model has no process."""


def _as_it_is(logits: Tensor) -> Tensor:
    return logits


def _beside(full: Tensor | Top, run: Tensor | Top, true: Tensor) -> PerToken:
    if isinstance(full, Top) or isinstance(run, Top):
        return compare_known(full, run, true[0])
    return compare(_as_it_is, full[None], run[None], true, full.shape[1])


def compared(scorers: Sequence[Any], windows: Tensor, prompt: int, pairs: Sequence[tuple[int, int]]) -> list[PerToken]:
    """Let scorers score the same windows side by side, a few tokens at a time, and compare them in pairs.

    Args:
        scorers: of which each is a Scorer; those that are processes work at the same time.
        windows: int64 [windows, T].
        prompt: tokens that are not scored.
        pairs: places in `scorers`: of the full cache, and of the run that is compared with it.

    Returns:
        For each pair what evaluation.damage compares, [windows, T - prompt] each.

    Raises:
        EngineError: what a scorer raises, and scorers whose vocabularies differ.
    """
    parts: list[list[list[PerToken]]] = [[] for _ in pairs]
    for tokens in windows:
        for column in parts:
            column.append([])
        place = prompt
        running = [scorer.logits(tokens, prompt) for scorer in scorers]
        for chunks in zip(*running, strict=True):
            sizes = {chunk.shape[1] for chunk in chunks if not isinstance(chunk, Top)}
            if len(sizes) > 1:
                raise EngineError(
                    f"vocabularies of {' and '.join(f'{size:,}' for size in sorted(sizes))} tokens differ"
                )
            true = tokens[None, place : place + len(chunks[0])]
            for column, (full, run) in zip(parts, pairs, strict=True):
                column[-1].append(_beside(chunks[full], chunks[run], true))
            place += len(chunks[0])
    joined = [
        [PerToken(*(torch.cat(c, 1) for c in zip(*window, strict=True))) for window in column] for column in parts
    ]
    return [PerToken(*map(torch.cat, zip(*column, strict=True))) for column in joined]


@contextmanager
def closing(scorers: Sequence[Any]) -> Iterator[None]:
    """Close, at the end of the context, all `scorers` that are in the list by then, whatever happened."""
    try:
        yield
    finally:
        for scorer in scorers:
            scorer.close()
