"""llama.cpp's own server: it is forced to decode a text by requests of one token each, in the cache of one slot."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Generator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from knorm.engines.endpoint import Endpoint, count_of
from knorm.engines.http import MOST_ANSWER, Address, Fields
from knorm.engines.process import EngineError, EngineLost, EngineRefused
from knorm.engines.told import Able, Predicted, columns

OWNER = "llamacpp"  # what it calls itself
_MOST_KNOWN = 2048  # likeliest tokens that are asked for: 49,152 take half a second a token
_CERTAIN = 1e9  # added to a token's logit; the log-probabilities of an answer are those before that


def endpoint_at(address: Address, limit: float) -> Endpoint:
    """Ask a server which model it serves.

    Args:
        address: of the endpoint.
        limit: seconds for an answer.

    Returns:
        What knows how it is to be asked.

    Raises:
        EngineError: what Endpoint raises.
    """
    endpoint = Endpoint(address, limit)
    return LlamaServer(address, limit) if endpoint.owner == OWNER else endpoint


class LlamaServer(Endpoint):
    """Ask llama.cpp's server, which scores no prompts and tells each answer how many tokens it read anew.

    Args:
        address: of the endpoint.
        limit: seconds for an answer.

    Attributes:
        spare: windows that it decodes beside one; known once `able` was asked. By default the server clears a slot when
            another one begins (not with --no-kv-unified): then there are none.

    Raises:
        EngineError: what Endpoint raises.
    """

    def __init__(self, address: Address, limit: float) -> None:
        super().__init__(address, limit)
        meta = self.entry.get("meta")
        told = meta if isinstance(meta, dict) else {}
        self.context = count_of(told.get("n_ctx"))
        self._size = count_of(told.get("n_vocab")) or _MOST_KNOWN
        self.counts = (min(self._size, _MOST_KNOWN), *(count for count in self.counts if 0 < count < self._size))
        props = self._props()
        self.software = f"llama.cpp {props.get('build_info') or ''}".strip()[:80]
        slots = count_of(props.get("total_slots")) or 1
        self.spare = slots - 1
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(slots):
            self._slots.put(slot)

    def _find_out(self, sample: list[int]) -> Able:
        able = super()._find_out(sample)
        if not (able.forced and self.spare and self._two_at_a_time(sample)):
            self.spare = 0
        return able

    def _two_at_a_time(self, sample: list[int]) -> bool:
        """Decode two windows by turns; tell whether each keeps its cache."""
        runs = [self.generated(sample, 2, 1, sample[place : place + 2]) for place in range(2)]
        try:
            for _ in range(2):
                for run in runs:
                    next(run)
        except EngineRefused:
            return False
        finally:
            for run in runs:
                run.close()
        return True

    def _props(self) -> Fields:
        with contextlib.suppress(EngineError):
            return dict(self.server.get(f"{self.address.root}/props"))
        return {}

    def generated(
        self, prompt: Sequence[int], count: int, known: int, forced: Sequence[int] | None = None
    ) -> Generator[Predicted, None, None]:
        """Let the server generate tokens, one a request, each in the cache that the ones before it were written to.

        Args:
            prompt: tokens that it reads.
            count: tokens that it generates.
            known: likeliest tokens that it tells; -1 for all.
            forced: what it is to generate; None for what it likes best.

        Yields:
            For each token what was predicted.

        Raises:
            EngineRefused: it reads tokens again that were in its cache.
            EngineError: what Server.ask raises, and what are no log-probabilities.
        """
        tokens, slot = [*prompt], self._slots.get()
        known = known if known > 0 else self._size
        try:
            for place in range(count):
                wanted = None if forced is None else forced[place]
                told = self._one(tokens, slot, known, wanted, new=place == 0)
                told = told or self._beside_another(tokens, slot, known, wanted)
                tokens.append(told.token)
                yield told
        finally:
            self._slots.put(slot)

    def _one(self, tokens: list[int], slot: int, known: int, wanted: int | None, *, new: bool) -> Predicted | None:
        """Let it generate a token; None where nothing is told of it, as of one that ends within a character."""
        request = self._request(tokens, 1, known) | {"id_slot": slot, "cache_prompt": not new}
        if wanted is not None:
            request |= {"logit_bias": [[wanted, _CERTAIN]], "ignore_eos": False}
        answer = self.server.ask(f"{self.address.path}/completions", request, MOST_ANSWER)
        read = self._read(answer)
        if len(read) > 1:
            raise EngineLost(f"{self.spec} generated {len(read)} tokens of 1")
        if not new and (anew := _anew(answer)) != 1:
            raise EngineRefused(
                f"{self.spec} read {anew or 'an unknown number of'} tokens where one was new: the others were "
                "cleared from its cache. Leave it to knorm alone, or start it with --no-kv-unified"
            )
        return read[0] if read else None

    def _beside_another(self, tokens: list[int], slot: int, known: int, wanted: int | None) -> Predicted:
        """Tell what was predicted where the token ends within a character: another one is generated in its place."""
        told = self._one(tokens, slot, self._size, self._whole, new=False)
        if told is None:
            raise EngineRefused(f"{self.spec} tells no log-probabilities of tokens by their numbers")
        order = np.argsort(-told.logprobs, kind="stable")
        token = int(told.known[order[0]]) if wanted is None else wanted
        places = np.flatnonzero(told.known == token)
        if not len(places):
            raise EngineLost(f"{self.spec} tells nothing of token {token}")
        likeliest = order[:known]
        return self._checked(token, float(told.logprobs[places[0]]), told.known[likeliest], told.logprobs[likeliest])

    @cached_property
    def _whole(self) -> int:
        """Return a token that is a whole character."""
        tokens = self.tokenize("a", begin=False)
        if not tokens:
            raise EngineLost(f"{self.spec} cuts 'a' into no tokens")
        return tokens[0]

    def _no_forcing(self, error: EngineRefused | None) -> str:
        return str(error) if error else "it generates other tokens than those that logit_bias makes certain"

    def prompt(self, tokens: Sequence[int], known: int) -> list[Predicted]:
        """Raise EngineRefused: it scores no prompts."""
        raise EngineRefused(f"{self.spec} does not tell log-probabilities of a prompt's tokens")

    def _read(self, answer: Any, *, may_be_empty: bool = False) -> list[Predicted]:
        try:
            told = answer["choices"][0]["logprobs"]
            return [] if told is None else [self._likeliest(each) for each in told["content"]]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
            if isinstance(error, EngineError):
                raise
            raise EngineRefused(f"{self.spec} tells no log-probabilities of tokens by their numbers") from None

    def _likeliest(self, told: Any) -> Predicted:
        top = told["top_logprobs"]
        known, logprobs = columns((each["id"] for each in top), (each["logprob"] for each in top))
        return self._checked(told["id"], told["logprob"], known, logprobs)

    def _cuts(self, text: str, *, begin: bool) -> Fields:
        return {"content": text, "add_special": begin}


def _anew(answer: Fields) -> int | None:
    """Return how many tokens were read that were not in the cache; None where that is not told."""
    timings = answer.get("timings")
    return count_of(timings.get("prompt_n")) if isinstance(timings, dict) else None
