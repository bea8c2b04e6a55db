"""What one pass costs, beside the plain forward pass and the loop: python tools/bench_exact.py [cpu|cuda] > docs/...

Plain pass and one pass alternate within one process, and the ratio is the median of the pairs' ratios: other users of
the machine slow both. On CUDA, times are from events, after warm-up. The models are the embedded one (CPU) and a
GPT-NeoX of Pythia-70M's shape with random weights (CUDA): time does not depend on what the weights are.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
import transformers
from transformers import GPTNeoXForCausalLM

from knorm import Policy, load_embedded
from knorm.evaluation.windows import cut_windows
from knorm.models import load_text, random_gpt_neox
from knorm.perplexity import NEAR_TIE, agreement, exact_run, stream_run


def seconds(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def paired(plain: Callable[[], object], other: Callable[[], object], device: str, pairs: int) -> tuple[float, ...]:
    """Median seconds of both, median ratio, and the ratio's lowest and highest quartile."""
    for _ in range(2):
        plain(), other()
    times = []
    for i in range(pairs):
        order = (plain, other) if i % 2 else (other, plain)
        one, two = (seconds(call, device) for call in order)
        times.append((one, two) if i % 2 else (two, one))
    low, middle, high = statistics.quantiles([b / a for a, b in times], n=4)
    return statistics.median(a for a, _ in times), statistics.median(b for _, b in times), middle, low, high


def cpu() -> None:
    model, tokenizer = load_embedded()
    ids = cut_windows(tokenizer, load_text("narrative"), 512, 8).input_ids
    threads = torch.get_num_threads()
    print(f"## Embedded model, 8 windows of 512 tokens, float32, {threads} CPU threads\n")
    print(
        "| prune_after | ratio | plain pass s | one pass s | ratio of the two (quartiles) | schedules, share "
        "| loop s | speed-up | evictions that differ | norms within | largest difference |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for prune_after in (128, 32):
        for ratio in ("0.9", "0.5"):
            policy = Policy(ratio, prune_after, protocol="streaming", skip_layers=(0,))

            @torch.no_grad()
            def plain() -> None:
                model(ids, use_cache=False)

            a, b, middle, low, high = paired(plain, lambda: exact_run(model, ids, policy), "cpu", 15)  # noqa: B023
            runs = [exact_run(model, ids, policy) for _ in range(7)]
            share = statistics.median(run.scheduling / run.seconds for run in runs)
            both = agreement(model, ids, policy)
            loop = both.stream.seconds
            print(
                f"| {prune_after} | {ratio} | {a:.3f} | {b:.3f} | {middle:.2f} ({low:.2f} to {high:.2f}) | {share:.1%} "
                f"| {loop:.1f} | {loop / b:.0f}x | {both.evictions} | {both.gap:.1e} | {both.difference:.1e} |",
                flush=True,
            )
    policy = Policy("0.5", 128, protocol="streaming", skip_layers=(0,))
    loop = sum(stream_run(model, row[None], policy).seconds for row in ids[:2]) / 2
    one = statistics.median(exact_run(model, ids, policy).seconds / len(ids) for _ in range(5))
    print(f"\nThis loop runs 8 windows at a time; one at a time, {loop:.1f} s a window, {loop / one:.0f}x one pass.\n")


def cuda() -> None:
    @torch.no_grad()
    def plain(model: GPTNeoXForCausalLM, ids: torch.Tensor) -> None:
        model(ids, use_cache=False)

    draw = torch.Generator().manual_seed(0)
    print("## Pythia-70M's shape, float32 and bfloat16\n")
    print(
        "| dtype | tokens | prune_after | ratio | plain pass ms | one pass ms | ratio of the two (quartiles) "
        "| schedules, six layers, ms | plain pass MiB | one pass MiB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        for length, prunes in ((2048, (512, 32)), (32768, (512, 32))):
            model = random_gpt_neox(length).to("cuda", dtype)
            ids = torch.randint(0, 50304, (1, length), generator=draw).cuda()
            for prune_after in prunes:
                for ratio in ("0.9", "0.5"):
                    policy = Policy(ratio, prune_after, protocol="streaming")
                    memory = []
                    for call in (lambda: plain(model, ids), lambda: exact_run(model, ids, policy)):  # noqa: B023
                        torch.cuda.reset_peak_memory_stats()
                        call()
                        memory.append(torch.cuda.max_memory_allocated() / 2**20)
                    a, b, middle, low, high = paired(
                        lambda: plain(model, ids),  # noqa: B023
                        lambda: exact_run(model, ids, policy),  # noqa: B023
                        "cuda",
                        15 if length < 10_000 else 6,
                    )
                    schedules = schedule_seconds(model, ids, policy)
                    print(
                        f"| {str(dtype)[6:]} | {length} | {prune_after} | {ratio} | {a * 1e3:.2f} | {b * 1e3:.2f} "
                        f"| {middle:.2f} ({low:.2f} to {high:.2f}) | {schedules * 1e3:.2f} "
                        f"| {memory[0]:.0f} | {memory[1]:.0f} |",
                        flush=True,
                    )
    model = random_gpt_neox().to("cuda")
    ids = torch.randint(0, 50304, (1, 1024), generator=draw).cuda()
    policy = Policy("0.5", 128, protocol="streaming")
    for dtype in (torch.float32, torch.bfloat16):
        both = agreement(model.to(dtype), ids, policy)
        print(
            f"\nLoop, 1,024 tokens, prune_after 128, ratio 0.5, {str(dtype)[6:]}: {both.stream.seconds:.1f} s, "
            f"{both.stream.seconds / exact_run(model, ids, policy).seconds:.0f}x one pass; {both.evictions} evictions "
            f"differ, norms within {both.gap:.1e} where they first do (near-ties: {NEAR_TIE:.1e}); "
            f"largest difference of a token's NLL {both.difference:.1e}.",
            flush=True,
        )


def schedule_seconds(model: torch.nn.Module, ids: torch.Tensor, policy: Policy) -> float:
    """Seconds for the schedules of all layers, from keys on the device to evicted_at on the device; median of 7."""
    from knorm import perplexity

    layers: list[torch.Tensor] = []
    own = perplexity._schedule(policy, 1, None)
    exact_run(model, ids, policy, schedule=lambda layer, keys: (layers.append(keys), own(layer, keys))[1])

    def all_layers() -> None:
        for layer, keys in enumerate(layers):
            own(layer, keys)

    return statistics.median(seconds(all_layers, "cuda") for _ in range(7))


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"
    print("# What one pass costs\n")
    print(f"`python tools/bench_exact.py {device}`, on {name}; Python {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}.\n")
    {"cpu": cpu, "cuda": cuda}[device]()


if __name__ == "__main__":
    main()
