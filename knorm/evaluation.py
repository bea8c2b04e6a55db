"""Perplexity of a text under a policy, window by window: one row of a curve, with what it rests on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from knorm.perplexity import Agreement, Run, agreement, exact_run
from knorm.policy import Policy, whole
from knorm.schedule import cache_lengths, recent_cached

MOST_NLL = 500.0  # beyond it, nothing is being predicted
_PER_TOKEN, _BEYOND = 8, 1024  # characters to begin with, for each token and after all of them; see _encode
_LONGEST_WORD, _MOST_CHARACTERS = 2**20, 2**25  # of what is tokenised: beyond them it takes minutes and gigabytes
NEWEST = 16  # tokens whose presence in the cache is reported


@dataclass(frozen=True)
class Windows:
    """A text cut into windows of equal length, each evaluated as a sequence of its own.

    input_ids   int64 [windows, tokens]
    byte_ends   int64 [windows, tokens]: where each token ends in the text's UTF-8
    """

    input_ids: Tensor
    byte_ends: Tensor

    def scored_bytes(self, prompt_length: int) -> int:
        """Bytes of text that the tokens after the prompt stand for."""
        return int((self.byte_ends[:, -1] - self.byte_ends[:, prompt_length - 1]).sum())


def cut_windows(tokenizer: PreTrainedTokenizerFast, text: str, length: int = 512, most: int | None = None) -> Windows:
    """The first windows of a text; what is left over at its end is not used, unless the text is shorter than a window.

    Each window starts with the tokenizer's own beginning-of-sequence token where it adds one. Raises ValueError for a
    text shorter than two tokens, and for settings below two tokens or one window.
    """
    length, most = whole("length", length), None if most is None else whole("most", most)
    if length < 2 or (most is not None and most < 1):
        raise ValueError(f"{most} windows of {length} tokens, but should be at least 1 of 2")
    start = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
    ids, ends = _encode(tokenizer, text, None if most is None else most * (length - len(start)))
    if len(ids) < 2:
        raise ValueError(
            f"the text has {len(ids)} tokens, but needs at least two: one to be given, one to be predicted"
        )
    own = min(length - len(start), len(ids))
    count = min(len(ids) // own, most or len(ids))
    windows = torch.tensor(ids[: count * own]).view(count, own)
    byte_ends = torch.from_numpy(ends[: count * own].astype(np.int64)).view(count, own)
    if start:
        windows = torch.cat([torch.full((count, 1), start[0]), windows], 1)
        before = torch.cat([torch.zeros(1, 1, dtype=torch.int64), byte_ends[:-1, -1:]])
        byte_ends = torch.cat([before, byte_ends], 1)
    return Windows(windows, byte_ends)


def _encode(
    tokenizer: PreTrainedTokenizerFast, text: str, need: int | None
) -> tuple[list[int], np.ndarray[Any, np.dtype[np.int64]]]:
    """Tokenise the first `need` tokens of a text, or all: their ids, and where each ends in the text's UTF-8.

    Tokenizers split words at spaces, so what stands before a space is tokenised alike whatever follows. A token that
    spans spaces (one added by hand) is shorter than _BEYOND: no token is taken from so near the end of the part read.
    """
    size = len(text) if need is None else _PER_TOKEN * need + _BEYOND
    while True:
        part = text[: size + _BEYOND]
        _check_part(part)
        encoding = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, ends = encoding["input_ids"], np.array([end for _, end in encoding["offset_mapping"]], dtype=np.int64)
        if len(part) < len(text):
            words = part[:size].rsplit(maxsplit=1)  # all before the last word, and the last word
            beyond = ends > (len(words[0]) if len(words) == 2 else 0)
            count = int(beyond.argmax()) if beyond.any() else len(ids)
            if count < (need or 0):
                size *= 4
                continue
            ids, ends = ids[:need], ends[:need]
        before = np.cumsum([0, *(len(character.encode()) for character in part[: int(ends.max(initial=0))])])
        return ids, before[ends]


def _check_part(part: str) -> None:
    """Raise ValueError for a part of a text that would take too long to tokenise."""
    if len(part) > _MOST_CHARACTERS:
        raise ValueError(
            f"the windows need more than {_MOST_CHARACTERS:,} characters of the text: give fewer or shorter windows"
        )
    if len(part) > _LONGEST_WORD:
        longest = max(re.finditer(r"\S+", part), key=lambda word: word.end() - word.start(), default=None)
        if longest and longest.end() - longest.start() > _LONGEST_WORD:
            raise ValueError(
                f"the text has no space from character {longest.start():,} to {longest.end():,}, but words of at most "
                f"{_LONGEST_WORD:,} characters can be tokenised: is it a text?"
            )


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


def check_prompt(windows: Windows, prompt_length: int) -> None:
    """Raise ValueError for a prompt that leaves nothing to score."""
    if prompt_length == windows.input_ids.shape[1]:
        raise ValueError(
            f"a prompt of {prompt_length} tokens is the whole window, but only tokens after the prompt are scored: "
            "give a shorter prompt, or longer windows"
        )
    if 1 <= prompt_length < windows.input_ids.shape[1] and not windows.scored_bytes(prompt_length):
        raise ValueError("the text's tokens end within one character: there are no bytes to score, give a longer text")


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
