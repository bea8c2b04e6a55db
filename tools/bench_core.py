"""One compression on a CPU beside the published ways: python tools/bench_core.py > docs/compression.md

The ways alternate within one process, and ratios are medians of each round's: other users of the machine slow all. Of
each way the least of three calls counts, since a virtual machine that gives free pages back to its host can take longer
to get them again than for everything else. The floor is what any way has to do: read the keys once, and copy what is
kept into fresh memory, in huge pages as knorm has it. Peak memory is the kernel's own count, in a process of its own in
which each freed block goes back at once.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from knorm import compress, core

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
    keys.amax()
    for rows in (keys, values):
        half = rows[:, :, : rows.shape[2] // 2]
        core._empty(half.shape, rows.dtype).copy_(half)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (1, 2)]


def peak(shape: str, dtype: str) -> None:
    """Print what one compression takes at most, over the bytes that it returns."""
    keys, values = inputs(tuple(map(int, shape.split(","))), getattr(torch, dtype))
    compress(keys[:, :, :64], values[:, :, :64], 0.5)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = status("VmRSS")
    kept = compress(keys, values, 0.5)
    print((status("VmHWM") - before) / sum(part.nbytes for part in kept))


def status(name: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak_alone(shape: tuple[int, ...], dtype: str) -> float:
    command = [sys.executable, __file__, "peak", ",".join(map(str, shape)), dtype]
    at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return float(subprocess.run(command, env=at_once, capture_output=True, text=True, check=True).stdout)


def milliseconds(call: Callable[..., object], *arguments: Tensor) -> float:
    """The least of three calls in a row: what one frees is what the next one gets, as one layer follows another."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - begin)
    return 1000 * min(times)


def main() -> None:
    print("# One compression on a CPU\n\nWritten by `python tools/bench_core.py`. Half of a layer's cache is kept;")
    print(f"milliseconds, medians of {ROUNDS} rounds in which all alternate, the least of three calls each.")
    print(f"{torch.get_num_threads()} CPU threads, {platform.machine()}, torch {torch.__version__.split('+')[0]}.")
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    said = pages.read_text().split("[")[1].split("]")[0] if pages.exists() else "none"
    print(f"Huge pages: {said} (with madvise NumPy asks for them, and so does knorm; with always all get them).\n")
    heads = ["keys", "dtype", "knorm", "floor", "knorm / floor", "top-k + gather / knorm", "argsort + gather / knorm"]
    heads += ["peak memory / retained"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    ways = (lambda keys, values: compress(keys, values, 0.5), floor, top_k, sorted_whole)
    for shape in SHAPES:
        for dtype in ("bfloat16", "float32"):
            keys, values = inputs(shape, getattr(torch, dtype))
            rounds = [[milliseconds(way, keys, values) for way in ways] for _ in range(ROUNDS + 1)][1:]
            own, least = (statistics.median(column) for column in list(zip(*rounds, strict=True))[:2])
            ratios = [statistics.median(row[i] / row[0] for row in rounds) for i in (1, 2, 3)]
            cells = [" x ".join(f"{n:,}" for n in shape), dtype, f"{own:.2f}", f"{least:.2f}", f"{1 / ratios[0]:.1f}x"]
            cells += [f"{ratios[1]:.1f}x", f"{ratios[2]:.1f}x", f"{peak_alone(shape, dtype):.2f}x"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(*sys.argv[2:])
    else:
        main()
