"""Scorers of endpoints: forced decode, prompt scoring, or a server's own text decoded; and what each can see."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from knorm.engines.endpoint import Endpoint
from knorm.engines.partial import Top
from knorm.engines.process import EngineError, EngineLost, EngineRefused
from knorm.engines.scorer import FRAME, Asked
from knorm.engines.told import Able, Predicted, fits

FORCED = (
    "forced decode: the server generates the text's own tokens, each predicted through the cache that the ones before "
    "it were written to; what a cache does to people who generate text is seen"
)
PROMPTS = (
    "prompt scoring: the server reads all tokens at once and decodes none; what prefill makes of the cache is seen, "
    "and what decoding does to it is not"
)
OWN = (
    "decode against rescoring: a text of the server's own is decoded and then scored as a prompt; that both differ is "
    "seen, and what the cache costs on a given text is not"
)
_IN_MEMORY = 2**25  # bytes of a window's predictions; the rest waits in a file


class EndpointScorer:
    """Score with a server.

    A window is scored to its end when `logits` is called, so that two scorers of one server never ask at a time.

    Args:
        endpoint: the server.
        able: what can be asked of it.
        asked: how it scores. "loop" is forced decode; where that is not possible, a window of `own` is decoded, and any
            other one scored as a prompt.
        own: windows whose tokens after the prompt the server itself generated, int64 [T] each.

    Attributes:
        seconds: that scoring took.
    """

    def __init__(self, endpoint: Endpoint, able: Able, asked: Asked | None = None, own: Sequence[Tensor] = ()) -> None:
        self.endpoint, self.able, self.asked, self.own = endpoint, able, asked or Asked(), own
        self.seconds = 0.0

    def logits(self, tokens: Tensor, prompt: int) -> Iterator[Tensor | Top]:
        """Score the `tokens` of a window after its `prompt`, and generate log-probabilities, FRAME tokens at a time.

        Raises:
            EngineError: tokens beyond the vocabulary, a window beyond the context, and what Endpoint raises.
        """
        self.endpoint.check_context(len(tokens) + 1 if self._as_prompt(tokens) else len(tokens))
        largest, most = int(tokens.max()), self.able.vocabulary
        if most is not None and largest >= most:
            raise EngineError(
                f"token {largest} is not in the vocabulary of {self.endpoint.spec}, which has {most:,}: "
                "the tokens are another model's"
            )
        begin = time.perf_counter()
        try:
            if self._as_prompt(tokens):
                return self._scored(tokens, prompt)
            with _Companions(self.endpoint, self.asked.companions, prompt, forced=self.able.forced):
                return self._decoded(tokens, prompt)
        finally:
            self.seconds += time.perf_counter() - begin

    def _as_prompt(self, tokens: Tensor) -> bool:
        if self.asked.how == "two calls":
            return True
        return not self.able.forced and not any(torch.equal(tokens, own) for own in self.own)

    def _scored(self, tokens: Tensor, prompt: int) -> Iterator[Tensor | Top]:
        if not self.able.prompts:
            raise EngineRefused(f"{self.endpoint.spec} scores no prompts (echo with logprobs)")
        known = fits(self.able, len(tokens))
        told = self.endpoint.prompt(tokens.tolist(), -1 if known is None else known)[prompt:]
        frames = (told[start : start + FRAME] for start in range(0, len(told), FRAME))
        return (self.endpoint.rows(frame, self.able, known) for frame in frames)

    def _decoded(self, tokens: Tensor, prompt: int) -> Iterator[Tensor | Top]:
        true = tokens[prompt:].tolist()
        known = fits(self.able, len(true))
        told = self.endpoint.generated(
            tokens[:prompt].tolist(), len(true), -1 if known is None else known, true if self.able.forced else None
        )
        spool, frame = _Spool(), list[Predicted]()
        with contextlib.closing(told):
            for place, each in enumerate(told):
                if each.token != true[place]:
                    why = "where it was left one choice" if self.able.forced else "where it chose another one before"
                    raise EngineLost(f"{self.endpoint.spec} generated token {each.token} {why}, {true[place]}")
                frame.append(each)
                if len(frame) == FRAME or place + 1 == len(true):
                    spool.add(self.endpoint.rows(frame, self.able, known))
                    frame = []
        return spool.chunks()

    def told(self, length: int, prompt: int) -> int | None:
        """Return how many of the likeliest tokens are told of windows of this `length` and `prompt`; None for all."""
        return fits(self.able, length if self.asked.how == "two calls" else length - prompt)

    def tokenize(self, text: str, *, begin: bool) -> list[int]:
        """Cut `text` into tokens as the server does; `begin`: with what it puts in front of a text."""
        return self.endpoint.tokenize(text, begin=begin)

    def close(self) -> None:
        """End what is still being answered."""
        self.endpoint.close()


class _Spool:
    """Hold a window's predictions; many of a large vocabulary in a temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
        self._parts: list[Top | torch.Size] = []

    def add(self, chunk: Tensor | Top) -> None:
        if isinstance(chunk, Top):
            self._parts.append(chunk)
            return
        self._parts.append(chunk.shape)
        self._file.write(chunk.numpy().tobytes())

    def chunks(self) -> Iterator[Tensor | Top]:
        with self._file as file:
            file.seek(0)
            for part in self._parts:
                if isinstance(part, Top):
                    yield part
                else:
                    numbers = np.frombuffer(file.read(4 * part.numel()), np.float32)
                    yield torch.from_numpy(numbers.copy()).view(part)


class _Companions:
    """Let a server generate other windows, again and again, while the context is open.

    It opens when the first token of each has come.
    """

    def __init__(self, endpoint: Endpoint, windows: Sequence[Tensor], prompt: int, *, forced: bool) -> None:
        self.endpoint, self.prompt, self.forced = endpoint, prompt, forced
        self._done, self._failed = threading.Event(), list[EngineError]()
        self._running = [self._thread(window.tolist()) for window in windows]

    def _thread(self, tokens: list[int]) -> tuple[threading.Thread, threading.Event]:
        begun = threading.Event()
        return threading.Thread(target=self._run, args=(tokens, begun.set), daemon=True), begun

    def _run(self, tokens: list[int], begun: Callable[[], None]) -> None:
        after = tokens[self.prompt :]
        try:
            while not self._done.is_set():
                for _ in self.endpoint.generated(tokens[: self.prompt], len(after), 1, after if self.forced else None):
                    begun()
        except EngineError as error:
            self._failed.append(error)
        finally:
            begun()

    def __enter__(self) -> None:
        for thread, _begun in self._running:
            thread.start()
        for _thread, begun in self._running:
            begun.wait()

    def __exit__(self, kind: object, *_: object) -> None:
        self._done.set()
        for thread, _begun in self._running:
            thread.join()
        if self._failed and kind is None:
            raise self._failed[0]


def own_windows(endpoint: Endpoint, windows: Tensor, prompt: int) -> Tensor:
    """Let a server go on with the prompts of windows by itself.

    Args:
        endpoint: the server.
        windows: int64 [windows, T].
        prompt: tokens of each that it is given.

    Returns:
        The same windows with what the server generates after the prompt, int64 [windows, T].
    """
    rows = []
    for window in windows:
        given = window[:prompt].tolist()
        after = [each.token for each in endpoint.generated(given, len(window) - prompt, 1)]
        rows.append(torch.tensor([*given, *after]))
    return torch.stack(rows)
