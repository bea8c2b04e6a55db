"""Three ways to run a method on a text: by its schedule, in two calls, and by the loop; and which of them is right."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from knorm.evaluation.damage import PerToken, compare, head_of, summed
from knorm.evaluation.recovery import Beside
from knorm.evaluation.sums import Damage
from knorm.evaluation.windows import Windows, check_prompt
from knorm.methods.budget import Budget
from knorm.methods.caches import CacheMethod, stored_bytes
from knorm.methods.method import Method, Session, Tokenizer
from knorm.model_attention import cache_keyword
from knorm.perplexity import check_ids, exact_hidden, refuse_unready
from knorm.policy import whole
from knorm.rounding import ROUNDING, Rounding
from knorm.schedule import cache_lengths

How = Literal["auto", "schedule", "two calls", "loop"]
HOWS = ("auto", "schedule", "two calls", "loop")


class Pass(NamedTuple):
    """Hold one run over a batch of windows.

    states    hidden states that predict the scored tokens, [batch, scored, width]
    seen      tokens that a query after the prompt sees, on average, float64 [layers, kv_heads]
    stored    bytes that the cache stores, on average over those queries
    """

    states: Tensor
    seen: Tensor
    stored: float


@dataclass(frozen=True)
class Evaluation:
    """Hold what a method costs on a text, beside the full cache on the same tokens.

    Attributes:
        method: the method's name.
        budget: what one compression retains; None where the method has its own.
        how: the way it was run: "schedule", "two calls" or "loop".
        check: how that way was checked, in words; empty where there was nothing to check.
        changed: False where every token's prediction is the full cache's, up to rounding.
        per_token: what is compared for each scored token, [windows, scored].
        damage: the sums of per_token.
        tokens_seen: tokens that a query after the prompt sees, on average, float64 [layers, kv_heads].
        tokens_before: the same for the full cache, one number.
        bytes_stored: bytes that the cache stores for one window, on average over those queries.
        bytes_full: the same for the full cache.
        seconds: wall time of the method's own runs.
        kl_at_least: only the likeliest tokens are compared, so that KL is a lower bound.

    Example:
        >>> model, tokenizer = load_embedded()
        >>> ids = tokenizer("The cat sat on the mat, and the dog lay by the door.", return_tensors="pt").input_ids
        >>> evaluate(model, ids, method(Policy(0.5)), prompt_length=8).label
        'Policy 0.5'
    """

    method: str
    budget: Budget | None
    how: str
    check: str
    changed: bool
    per_token: PerToken
    damage: Damage
    tokens_seen: Tensor
    tokens_before: float
    bytes_stored: float
    bytes_full: float
    seconds: float
    kl_at_least: bool = False

    @property
    def label(self) -> str:
        """Name the method and its budget, as tables do."""
        return self.method if self.budget is None else f"{self.method} {self.budget}"

    @property
    def bytes_per_token(self) -> float:
        """Divide the bytes stored by the tokens that had been fed."""
        return self.bytes_stored / self.tokens_before


class Ways:
    """Run methods on the same windows, and compare each with the full cache, which is run once.

    Args:
        model: a causal language model of transformers in eval mode, which attends by "sdpa" or "eager".
        windows: the tokens, [windows, T].
        prompt_length: tokens of the prompt; only those after it are scored.
        batch: windows at a time.
        scored: tokens at the end of each window that are scored; by default all after the prompt.
        tokenizer: of the model, for methods that read text.
        seed: of PyTorch's generators, before each run of a method.

    Raises:
        ValueError: for a prompt that leaves nothing to score, and for what no model can run.

    Example:
        >>> Ways(load_embedded()[0], Windows(torch.arange(64).view(2, 32)), 16).evaluate(method(Policy(0.5))).label
        'Policy 0.5'
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Windows,
        prompt_length: int,
        *,
        batch: int = 1,
        scored: int | None = None,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
    ) -> None:
        refuse_unready(model)
        check_ids(model, windows.input_ids)
        check_prompt(windows, whole("prompt_length", prompt_length))
        after = windows.input_ids.shape[1] - prompt_length
        if prompt_length < 1 or after < 2:
            raise ValueError(
                f"prompt_length={prompt_length}, but should be between 1 and {windows.input_ids.shape[1] - 2}: a "
                "prompt to compress, and two tokens after it, since the prompt itself predicts the first"
            )
        self.scored = after if scored is None else whole("scored", scored, 1)
        if self.scored > after:
            raise ValueError(f"scored={scored}, but only {after} tokens follow a prompt of {prompt_length}")
        self.model, self.windows, self.prompt_length = model, windows, prompt_length
        self.batch, self.tokenizer, self.seed = whole("batch", batch, 1), tokenizer, seed
        self.ids = windows.input_ids.to(model.device, torch.int64)
        self._full: list[Pass] = []
        self._noise: dict[str, tuple[Rounding, float]] = {}  # by the way of the run

    def full(self) -> list[Pass]:
        """Run the full cache by one plain pass a batch; once, whatever asks for it."""
        if not self._full:
            self._full = [self._plain(ids) for ids in self.ids.split(self.batch)]
        return self._full

    def control(self) -> Evaluation:
        """Run the full cache again, in batches of another size: what differs is noise."""
        begin, batch = time.perf_counter(), 2 if self.batch == 1 else 1
        ids = self.ids if len(self.ids) > 1 or batch == 1 else self.ids.repeat(2, 1)
        states = torch.cat([self._plain(part).states for part in ids.split(batch)])[: len(self.ids)]
        first = self.full()[0]
        passes = [first._replace(states=part) for part in states.split(self.batch)]
        check = f"the full cache again, in batches of {batch}"
        return self._evaluation("full cache, again", None, "one pass", check, passes, time.perf_counter() - begin)

    def evaluate(self, method: Method, how: How = "auto", *, on_batch: Callable[[], None] = lambda: None) -> Evaluation:
        """Run a method on every window, in the cheapest way that is right for it.

        Args:
            method: made by `knorm.method`.
            how: "schedule" for knorm's own policies, "two calls" for methods that act once, after the prompt, "loop"
                for all. "auto" takes the schedule where there is one, else two calls, and checks them on the first
                batch against the loop.
            on_batch: called after each batch.

        Returns:
            An Evaluation, whose `check` says how the way was checked.

        Raises:
            MethodError: what the method's own code raised.
            ValueError: for "schedule" of a method that has none, and for a cache that does not fit.
        """
        if how not in HOWS:
            raise ValueError(f"how={how!r}, but should be one of {', '.join(HOWS)}")
        if how == "schedule" and method.policy is None:
            raise ValueError(f"{method.name} has no schedule: give how='two calls', 'loop' or 'auto'")
        begin, batches, check = time.perf_counter(), [*self.ids.split(self.batch)], ""
        passes: list[Pass] = []
        chosen: str = how if how != "auto" else "two calls" if method.policy is None else "schedule"
        if chosen == "two calls" and how == "auto":
            passes, chosen, check = self._checked(method, batches[0])
            on_batch()
        for ids in batches[len(passes) :]:
            passes.append(self._run(method, ids, chosen))
            on_batch()
        return self._evaluation(method.name, method.budget, chosen, check, passes, time.perf_counter() - begin)

    def _checked(self, method: Method, ids: Tensor) -> tuple[list[Pass], str, str]:
        """Run the first batch in two calls and by the loop; the passes, the way that is right, and what was found."""
        try:
            two = self._run(method, ids, "two calls")
        except ValueError as error:
            loop = self._run(method, ids, "loop")
            return [loop], "loop", f"loop: in two calls {error}"
        loop = self._run(method, ids, "loop")
        tokens = self._compared([two], [loop], ids)
        change = tokens.nll - tokens.nll_full
        where = "window 1" if len(ids) == 1 else f"windows 1 to {len(ids)}"
        if self.covers(change, "loop"):
            acted = self._acted(self._compared([loop], self.full()[:1], ids), loop, 0)
            said = f"checked on {where}: equal to the loop within {float(change.abs().max()):.1e}"
            if not acted:
                said += f"; did not act in {ids.shape[1]} tokens"
            return [two], "two calls", said
        bound = self._noise["loop"][0].largest if "loop" in self._noise else ROUNDING
        beyond = (change.abs() > bound).any(0)
        token = ids.shape[1] - self.scored + (int(beyond.nonzero()[0]) if bool(beyond.any()) else 0)
        largest = float(change.abs().max())
        said = f"in two calls {where} differs by up to {largest:.1e} nats, from token {token} on"
        again = not torch.allclose(two.seen, loop.seen)
        why = "acts again after the prompt" if again else "rounds otherwise in one call than in many"
        return [loop], "loop", f"{why}: {said}"

    def covers(self, change: Tensor, how: str) -> bool:
        """Tell whether rounding alone may explain `change`, in tokens' NLLs, to a run that is made in the way `how`.

        What it does here is measured on the full cache, one pass against the same way, where the usual bound of float32
        is exceeded; and always in half precision.
        """
        if self.model.dtype in (torch.float32, torch.float64) and how not in self._noise:
            largest = float(change.abs().max())
            if not ROUNDING < largest <= 100 * ROUNDING:  # nothing to measure: far from where it is in doubt
                return largest <= ROUNDING
        return self._measured(how)[0].covers(change)

    def _measured(self, how: str) -> tuple[Rounding, float]:
        """Measure what rounding does to a token's NLL and KL: at most twice what the full cache shows in that way."""
        if how not in self._noise:
            ids = self.ids[: self.batch]
            run = self._run(CacheMethod("full cache", DynamicCache, None, {}), ids, how)
            tokens = self._compared([run], self.full()[:1], ids)
            noise = Rounding.measured(2 * (tokens.nll - tokens.nll_full))
            self._noise[how] = noise, max(ROUNDING, 2 * float(tokens.kl.max()))
        return self._noise[how]

    def _acted(self, tokens: PerToken, run: Pass, index: int) -> bool:
        """Tell whether a run differs from the full cache's, in a prediction or in what its queries see."""
        fewer = bool((run.seen < self.full()[index].seen - 1e-9).any())
        return fewer or not self.covers(tokens.nll - tokens.nll_full, "loop")

    def _compared(self, runs: Sequence[Pass], full: Sequence[Pass], ids: Tensor) -> PerToken:
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        targets = ids[:, -self.scored :].split([len(run.states) for run in runs])
        with torch.no_grad(), head_of(self.model) as head:
            given = zip(runs, full, targets, strict=True)
            parts = [compare(head, ours.states, run.states, true, vocabulary) for run, ours, true in given]
        return PerToken(*map(torch.cat, zip(*parts, strict=True)))

    def _evaluation(
        self, name: str, budget: Budget | None, how: str, check: str, passes: list[Pass], seconds: float
    ) -> Evaluation:
        full = self.full()
        tokens = self._compared(passes, full, self.ids)
        if not bool(tokens.nll.isfinite().all()):
            raise ValueError(f"{name}: the predictions of {int((~tokens.nll.isfinite()).sum())} tokens are no numbers")
        weights = [len(run.states) for run in passes]
        seen, stored = (
            sum(getattr(run, column) * weight for run, weight in zip(passes, weights, strict=True)) / sum(weights)
            for column in ("seen", "stored")
        )
        way = "loop" if how == "loop" else "two calls"
        covered = self.covers(tokens.nll - tokens.nll_full, way)
        changed = not covered or float(tokens.kl.max()) > self._noise.get(way, (None, ROUNDING))[1]
        return Evaluation(
            method=name,
            budget=budget,
            how=how,
            check=check,
            changed=changed,
            per_token=tokens,
            damage=summed(tokens),
            tokens_seen=seen,
            tokens_before=self._mean_length(),
            bytes_stored=stored,
            bytes_full=full[0].stored,
            seconds=seconds,
        )

    def _mean_length(self) -> float:
        """Return how many tokens had been fed when a query after the prompt attends, itself included, on average."""
        return (self.prompt_length + 1 + self.ids.shape[1] - 1) / 2

    @torch.no_grad()
    def _plain(self, ids: Tensor) -> Pass:
        config = self.model.config.get_text_config(decoder=True)
        states = self.model.base_model(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        seen = torch.full((config.num_hidden_layers, heads), self._mean_length(), dtype=torch.float64)
        size = 2 * width * self.model.dtype.itemsize
        return Pass(states[:, -self.scored - 1 : -1].clone(), seen, float(seen.sum()) * size)

    def beside(self, method: Method, how: str, make: Callable[[int], Beside]) -> tuple[PerToken, list[Beside]]:
        """Run a method on every batch with something beside it.

        Args:
            method: made by `knorm.method`.
            how: "two calls" or "loop".
            make: called with the rows of a batch; returns what stands beside its run.

        Returns:
            The comparison with the full cache, and what stood beside each batch.
        """
        batches = self.ids.split(self.batch)
        made = [make(len(ids)) for ids in batches]
        passes = [self._run(method, ids, how, other) for ids, other in zip(batches, made, strict=True)]
        return self._compared(passes, self.full(), self.ids), made

    def _run(self, method: Method, ids: Tensor, how: str, beside: Beside | None = None) -> Pass:
        if how == "schedule":
            return self._by_schedule(method, ids)
        prompt, length = self.prompt_length, ids.shape[1]
        cuts = [(prompt, length - 1)] if how == "two calls" else [(at, at + 1) for at in range(prompt, length - 1)]
        devices = [] if self.model.device.type == "cpu" else [self.model.device]
        with (
            torch.random.fork_rng(devices),
            method.session(self.model, length=length, batch=len(ids), tokenizer=self.tokenizer) as session,
        ):
            torch.manual_seed(self.seed)
            return self._calls(session, ids, cuts, beside or Beside())

    @torch.no_grad()
    def _calls(self, session: Session, ids: Tensor, cuts: list[tuple[int, int]], beside: Beside) -> Pass:
        prompt, rows = self.prompt_length, len(ids)
        places = torch.arange(ids.shape[1], device=ids.device).expand(rows, -1)
        base, keyword = self.model.base_model, cache_keyword(self.model)
        given = session.prompt(ids[:, :prompt], places[:, :prompt])
        with beside.reading(session):
            states = base(**given, use_cache=True, return_dict=True, **{keyword: session.cache}).last_hidden_state
        parts, shift = [states[:, -1:].clone()], session.end_prompt() - prompt
        sizes = [stored_bytes(session.cache) / rows]
        with beside.decoding(session):
            for start, stop in cuts:
                output = base(
                    input_ids=ids[:, start:stop],
                    position_ids=places[:, start:stop] + shift,
                    use_cache=True,
                    return_dict=True,
                    **{keyword: session.cache},
                )
                states = output.last_hidden_state
                if states.shape[:2] != (rows, stop - start):
                    raise ValueError(f"a call of [{rows}, {stop - start}] tokens came back as {list(states.shape[:2])}")
                parts.append(states)
                sizes.append(stored_bytes(session.cache) / rows)
        step = (sizes[-1] - sizes[0]) / (cuts[-1][1] - prompt)  # in one call a cache grows by each of its tokens
        stored = sum(sizes[1:]) / len(cuts) if len(cuts) > 1 else (sizes[0] + step + sizes[-1]) / 2
        return Pass(torch.cat(parts, 1)[:, -self.scored :].clone(), session.seen.mean(), stored)

    def _by_schedule(self, method: Method, ids: Tensor) -> Pass:
        assert method.policy is not None
        hidden = exact_hidden(self.model, ids, method.policy, prompt_length=self.prompt_length)
        lengths = [cache_lengths(lost)[..., self.prompt_length : -1].double() for lost in hidden.evicted_at]
        seen = torch.stack([length.mean((0, 2)) for length in lengths]).cpu()
        full = self.full()[0]
        per_token = full.stored / float(full.seen.sum())
        return Pass(hidden.states[:, -self.scored - 1 : -1].clone(), seen, float(seen.sum()) * per_token)


def evaluate(
    model: PreTrainedModel,
    input_ids: Tensor,
    method: Method,
    *,
    prompt_length: int,
    how: How = "auto",
    batch: int = 1,
    tokenizer: Tokenizer | None = None,
) -> Evaluation:
    """Run a method on texts, and compare each prediction after the prompt with the full cache's.

    Args:
        model: a causal language model of transformers in eval mode, which attends by "sdpa" or "eager".
        input_ids: int64 [texts, T], without padding; each row is a text of its own.
        method: made by `knorm.method`.
        prompt_length: tokens of the prompt, 2 to T - 1; those after it are scored.
        how: "auto", "schedule", "two calls" or "loop"; see Ways.evaluate.
        batch: texts at a time.
        tokenizer: the model's, for methods that read text.

    Returns:
        An Evaluation: per_token [texts, T - prompt_length], damage, tokens seen by layer and head, bytes stored, and
        how it was run and checked.

    Raises:
        MethodError: the method's own code raised an exception; the message says which, and where.
        ValueError: texts or a model that cannot be run so.

    Example:
        >>> model, tokenizer = load_embedded()
        >>> ids = tokenizer("The cat sat on the mat, and the dog lay by the door.", return_tensors="pt").input_ids
        >>> evaluate(model, ids, method(Policy(1.0)), prompt_length=8).damage.same_top
        1.0
    """
    return Ways(model, Windows(input_ids), prompt_length, batch=batch, tokenizer=tokenizer).evaluate(method, how)
