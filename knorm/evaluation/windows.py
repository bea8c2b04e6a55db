"""A text cut into windows of equal length, each evaluated as a sequence of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast


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
    if length < 2 or (most is not None and most < 1):
        raise ValueError(f"{most} windows of {length} tokens, but should be at least 1 of 2")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoding["input_ids"]
    bytes_before = np.cumsum([0, *(len(character.encode()) for character in text)])
    ends = bytes_before[[end for _, end in encoding["offset_mapping"]]] if ids else np.array([])
    start = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
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


def check_prompt(windows: Windows, prompt_length: int) -> None:
    """Raise ValueError for a prompt that leaves nothing to score."""
    if prompt_length == windows.input_ids.shape[1]:
        raise ValueError(
            f"a prompt of {prompt_length} tokens is the whole window, but only tokens after the prompt are scored: "
            "give a shorter prompt, or longer windows"
        )
    if 1 <= prompt_length < windows.input_ids.shape[1] and not windows.scored_bytes(prompt_length):
        raise ValueError("the text's tokens end within one character: there are no bytes to score, give a longer text")
