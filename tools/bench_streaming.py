"""What streaming compression adds to a step: python tools/bench_streaming.py [--device cuda]; rows of docs/streaming.md

One cycle of KnormCache with prune_after 512 and half kept (256 tokens grow to 511, one more and 256 go) beside a
DynamicCache that grows by as many tokens over the same lengths: in turns, as `knorm bench` takes them.
"""

from __future__ import annotations

import argparse

import torch

from knorm import Policy, load_embedded
from knorm.bench.latency import (
    Arm,
    Prompt,
    attending,
    check_alone,
    log_ratio,
    measure,
    without_interruptions,
)
from knorm.bench.policies import summarise
from knorm.models import random_gpt_neox
from knorm.statistics import compare

POLICY = Policy(0.5, protocol="streaming", prune_after=512)
NEW, TARGET = 257, 0.05


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    check_alone(given.device)
    torch.set_num_threads(given.threads)
    if given.device == "cpu":
        model, name, place = load_embedded()[0], "the embedded model", f"{given.threads} CPU threads"
    else:
        model, name = random_gpt_neox(positions=2048).to(given.device), "Pythia-70M's shape"
        place = torch.cuda.get_device_name()
    ids = torch.randint(0, 4096, (1, 512), generator=torch.Generator().manual_seed(0)).to(given.device)
    arms = [Arm(model, [Prompt(ids[:, :256], NEW)], None), Arm(model, [Prompt(ids, NEW)], POLICY)]
    with attending(model):
        samples, _ = without_interruptions(measure(arms, [NEW], blocks=given.blocks))
    found = compare([log_ratio(own, plain, "tpot") for plain, own in samples], margin=TARGET)
    plain, own = (1000 * summarise(arm, [(1, NEW)]).tpot for arm in zip(*samples, strict=True))
    print(
        f"| {name}, {place} | {own:.3f} | {plain:.3f} | {found.ratio:.3f} ({found.low:.3f} to {found.high:.3f}) "
        f"| {found.blocks} |"
    )


if __name__ == "__main__":
    main()
