"""One layer's masked attention on CUDA: blocks of queries over surviving keys, a dense mask, and FlexAttention.

    python tools/bench_attention.py

All three compute query t over keys s with s <= t < evicted_at[s]. FlexAttention gets a block mask from per-block
minima and maxima of evicted_at, so that empty blocks are skipped and full ones not masked; compilation is timed apart.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from bench_exact import seconds
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention as sdpa

from knorm import Policy, evicted_at, masked_attention
from knorm.masked_attention import attend_compiled, attend_seen, block_mask, by_lifetime


def median_ms(call: Callable[[], object]) -> float:
    call()
    return statistics.median(seconds(call, "cuda") for _ in range(7)) * 1e3


def schedules(key: Tensor) -> dict[str, Tensor]:
    scores, half = key.float().square().sum(-1), key.shape[2] // 2
    return {
        "streaming, 0.9": evicted_at(scores, Policy("0.9", 512, protocol="streaming")),
        "streaming, 0.5": evicted_at(scores, Policy("0.5", 512, protocol="streaming")),
        "prefill of half, 0.9": evicted_at(scores, Policy("0.9"), half),
    }


def tiles(lost: Tensor) -> BlockMask:
    order = by_lifetime(lost)
    return block_mask(lost.gather(2, order), order)


def main() -> None:
    masked_attention._COMPILED_FROM = 2**30  # blocks are to be timed in half precision too
    draw = torch.Generator("cuda").manual_seed(0)
    sizes, own = (512, 1024, 2048), masked_attention._QUERIES["cuda"]
    print(
        "# One layer's masked attention\n\n`python tools/bench_attention.py`: 8 heads of 64, prune_after 512, on ",
        end="",
    )
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__.split('+')[0]}; milliseconds, median of 7.\n")
    print("| dtype | tokens | policy | plain causal |", *(f"blocks of {n} |" for n in sizes), "dense mask |", end="")
    print(" FlexAttention | of it, order and block mask | its compilation s | largest difference |")
    print("| --- " * (8 + len(sizes)) + "|")
    for dtype, length in ((torch.float32, 2048), (torch.float32, 32768), (torch.bfloat16, 32768)):
        query, key, value = (torch.randn(1, 8, length, 64, device="cuda", generator=draw).to(dtype) for _ in range(3))
        compilation = 0.0
        for name, lost in schedules(key).items():
            flex = partial(attend_compiled, query, key, value, lost, None)
            begin = time.perf_counter()
            flexed = flex()
            torch.cuda.synchronize()
            compilation = max(compilation, time.perf_counter() - begin)
            cells = [median_ms(partial(sdpa, query, key, value, is_causal=True))]
            attend = partial(attend_seen, query, key, value, lost, None)
            for masked_attention._QUERIES["cuda"] in sizes:
                cells.append(median_ms(attend))
            masked_attention._QUERIES["cuda"] = own
            dense = math.nan
            if length <= 4096:
                positions = torch.arange(length, device="cuda")
                mask = (positions <= positions[:, None]) & (positions[:, None] < lost[..., None, :])
                dense = median_ms(partial(sdpa, query, key, value, attn_mask=mask))
            cells += [dense, median_ms(flex)]
            cells.append(median_ms(partial(tiles, lost)))
            difference = (flexed - attend()).abs().max().item()
            print(f"| {str(dtype)[6:]} | {length} | {name} |", *(f"{cell:.2f} |" for cell in cells), end="")
            print(f" {compilation:.0f} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
