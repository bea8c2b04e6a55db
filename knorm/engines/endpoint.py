"""An OpenAI-compatible server's model: what it tells of itself, what can be asked of it, and its predictions."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Generator, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knorm.engines.http import MOST_ANSWER, Address, Fields, Server
from knorm.engines.partial import Top
from knorm.engines.process import EngineError, EngineLost, EngineRefused
from knorm.engines.told import ID, Able, Likeliest, Predicted, as_told, columns

_NEVER = -9999.0  # the log-probability of what cannot come, as vLLM sends it
_NO_FORCING = "it takes no tokens to be generated (vLLM does with --logits-processors knorm.engines.forced:Forced)"
_SAMPLE = (5, 6, 7, 8)  # tokens that every vocabulary has
_CACHE = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)


class Endpoint:
    """Ask a server which model it serves, and find out what can be asked of it.

    Args:
        address: of the endpoint.
        limit: seconds for an answer.

    Attributes:
        model: as the server calls it.
        context: tokens that it holds at most; None where it does not say.
        owner: who serves it, as the server says.
        software: name and version, as far as they are told.
        cache: settings of its cache, as vLLM tells them under /metrics; else empty.

    Raises:
        EngineError: nothing answers, no model server does, or it does not serve the model; in one line.
    """

    counts: Sequence[int] = (-1, 100, 50, 20, 10, 5, 1)  # likeliest tokens asked for, the most first; -1 is all
    spare: int | None = None  # windows that it decodes beside one; None for as many as there are

    def __init__(self, address: Address, limit: float) -> None:
        self.address, self.server = address, Server(address, limit, as_told)
        self.entry = self._entry()
        self.model = str(self.entry["id"])
        self.context = count_of(self.entry.get("max_model_len"))
        self.cache = self._cache()
        self.owner = str(self.entry.get("owned_by") or "")
        self.software = " ".join(filter(None, (self.owner, self._version())))[:80]
        self._able: Able | None = None

    def _entry(self) -> Fields:
        url = self.address.url
        try:
            listed = self.server.get(f"{self.address.path}/models").get("data")
        except EngineRefused as error:
            hint = "" if self.address.path.endswith("/v1") else f"; is it {url}/v1?"
            raise EngineRefused(f"{error}{hint}") from None
        models = listed if isinstance(listed, list) else []
        served = {x["id"]: x for x in models if isinstance(x, dict) and isinstance(x.get("id"), str)}
        if not served:
            raise EngineLost(f"{url} names no model under GET {self.address.path}/models: is this a model server?")
        names = ", ".join([*served][:8]) + (f" and {len(served) - 8} more" if len(served) > 8 else "")
        wanted = self.address.model
        if not wanted and len(served) > 1:
            raise EngineError(f"{url} serves {names}: name one of them, as {url}#{next(iter(served))}")
        if wanted and wanted not in served:
            near = get_close_matches(wanted, served, 3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise EngineError(f"{url} does not serve {wanted!r}; it serves {names}{hint}")
        return dict(served[wanted] if wanted else next(iter(served.values())))

    def _version(self) -> str:
        with contextlib.suppress(EngineError):
            return str(self.server.get(f"{self.address.root}/version").get("version", ""))
        return ""

    def _cache(self) -> dict[str, str]:
        with contextlib.suppress(EngineError):
            told = _CACHE.search(self.server.read("GET", f"{self.address.root}/metrics").decode("utf-8", "replace"))
            return dict(re.findall(r'(\w+)="([^"]*)"', told[1])) if told else {}
        return {}

    @property
    def spec(self) -> str:
        """Return the endpoint with its model, as a target names it."""
        return f"{self.address.url}#{self.model}"

    @property
    def kind(self) -> str:
        """Return the type of its cache, auto for the model's own; empty where the server does not say."""
        return self.cache.get("cache_dtype", "")

    @property
    def bytes_per_token(self) -> float:
        """Return the bytes that a token takes in its cache; nan where the server does not say."""
        try:
            size, blocks, block = (
                int(self.cache[name]) for name in ("kv_cache_memory_bytes", "num_gpu_blocks", "block_size")
            )
            return float(size // blocks // block) or math.nan
        except (KeyError, ValueError, ZeroDivisionError):
            return math.nan

    def check_context(self, length: int) -> None:
        """Refuse windows of a `length` that the server does not hold. Raises EngineError."""
        if self.context is not None and length > self.context:
            raise EngineError(
                f"windows of {length:,} tokens, but {self.spec} holds a context of {self.context:,}: give --window "
                f"{self.context} or less"
            )

    def check_vocabulary(self, ours: int | None, tokens: Tensor) -> None:
        """Refuse a vocabulary that is not the text's.

        Args:
            ours: size of the vocabulary of the model beside it; None where there is none.
            tokens: of the text, int64 of any shape.

        Raises:
            EngineError: another size, or a token that the server does not have.
        """
        theirs, most = self.able().vocabulary, int(tokens.max())
        if theirs is not None and ours is not None and theirs != ours:
            raise EngineError(
                f"{self.spec} has a vocabulary of {theirs:,} tokens, but that of --model has {ours:,}: they are two "
                "models"
            )
        try:
            [*self.generated([most], 1, 1)]
        except EngineRefused as error:
            raise EngineRefused(f"the text has token {most}, the tokens are another model's: {error}") from None

    def able(self) -> Able:
        """Find out what can be asked, by asking; it is done once.

        Returns:
            What can be asked.

        Raises:
            EngineError: neither forced decode nor prompt scoring, or tokens that have no numbers.
        """
        if self._able is None:
            self._able = self._find_out([*_SAMPLE])
        return self._able

    def _find_out(self, sample: list[int]) -> Able:
        known, answer = self._most_told(sample)
        tokens = sorted(answer.known)
        whole = tokens == [*range(len(tokens))] and abs(float(np.exp(answer.logprobs).sum()) - 1) < 0.01
        vocabulary = len(tokens) if whole else None
        if known == -1:
            known = len(tokens)
        why, prompts = self._why_not_forced(sample), self._scores_prompts(sample)
        if why and not prompts:
            raise EngineRefused(f"{self.spec} cannot be scored: {why}, and it scores no prompts (echo with logprobs)")
        return Able(not why, prompts, None if whole else known, vocabulary, why)

    def _most_told(self, sample: list[int]) -> tuple[int, Predicted]:
        for count in self.counts:
            try:
                (first,) = self.generated(sample, 1, count)
            except EngineRefused as error:
                refused = error
                continue
            return count, first
        raise refused

    def _why_not_forced(self, sample: list[int]) -> str:
        """Force tokens that nobody would generate, twice and differently; say why that is not possible."""
        a, b = sample[:2]
        logprobs: list[float | None] = []
        for wanted in ([a, b, b], [b, a, a]):
            try:
                given = [*self.generated(sample, 3, 1, wanted)]
            except EngineRefused as error:
                return self._no_forcing(error)
            if [each.token for each in given] != wanted:
                return self._no_forcing(None)
            logprobs += [each.logprob for each in given]
        if not any(logprobs):
            return (
                "it tells log-probabilities after tokens are forced (vLLM does not with --logprobs-mode raw_logprobs)"
            )
        return ""

    def _no_forcing(self, error: EngineRefused | None) -> str:
        """Say why it cannot be forced, in words that follow its name."""
        return _NO_FORCING

    def _scores_prompts(self, sample: list[int]) -> bool:
        try:
            self.prompt(sample, 1)
        except EngineRefused:
            return False
        return True

    def generated(
        self, prompt: Sequence[int], count: int, known: int, forced: Sequence[int] | None = None
    ) -> Generator[Predicted, None, None]:
        """Let the server generate tokens, and give what it predicted for each, as they come.

        Args:
            prompt: tokens that it reads.
            count: tokens that it generates.
            known: likeliest tokens that it tells; -1 for all.
            forced: what it is to generate; None for what it likes best.

        Yields:
            For each token what was predicted.

        Raises:
            EngineError: what Server.stream raises; fewer or more tokens, or what are no log-probabilities.
        """
        request = self._request(prompt, count, known) | {"stream": True}
        if forced is not None:
            request["vllm_xargs"] = {"forced": [*forced], "key": "knorm"}
        done = idle = 0
        with contextlib.closing(self.server.stream(f"{self.address.path}/completions", request)) as events:  # type: ignore[type-var]
            for event in events:
                for each in self._read(event, may_be_empty=True):
                    done, idle = done + 1, -1
                    if done > count:
                        raise EngineLost(f"{self.spec} generated more than the {count} tokens that it was asked for")
                    yield each
                idle += 1
                if idle > IDLE:
                    raise EngineLost(f"{self.spec} sends events without tokens")
        if done < count:
            raise EngineLost(f"{self.spec} generated {done} tokens of {count}")

    def prompt(self, tokens: Sequence[int], known: int) -> list[Predicted]:
        """Let the server score a prompt.

        Args:
            tokens: of the prompt.
            known: likeliest tokens that it tells; -1 for all.

        Returns:
            For each token what was predicted; nothing for the first.

        Raises:
            EngineRefused: it scores no prompts.
            EngineError: what Server.ask raises, and what are no log-probabilities of these tokens.
        """
        request = self._request(tokens, 1, known) | {"echo": True}
        scored = self._read(self.server.ask(f"{self.address.path}/completions", request, MOST_ANSWER))[: len(tokens)]
        if [each.token for each in scored] != [*tokens] or len(scored) < 2 or scored[-1].logprob is None:
            raise EngineRefused(f"{self.spec} does not tell log-probabilities of a prompt's tokens")
        return scored

    def _request(self, prompt: Sequence[int], count: int, known: int) -> Fields:
        request = {
            "model": self.model, "prompt": [*prompt], "max_tokens": count, "temperature": 0, "logprobs": known,
            "return_tokens_as_token_ids": True, "ignore_eos": True,
        }  # fmt: skip
        if self.owner == "vllm" and count == 1:  # without a tokenizer it checks these alone, and a wrong prompt ends it
            request["stop_token_ids"] = [max(prompt)]
        return request

    def _read(self, answer: Any, *, may_be_empty: bool = False) -> list[Predicted]:
        """Read what an answer, or an event of one, tells of tokens."""
        try:
            choices = answer["choices"]
            if may_be_empty and (not choices or choices[0].get("logprobs") is None) and not _text(choices):
                return []
            told = choices[0]["logprobs"]
            if told is None:
                raise EngineRefused(f"{self.spec} tells no log-probabilities")
            columns = told["tokens"], told["token_logprobs"], told["top_logprobs"]
            return [self._predicted(*each) for each in zip(*columns, strict=True)]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
            if isinstance(error, EngineError):
                raise
            raise EngineLost(f"{self.spec} answers with what is no completion with log-probabilities") from None

    def _predicted(self, token: str, logprob: float | None, top: Any) -> Predicted:
        if not token.startswith(ID):
            raise EngineRefused(
                f"{self.spec} tells tokens as texts ({token[:20]!r}), not by their numbers, so that what it predicts "
                "cannot be compared (vLLM's server does, asked for return_tokens_as_token_ids)"
            )
        number = int(token[len(ID) :])
        if logprob is None:
            return Predicted(number, None, *columns([], []))
        known, logprobs = (top.known, top.logprobs) if isinstance(top, Likeliest) else columns([], [])
        return self._checked(number, logprob, known, logprobs)

    def _checked(
        self, number: int, logprob: float, known: NDArray[np.int64], logprobs: NDArray[np.float64]
    ) -> Predicted:
        """Put the token itself among the known ones; refuse what are no log-probabilities."""
        if number not in known:
            its, own = columns([number], [logprob])
            known, logprobs = np.concatenate([known, its]), np.concatenate([logprobs, own])
        odd = ~(logprobs < 1e-3) | (known < 0)
        if odd.any():
            place = int(odd.argmax())
            raise EngineLost(f"{self.spec} tells {logprobs[place]} as log-probability of token {known[place]}")
        return Predicted(number, float(logprob), known, np.maximum(logprobs, _NEVER))

    def tokenize(self, text: str, *, begin: bool) -> list[int]:
        """Cut `text` into tokens as the server does; `begin`: with what it puts in front of a text.

        Raises:
            EngineRefused: it has no /tokenize.
            EngineError: what Server.ask raises.
        """
        try:
            tokens = self.server.ask(f"{self.address.root}/tokenize", self._cuts(text, begin=begin)).get("tokens")
        except EngineError:
            tokens = None
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise EngineRefused(f"{self.address.url} cuts no text into tokens (POST {self.address.root}/tokenize)")
        return tokens

    def _cuts(self, text: str, *, begin: bool) -> Fields:
        return {"model": self.model, "prompt": text, "add_special_tokens": begin}

    def rows(self, told: Sequence[Predicted], able: Able, known: int | None) -> Tensor | Top:
        """Put predictions together, as scorers give them.

        Args:
            told: what was predicted.
            able: what the server can.
            known: likeliest tokens that were asked for; None for all.

        Returns:
            Log-probabilities, float32 [predictions, vocabulary]; where the likeliest alone are told, a Top.

        Raises:
            EngineLost: less is told than was asked for.
        """
        if known is None:
            assert able.vocabulary
            table = torch.full((len(told), able.vocabulary), math.nan)
            for row, each in zip(table, told, strict=True):
                if len(each.known) != able.vocabulary or each.known.max() >= able.vocabulary:
                    raise EngineLost(f"{self.spec} tells of {len(each.known):,} tokens, not of all {able.vocabulary:,}")
                row[torch.from_numpy(each.known)] = torch.from_numpy(each.logprobs).float()
            return table
        least = next((each for each in told if len(each.known) < known), None)
        if least:
            raise EngineLost(f"{self.spec} tells of {len(least.known)} likeliest tokens, but {known} were asked for")
        logprobs = [torch.from_numpy(each.logprobs) for each in told]
        if any(float(row.exp().sum()) > 1.01 for row in logprobs):
            raise EngineLost(f"{self.spec} tells probabilities that add up to more than 1")
        return Top([torch.from_numpy(each.known) for each in told], logprobs)

    def close(self) -> None:
        """End what is still being answered."""
        self.server.close()


def count_of(value: object) -> int | None:
    """Read a number of something.

    Args:
        value: what a server told.

    Returns:
        The number, where it is a whole one above 0; None for anything else.

    Example:
        >>> count_of(512), count_of(0), count_of(True), count_of("512")
        (512, None, None, None)
    """
    return value if type(value) is int and value > 0 else None


IDLE = 1000  # events in a row that have no tokens


def _text(choices: Any) -> str:
    return str(choices[0].get("text") or "") if choices else ""
