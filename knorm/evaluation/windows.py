"""A text cut into windows of equal length, each evaluated as a sequence of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from knorm.policy import whole

_PER_TOKEN, _BEYOND = 8, 1024  # characters to begin with, for each token and after all of them; see _encode
_LONGEST_WORD, _MOST_CHARACTERS = 2**20, 2**25  # of what is tokenised: beyond them it takes minutes and gigabytes


@dataclass(frozen=True)
class Windows:
    """Hold a text cut into windows of equal length, each evaluated as a sequence of its own.

    input_ids   int64 [windows, tokens]
    byte_ends   int64 [windows, tokens]: where each token ends in the text's UTF-8; None for tokens of no text
    """

    input_ids: Tensor
    byte_ends: Tensor | None = None

    def scored_bytes(self, prompt_length: int) -> int:
        """Count the bytes of the tokens after the first `prompt_length`. Raises ValueError for tokens of no text."""
        if self.byte_ends is None:
            raise ValueError("byte_ends is None, but should say where each token ends in its text: see cut_windows")
        return int((self.byte_ends[:, -1] - self.byte_ends[:, prompt_length - 1]).sum())


def cut_windows(tokenizer: PreTrainedTokenizerFast, text: str, length: int = 512, most: int | None = None) -> Windows:
    """Cut the first windows out of a text; its end is not used, unless the text is shorter than a window.

    Each window starts with the tokenizer's own beginning-of-sequence token where it adds one.

    Args:
        tokenizer: a fast tokenizer of transformers.
        text: at least two tokens long.
        length: tokens of a window.
        most: windows at most; by default as many as there are.

    Returns:
        The windows.

    Raises:
        ValueError: a text below two tokens, or settings below two tokens or one window.

    Example:
        >>> cut_windows(knorm.load_embedded()[1], "The cat sat on the mat.", 4, 1).input_ids.shape
        torch.Size([1, 4])
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


def check_prompt(windows: Windows, prompt_length: int) -> None:
    """Refuse a prompt that leaves nothing to score.

    Args:
        windows: the tokens, int64 [windows, T].
        prompt_length: tokens of the first call.

    Raises:
        ValueError: no token, or no byte, stands after the prompt.
    """
    if prompt_length == windows.input_ids.shape[1]:
        raise ValueError(
            f"a prompt of {prompt_length} tokens is the whole window, but only tokens after the prompt are scored: "
            "give a shorter prompt, or longer windows"
        )
    length = windows.input_ids.shape[1]
    if windows.byte_ends is not None and 1 <= prompt_length < length and not windows.scored_bytes(prompt_length):
        raise ValueError("the text's tokens end within one character: there are no bytes to score, give a longer text")
