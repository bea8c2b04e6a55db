"""Runs of a policy over all windows of a text: split into batches, run, joined, the prompt dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from knorm.evaluation.windows import Windows, check_prompt
from knorm.masked_attention import Attend
from knorm.perplexity import Agreement, Run, Schedule, agreement, exact_run
from knorm.policy import Policy, whole


class Changes(TypedDict, total=False):
    """Name what one run may do differently from its policy; arguments of perplexity.exact_run.

    position_ids   int64 [T], the same for every window
    schedule       overrides the policy's evictions
    attend         replaces masked_attention.attend_seen
    """

    position_ids: Tensor
    schedule: Schedule
    attend: Attend | None


@dataclass(frozen=True)
class Runner:
    """Run policies on the same windows, and score the same tokens in each run: those after the prompt.

    Args:
        model: a causal language model in eval mode, of the types in perplexity.MODELS.
        windows: the tokens, [windows, T].
        prompt_length: tokens of the first call, which are not scored; 1 to T - 1.
        batch: windows at a time.

    Raises:
        ValueError: for a prompt that leaves nothing to score, and for a batch below 1.

    Example:
        >>> from knorm.evaluation.windows import cut_windows
        >>> from knorm.models import load_text
        >>> model, tokenizer = load_embedded()
        >>> runner = Runner(model, cut_windows(tokenizer, load_text("narrative"), length=64, most=2))
        >>> runner.run(Policy(0.5, prune_after=32, protocol="streaming")).nll.shape
        torch.Size([2, 63])
    """

    model: PreTrainedModel
    windows: Windows
    prompt_length: int = 1
    batch: int = 8

    def __post_init__(self) -> None:
        whole("batch", self.batch, 1)
        check_prompt(self.windows, self.prompt_length)

    def run(
        self,
        policy: Policy,
        *,
        prompt_length: int | None = None,
        on_batch: Callable[[], None] = lambda: None,
        **changes: Unpack[Changes],
    ) -> Run:
        """Run a policy on every window, exactly, by one forward pass each.

        Args:
            policy: when and what to evict.
            prompt_length: tokens of the first call in this run alone; the scored tokens stay the same.
            on_batch: called after each batch, for a progress bar.
            **changes: what else differs in this run.

        Returns:
            One Run of all windows, on the model's device: nll and correct [windows, T - prompt_length] begin with the
            first token after the runner's prompt; evicted_at, seconds and scheduling are of whole windows.

        Raises:
            ValueError: what perplexity.exact_nll raises.
        """
        prompt = self.prompt_length if prompt_length is None else prompt_length
        runs = []
        for ids in self._batches():
            own: Changes = {**changes}
            if "position_ids" in changes:
                own["position_ids"] = changes["position_ids"].expand(ids.shape)
            runs.append(exact_run(self.model, ids, policy, prompt_length=prompt, **own))
            on_batch()
        return self._joined(runs)

    def agreement(self, policy: Policy, *, on_batch: Callable[[], None] = lambda: None) -> Agreement:
        """Run `policy` by the loop too, and compare; the two runs are joined as those of `run`.

        `on_batch` is called after each batch. Returns the runs, and how far their tokens' NLLs lie apart.
        """
        parts = []
        for ids in self._batches():
            parts.append(agreement(self.model, ids, policy, prompt_length=self.prompt_length))
            on_batch()
        return Agreement(
            self._joined([part.exact for part in parts]),
            self._joined([part.stream for part in parts]),
            sum(part.evictions for part in parts),
            max(part.gap for part in parts),
            max(part.difference for part in parts),
        )

    def _batches(self) -> Sequence[Tensor]:
        return self.windows.input_ids.split(self.batch)

    def _joined(self, runs: Sequence[Run]) -> Run:
        first = self.prompt_length - 1  # the query that predicts the first scored token
        return Run(
            torch.cat([run.nll[:, first:] for run in runs]),
            torch.cat([run.correct[:, first:] for run in runs]),
            tuple(map(torch.cat, zip(*(run.evicted_at for run in runs), strict=True))),
            sum(run.seconds for run in runs),
            sum(run.scheduling for run in runs),
        )
