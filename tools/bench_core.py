"""One compression on a CPU beside the published ways: python tools/bench_core.py > docs/compression.md

The three alternate within one process, and ratios are medians of each round's: other users of the machine slow all. The
floor is what any way has to do: read the keys once, and copy what is kept.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from knorm import compress

SHAPES = ((1, 8, 4096, 64), (1, 8, 4096, 128), (1, 32, 16384, 128))
ROUNDS = 9


def top_k(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """kvpress' way: the highest scores by topk, then gather; in no order of time."""
    index = (-keys.norm(dim=-1)).topk(keys.shape[2] // 2, dim=-1).indices[..., None].expand(-1, -1, -1, keys.shape[3])
    return keys.gather(2, index).contiguous(), values.gather(2, index).contiguous()


def sorted_whole(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """l2compress' way: everything sorted by norm, then cut off."""
    index = keys.norm(p=2, dim=-1).argsort(dim=-1)[..., None].expand(-1, -1, -1, keys.shape[3])
    return keys.gather(2, index)[:, :, : keys.shape[2] // 2], values.gather(2, index)[:, :, : keys.shape[2] // 2]


def floor(keys: Tensor, values: Tensor) -> None:
    """Every key read once, what is kept copied."""
    half = keys.shape[2] // 2
    keys.amax()
    keys[:, :, :half].clone(), values[:, :, :half].clone()


def milliseconds(call: Callable[..., object], *arguments: Tensor) -> float:
    begin = time.perf_counter()
    call(*arguments)
    return 1000 * (time.perf_counter() - begin)


def main() -> None:
    print("# One compression on a CPU\n\nWritten by `python tools/bench_core.py`. Half of a layer's cache is kept;")
    print(f"milliseconds, medians of {ROUNDS} rounds in which all alternate. {torch.get_num_threads()} CPU threads,")
    print(f"{platform.machine()}, torch {torch.__version__.split('+')[0]}.\n")
    print("| keys | dtype | knorm | floor | knorm / floor | top-k + gather / knorm | argsort + gather / knorm |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    ways = (lambda keys, values: compress(keys, values, 0.5), floor, top_k, sorted_whole)
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            keys, values = (torch.randn(shape, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (1, 2))
            rounds = [[milliseconds(way, keys, values) for way in ways] for _ in range(ROUNDS + 1)][1:]
            own, least = (statistics.median(column) for column in list(zip(*rounds, strict=True))[:2])
            ratios = [statistics.median(row[i] / row[0] for row in rounds) for i in (1, 2, 3)]
            name = " x ".join(f"{n:,}" for n in shape)
            print(
                f"| {name} | {str(dtype).removeprefix('torch.')} | {own:.2f} | {least:.2f} | {1 / ratios[0]:.1f}x "
                f"| {ratios[1]:.1f}x | {ratios[2]:.1f}x |"
            )


if __name__ == "__main__":
    main()
