"""What a sweep costs beside its cells, and what it survives: python tools/bench_sweep.py PART ... [--write]

plan      10,000 cells: planned, resumed and joined
overhead  cells of 2 s that do nothing, against 2 s each
memory    the most memory of the process that writes 500 results and 10,000
workers   two workers against one on the embedded model, a thread each
cost      seconds by cells, windows and length: how a study's cost grows
kills     a sweep killed with SIGKILL at random moments, again and again until it ends; `kills ray` on a cluster
gpus      one worker against one for each GPU of this machine (two are asked for), the embedded model's shape in float32

With --write the parts' text replaces what docs/sweeps.md has of them. Exit code 1: a part misses its floor.
"""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "sweeps.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

from marked import rewrite  # noqa: E402

STUDY = """
methods = ["knorm", "mended.py:compress", "transformers:DynamicCache"]
keep_ratio = {ratios}
window = {window}
windows = {windows}
windows_per_cell = {per_cell}
how = "{how}"
device = "{device}"
dtypes = ["{dtype}"]
seeds = {seeds}
"""
MISSED: list[str] = []


def floor(holds: bool, said: str) -> str:
    """Return the sentence, and note where it is not so."""
    if not holds:
        MISSED.append(said)
    return f"{said}: {'held' if holds else 'MISSED'}"


def where(part: str) -> str:
    versions = ", ".join(f"{name} {metadata.version(name).partition('+')[0]}" for name in ("torch", "transformers"))
    cores = len(os.sched_getaffinity(0))
    machine = f"{cores} cores ({platform.machine()}), Python {platform.python_version()}, {versions}"
    return f"`python tools/bench_sweep.py {part}`: {machine}."


@contextmanager
def folder(**settings: Any) -> Iterator[Path]:
    """A folder with a plan and its method."""
    asked = {"ratios": [0.5], "window": 256, "windows": 8, "per_cell": 4, "how": "two calls", "device": "cpu"}
    with tempfile.TemporaryDirectory(prefix="knorm-") as name:
        place = Path(name)
        (place / "mended.py").write_bytes((ROOT / "examples" / "mended.py").read_bytes())
        (place / "plan.toml").write_text(STUDY.format(**{**asked, "dtype": "float32", "seeds": [0], **settings}))
        yield place


def command(place: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "knorm", "sweep", "plan.toml", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def timed(place: Path, *arguments: str) -> float:
    """Run a sweep; seconds."""
    begin = time.perf_counter()
    run = subprocess.run(command(place, *arguments), cwd=place, env=environment(), capture_output=True, check=False)
    if run.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {run.returncode}: {run.stderr.decode()}")
    return time.perf_counter() - begin


def plan() -> str:
    """10,000 cells whose results are made up, with the real command around them."""
    import sweeping

    from knorm.sweep.cells import study_of
    from knorm.sweep.folder import Folder
    from knorm.sweep.plan import read_plan

    lines = ["| 10,000 cells | s |", "| --- | --- |"]
    ratios = [round(0.04 * i, 2) for i in range(1, 21)]
    with folder(ratios=ratios, seeds=list(range(119))) as place:
        first = timed(place, "out", "--dry-run", "-q")
        os.chdir(place)
        known: dict[str, Any] = {}
        study = study_of(read_plan(Path("plan.toml")), "cpu", known)
        cells = {cell.name(): cell for cell in study.cells()}
        store = Folder(place / "out")
        store.begin(study.rows(), known, study.axes())
        os.fsync = lambda descriptor: None  # it is not the disk that is timed here
        for name, cell in cells.items():
            store.write(name, sweeping.made_up(cell.as_json(), scored=128), failed=False)
        again = timed(place, "out")
        quiet = timed(place, "out", "-q")
        dry = timed(place, "out", "--dry-run", "-q")
        os.chdir(ROOT)
    assert 9_990 <= len(cells) <= 10_010, len(cells)
    import_s = timed_import()
    for what, seconds in (
        ("planned (`--dry-run`), the targets loaded for the first time", first),
        ("resumed: all are done, the table is joined and shown", again),
        ("the same with `-q`, as in a batch job: nothing is joined", quiet),
        ("`--dry-run` of the same folder, with estimates from all results", dry),
    ):
        lines.append(f"| {what} | {seconds:.1f} |")
    lines += ["", f"Of the first, {import_s:.1f} s are the imports of PyTorch and transformers."]
    held = first < 5, again < 5
    return "\n".join([*lines, "", floor(held[0], "Floor, planned in 5 s"), floor(held[1], "Floor, resumed in 5 s")])


def timed_import() -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import knorm.methods.door"], env=environment(), check=True)
    return time.perf_counter() - begin


def overhead() -> str:
    """Cells of 2 s in two workers, twenty each; the workers' start is told apart."""
    import sweeping

    from knorm.sweep.drive import drive
    from knorm.sweep.folder import Folder
    from knorm.sweep.local import Pool

    def run(cells: Any, pool: Any, place: Path) -> float:
        store = Folder(place)
        store.begin(["row"], {}, {})
        begin = time.perf_counter()
        drive(store, cells, pool)
        return time.perf_counter() - begin

    with tempfile.TemporaryDirectory() as name:
        pool = Pool(2, "cpu", work=sweeping.waits)
        warm = run(sweeping.make_cells(methods=2, blocks=1, text="0.1"), pool, Path(name, "warm"))
        spent = run(sweeping.make_cells(methods=8, blocks=5, text="2"), pool, Path(name, "cells"))
        pool.close()
    share = spent / 40 - 1
    said = f"40 cells of 2 s in two workers took {spent:.2f} s: {100 * share:.1f}% beside the cells"
    return f"{said}; two workers are there after {warm:.1f} s.\n\n{floor(share <= 0.05, 'Floor, at most 5%')}"


def memory() -> str:
    """Peak memory of the process that writes, in a process of its own for each number of cells."""
    code = """
        import resource, sys, tempfile
        import sweeping
        from pathlib import Path
        cells = sweeping.make_cells(methods=10, blocks=int(sys.argv[1]) // 10)
        with tempfile.TemporaryDirectory() as name:
            made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            sweeping.run(name, cells, lambda fields, hint: sweeping.made_up(fields, hint, scored=512))
            print(made, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    lines = ["| cells done | MiB with the plan made | MiB at most |", "| --- | --- | --- |"]
    grown = []
    for count in (500, 10_000):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(count)],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        made, most = (int(word) / 1024 for word in done.stdout.split())
        grown.append(most - made)
        lines.append(f"| {count:,} | {made:.0f} | {most:.0f} |")
    return "\n".join(
        [*lines, "", floor(grown[1] - grown[0] < 16, "Floor, doing 10,000 cells takes no 16 MiB more than doing 500")]
    )


def workers() -> str:
    """The same cells in one worker and in two, in turns."""
    pairs = []
    settings = {"ratios": [0.5, 0.4, 0.3, 0.2], "windows": 12, "per_cell": 6, "window": 512}
    for _ in range(3):
        with folder(**settings) as place:
            pairs.append(tuple(in_cells(place, name, "--workers", str(n)) for n, name in ((1, "one"), (2, "two"))))
    ratios = sorted(one / two for one, two in pairs)
    lines = ["| one worker, s | two workers, s | ratio |", "| --- | --- | --- |"]
    lines += [f"| {one:.1f} | {two:.1f} | {one / two:.2f}x |" for one, two in pairs]
    return "\n".join([*lines, "", floor(ratios[1] >= 1.7, "Floor, at least 1.7x (the median)")])


def in_cells(place: Path, out: str, *arguments: str) -> float:
    """Seconds from the first result to the last: the workers' start and the table are left out."""
    timed(place, out, "-q", *arguments)
    times = sorted(file.stat().st_mtime for file in (place / out / "results").iterdir())
    count = int(arguments[arguments.index("--workers") + 1]) if "--workers" in arguments else 1
    return (times[-1] - times[count - 1]) * len(times) / (len(times) - count)


def cost() -> str:
    """Seconds of a cell, by method's way, windows and length."""
    lines = [
        "| window | windows of a cell | way | knorm, s | a function, s | full cache, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for window, per_cell, how in (
        (256, 4, "two calls"),
        (256, 8, "two calls"),
        (512, 4, "two calls"),
        (1024, 4, "two calls"),
        (256, 4, "auto"),
        (256, 4, "loop"),
    ):
        with folder(window=window, windows=2 * per_cell, per_cell=per_cell, how=how) as place:
            timed(place, "out", "-q", "--workers", "1")
            spent: dict[str, list[float]] = {}
            for file in (place / "out" / "results").iterdir():
                result = json.loads(file.read_bytes())
                if result["cell"]["first"]:  # the first ones load the model
                    spent.setdefault(result["cell"]["method"]["target"], []).append(result["seconds"])
        seconds = [min(spent[name]) for name in ("knorm", "mended.py:compress", "full cache, again")]
        lines.append(f"| {window} | {per_cell} | {how} | " + " | ".join(f"{value:.2f}" for value in seconds) + " |")
    return "\n".join(lines)


def kills(engine: str = "local") -> str:
    """Kill the process that sweeps at 50 random moments; what is there in the end is what an undisturbed run gives."""
    draw, killed, options = random.Random(0), 0, ("--on", engine, "--expire", "1", "--json")
    with folder(ratios=[0.5, 0.4, 0.3, 0.2, 0.1], window=64, windows=32, per_cell=2) as place, cluster(engine) as more:
        whole = timed(place, "whole", *options, "whole.json", "-q")
        out, seen = place / "out" / "results", 0
        while True:
            run = subprocess.Popen(
                command(place, "out", *options, "out.json", "-q"), cwd=place, env={**environment(), **more},
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            done = len([*out.glob("[!.]*.json")]) if out.is_dir() else 0
            if killed < 50:  # once cells come back, at a random moment
                while run.poll() is None and len([*out.glob("[!.]*.json")] if out.is_dir() else []) <= done:
                    time.sleep(0.002)
                time.sleep(draw.random() * 0.2)
            if killed >= 50 or run.poll() is not None:
                break
            run.send_signal(signal.SIGKILL)
            run.wait()
            killed += 1
            now = len([*out.glob("[!.]*.json")])
            assert now >= seen, "a result was lost"
            seen = now
        assert run.wait() == 0
        same = (place / "whole.json").read_bytes() == (place / "out.json").read_bytes()
    said = f"{engine}: killed {killed} times, the undisturbed run took {whole:.0f} s"
    return f"{said}. {floor(same, 'The same table, byte for byte')}"


@contextmanager
def cluster(engine: str) -> Iterator[dict[str, str]]:
    """A Ray cluster that outlives the processes that are killed, where one is asked for."""
    if engine != "ray":
        yield {}
        return
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = made.address
    try:
        yield {"RAY_ADDRESS": made.address}
    finally:
        made.shutdown()


def gpus() -> str:
    """The same cells on one GPU and on two of this machine."""
    import torch

    if torch.cuda.device_count() < 2:
        raise SystemExit(f"gpus needs two CUDA devices, but there are {torch.cuda.device_count()}")
    name = torch.cuda.get_device_name(0)
    settings = {
        "ratios": [0.5, 0.3],
        "windows": 16,
        "per_cell": 4,
        "window": 512,
        "device": "cuda",
        "how": "loop",  # cells of seconds: one of 0.1 s, in two calls, is over before the second worker has started
    }
    with folder(**settings) as place:
        in_cells(place, "first", "--workers", "2")  # compiles kernels, which are kept
        one, two = (in_cells(place, out, "--workers", str(n)) for n, out in ((1, "one"), (2, "two")))
    return f"Two {name}, 24 cells: {one:.1f} s with one of them, {two:.1f} s with both, {one / two:.2f}x.\n\n" + floor(
        one / two >= 1.8, "Floor, at least 1.8x"
    )


PARTS: dict[str, Callable[[], str]] = {
    "plan": plan, "overhead": overhead, "memory": memory, "workers": workers, "cost": cost, "kills": kills,
    "kills ray": lambda: kills("ray"), "gpus": gpus,
}  # fmt: skip


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--write"]
    names = ["kills ray"] if words == ["kills", "ray"] else words
    if not names or {*names} - {*PARTS}:
        raise SystemExit(__doc__)
    for name in names:
        text = f"{where(name)}\n\n{PARTS[name]()}\n"
        print(text, flush=True)
        if "--write" in sys.argv:
            rewrite(DOCUMENT, name, text)
    if MISSED:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
