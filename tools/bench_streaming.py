"""What streaming compression adds to a step: python tools/bench_streaming.py [--device cuda] > docs/streaming.md

One cycle of KnormCache with prune_after 512 and half kept (256 tokens grow to 511, one more and 256 go) beside a
DynamicCache that grows by as many tokens over the same lengths. The two alternate in mirrored order (ABBA) within one
process; the ratio is a block's, the interval Student's over blocks.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time

import torch
from scipy.stats import t
from transformers import DynamicCache

from knorm import KnormCache, Policy, load_embedded
from knorm.cache import cache_keyword
from knorm.models import random_gpt_neox

POLICY = Policy(0.5, protocol="streaming", prune_after=512)
STEPS, WARM = 256, 2


def step_seconds(model, ids, cache, prompt: int) -> float:
    """Mean seconds of a step, over 256 of them after the prompt."""
    keyword, device = cache_keyword(model), ids.device
    with torch.inference_mode():
        model(ids[:, :prompt], use_cache=True, **{keyword: cache})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for step in range(prompt, prompt + STEPS):
            model(ids[:, step : step + 1], use_cache=True, **{keyword: cache})
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - begin) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=16)
    given = parser.parse_args()
    if given.device == "cpu":
        model, name = load_embedded()[0], "the embedded model"
        place = f"{torch.get_num_threads()} CPU threads"
    else:
        model, name = random_gpt_neox(positions=2048).to(given.device), "Pythia-70M's shape"
        place = torch.cuda.get_device_name()
    ids = torch.randint(0, 4096, (1, 1024), generator=torch.Generator().manual_seed(0)).to(given.device)

    def compressed() -> float:
        return step_seconds(model, ids, KnormCache(POLICY), 512)

    def plain() -> float:
        return step_seconds(model, ids, DynamicCache(), 256)

    blocks = [[way() for way in (plain, compressed, compressed, plain)] for _ in range(WARM + given.blocks)][WARM:]
    logs = [math.log(b * c / (a * d)) / 2 for a, b, c, d in blocks]
    half = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    low, middle, high = (math.exp(statistics.fmean(logs) + x) for x in (-half, 0.0, half))
    own, held = (1000 * statistics.median(sum(block[i] for i in at) / 2 for block in blocks) for at in ((1, 2), (0, 3)))
    print(f"| {name}, {place} | {own:.3f} | {held:.3f} | {middle:.3f} ({low:.3f} to {high:.3f}) | {given.blocks} |")


if __name__ == "__main__":
    main()
