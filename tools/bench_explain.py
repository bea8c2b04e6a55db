"""What explaining a run costs, all interventions included: python tools/bench_explain.py [cpu|cuda] > docs/...

CPU: the embedded model, 8 windows of 512 tokens. CUDA: a GPT-NeoX of Pythia-70M's shape with random weights, 64 windows
of 1,024 tokens: time does not depend on what the weights are.
"""

from __future__ import annotations

import platform
import sys
import time

import torch
import transformers

from knorm import Policy, load_embedded
from knorm.evaluation.explain import explain
from knorm.evaluation.runner import Runner
from knorm.evaluation.windows import Windows, cut_windows
from knorm.models import hush, load_text, random_gpt_neox


def main() -> None:
    hush()
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    model, tokenizer = load_embedded()
    policy = Policy("0.9", 32, (0,), protocol="streaming")
    windows = cut_windows(tokenizer, load_text("narrative"), 512, 8)
    what = "embedded model, 8 windows of 512 tokens"
    if device == "cuda":
        model, ids = (
            random_gpt_neox().to("cuda"),
            torch.randint(0, 4096, (64, 1024), generator=torch.Generator().manual_seed(0)),
        )
        windows, what = Windows(ids, ids.cumsum(1)), "Pythia-70M's shape, 64 windows of 1,024 tokens"
        policy = Policy("0.9", 512, (0,), protocol="streaming")
    steps: list[tuple[str, float]] = []
    explain(Runner(model, Windows(windows.input_ids[:1], windows.byte_ends[:1])), tokenizer, policy)  # warm-up
    begin = time.perf_counter()
    explain(Runner(model, windows), tokenizer, policy, on_step=lambda name: steps.append((name, time.perf_counter())))
    end = time.perf_counter()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"`python tools/bench_explain.py {device}`: {what}, on {name} ({platform.machine()}), Python "
        f"{platform.python_version()}, torch {torch.__version__.partition('+')[0]}, transformers "
        f"{transformers.__version__}: **{end - begin:.1f} s** for {len(steps)} evaluations.\n"
    )
    print("| evaluation | s |\n| --- | --- |")
    for (step, start), stop in zip(steps, [*(t for _, t in steps[1:]), end], strict=True):
        print(f"| {step} | {stop - start:.2f} |")


if __name__ == "__main__":
    main()
