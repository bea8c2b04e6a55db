"""Tries the laws of engines on a server, as far as they can be asked over HTTP."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Generator
from dataclasses import replace

import torch

from knorm.engines.asking import FORCED, OWN, PROMPTS, EndpointScorer, own_windows
from knorm.engines.endpoint import Endpoint
from knorm.engines.http import read_address
from knorm.engines.llama_server import endpoint_at
from knorm.engines.scorer import Asked, ModelScorer, compared
from knorm.engines.told import Able
from knorm.evaluation.windows import cut_windows
from knorm.laws import engine
from knorm.laws.engine_run import LONG, TEXT, Beside, EngineChecks, chosen_laws
from knorm.laws.process.protocol import Request
from knorm.laws.registry import Refuted, Silent, Untested
from knorm.laws.results import Result
from knorm.models import hush, load_model, load_text

NO_MODEL = "the laws compare a server with the same weights in transformers: give them as --model"
_NO_CUT = "a server has no call that takes tokens out of its cache"
_ALONE = "the server decodes one window at a time (llama-server two, started with --parallel 2 --no-kv-unified)"
_NO_PROMPTS = "the server scores no prompts (echo with logprobs)"
Law = Callable[[engine.Trial], int]


class Served(Beside):
    """Make scorers of a server, and of what has the full cache; see laws.engine.EngineSubject.

    The full cache is that of the other server, or transformers' where there is none.

    Args:
        endpoint: the server.
        reference: the one with the full cache, or None.
        model: name of the same weights in transformers.
        profile: "quick" or "thorough".

    Raises:
        ValueError: a model that cannot be loaded, another vocabulary, a context too short, or what a server does in
            place of answering.
    """

    movable = False  # a server's weights are its own
    control = "the same requests again"

    def __init__(self, endpoint: Endpoint, reference: Endpoint | None, model: str, profile: str) -> None:
        hush()
        self.name, self.endpoint, self.reference = endpoint.spec, endpoint, reference
        self.model, tokenizer = load_model(model)
        story, (count, length) = load_text("narrative"), LONG[profile]
        most = getattr(self.model.config, "max_position_embeddings", None) or length
        servers = [endpoint, *([reference] if reference else [])]
        most = min([most, *(server.context - 1 for server in servers if server.context)])
        self.text = story[:TEXT]
        self.tokens = list(tokenizer(self.text, add_special_tokens=False).input_ids)
        self.long = cut_windows(tokenizer, story, min(length, most), count).input_ids
        self.short = cut_windows(tokenizer, story, engine.SHORT, 2).input_ids
        size = self.model.config.get_text_config(decoder=True).vocab_size
        sent = torch.cat([self.long.flatten(), self.short.flatten()])
        for server in servers:
            server.check_context(engine.SHORT + 1)
            server.check_vocabulary(size, sent)
        self.own = torch.empty(0, 0, dtype=torch.int64)
        if not self.able.forced:
            self.own = self.short = own_windows(endpoint, self.short, engine.PROMPT)

    @property
    def able(self) -> Able:
        """Say what can be asked of the server."""
        return self.endpoint.able()

    def scorer(self, which: str, asked: Asked, **how: bool) -> EndpointScorer | ModelScorer:
        """Return a scorer.

        Args:
            which: "full" or "target".
            asked: how it scores.
            **how: what a process of knorm's would be started with; a server is asked again as it is.

        Returns:
            A scorer of the server, of the other one, or of transformers.
        """
        if asked.cut:
            raise Silent(_NO_CUT)
        server = self.endpoint if which == "target" else self.reference
        if asked.companions and server and server.spare == 0:
            raise Silent(_ALONE)
        if asked.how == "two calls" and server and not server.able().prompts:  # noise: the same requests again
            asked = replace(asked, how="loop")
        if which == "target":
            return EndpointScorer(self.endpoint, self.able, asked, [*self.own])
        if self.reference:
            return EndpointScorer(self.reference, self.reference.able(), asked)
        if asked.how == "two calls" and any(how.values()):
            return self.elsewhere(((0, 0),))
        return self.elsewhere()

    def tokenize(self, text: str) -> list[int]:
        """Cut `text` as the server does."""
        return self.endpoint.tokenize(text, begin=False)

    def program(self, law: str) -> str:
        """Return no program for a `law`: what is refuted is the server's, with all its settings."""
        return ""

    @property
    def told(self) -> list[str]:
        """Say how the server was asked, and what stands beside it."""
        way = FORCED if self.able.forced else f"{PROMPTS}. Where laws are about decoding, {OWN}"
        full = self.reference.spec if self.reference else "transformers with the weights of --model"
        software = ", ".join(
            filter(None, (self.endpoint.software, self.endpoint.kind and f"cache type {self.endpoint.kind}"))
        )
        return [
            f"{self.name} ({software}): {way}.",
            *([] if self.able.forced else [f"It cannot be made to decode a given text: {self.able.why}."]),
            f"{self.able.told[0].upper()}{self.able.told[1:]}. The full cache is that of {full}.",
        ]


class EndpointChecks(EngineChecks):
    """Try the laws of engines on a server.

    Args:
        request: the target, and which laws to try how long.
        limit: seconds for an answer.
        model: name of the same weights in transformers.
        reference: endpoint of a server with the full cache, or None.

    Attributes:
        told: how the server was asked, in words, once it was.
    """

    def __init__(self, request: Request, limit: float, model: str | None, reference: str | None) -> None:
        self.request, self.limit, self.model, self.reference = request, limit, model, reference
        self.expected = dict(request.expected)
        self.told: list[str] = []

    def results(self) -> Generator[Result, None, None]:
        """Yield a Result for each law, as they come.

        Raises:
            ValueError: no model to compare with, or a server that cannot be asked.
        """
        if not self.model:
            raise ValueError(NO_MODEL)
        endpoint = endpoint_at(read_address(self.request.target), self.limit)
        reference = endpoint_at(read_address(self.reference), self.limit) if self.reference else None
        subject = Served(endpoint, reference, self.model, self.request.profile)
        self.told = subject.told
        yield from self._tried(subject, [_asked(law, subject) for law in chosen_laws(self.request)])


def _asked(law: Law, subject: Served) -> Law:
    """Make of a law what can be asked of a server."""

    @functools.wraps(law)
    def asked(trial: engine.Trial) -> int:
        if law is engine.check_default_equals_transformers:
            return _default(law, trial, subject)
        if law is engine.check_decode_equals_batch and not subject.able.prompts:
            raise Silent(_NO_PROMPTS)
        return law(trial)

    return asked


def _default(law: Law, trial: engine.Trial, subject: Served) -> int:
    """Ask it of the other server, or of this one where it says that its cache is the default."""
    kind = subject.endpoint.kind
    if not subject.reference and kind != "auto":
        said = f"says that its cache is {kind}" if kind else "does not say which cache it has"
        raise Silent(f"the server {said}, and there is no --reference with the default")
    try:
        if subject.reference:
            return law(trial)
        return trial.within(trial.long["target"], "default equals transformers", "full")
    except Refuted as refuted:
        name = "elsewhere" if subject.reference else "target"
        mean, rounded = float(trial.long[name].kl.mean()), engine.NOISE * _half(subject)
        if mean <= rounded:
            raise Untested(
                f"{refuted}; that may be its precision, which it does not say: bfloat16 explains {rounded:.2g}"
            ) from None
        raise


def _half(subject: Served) -> float:
    """Measure what bfloat16 does to the predictions of the weights in transformers: the mean KL, in nats a token."""
    half = copy.deepcopy(subject.model).bfloat16()
    scorers = [ModelScorer(subject.model), ModelScorer(half)]
    (tokens,) = compared(scorers, subject.long, engine.PROMPT, [(0, 1)])
    return float(tokens.kl.mean())
