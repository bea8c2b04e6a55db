"""What the cache of a server costs: its endpoint beside another one with the full cache, or beside transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from knorm.engines.asking import FORCED, PROMPTS, EndpointScorer
from knorm.engines.cut import states_after_a_cut
from knorm.engines.endpoint import Endpoint
from knorm.engines.process import EngineRefused
from knorm.engines.scorer import Asked, EngineHow, ModelScorer, compared
from knorm.engines.told import Able
from knorm.engines.ways import bytes_per_token, refuse_no_numbers
from knorm.evaluation.damage import PerToken, summed
from knorm.evaluation.ways import Evaluation
from knorm.evaluation.windows import Windows, check_prompt
from knorm.rounding import ROUNDING

_TEXT = 2**20  # characters at most that a server cuts into tokens
_PER_TOKEN = 16  # characters of a text for each token that is needed, many enough


@dataclass(frozen=True)
class Measured:
    """Hold what endpoints cost.

    Attributes:
        rows: the full cache again, and each endpoint beside the full cache.
        beside: each endpoint beside itself; last, where the full cache is a server's, transformers beside that.
    """

    rows: list[Evaluation]
    beside: list[Evaluation]


class EndpointWays:
    """Score windows with servers, and compare each with the full cache, token by token.

    Args:
        windows: the tokens, [windows, T].
        prompt_length: tokens of the prompt; only those after it are scored.
        model: with the same weights, in transformers; None where `reference` alone is compared with.
        reference: a server with the full cache; None where transformers has it.
        how: "loop" or "two calls"; None for forced decode of all servers where each can be forced, else prompt scoring.

    Raises:
        ValueError: for a prompt that leaves nothing to score.
    """

    def __init__(
        self,
        windows: Windows,
        prompt_length: int,
        *,
        model: PreTrainedModel | None = None,
        reference: Endpoint | None = None,
        how: EngineHow | None = None,
    ) -> None:
        check_prompt(windows, prompt_length)
        self.ids, self.prompt_length = windows.input_ids, prompt_length
        length = self.ids.shape[1]
        if not 1 <= prompt_length < length:
            raise ValueError(f"prompt_length={prompt_length}, but should be between 1 and {length - 1}")
        self.model, self.reference, self.how = model, reference, how

    def prepare(self, endpoints: Sequence[Endpoint]) -> EngineHow:
        """Find out what can be asked of all servers, before anything is measured.

        Args:
            endpoints: whose caches are judged.

        Returns:
            The way in which all are scored.

        Raises:
            EngineError: a context too long, another vocabulary, or a way that a server cannot be asked in.
        """
        servers = [*endpoints, *([self.reference] if self.reference else [])]
        able = [self._able(server) for server in servers]
        if self.how is None:
            self.how = "loop" if all(each.forced for each in able) else "two calls"
        for server, each in zip(servers, able, strict=True):
            if self.how == "loop" and not each.forced:
                raise EngineRefused(f"{server.spec} cannot be forced to decode a text: {each.why}")
            if self.how == "two calls" and not each.prompts:
                raise EngineRefused(f"{server.spec} scores no prompts (echo with logprobs)")
            server.check_context(self.ids.shape[1] + (self.how == "two calls"))
        return self.how

    def _able(self, server: Endpoint) -> Able:
        config: Any = self.model.config.get_text_config(decoder=True) if self.model else None
        server.check_vocabulary(config.vocab_size if config else None, self.ids)
        return server.able()

    @property
    def sees(self) -> str:
        """Say what the way of scoring is, what it can see, and what it cannot."""
        return FORCED if self.how == "loop" else PROMPTS

    def measure(self, endpoints: Sequence[Endpoint]) -> Measured:
        """Score all, side by side.

        Args:
            endpoints: whose caches are judged.

        Returns:
            The rows.

        Raises:
            EngineError: what a server does in place of answering.
        """
        self.prepare(endpoints)
        full, again = self._full()
        runs = [run for endpoint in endpoints for run in self._twice(endpoint)]
        scorers, pairs = [full, again, *runs], [(0, 1)]
        for place in range(2, len(scorers), 2):
            pairs += [(0, place), (place, place + 1)]
        if self.reference and self.model:
            scorers.append(ModelScorer(self.model))
            pairs.append((0, len(scorers) - 1))
        control, *others = compared(scorers, self.ids, self.prompt_length, pairs)
        noise = max(ROUNDING, 2 * float(control.kl.max()))
        rows, beside = [self._row("full cache, again", self._control, control, again, noise)], []
        for place, endpoint in enumerate(endpoints):
            tokens, itself = others[2 * place : 2 * place + 2]
            ours, twice = runs[2 * place : 2 * place + 2]
            rows.append(self._row(endpoint.spec, self._told(ours), tokens, ours, noise))
            beside.append(self._row(f"{endpoint.spec}, again", self._asked_again(endpoint), itself, twice, noise))
        if self.reference and self.model:
            check = f"the same weights in {_dtype(self.model)}, one pass; KL(the other endpoint || transformers)"
            beside.append(self._row(f"transformers, {_dtype(self.model)}", check, others[-1], scorers[-1], noise))
        return Measured(rows, beside)

    def _full(self) -> tuple[Any, Any]:
        if self.reference:
            return self._twice(self.reference)
        assert self.model
        model = self.model
        return ModelScorer(model), ModelScorer(
            model, lambda tokens, prompt: states_after_a_cut(model, tokens, prompt, ())
        )

    def _twice(self, endpoint: Endpoint) -> tuple[EndpointScorer, EndpointScorer]:
        assert self.how
        able = endpoint.able()
        companions = (self.ids[-1],) if self._in_company(endpoint) else ()
        once, again = Asked(self.how), Asked(self.how, companions=companions)
        return EndpointScorer(endpoint, able, once), EndpointScorer(endpoint, able, again)

    def _told(self, scorer: EndpointScorer) -> str:
        return replace(scorer.able, known=scorer.told(self.ids.shape[1], self.prompt_length)).told

    def _asked_again(self, endpoint: Endpoint) -> str:
        return "asked again" + (", while another window is generated beside it" if self._in_company(endpoint) else "")

    def _in_company(self, endpoint: Endpoint) -> bool:
        return self.how == "loop" and endpoint.spare != 0

    @property
    def _control(self) -> str:
        return (
            self._asked_again(self.reference)
            if self.reference
            else "transformers, the prompt and the rest in a call each"
        )

    def _row(self, name: str, check: str, tokens: PerToken, scorer: Any, noise: float) -> Evaluation:
        refuse_no_numbers(name, tokens)
        assert self.how
        before = (self.prompt_length + self.ids.shape[1]) / 2  # when a query after the prompt attends, on average
        full = self._full()[0]
        return Evaluation(
            method=name,
            budget=None,
            how=self.how,
            check=check,
            changed=float(tokens.kl.max()) > noise,
            per_token=tokens,
            damage=summed(tokens),
            tokens_seen=self._seen(before),
            tokens_before=before,
            bytes_stored=_bytes(scorer) * before,
            bytes_full=_bytes(full) * before,
            seconds=getattr(scorer, "seconds", 0.0),
            kl_at_least=any(
                isinstance(x, EndpointScorer) and x.told(self.ids.shape[1], self.prompt_length) is not None
                for x in (scorer, full)
            ),
        )

    def _seen(self, before: float) -> Tensor:
        """Tell the tokens that a query sees, by layer and head, as far as they are known: those of one without."""
        shape = (1, 1)
        if self.model:
            config: Any = self.model.config.get_text_config(decoder=True)
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            shape = (config.num_hidden_layers, heads)
        return torch.full(shape, before, dtype=torch.float64)


def _bytes(scorer: Any) -> float:
    if isinstance(scorer, EndpointScorer):
        return scorer.endpoint.bytes_per_token
    return float(bytes_per_token(scorer.model))


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def windows_by(endpoint: Endpoint, text: str, length: int, most: int) -> Windows:
    """Let a server cut a text into windows; each begins with what it puts in front of a text.

    Args:
        endpoint: the server.
        text: of which the beginning is taken.
        length: tokens of a window.
        most: windows at most.

    Returns:
        The windows.

    Raises:
        EngineRefused: it cuts no texts.
        ValueError: too short a text.
    """
    part = text[: min(_TEXT, _PER_TOKEN * length * most)]
    try:
        ids = endpoint.tokenize(part, begin=False)
        whole = endpoint.tokenize(part, begin=True)
    except EngineRefused as error:
        raise EngineRefused(f"{error}: give --model, the same weights in transformers, which does") from None
    start = whole[: len(whole) - len(ids)] if whole[len(whole) - len(ids) :] == ids else []
    own = min(length - len(start), len(ids))
    if own < 2:
        raise ValueError(f"the text has {len(ids)} tokens, but needs one to be given and one to be predicted")
    count = min(len(ids) // own, most)
    return Windows(torch.tensor([[*start, *ids[place * own : (place + 1) * own]] for place in range(count)]))
