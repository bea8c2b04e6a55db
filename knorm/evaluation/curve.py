"""Perplexity of a text under a policy, window by window: one row of a curve, with what it rests on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean

from torch import Tensor

from knorm.evaluation.runner import Runner
from knorm.perplexity import Agreement, Run, agrees
from knorm.policy import Policy
from knorm.schedule import cache_lengths, recent_cached

MOST_NLL = 500.0  # beyond it, nothing is being predicted
NEWEST = 16  # tokens whose presence in the cache is reported


@dataclass(frozen=True)
class Row:
    """Hold one policy's costs on one text. Every row of a curve scores the same tokens: those after the prompt.

    Attributes:
        keep_ratio: as it was written.
        windows: how many were scored.
        tokens: how many were.
        nll: their mean, in nats.
        ppl: exp of that.
        standard_error: of ppl, clustered by window; None for one window.
        bits_per_byte: of the scored text's UTF-8.
        accuracy: share of tokens that were the likeliest.
        mean_cache: tokens that a scored query sees in a compressed layer, itself included.
        final_cache: tokens that the last query sees.
        recent: how many of the newest 16 tokens are among those of mean_cache; None in shorter windows.
        seconds: wall time.
        scheduling: seconds of it that schedules took.
        stream_ppl: that of the loop; None, as all below, where it was not run.
        stream_seconds: wall time of the loop.
        stream_difference: the largest difference of a token's NLL from the one pass, in nats.
        stream_evictions: how many evictions differ.
        stream_gap: the widest relative gap of norms where they first do.
    """

    keep_ratio: str
    windows: int
    tokens: int
    nll: float
    ppl: float
    standard_error: float | None
    bits_per_byte: float
    accuracy: float
    mean_cache: float
    final_cache: float
    recent: float | None
    seconds: float
    scheduling: float
    stream_ppl: float | None = None
    stream_seconds: float | None = None
    stream_difference: float | None = None
    stream_evictions: int | None = None
    stream_gap: float | None = None

    @property
    def agrees(self) -> bool | None:
        """Tell whether one pass and loop are equal, as float32 and float64 can be; None where the loop was not run."""
        if self.stream_difference is None or self.stream_gap is None:
            return None
        return agrees(self.stream_difference, self.stream_gap)


def _mean(tensors: list[Tensor]) -> float:
    return fmean(float(x.double().mean()) for x in tensors)


def _compressed(run: Run, policy: Policy) -> list[Tensor]:
    """Return the schedules of the compressed layers, or of all layers where none is compressed."""
    chosen = [layer for index, layer in enumerate(run.evicted_at) if index not in policy.skip_layers]
    return chosen or [*run.evicted_at]


def mean_recent(run: Run, policy: Policy, prompt_length: int) -> float | None:
    """Count how many of the newest 16 tokens a scored query sees in a compressed layer, on average.

    Args:
        run: with its schedules.
        policy: of the run: layers that it skips do not count.
        prompt_length: tokens of the run's first call.

    Returns:
        The mean over scored queries, heads and layers; None in windows shorter than 16.
    """
    first = max(prompt_length, NEWEST) - 1
    seen = [recent_cached(evicted, NEWEST)[..., first:] for evicted in _compressed(run, policy)]
    return _mean(seen) if seen[0].shape[-1] else None


def measure_row(
    runner: Runner, policy: Policy, *, stream: bool = False, on_batch: Callable[[], None] = lambda: None
) -> Row:
    """Measure one policy on a runner's windows by one pass over each; with `stream`, by the loop too.

    Args:
        runner: the model, its windows and their prompt.
        policy: when and what to evict.
        stream: run the loop as well, and compare.
        on_batch: called after each batch, for a progress bar.

    Returns:
        The row of a curve.

    Raises:
        ValueError: what perplexity.exact_nll raises; for a mean NLL beyond all guessing; for windows of no text.

    Example:
        >>> from knorm.evaluation.windows import cut_windows
        >>> model, tokenizer = load_embedded()
        >>> windows = cut_windows(tokenizer, "The cat sat on the mat. " * 30, length=32, most=2)
        >>> measure_row(Runner(model, windows), Policy(0.5, prune_after=16, protocol="streaming")).tokens
        62
    """
    both = runner.agreement(policy, on_batch=on_batch) if stream else None
    run = both.exact if both else runner.run(policy, on_batch=on_batch)
    first = runner.prompt_length - 1  # the query that predicts the first scored token
    lengths = [cache_lengths(evicted)[..., first:] for evicted in _compressed(run, policy)]

    nll = run.nll.double()
    means = nll.mean(1)
    mean = float(means.mean())
    if not mean < MOST_NLL:
        raise ValueError(
            f"the mean NLL is {mean:.4g} nats a token at keep_ratio={policy.keep_ratio}, where guessing has "
            f"{math.log(runner.model.config.vocab_size):.4g}: the model's weights are damaged, or its dtype overflows"
        )
    error = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else None
    row = Row(
        keep_ratio=str(policy.keep_ratio),
        windows=len(means),
        tokens=nll.numel(),
        nll=mean,
        ppl=math.exp(mean),
        standard_error=None if error is None else math.exp(mean) * error,
        bits_per_byte=float(nll.sum()) / math.log(2) / runner.windows.scored_bytes(runner.prompt_length),
        accuracy=_mean([run.correct]),
        mean_cache=_mean(lengths),
        final_cache=_mean([length[..., -1:] for length in lengths]),
        recent=mean_recent(run, policy, runner.prompt_length),
        seconds=run.seconds,
        scheduling=run.scheduling,
    )
    return _beside_loop(row, both) if both else row


def _beside_loop(row: Row, both: Agreement) -> Row:
    return replace(
        row,
        stream_ppl=math.exp(float(both.stream.nll.double().mean())),
        stream_seconds=both.stream.seconds,
        stream_difference=both.difference,
        stream_evictions=both.evictions,
        stream_gap=both.gap,
    )
