"""Perplexity of a text under a policy, window by window: one row of a curve, with what it rests on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from knorm.evaluation.windows import Windows, check_prompt
from knorm.perplexity import Agreement, Run, agreement, exact_run
from knorm.policy import Policy
from knorm.schedule import cache_lengths, recent_cached

MOST_NLL = 500.0  # beyond it, nothing is being predicted
NEWEST = 16  # tokens whose presence in the cache is reported


@dataclass(frozen=True)
class Row:
    """One policy on one text. Every row of a curve scores the same tokens: those after the prompt.

    ppl             exp of the mean NLL per token; standard_error of it, clustered by window (None for one window)
    bits_per_byte   of the scored text's UTF-8
    accuracy        share of tokens that were the likeliest
    mean_cache      tokens that a scored query sees in a compressed layer, itself included; final_cache: the last query
    recent          how many of the newest 16 tokens are among them, itself included (None in shorter windows)
    seconds         wall time; of which scheduling
    stream_*        the loop, where it was run: its PPL, the largest difference of a token's NLL from the one pass,
                    evictions that differ, and the widest relative gap of norms where they first do
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


def _mean(parts: list[tuple[Tensor, int]]) -> float:
    return sum(float(x.double().mean()) * n for x, n in parts) / sum(n for _, n in parts)


def _compressed(runs: list[Run], policy: Policy) -> list[tuple[Tensor, int]]:
    """The schedules of the compressed layers (of all, where none is), each with its number of rows."""
    layers = set(range(len(runs[0].evicted_at)))
    return [(run.evicted_at[layer], len(run.nll)) for run in runs for layer in layers - {*policy.skip_layers} or layers]


def mean_recent(runs: list[Run], policy: Policy, prompt_length: int) -> float | None:
    """How many of the newest 16 tokens a scored query sees in a compressed layer; None in windows shorter than that."""
    first = max(prompt_length, NEWEST) - 1
    seen = [(recent_cached(evicted, NEWEST)[..., first:], n) for evicted, n in _compressed(runs, policy)]
    return _mean(seen) if seen[0][0].shape[-1] else None


def evaluate(
    model: PreTrainedModel,
    windows: Windows,
    policy: Policy,
    *,
    prompt_length: int = 1,
    stream: bool = False,
    batch: int = 8,
    on_batch: Callable[[], None] = lambda: None,
) -> Row:
    """Evaluate a policy by one pass over each window; with `stream`, by the loop too.

    batch      windows at a time
    on_batch   called after each, for a progress bar

    Raises what perplexity.exact_nll raises, and ValueError for a prompt that leaves nothing to score.
    """
    check_prompt(windows, prompt_length)
    runs: list[Run] = []
    loops: list[Agreement] = []
    for ids in windows.input_ids.split(batch):
        if stream:
            loops.append(agreement(model, ids, policy, prompt_length=prompt_length))
            runs.append(loops[-1].exact)
        else:
            runs.append(exact_run(model, ids, policy, prompt_length=prompt_length))
        on_batch()
    first = prompt_length - 1  # the query that predicts the first scored token
    lengths = [(cache_lengths(evicted)[..., first:], n) for evicted, n in _compressed(runs, policy)]

    nll = torch.cat([run.nll[:, first:] for run in runs]).double()
    means = nll.mean(1)
    mean = float(means.mean())
    if not mean < MOST_NLL:
        raise ValueError(
            f"the mean NLL is {mean:.4g} nats a token at keep_ratio={policy.keep_ratio}, where guessing has "
            f"{math.log(model.config.vocab_size):.4g}: the model's weights are damaged, or its dtype overflows"
        )
    error = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else None
    row = Row(
        keep_ratio=str(policy.keep_ratio),
        windows=len(means),
        tokens=nll.numel(),
        nll=mean,
        ppl=math.exp(mean),
        standard_error=None if error is None else math.exp(mean) * error,
        bits_per_byte=float(nll.sum()) / math.log(2) / windows.scored_bytes(prompt_length),
        accuracy=_mean([(run.correct[:, first:], len(run.nll)) for run in runs]),
        mean_cache=_mean(lengths),
        final_cache=_mean([(x[..., -1:], n) for x, n in lengths]),
        recent=mean_recent(runs, policy, prompt_length),
        seconds=sum(run.seconds for run in runs),
        scheduling=sum(run.scheduling for run in runs),
    )
    return _beside_loop(row, loops, first) if stream else row


def _beside_loop(row: Row, loops: list[Agreement], first: int) -> Row:
    stream_nll = torch.cat([loop.stream.nll[:, first:] for loop in loops]).double()
    return replace(
        row,
        stream_ppl=math.exp(float(stream_nll.mean())),
        stream_seconds=sum(loop.stream.seconds for loop in loops),
        stream_difference=max(loop.difference for loop in loops),
        stream_evictions=sum(loop.evictions for loop in loops),
        stream_gap=max(loop.gap for loop in loops),
    )
