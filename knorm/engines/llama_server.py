"""llama.cpp's own server: it is forced to decode a text by requests of one token each, in the cache of one slot."""

from __future__ import annotations

import contextlib
import queue
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from knorm.engines.endpoint import Endpoint, count_of
from knorm.engines.http import MOST_ANSWER, Address, Fields
from knorm.engines.process import EngineError, EngineLost, EngineRefused
from knorm.engines.told import Able, Predicted

OWNER = "llamacpp"  # what it calls itself
_MOST_KNOWN = 2048  # likeliest tokens that are asked for: 49,152 take half a second a token
_CERTAIN = 1e9  # added to a token's logit, of which the log-probabilities that are told know nothing


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
                run.close()  # type: ignore[attr-defined]
        return True

    def _props(self) -> Fields:
        with contextlib.suppress(EngineError):
            return dict(self.server.get(f"{self.address.root}/props"))
        return {}

    def generated(
        self, prompt: Sequence[int], count: int, known: int, forced: Sequence[int] | None = None
    ) -> Iterator[Predicted]:
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
        try:
            for place in range(count):
                request = self._request(tokens, 1, known if known > 0 else self._size) | {
                    "id_slot": slot,
                    "cache_prompt": place > 0,
                }
                if forced is not None:
                    request |= {"logit_bias": [[forced[place], _CERTAIN]], "ignore_eos": False}
                answer = self.server.ask(f"{self.address.path}/completions", request, MOST_ANSWER)
                read = self._read(answer)
                if len(read) != 1:
                    raise EngineLost(f"{self.spec} generated {len(read)} tokens of 1")
                anew = _anew(answer)
                if place and anew != 1:
                    raise EngineRefused(
                        f"{self.spec} read {anew or 'an unknown number of'} tokens where one was new: the others were "
                        "cleared from its cache. Leave it to knorm alone, or start it with --no-kv-unified"
                    )
                tokens.append(read[0].token)
                yield read[0]
        finally:
            self._slots.put(slot)

    def prompt(self, tokens: Sequence[int], known: int) -> list[Predicted]:
        """Raise EngineRefused: it scores no prompts."""
        raise EngineRefused(f"{self.spec} does not tell log-probabilities of a prompt's tokens")

    def _read(self, answer: Any, *, may_be_empty: bool = False) -> list[Predicted]:
        try:
            told = answer["choices"][0]["logprobs"]["content"]
            return [self._likeliest(each) for each in told]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
            if isinstance(error, EngineError):
                raise
            raise EngineRefused(f"{self.spec} tells no log-probabilities of tokens by their numbers") from None

    def _likeliest(self, told: Any) -> Predicted:
        known = array("q", (each["id"] for each in told["top_logprobs"]))
        logprobs = array("d", (each["logprob"] for each in told["top_logprobs"]))
        return self._checked(told["id"], told["logprob"], known, logprobs)

    def _cuts(self, text: str, *, begin: bool) -> Fields:
        return {"content": text, "add_special": begin}


def _anew(answer: Fields) -> int | None:
    """Return how many tokens were read that were not in the cache; None where that is not told."""
    timings = answer.get("timings")
    return count_of(timings.get("prompt_n")) if isinstance(timings, dict) else None
