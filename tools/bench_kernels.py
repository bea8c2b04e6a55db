"""One compression on CUDA beside the published ways: python tools/bench_kernels.py > docs/kernels.md

The ways alternate within one process. Each call is timed alone, from an idle device, after one of its own that is not
timed: what the host adds, the launches and the wait for the norms, is in the time. The floor is the bytes that any way
has to move (keys read once for their norms, kept keys and values read and written) at the speed that this device copies
with.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import triton
from bench_core import sorted_whole, top_k
from torch import Tensor

from knorm import Policy, compress, kernels

SHAPES = ((1, 8, 4096, 128), (1, 8, 32768, 128), (1, 8, 131072, 128), (16, 8, 32768, 128))
OTHERS = tuple(((1, 8, 131072, width), dtype) for width in (64, 128, 256) for dtype in ("float16", "float32"))
ROUNDS = 25


def milliseconds(call: Callable[..., object], *arguments: Tensor) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    call(*arguments)
    torch.cuda.synchronize()
    start.record()
    kept = call(*arguments)
    stop.record()
    torch.cuda.synchronize()
    del kept
    return float(start.elapsed_time(stop))


def alone(keys: Tensor, values: Tensor) -> float:
    """Milliseconds of the kernels alone: launched behind other work, and nobody waits for the norms."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    wait, kernels._Held.wait = kernels._Held.wait, lambda held: 0
    try:
        torch.cuda._sleep(2_000_000)  # a millisecond
        start.record()
        kept = compress(keys, values, Policy(0.5))
        stop.record()
        torch.cuda.synchronize()
        del kept
    finally:
        kernels._Held.wait = wait
    return float(start.elapsed_time(stop))


def least(keys: Tensor, values: Tensor) -> None:
    """What a call from Python cannot do without: three allocations, a launch, a wait."""
    for width, dtype in ((keys.shape[3], keys.dtype), (values.shape[3], values.dtype), (1, torch.int64)):
        keys.new_empty((*keys.shape[:2], keys.shape[2] // 2, width), dtype=dtype)
    torch.zeros(1, device="cuda")
    torch.cuda.current_stream().synchronize()


def main() -> None:
    block = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    speed = 2 * 2**30 / statistics.median(milliseconds(torch.clone, block) for _ in range(ROUNDS)) / 1e6
    del block
    half = Policy(0.5)
    print("# One compression on CUDA\n\nWritten by `python tools/bench_kernels.py`. Half of a layer's cache is kept;")
    print(f"milliseconds, medians of {ROUNDS} rounds in which all alternate, each call from an idle device.")
    print(f"{torch.cuda.get_device_name()}, which copies {speed:,.0f} GB/s; torch {torch.__version__.split('+')[0]},")
    print(f"triton {triton.__version__}. The floor: keys read once, what is kept read and written.\n")
    heads = ["keys", "dtype", "knorm", "floor", "knorm / floor", "its kernels alone", "plain PyTorch"]
    heads += ["top-k + gather", "argsort + gather", "top-k / knorm", "argsort / knorm"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")

    def fast(keys: Tensor, values: Tensor) -> object:
        return compress(keys, values, half)

    def plain(keys: Tensor, values: Tensor) -> object:
        held, kernels.triton = kernels.triton, None
        try:
            return compress(keys, values, half)
        finally:
            kernels.triton = held

    ways = (fast, plain, top_k, sorted_whole, least)
    for shape, dtype in (*((shape, "bfloat16") for shape in SHAPES), *OTHERS):
        keys, values = (torch.randn(shape, dtype=getattr(torch, dtype), device="cuda") for _ in "kv")
        rounds = [[milliseconds(way, keys, values) for way in ways] for _ in range(ROUNDS + 3)][3:]
        own, slow, top, whole, idle = (statistics.median(column) for column in zip(*rounds, strict=True))
        kernel = statistics.median(alone(keys, values) for _ in range(ROUNDS))
        floor = 3 * keys.numel() * keys.element_size() / speed / 1e6
        over = [statistics.median(row[i] / row[0] for row in rounds) for i in (2, 3)]
        name = " x ".join(f"{n:,}" for n in shape)
        cells = [name, dtype, f"{own:.3f}", f"{floor:.3f}", f"{own / floor:.2f}x", f"{kernel:.3f}"]
        cells += [f"{slow:.3f}", f"{top:.3f}", f"{whole:.3f}", f"{over[0]:.1f}x", f"{over[1]:.1f}x"]
        print(f"| {' | '.join(cells)} |", flush=True)
        if shape == SHAPES[0]:
            host, short = idle, kernel
    print(
        f"\nOf the shortest call, the kernels take {short:.3f} ms. Three allocations, a fill of one number and a wait"
    )
    print(f"take {host:.3f} ms from the same Python. All times are of a shape seen before: a new one is compiled for,")
    print("or at least planned.")


if __name__ == "__main__":
    main()
