"""What the witness reads: a prompt and the calls after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from knorm.laws.probe import VOCABULARY


@dataclass(frozen=True)
class Reading:
    """Say what is read: a prompt, then calls of given sizes.

    Attributes:
        prompt: tokens of the first call.
        calls: tokens of each later call.
        keep_ratio: as for a compressor; a method with a budget of its own is given none.
        rows: of the batch.
        seed: of the tokens and of the drawn keys.
        family: architecture of the probe, one of probe.FAMILIES.
        scale: of the drawn keys.
        real: keys are those that the model makes of the tokens, and positions turn them.
        row: the row that stays, while all others are drawn anew; None: none is.
        dtype: of the probe, "float32" or "float16".
    """

    prompt: int
    calls: tuple[int, ...]
    keep_ratio: float = 0.5
    rows: int = 1
    seed: int = 0
    family: str = "llama"
    scale: float = 1.0
    real: bool = False
    row: int | None = None
    dtype: str = "float32"

    @property
    def length(self) -> int:
        """Count the tokens in all."""
        return self.prompt + sum(self.calls)

    @property
    def input_ids(self) -> Tensor:
        """Draw the tokens, int64 [rows, length]."""
        ids = self._tokens(self.seed)
        if self.row is None:
            return ids
        others = self._tokens(self.seed + 1)
        others[self.row] = ids[self.row]
        return others

    def _tokens(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, VOCABULARY - 1, (self.rows, self.length), generator=generator)

    def __repr__(self) -> str:
        sizes = [*map(str, self.calls)]
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        rows += "" if self.row is None else f", all but row {self.row} drawn anew"
        half = "" if self.dtype == "float32" else f"{self.dtype} "
        drawn = "its own keys" if self.real else "drawn keys" + f" times {self.scale:g}" * (self.scale != 1)
        return (
            f"a prompt of {self.prompt} tokens, then calls of {_runs(sizes)}, in {rows}, at ratio {self.keep_ratio}, "
            f"on a {half}{self.family} with {drawn}, seed {self.seed}"
        )


def _runs(sizes: list[str]) -> str:
    """1, 1, 1, 2 -> 3 x 1, 2."""
    parts: list[tuple[str, int]] = []
    for size in sizes:
        if parts and parts[-1][0] == size:
            parts[-1] = (size, parts[-1][1] + 1)
        else:
            parts.append((size, 1))
    return ", ".join(size if count == 1 else f"{count} x {size}" for size, count in parts)
