"""Any methods against the uncompressed cache, in one process; each generation of each is one turn, mirrored.

A method may leave hooks or masks on the model while its cache is in use, so it is opened for one whole generation, the
prompt and all decode steps, and closed before the next one's turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from statistics import fmean
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from knorm.bench.counters import count
from knorm.bench.latency import Arm, Prompt, Sample, Stored, check_fits, measure, no_collection
from knorm.bench.policies import WARM_UP, Bench, compared_rows
from knorm.cache import KnormCache
from knorm.methods.caches import stored_bytes
from knorm.methods.method import Method, Session, Tokenizer
from knorm.statistics import ALPHA


class MethodArm(Arm):
    """Generate greedily with a method open as its users have it.

    Args:
        model: a causal language model of transformers.
        prompts: what is generated from, by index.
        method: opened for each generation; None for transformers' own cache.
        tokenizer: of the model, for methods that read text.
    """

    def __init__(self, model: Any, prompts: Sequence[Prompt], method: Method | None, tokenizer: Tokenizer) -> None:
        super().__init__(model, prompts, None)
        self.method, self.tokenizer = method, tokenizer
        self._open, self._session, self._next = ExitStack(), Session(model, DynamicCache()), 0

    def prompt(self, index: int) -> float:
        """Open the method, read the prompt; seconds to the first new token, the end of the prefill phase included."""
        self.close()
        self.token, tokens = self.prompts[index].ids, self.prompts[index].ids.shape[1]
        self._session = session = self._opened(tokens + self.prompts[index].new_tokens)
        places = torch.arange(tokens, device=self.model.device).expand(len(self.token), -1)
        self.cache = session.cache

        def first(options: dict[str, Any]) -> None:
            self._call({**options, **session.prompt(self.token, places), "logits_to_keep": 1})
            self._next = session.end_prompt()
            self.cache = session.cache

        return self._clocked(1, first)[0]

    def steps(self, count: int) -> list[float]:
        """Decode `count` steps; seconds of each."""

        def step(options: dict[str, Any]) -> None:
            places = torch.full((len(self.token), 1), self._next, device=self.model.device)
            self._call({**options, "input_ids": self.token, "position_ids": places})
            self._next += 1

        return self._clocked(count, step)

    def generation(self, index: int) -> tuple[float, list[float]]:
        """Generate from prompt `index`, then close the method; return seconds to the first token and of each step."""
        try:
            return self.prompt(index), self.steps(self.prompts[index].new_tokens - 1)
        finally:
            self.close()

    def close(self) -> None:
        """End the method, if it is open."""
        self._open.close()

    def stored(self, peak: int | None = None) -> Stored:
        """Count what the cache holds after the last generation; tokens per layer where its layers tell."""
        layers = [layer for layer in getattr(self.cache, "layers", []) if torch.is_tensor(getattr(layer, "keys", None))]
        tokens = tuple(int(layer.keys.shape[2]) if layer.keys.ndim == 4 else layer.get_seq_length() for layer in layers)
        return Stored(tokens, stored_bytes(self.cache), peak)

    def _opened(self, length: int) -> Session:
        if self.method is None:
            return self._closing(Session(self.model, DynamicCache()))
        if self.method.policy is not None:
            return self._closing(Session(self.model, KnormCache(self.method.policy)))
        opened = self.method.session(self.model, length=length, batch=len(self.token), tokenizer=self.tokenizer)
        session = self._open.enter_context(opened)
        session.watched = False
        return session

    def _closing(self, session: Session) -> Session:
        session.watched = False
        self._open.callback(session.close)
        return session

    def _call(self, options: dict[str, Any]) -> None:
        self.token = self.model(**options).logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def _clocked(self, count: int, work: Callable[[dict[str, Any]], None]) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize(self.model.device)
        marks = [self._mark()]
        for _ in range(count):
            work({"use_cache": True, self.keyword: self.cache})
            marks.append(self._mark())
        return self._between(marks)


def run_generations(arms: Sequence[MethodArm], new_tokens: Sequence[int], flip: bool = False) -> list[Sample]:
    """Run two generations of each arm from each prompt, A B C C B A.

    Args:
        arms: the methods, the uncompressed cache first.
        new_tokens: of each prompt.
        flip: start with the last arm, as every other block does.

    Returns:
        A Sample for each arm, in which each step is the mean of two.
    """
    forwards = [*range(len(arms))]
    orders = (forwards[::-1], forwards) if flip else (forwards, forwards[::-1])
    first: list[list[tuple[float, ...]]] = [[] for _ in arms]
    steps: list[list[tuple[float, ...]]] = [[] for _ in arms]
    with no_collection():
        for index in range(len(new_tokens)):
            turns: list[list[tuple[float, list[float]]]] = [[] for _ in arms]
            for order in orders:
                for arm in order:
                    turns[arm].append(arms[arm].generation(index))
            for arm, both in enumerate(turns):
                first[arm].append(tuple(ttft for ttft, _ in both))
                steps[arm].append(tuple(map(fmean, zip(*(times for _, times in both), strict=True))))
    return [Sample(tuple(a), tuple(b)) for a, b in zip(first, steps, strict=True)]


def bench_methods(
    model: Any,
    prompts: Mapping[str, Prompt],
    methods: Sequence[Method],
    tokenizer: Tokenizer,
    *,
    margin: float,
    alpha: float = ALPHA,
    blocks: int | None = None,
    seconds: float = 30.0,
    on_block: Callable[[], None] = lambda: None,
) -> Bench:
    """Time methods and the uncompressed cache in turns.

    Args:
        model: a causal language model of transformers.
        prompts: by name.
        methods: an arm for each, opened for whole generations.
        tokenizer: of the model, for methods that read text.
        margin: slowdown, as a share, that a method may have.
        alpha: of all verdicts together: each gets its part.
        blocks: as latency.measure takes them.
        seconds: as latency.measure takes them.
        on_block: called after each block.

    Returns:
        Times, counters and verdicts of each arm, the uncompressed one first.

    Raises:
        ValueError: as policies.bench.
        MethodError: what a method's own code raised.
    """
    check_fits(model, prompts)
    shown, new = list(prompts.values()), [prompt.new_tokens for prompt in prompts.values()]
    arms = [MethodArm(model, shown, method, tokenizer) for method in (None, *methods)]
    longest = max(range(len(new)), key=lambda index: shown[index].ids.shape[1])
    begin = time.perf_counter()
    raw = measure(
        arms, new, blocks=blocks, seconds=seconds, warm_up=WARM_UP, on_block=on_block, run=run_generations
    )  # fmt: skip
    spent = time.perf_counter() - begin
    stored, counters = [], []
    for arm in arms:
        stored.append(arm.alone(longest))
        counters.append(count(arm, longest, stored[-1]))
        arm.close()
    names = ["uncompressed", *(method.label for method in methods)]
    return compared_rows(names, [None] * len(names), raw, shown, stored, counters, margin, alpha, spent)
