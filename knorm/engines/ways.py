"""What an engine's cache costs: each condition beside the same engine's full cache, and that beside transformers."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from knorm.engines.boxed import can_move, moved_file
from knorm.engines.conditions import EngineTarget, Place, Settings
from knorm.engines.process import EngineError
from knorm.engines.scorer import Asked, EngineHow, EngineScorer, ModelScorer, closing, compared
from knorm.evaluation.damage import PerToken, summed
from knorm.evaluation.ways import Evaluation
from knorm.evaluation.windows import Windows, check_prompt
from knorm.rounding import ROUNDING

SMALLER = 32  # tokens of a batch in a control: below what llama.cpp's kernels for large batches take
_HOW = {
    "loop": "forced decode, one token a call",
    "two calls": "prompt scoring: all tokens in batches, none is decoded",
}


@dataclass(frozen=True)
class EngineRows:
    """Hold what a target costs, and the control in its own condition.

    Attributes:
        row: the target beside the engine's full cache.
        again: the target beside itself, read in other batches, or with moved weights: what noise does in its condition.
    """

    row: Evaluation
    again: Evaluation


class EngineWays:
    """Score windows with an engine in several conditions; each is compared with its full cache on the same tokens.

    Args:
        model: the engine's model, as transformers runs it.
        windows: the tokens, [windows, T].
        prompt_length: tokens of the prompt; only those after it are scored.
        file: the model's file.
        place: where the engine runs.
        how: "loop" or "two calls", for the full cache and all that is compared with it.

    Attributes:
        said: what the engine said of itself when it was last started.

    Raises:
        ValueError: for a prompt that leaves nothing to score.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Windows,
        prompt_length: int,
        *,
        file: Path,
        place: Place | None = None,
        how: EngineHow = "loop",
    ) -> None:
        check_prompt(windows, prompt_length)
        length = windows.input_ids.shape[1]
        if not 1 <= prompt_length < length:
            raise ValueError(f"prompt_length={prompt_length}, but should be between 1 and {length - 1}")
        self.model, self.ids, self.prompt_length = model, windows.input_ids, prompt_length
        self.file, self.place, self.how = file, place or Place(), how
        self.said: dict[str, Any] = {}
        self._controls: dict[EngineTarget, tuple[Evaluation, Evaluation]] = {}  # and transformers beside the same run

    def control(self, target: EngineTarget) -> Evaluation:
        """Score the full cache of `target` twice, the second time read in small batches: what differs is noise.

        Where nothing differs, each weight is moved to the number next to it instead. It is done once for all targets
        of one full cache.
        """
        return self._both(target)[0]

    def beside(self, target: EngineTarget) -> Evaluation:
        """Compare the full cache of `target` with transformers, which runs the same weights in their own precision."""
        return self._both(target)[1]

    def _both(self, target: EngineTarget) -> tuple[Evaluation, Evaluation]:
        full = replace(full_of(target), spec="")
        if full not in self._controls:
            self._controls[full] = self._control(full)
        return self._controls[full]

    def _control(self, full: EngineTarget) -> tuple[Evaluation, Evaluation]:
        begin, scorers = time.perf_counter(), list[EngineScorer]()
        with closing(scorers):
            wanted, model = [full, self._smaller(full)], ModelScorer(self.model)
            (tokens, beside), said = self._scored(wanted, [(0, 1), (0, 2)], scorers, model)
            tokens, check = self._disturbed(tokens, scorers, 0)
        most = float(tokens.kl.max())
        check = f"{check}; {_HOW[self.how]}"
        row = self._row("full cache, again", check, tokens, (said[0], said[0]), begin, ROUNDING + most)
        dtype = str(self.model.dtype).removeprefix("torch.")
        check = f"the same weights in {dtype}, one pass; KL(engine's full cache || transformers)"
        stored, noise = {**said[0], "bytes_per_token": bytes_per_token(self.model)}, max(ROUNDING, 2 * most)
        return row, self._row(f"transformers, {dtype}", check, beside, (stored, said[0]), begin, noise)

    def evaluate(self, target: EngineTarget) -> EngineRows:
        """Score a target beside its full cache, and beside itself read in small batches, or with moved weights.

        Args:
            target: the engine's condition.

        Returns:
            Its row and the control in its own condition.

        Raises:
            EngineError: the engine refuses the condition, dies or hangs.
        """
        noise = self._noise(target)
        begin, scorers = time.perf_counter(), list[EngineScorer]()
        with closing(scorers):
            wanted = [full_of(target), target, self._smaller(target)]
            (tokens, again), said = self._scored(wanted, [(0, 1), (1, 2)], scorers)
            again, other = self._disturbed(again, scorers, 1)
        check = f"{_HOW[self.how]}; {self._batches(target)}"
        row = self._row(target.spec, check, tokens, (said[1], said[0]), begin, noise)
        check = f"{other}, both in this condition"
        return EngineRows(row, self._row(f"{target.spec}, again", check, again, (said[2], said[1]), begin, noise))

    def _smaller(self, target: EngineTarget) -> EngineTarget:
        return with_settings(target, target.settings.in_batches_of(SMALLER))

    def _disturbed(self, tokens: PerToken, scorers: list[EngineScorer], place: int) -> tuple[PerToken, str]:
        """Return what small batches change, or, where that is nothing, what moved weights do; and which it is."""
        scorer, target = scorers[place], scorers[place].target
        if tokens.kl.any() or not can_move(target.model, target.settings.form):
            return tokens, f"{self._batches(target)} against {SMALLER}"
        for other in scorers:
            if other is not scorer:  # each holds the model
                other.close()
        with moved_file(target.model, self.model, target.settings.form, target.settings.dtype) as file:
            moved = EngineScorer(target, file, self.place, self.ids.shape[1], Asked(self.how))
        with closing([moved]):
            (tokens,) = compared([scorer, moved], self.ids, self.prompt_length, [(0, 1)])
        return tokens, "weights as they are against each moved to the number next to it"

    def alone(self, target: EngineTarget) -> Evaluation:
        """Score `target` beside its full cache, and nothing else: `changed` is told by rounding."""
        begin = time.perf_counter()
        scorers: list[EngineScorer] = []
        with closing(scorers):
            (tokens,), said = self._scored([full_of(target), target], [(0, 1)], scorers)
        check = f"{_HOW[self.how]}; {self._batches(target)}"
        return self._row(target.spec, check, tokens, (said[1], said[0]), begin, ROUNDING)

    def _noise(self, target: EngineTarget) -> float:
        """Return the most that noise does to a token's KL: twice what the control shows, or what rounding may do."""
        return max(ROUNDING, 2 * float(self.control(target).per_token.kl.max()))

    def _batches(self, target: EngineTarget) -> str:
        return f"batches of {target.settings.batch}"

    def _scored(
        self,
        targets: list[EngineTarget],
        pairs: list[tuple[int, int]],
        scorers: list[EngineScorer],
        *others: ModelScorer,
    ) -> tuple[list[PerToken], list[dict[str, Any]]]:
        """Compare targets, and others after them, in pairs; their scorers are put into the list, for closing."""
        context, asked = self.ids.shape[1], Asked(self.how)
        for target in targets:
            scorers.append(EngineScorer(target, self.file, self.place, context, asked, wait=False))
        for scorer in scorers:
            scorer.wait()
        self.said = scorers[0].said
        tokens = compared([*scorers, *others], self.ids, self.prompt_length, pairs)
        return tokens, [scorer.said for scorer in scorers]

    def _row(
        self,
        name: str,
        check: str,
        tokens: PerToken,
        said: tuple[dict[str, Any], dict[str, Any]],
        begin: float,
        noise: float,
    ) -> Evaluation:
        own, full = said
        refuse_no_numbers(name, tokens)
        before = (self.prompt_length + self.ids.shape[1]) / 2  # when a query after the prompt attends, on average
        seen: Tensor = torch.full((full["layers"], full["kv_heads"]), before, dtype=torch.float64)
        return Evaluation(
            method=name,
            budget=None,
            how=self.how,
            check=check,
            changed=float(tokens.kl.max()) > noise,
            per_token=tokens,
            damage=summed(tokens),
            tokens_seen=seen,
            tokens_before=before,
            bytes_stored=own["bytes_per_token"] * before,
            bytes_full=full["bytes_per_token"] * before,
            seconds=time.perf_counter() - begin,
        )


def refuse_no_numbers(name: str, tokens: PerToken) -> None:
    """Raise EngineError where predictions in `tokens` are no numbers; `name` is whose they are."""
    if odd := int((~(tokens.kl.isfinite() & tokens.nll.isfinite())).sum()):
        raise EngineError(f"{name}: the predictions of {odd} tokens are no numbers")


def with_settings(target: EngineTarget, settings: Settings) -> EngineTarget:
    """Return `target` with other `settings`."""
    return replace(target, settings=settings)


def full_of(target: EngineTarget) -> EngineTarget:
    """Return the engine and the model of `target` with the full cache."""
    return with_settings(target, target.settings.full())


def bytes_per_token(model: PreTrainedModel) -> int:
    """Count the bytes that a token takes in the full cache of a `model`."""
    config: Any = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)
