"""How often is the latency gate wrong? No change, and delays of 2, 5 and 10% in every decode step.

    python tools/bench_latency_power.py measure OUT.json [--device cuda] [--slowdowns 0,5] [--blocks 400] [--runs 10]
    python tools/bench_latency_power.py table OUT.json...       # docs/latency-power.md, from the files of all devices

`measure` adds to OUT.json, so that it can be split: `--runs 0` measures the blocks alone, `--blocks 0` the runs alone.
A run is what `knorm bench` does with one policy: a fresh process, two arms in turns, a fixed number of blocks, a
verdict on TTFT and TPOT. Here both arms have the same policy, and one of them waits in each step. 2,000 more runs are
drawn from the blocks, each as many blocks in a row as a run has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from knorm.bench.latency import Arm, attending, check_alone, log_ratio, run_block, without_interruptions  # noqa: E402
from knorm.bench.policies import GATED, make_prompts  # noqa: E402
from knorm.golden.environment import device_class, environment  # noqa: E402
from knorm.models import hush, load_embedded  # noqa: E402
from knorm.policy import Policy  # noqa: E402
from knorm.statistics import ALPHA, MARGIN, compare, effective_blocks, overall  # noqa: E402

DOCUMENT = ROOT / "docs" / "latency-power.md"
POLICY = Policy(0.5)  # compressed once: its steps are alike
CHARACTERS, NEW_TOKENS = 512, 31  # 30 steps: an even number of segments
RUN_BLOCKS = {"cpu": 32, "cuda": 16}
RESAMPLED, MORE = 2000, 4  # runs drawn of each length; the longer ones have so many times the blocks
VERDICTS = ("FAIL", "PASS", "INCONCLUSIVE")
WARM_UP = 3  # blocks


class Delay:
    """Makes a step longer by `seconds`, whether it waits for the processor or for the GPU.

    On CUDA both are kept busy at the same time: a kernel that spins, and a loop here. A step takes as long as the
    slower of launching and computing, and each of them gets longer by the same.
    """

    def __init__(self, device: str) -> None:
        self.seconds = 0.0
        self.speed = _cycles_per_second(device) if torch.device(device).type == "cuda" else 0.0

    def __call__(self) -> None:
        end = time.perf_counter() + self.seconds
        if self.speed:
            torch.cuda._sleep(int(self.seconds * self.speed))
        while time.perf_counter() < end:
            pass


def _cycles_per_second(device: str) -> float:
    cycles = 20_000_000
    for _ in range(2):  # the first one loads the kernel
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        torch.cuda._sleep(cycles)
        marks[1].record()
        torch.cuda.synchronize(device)
    return cycles / (marks[0].elapsed_time(marks[1]) / 1000)


def live(device: str, slowdown: float, blocks: int) -> dict:
    """Log-ratios of live blocks, by metric, of an arm that is slower by a share of its own decode step.

    The delay is that share of the median step of the other arm in the block before: clocks drift, and a delay fixed
    at the start would be another share by the end.
    """
    check_alone(device)
    torch.set_num_threads(1)  # as `knorm bench` has it
    hush()
    model, tokenizer = load_embedded(device=device)
    prompts = [*make_prompts(tokenizer, ["encyclopedia"], [CHARACTERS], [NEW_TOKENS], device=device).values()]
    plain, slowed = (Arm(model, prompts, POLICY) for _ in range(2))
    samples, delays = [], []
    with attending(model):
        delay = slowed.after_step = Delay(device) if slowdown else None
        for number in range(-WARM_UP, blocks):
            if number == 0:
                begin = time.perf_counter()
            both = run_block([plain, slowed], [NEW_TOKENS], flip=bool(number % 2))
            if number >= 0:
                samples.append(both)
                delays.append(delay.seconds if delay else 0.0)
            if delay:
                delay.seconds = slowdown * statistics.median(both[0].steps[0])
    seconds = time.perf_counter() - begin
    size, logs = RUN_BLOCKS[torch.device(device).type], {metric: [] for metric in GATED}
    for start in range(0, blocks, size):  # as a run does it
        calm, _ = without_interruptions(samples[start : start + size])
        for metric in GATED:
            logs[metric] += [log_ratio(b, a, metric) for a, b in calm]
    return {"logs": logs, "seconds": seconds, "delay": statistics.fmean(delays)}


def judge(logs: dict, device: str) -> tuple[str, dict]:
    """The verdict of a run, and each metric's comparison."""
    found = {metric: compare(logs[metric], margin=MARGIN[device], alpha=ALPHA / len(GATED)) for metric in GATED}
    return overall(c.verdict for c in found.values()), found


def one_run(device: str, slowdown: float) -> dict:
    """A run in this process."""
    kind = torch.device(device).type
    begin = time.perf_counter()
    found = live(device, slowdown, RUN_BLOCKS[kind])
    verdict, compared = judge(found["logs"], kind)
    ratios = {metric: c.ratio for metric, c in compared.items()}
    mde = {metric: c.mde for metric, c in compared.items()}
    whole = time.perf_counter() - begin
    return {"verdict": verdict, "ratio": ratios, "mde": mde, "seconds": found["seconds"], "with_loading": whole}


def child(device: str, percent: str, blocks: int) -> dict:
    """What a fresh process gives: live blocks, or, for none, a run. On CUDA this process must not be another user."""
    command = [sys.executable, __file__, "child", device, percent, str(blocks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{percent}%: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(device: str, percent: float, blocks: int) -> dict:
    """The same, in that process."""
    result = live(device, percent / 100, blocks) if blocks else one_run(device, percent / 100)
    here = environment(device).model_dump(exclude={"numerics"})
    return {"result": result, "device_class": device_class(device), "environment": here}


def measure_all(arguments: argparse.Namespace) -> None:
    """Blocks and runs of each slowdown, added to the file."""
    out, device = Path(arguments.out), arguments.device
    found = json.loads(out.read_text()) if out.exists() else {"arms": {}}
    for percent in arguments.slowdowns.split(","):
        arm = found["arms"].setdefault(percent, {"blocks": [], "runs": []})
        plan = ["blocks"] * bool(arguments.blocks) + ["runs"] * arguments.runs
        for kind in plan:
            said = child(device, percent, arguments.blocks if kind == "blocks" else 0)
            arm[kind].append(said.pop("result"))
            found |= {"kind": torch.device(device).type, **said}
            out.write_text(json.dumps(found))
            print(f"{percent}%: {arm[kind][-1].get('verdict', f'{arguments.blocks} blocks')}", flush=True)


def resample(logs: dict, kind: str, size: int) -> tuple[Counter, float]:
    """Verdicts of runs drawn from live blocks, `size` in a row; the TPOT slowdown that the median one could see."""
    rng, verdicts, mdes = np.random.default_rng(0), Counter(), []
    for start in rng.integers(0, len(logs[GATED[0]]) - size + 1, RESAMPLED):
        verdict, compared = judge({metric: values[start : start + size] for metric, values in logs.items()}, kind)
        verdicts[verdict] += 1
        mdes.append(compared["tpot"].mde)
    return verdicts, statistics.median(mdes)


def row(percent: str, arm: dict, kind: str) -> str:
    """One line of the table."""
    logs = {metric: [x for part in arm["blocks"] for x in part["logs"][metric]] for metric in GATED}
    live_verdicts = Counter(run["verdict"] for run in arm["runs"])
    tpot = np.asarray(logs["tpot"])
    spent = statistics.median(run["seconds"] for run in arm["runs"]) if arm["runs"] else float("nan")
    worth = effective_blocks(logs["tpot"]) / len(tpot)
    cells = [f"{percent}%", f"{np.expm1(tpot.mean()):+.2%}", str(len(tpot)), f"{tpot.std(ddof=1):.2%}", f"{worth:.0%}"]
    for size in (RUN_BLOCKS[kind], MORE * RUN_BLOCKS[kind]):
        verdicts, mde = resample(logs, kind, size)
        cells += [*(f"{verdicts[v] / RESAMPLED:.1%}" for v in VERDICTS), f"{mde:.2%}"]
    cells += [*(f"{live_verdicts[v]} of {len(arm['runs'])}" for v in VERDICTS), f"{spent:.1f}"]
    return f"| {' | '.join(cells)} |"


HEAD = """# How often is the latency gate wrong?

Written by `tools/bench_latency_power.py` (its first lines say how). Two arms of one policy run in turns, one of them \
with a calibrated delay in every decode step: a busy wait, on CUDA together with a kernel that spins as long. A run is \
a fixed number of blocks in a fresh process and gives one verdict on TTFT and TPOT, at a nominal {alpha:.0%}; \
{resampled:,} more runs are as many blocks in a row, drawn from the live ones, and {resampled:,} longer ones {more} \
times as many; drawn ones overlap. INCONCLUSIVE counts as not caught.

A slowdown of twice the margin is to be caught: 5% on CUDA, where the margin is {cuda:.1%}, and 10% on a CPU, where \
it is {cpu:.0%}. One below the margin may pass; one between them is slower, and FAILs where that is shown.
"""
COLUMNS = (
    "injected", "TPOT got slower by", "live blocks", "sd of a block", "worth of one",
    *("FAIL", "PASS", "INCONCLUSIVE", "could see"), *("longer: FAIL", "PASS", "INCONCLUSIVE", "could see"),
    *("live: FAIL", "PASS", "INCONCLUSIVE"), "s a run",
)  # fmt: skip


def table(files: list[str]) -> None:
    """The document."""
    head = HEAD.format(alpha=ALPHA, resampled=RESAMPLED, more=MORE, cuda=MARGIN["cuda"], cpu=MARGIN["cpu"])
    lines = [head]
    for file in files:
        found = json.loads(Path(file).read_text())
        kind, here = found["kind"], found["environment"]
        what = f"{here['device']}, torch {here['torch']}, transformers {here['transformers']}, 1 CPU thread"
        lines.append(f"## {found['device_class']}\n\n{what}; {RUN_BLOCKS[kind]} blocks a run,")
        apart = min(sum(len(part["logs"]["tpot"]) for part in arm["blocks"]) for arm in found["arms"].values())
        lines.append(f"so that at most {apart // RUN_BLOCKS[kind]} of those drawn share no block.\n")
        lines += [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
        lines += [row(percent, arm, kind) for percent, arm in sorted(found["arms"].items(), key=lambda e: float(e[0]))]
        lines.append("")
    lines.append(
        "'Worth of one': what a block counts, being correlated with its neighbours, of an independent one (over "
        "all live blocks; a run judges its own). 'Could see': the smallest slowdown of TPOT that the median run could "
        "detect in 95%. 's a run': seconds of measuring, without loading.\n"
    )
    DOCUMENT.write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("out")
    measuring.add_argument("--device", default="cpu")
    measuring.add_argument("--slowdowns", default="0,2,5,10")
    measuring.add_argument("--blocks", type=int, default=400)
    measuring.add_argument("--runs", type=int, default=10)
    single = commands.add_parser("child")
    single.add_argument("device")
    single.add_argument("percent", type=float)
    single.add_argument("blocks", type=int)
    commands.add_parser("table").add_argument("files", nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        measure_all(arguments)
    elif arguments.command == "child":
        print(json.dumps(answer(arguments.device, arguments.percent, arguments.blocks)))
    else:
        table(arguments.files)


if __name__ == "__main__":
    main()
