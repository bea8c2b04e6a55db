"""Engines' caches: python tools/bench_engines.py PART ...

tool PROGRAM   llama.cpp's own llama-perplexity beside knorm on the same tokens, q4_0 and q8_0; exit code 1 where they
               differ, or where knorm takes more time or memory than promised
types MODEL    what each of llama.cpp's cache types costs on smollm2, embedded or embedded-llama, by forced decode
vllm MODEL     the same of vLLM's on a CPU, beside what it accepts and gets wrong
"""

from __future__ import annotations

import os
import platform
import re
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from knorm.engines.boxed import model_file
from knorm.engines.conditions import TYPES, EngineTarget, Place, engine_target
from knorm.engines.process import EngineError
from knorm.engines.scorer import Asked, EngineScorer, closing
from knorm.engines.ways import EngineWays, full_of
from knorm.evaluation.damage import PerToken, compare, summed
from knorm.evaluation.sums import Damage
from knorm.evaluation.ways import Evaluation
from knorm.evaluation.windows import cut_windows
from knorm.models import hush, load_model, load_text
from knorm.paths import ASSETS

CHUNKS, WINDOW = 4, 512
FIRST = WINDOW // 2  # the tool's rule: logits of a chunk's second half are scored, but the last one's
NEAR, NEARER = 3e-3, 1e-4  # relative: of knorm's figures, and of those with the reference rounded as in the tool's file
MOST_LOGITS = 64 * 2**20
VLLM_WORK = ("fp8", "fp8_e5m2")
VLLM_WRONG = (  # what knorm check refutes under a model in float32
    "int8_per_token_head", "int4_per_token_head", "fp8_per_token_head", "fp8_inc", "nvfp4", "turboquant_k8v4",
    "float16",
)  # fmt: skip
Array = np.ndarray[Any, Any]


def where(part: str) -> str:
    return (
        f"`python tools/bench_engines.py {part}`: {os.cpu_count()} CPU cores ({platform.machine()}), a thread for each "
        f"process, Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}, transformers "
        f"{transformers.__version__}.\n"
    )


@dataclass
class Told:
    """Hold what llama-perplexity prints, as text: with the digits that it has."""

    kl: str
    same_top: str
    rms: str
    seconds: float


def run_tool(program: str, file: Path, folder: Path, kind: str = "") -> tuple[str, float]:
    """Run llama-perplexity: without a `kind` of cache it writes the base file, which it reads with one."""
    words = [program, "-m", str(file), "-f", str(ASSETS / "narrative.txt"), "-c", str(WINDOW), "--chunks", str(CHUNKS)]
    words += ["-t", "1", "--kl-divergence-base", str(folder / "base")]
    words += ["--kl-divergence", "-ctk", kind, "-ctv", kind] if kind else []
    begin = time.perf_counter()
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{program} ended with exit code {ended.returncode}: {ended.stderr.strip().splitlines()[-1:]}")
    return ended.stdout + ended.stderr, time.perf_counter() - begin


def told(text: str, seconds: float) -> Told:
    lines = (r"Mean +KLD: +([\d.]+)", r"Same top p: +([\d.]+)", r"RMS Δp +: +([\d.]+)")
    found = [re.search(line, text) for line in lines]
    return Told(*(match[1] for match in found if match), seconds)


def base_tokens(file: Path) -> torch.Tensor:
    """Read the tokens that the tool cut the text into, out of its base file."""
    with open(file, "rb") as stream:
        mark, length, _, chunks = struct.unpack("<8sIii", stream.read(20))
        assert mark == b"_logits_"
        return (
            torch.frombuffer(bytearray(stream.read(4 * length * chunks)), dtype=torch.int32).view(chunks, length).long()
        )


def rounded(logits: Array) -> Array:
    """Return log-probabilities as the tool's base file holds them: 16 bits each, none below the largest less 16."""
    largest = logits.max(-1, keepdims=True)
    least = np.maximum(logits.min(-1, keepdims=True), largest - 16)
    total = np.log(np.exp(logits - largest).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scale = (largest - least) / np.float32(65535)
    steps = np.where(logits > least, np.rint((logits - least) * (1 / scale)), 0).astype(np.float32)
    return scale * steps + (least - largest - total)


def by_the_tools_formula(base: Array, run: Array, true: Array) -> tuple[Array, Array, Array]:
    """Compute KL, same top and delta-p of each token as the tool does, from what its base file would hold."""
    largest = run.max(-1, keepdims=True)
    total = largest + np.log(np.exp(run - largest).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    kl = np.where(base > -16, np.exp(base) * (base - run + total), 0).sum(-1, dtype=np.float64)
    rows = np.arange(len(true))
    delta = np.exp(run[rows, true] - total[:, 0]) - np.exp(base[rows, true])
    return kl, base.argmax(-1) == run.argmax(-1), delta


class Peak:
    """Measure by how much the memory of processes rises above what it is now (Linux)."""

    def __init__(self, *processes: int) -> None:
        self.before = {process: self._rise(process, reset=True) for process in processes}

    def _rise(self, process: int, *, reset: bool = False) -> int:
        if reset:
            Path(f"/proc/{process}/clear_refs").write_text("5")  # the peak is what is there now
        status = Path(f"/proc/{process}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]

    def bytes(self) -> int:
        """Return the sum of what the processes rose by."""
        return sum(self._rise(process) - before for process, before in self.before.items())


@dataclass
class Ours:
    """Hold knorm's figures, those by the tool's formula from a rounded reference, and seconds."""

    damage: Damage
    kl: float
    same_top: float
    rms: float
    seconds: float


def started(target: EngineTarget, file: Path, asked: Asked) -> list[EngineScorer]:
    full = EngineScorer(full_of(target), file, Place(), WINDOW, asked)
    return [full, EngineScorer(target, file, Place(), WINDOW, asked)]


def score(target: EngineTarget, file: Path, windows: torch.Tensor, how: Any = "two calls") -> Ours:
    """Score as the tool does, the full cache and the target side by side; "two calls": in batches."""
    begin, tokens, rounds = time.perf_counter(), [], []
    scorers = started(target, file, Asked(how))
    with closing(scorers):
        for ids in windows:
            place, parts = FIRST + 1, []
            for full, run in zip(*(scorer.logits(ids, place) for scorer in scorers), strict=True):
                true = ids[place : place + len(full)]
                parts.append(compare(lambda x: x, full[None], run[None], true[None], full.shape[1]))
                rounds.append(by_the_tools_formula(rounded(full.numpy()), run.numpy(), true.numpy()))
                place += len(full)
            tokens.append(PerToken(*(torch.cat(column, 1) for column in zip(*parts, strict=True))))
    damage = summed(PerToken(*map(torch.cat, zip(*tokens, strict=True))))
    kl, top, delta = (np.concatenate(column) for column in zip(*rounds, strict=True))
    rms = float(np.sqrt((delta.astype(np.float64) ** 2).mean()))
    return Ours(damage, float(kl.mean()), float(top.mean()), rms, time.perf_counter() - begin)


def bytes_of_logits(target: EngineTarget, file: Path, ids: torch.Tensor) -> int:
    """Measure what scoring a window adds to the memory of all three processes that scoring its last token does not."""
    scorers = started(target, file, Asked("two calls"))
    with closing(scorers):
        peak = None
        for first in (WINDOW - 1, FIRST + 1):
            place = first
            if first < WINDOW - 1:
                peak = Peak(os.getpid(), *(scorer.process.process.pid for scorer in scorers))
            for full, run in zip(*(scorer.logits(ids, place) for scorer in scorers), strict=True):
                compare(lambda x: x, full[None], run[None], ids[None, place : place + len(full)], full.shape[1])
                place += len(full)
        assert peak
        return peak.bytes()


def off(ours: float, theirs: str, unit: float = 1.0) -> float:
    """Return how far a figure is from a printed one, relative, less what the printed one may have lost by rounding."""
    printed = float(theirs) / unit
    lost = 0.5 * 10 ** -len(theirs.partition(".")[2]) / unit
    return max(0.0, abs(ours - printed) - lost) / printed


def tool(program: str) -> None:
    """Compare with llama-perplexity in one run; exit code 1 where figures, memory or time are not as promised."""
    hush()
    print("## llama.cpp's own tool, on the same tokens\n\n" + where("tool llama-perplexity"))
    model, tokenizer = load_model("smollm2")
    windows = cut_windows(tokenizer, load_text("narrative"), WINDOW, CHUNKS).input_ids
    print("| cache | by | mean KL | same top | RMS delta-p | s |\n| --- | --- | --- | --- | --- | --- |")
    wrong, notes = [], []
    with model_file("smollm2", model) as file, tempfile.TemporaryDirectory() as folder:
        _, base_seconds = run_tool(program, file, Path(folder))
        size = (Path(folder) / "base").stat().st_size
        if not torch.equal(base_tokens(Path(folder) / "base"), windows):
            sys.exit("the tool cuts the text into other tokens than knorm")
        for kind in ("q4_0", "q8_0"):
            target = engine_target(f'llama.cpp:smollm2(type_k="{kind}", type_v="{kind}")')
            theirs = told(*run_tool(program, file, Path(folder), kind))
            ours, decoded = score(target, file, windows), score(target, file, windows, "loop")
            both = base_seconds + theirs.seconds
            print(f"| {kind} | llama-perplexity | {theirs.kl} | {theirs.same_top}% | {theirs.rms}% | {both:.1f} |")
            row(kind, "knorm, in batches", ours.damage.kl, ours.damage.same_top, ours.damage.delta_p_rms, ours.seconds)
            row(kind, "the same, reference rounded", ours.kl, ours.same_top, ours.rms)
            d = decoded.damage
            row(kind, "knorm, forced decode", d.kl, d.same_top, d.delta_p_rms, decoded.seconds)
            d = ours.damage
            for by, figures, most in (
                ("in batches", (d.kl, d.same_top, d.delta_p_rms), NEAR),
                ("reference rounded", (ours.kl, ours.same_top, ours.rms), NEARER),
            ):
                printed = ((theirs.kl, 1.0), (theirs.same_top, 100.0), (theirs.rms, 100.0))
                far = [off(number, text, unit) for number, (text, unit) in zip(figures, printed, strict=True)]
                notes.append(
                    f"{kind}, {by}: {', '.join(f'{x:.1e}' for x in far)} off what is printed, {most:g} allowed"
                )
                wrong += [notes[-1]] if max(far) > most else []
            memory = bytes_of_logits(target, file, windows[0])
            told_of = f"{memory / 2**20:.0f} MiB for logits, in all processes; the tool's base file: {size:,} bytes"
            notes.append(f"{kind}: {told_of}")
            wrong += [notes[-1]] if memory > MOST_LOGITS else []
            wrong += [f"{kind}: {ours.seconds:.1f} s, the tool's two runs {both:.1f} s"] if ours.seconds > both else []
    print("\n" + "\n".join(f"- {note}" for note in notes))
    sys.exit("\n".join(wrong) if wrong else 0)


def row(kind: str, by: str, kl: float, top: float, rms: float, seconds: float | None = None) -> None:
    print(f"| {kind} | {by} | {kl:.6f} | {top:.3%} | {rms:.3%} | {'' if seconds is None else f'{seconds:.1f}'} |")


def types(name: str) -> None:
    """Print what each type of cache costs, keys and values alike, by forced decode; and what is refused or dies."""
    hush()
    print(f"## Cache types on {name}\n\n" + where(f"types {name}"))
    model, tokenizer = load_model(name)
    windows = cut_windows(tokenizer, load_text("narrative"), WINDOW, 8 if name.startswith("embedded") else CHUNKS)
    print("| type | bytes per token | ΔNLL | KL | 95% interval | same top | KL to itself |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    notes = []
    with model_file(name, model) as file:
        ways = EngineWays(model, windows, FIRST, file=file)
        first = engine_target(f"llama.cpp:{name}")
        line(again("f16", ways.control(first)), ways.control(first).damage, 0)
        beside = ways.beside(first)
        line(f"transformers in {beside.method.partition(', ')[2]}", beside.damage, beside.bytes_per_token)
        for kind in TYPES:
            target = replace(first, settings=replace(first.settings, type_k=kind, type_v=kind))
            try:
                pair = ways.evaluate(target)
            except EngineError as error:
                notes.append(f"- {kind}: {error}")
                continue
            line(kind, pair.row.damage, pair.row.bytes_per_token, pair.again.damage.kl)
    print("\n" + "\n".join(notes))


def vllm(name: str) -> None:
    """Print what vLLM's types of cache cost by forced decode, those that work with a control of their own."""
    hush()
    print(f"## vLLM's cache types on {name}\n\n" + where(f"vllm {name}"))
    model, tokenizer = load_model(name)
    boxed = name.startswith("embedded")
    count, window = (4, WINDOW) if boxed else (2, 128)
    windows = cut_windows(tokenizer, load_text("narrative"), window, count)
    print(f"{count} windows of {window} tokens, prompt {window // 2}, weights in float32.\n")
    print("| kv_cache_dtype | bytes per token | ΔNLL | KL | 95% interval | same top | KL to itself |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with model_file(name, model, "folder") as file:
        ways = EngineWays(model, windows, window // 2, file=file)
        first = engine_target(f"vllm:{name}")
        line(again("auto", ways.control(first)), ways.control(first).damage, 0)
        beside = ways.beside(first)
        line(f"transformers in {beside.method.partition(', ')[2]}", beside.damage, beside.bytes_per_token)
        for kind in (*VLLM_WORK, *(VLLM_WRONG if boxed else ())):
            target = replace(first, settings=replace(first.settings, kv_cache_dtype=kind))
            if kind in VLLM_WORK:
                pair = ways.evaluate(target)
                line(kind, pair.row.damage, pair.row.bytes_per_token, pair.again.damage.kl)
            else:
                row = ways.alone(target)
                line(f"{kind} (refuted)", row.damage, row.bytes_per_token)
        ids = cut_windows(tokenizer, load_text("narrative"), WINDOW, 1).input_ids[0]
        memory = bytes_of_logits(replace(first, settings=replace(first.settings, kv_cache_dtype="fp8")), file, ids)
    print(f"\n- Prompt scoring of {WINDOW} tokens with fp8: {memory / 2**20:.0f} MiB for logits, in all processes")
    if memory > MOST_LOGITS:
        sys.exit(f"more than {MOST_LOGITS / 2**20:.0f} MiB for logits")


def again(kind: str, control: Evaluation) -> str:
    """Name the full cache's control by what it does."""
    return f"{kind}, {'its weights moved' if 'moved' in control.check else 'read in other batches'}"


def line(name: str, damage: Damage, size: float, again: float | None = None) -> None:
    change = f"{damage.delta_nll:+.4f} ({damage.delta_nll_low:+.4f} to {damage.delta_nll_high:+.4f})"
    between = f"{damage.kl_low:.2g} to {damage.kl_high:.2g}"
    own = "" if again is None else f"{again:.1e}"
    cells = [name, f"{size:.0f}" if size else "", change, f"{damage.kl:.3g}", between, f"{damage.same_top:.1%}", own]
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = {"tool": tool, "types": types, "vllm": vllm}
    if len(sys.argv) != 3 or sys.argv[1] not in parts:
        sys.exit(__doc__)
    parts[sys.argv[1]](sys.argv[2])
