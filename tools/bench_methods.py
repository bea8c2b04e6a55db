"""What any methods cost, how they are run and how long that takes: python tools/bench_methods.py PART ...

quality   an fp8 cache on the embedded model, read back in three ways: perplexity alone misleads
speed     two calls and their metrics, against two plain forward passes
long      a text of 32,768 tokens on a GPU, random weights of Pythia-70M's shape: seconds and memory
presses   every press of kvpress that is installed: the way, the check, KL beside the control's, seconds
compare   knorm's own method and ten others, on embedded-llama and SmolLM2, at half of the cache and a quarter
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
import transformers

from knorm.evaluation.ways import Evaluation, Ways
from knorm.evaluation.windows import Windows, cut_windows
from knorm.methods.budget import NeedsBudget
from knorm.methods.door import method
from knorm.methods.method import Method, MethodError
from knorm.methods.targets import expanded
from knorm.models import hush, load_model, load_text, random_gpt_neox
from knorm.policy import Policy


def where(part: str) -> str:
    return (
        f"`python tools/bench_methods.py {part}`: {torch.get_num_threads()} CPU threads ({platform.machine()}), Python "
        f"{platform.python_version()}, torch {torch.__version__.partition('+')[0]}, transformers "
        f"{transformers.__version__}.\n"
    )


def prepared(name: str, windows: int, prompt: int, **options: int) -> Ways:
    model, tokenizer = load_model(name)
    cut = cut_windows(tokenizer, load_text("narrative"), 512, windows)
    return Ways(model, cut, prompt, tokenizer=tokenizer, **options)  # type: ignore[arg-type]


def quality() -> None:
    print("## An fp8 cache, read back\n\n" + where("quality"))
    print('The embedded model, the same last 256 tokens of 512, `transformers:QuantizedCache(backend="fp8")`.\n')
    print("| run | PPL | mean KL | same top | RMS delta-p |\n| --- | --- | --- | --- | --- |")
    fp8 = method('transformers:QuantizedCache(backend="fp8")')
    full = prepared("embedded", 1, 256)
    line("full cache, run again", full.control())
    for name, prompt, how in (
        ("fp8, loop from token 1", 1, "loop"),
        ("fp8, a prompt of 128, then the rest in one call", 128, "two calls"),
        ("fp8, a prompt of 128, then the loop", 128, "loop"),
        ("fp8, a prompt of 256, then the loop", 256, "loop"),
    ):
        line(name, prepared("embedded", 1, prompt, scored=256).evaluate(fp8, how))  # type: ignore[arg-type]
    print()


def line(name: str, row: Evaluation) -> None:
    d = row.damage
    print(f"| {name} | {d.ppl:.3f} | {d.kl:.1e} | {d.same_top:.1%} | {d.delta_p_rms:.1%} |", flush=True)


def newest(keys: torch.Tensor, values: torch.Tensor, keep_ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    count = int(keys.shape[2] * keep_ratio)
    return keys[:, :, -count:], values[:, :, -count:]


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def speed() -> None:
    print("## Two calls\n\n" + where("speed"))
    print("The embedded model, 8 windows of 512, a prompt of 256; median of 5 rounds, all in turns.\n")
    print("| what | s | two plain passes |\n| --- | --- | --- |")
    chosen = method(newest, keep_ratio=0.5)
    ways = prepared("embedded", 8, 256, batch=8)
    ways.full()

    def plain() -> None:
        with torch.no_grad():
            ways.model(input_ids=ways.ids, use_cache=False)
            ways.model(input_ids=ways.ids, use_cache=False)

    def one_by_one() -> None:
        fresh = Ways(ways.model, ways.windows, 256)
        fresh.evaluate(chosen, "two calls")

    calls: dict[str, Callable[[], object]] = {
        "two plain passes, 8 windows at once": plain,
        "two calls, 8 windows at once, the full cache and all metrics": lambda: Ways(
            ways.model, ways.windows, 256, batch=8
        ).evaluate(chosen, "two calls"),
        "the same, a window at a time": one_by_one,
        "auto, a window at a time: with the loop on window 1": lambda: Ways(ways.model, ways.windows, 256).evaluate(
            chosen
        ),
        "the loop on one window": lambda: ways._run(chosen, ways.ids[:1], "loop"),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(6):
        for name, call in calls.items():
            times[name].append(seconds(call))
    base = statistics.median(times["two plain passes, 8 windows at once"][1:])
    for name, measured in times.items():
        middle = statistics.median(measured[1:])
        print(f"| {name} | {middle:.2f} | {middle / base:.2f}x |")
    print()


def long() -> None:
    print("## A long text on a GPU\n")
    print(f"`python tools/bench_methods.py long`: {torch.cuda.get_device_name()}, torch {torch.__version__}, bf16.\n")
    model = random_gpt_neox(32768).to("cuda", torch.bfloat16)
    ids = torch.randint(0, 50304, (1, 32768), generator=torch.Generator().manual_seed(0))
    cache = 2 * 6 * 32768 * 512 * 2
    print("| run | s | peak beyond model and cache, GiB |\n| --- | --- | --- |")
    chosen = method(newest, keep_ratio=0.5)
    for name, call in (
        ("the plain pass", lambda ways: ways.full()),
        ("two calls, a prompt of 16,384, all metrics", lambda ways: ways.evaluate(chosen, "two calls")),
    ):
        for _ in range(2):  # the first call warms up
            ways = Ways(model, Windows(ids), 16384)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, begin = torch.cuda.memory_allocated(), time.perf_counter()
            call(ways)
            torch.cuda.synchronize()
            spent = time.perf_counter() - begin
            extra = torch.cuda.max_memory_allocated() - before - cache
        print(f"| {name} | {spent:.2f} | {max(extra, 0) / 2**30:.2f} |")
    print()


def presses() -> None:
    print("## Every press of kvpress\n\n" + where("presses"))
    print("embedded-llama, 2 windows of 512 tokens of the narrative, a prompt of 256; half of the cache where a press")
    print("takes a ratio. The control is the full cache run again in batches of two windows.\n")
    ways = prepared("embedded-llama", 2, 256)
    print("| target | way | PPL | KL | same top | bytes per token | seen | s |\n" + "| --- " * 8 + "|")
    row("full cache, again", ways.control())
    for target in expanded("kvpress:*"):
        chosen: Method
        try:
            chosen = method(target)
        except NeedsBudget:
            chosen = method(target, keep_ratio="0.5")
        try:
            found = ways.evaluate(chosen)
        except MethodError as error:
            print(f"| `{target}` | not run: {error} |||||||", flush=True)
            continue
        row(f"`{chosen.label}`", found)
        print(f"{chosen.label}: {found.check}", file=sys.stderr)
    print()


COMPARED = (
    "knorm", "SnapKVPress", "ExpectedAttentionPress", "TOVAPress", "StreamingLLMPress", "KeyDiffPress",
    "PyramidKVPress", "LagKVPress", "CURPress", "AdaKVPress(SnapKVPress())", "KVzipPress",
)  # fmt: skip


def compare() -> None:
    print("## Knorm's own method beside ten others\n\n" + where("compare"))
    print("4 windows of 512 tokens of the narrative, a prompt of 256, compressed once. Bytes are of a window's cache")
    print("per token fed; KL is in nats per token, with its 95% interval.\n")
    for name in ("embedded-llama", "smollm2"):
        ways = prepared(name, 4, 256)
        print(f"**{name}**\n\n| method | PPL | KL | same top | bytes per token | s |\n" + "| --- " * 6 + "|")
        rows = [("full cache, again", ways.control())]
        for target in COMPARED:
            for ratio in ("0.5", "0.25"):
                chosen = method(Policy(ratio)) if target == "knorm" else method(f"kvpress:{target}", keep_ratio=ratio)
                found = ways.evaluate(chosen)
                rows.append((f"`{'knorm ' + ratio if target == 'knorm' else chosen.label}`", found))
        for label, found in rows:
            d = found.damage
            between = "" if d.kl_low is None else f" ({d.kl_low:.1e} to {d.kl_high:.1e})"
            print(
                f"| {label} | {d.ppl:.2f} | {d.kl:.1e}{between} | {d.same_top:.1%} | {found.bytes_per_token:.0f} | "
                f"{found.seconds:.1f} |",
                flush=True,
            )
        print()


def row(name: str, found: Evaluation) -> None:
    d = found.damage
    print(
        f"| {name} | {found.how} | {d.ppl:.2f} | {d.kl:.1e} | {d.same_top:.1%} | {found.bytes_per_token:.0f} | "
        f"{float(found.tokens_seen.mean()):.0f} | {found.seconds:.1f} |",
        flush=True,
    )


def main() -> None:
    hush()
    for part in sys.argv[1:] or ["quality", "speed", "presses"]:
        {"quality": quality, "speed": speed, "long": long, "presses": presses, "compare": compare}[part]()


if __name__ == "__main__":
    main()
