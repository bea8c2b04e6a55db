"""Law by mutant, and how fast: python tools/bench_laws.py matrix | speed | correct | cuda; writes into docs/laws.md.

`matrix` runs every check that applies on every mutant of tests/mutants, at seed 0, and fails where a check has no
mutant that it alone refutes. `speed` runs each mutant against its check with 20 seeds, `correct` the correct
subjects against the whole catalogue with 20, knorm's own core with 200. `cuda` runs them on CUDA tensors, all with one
seed after another, up to 20: what is not done after --seconds is left, and the table says how many seeds were. The
laws that the witness reads are left out there: its models are on the CPU, whatever the device.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import hypothesis  # noqa: E402
import torch  # noqa: E402
from mutants import MUTANTS  # noqa: E402
from mutants.correct import CORRECT  # noqa: E402

from knorm.laws import CHECKS, Result, iter_results  # noqa: E402
from knorm.laws.runner import applies, run_check  # noqa: E402

DOCUMENT = ROOT / "docs" / "laws.md"
HEAD = "# The laws and their mutants\n\nWritten by `tools/bench_laws.py`; the mutants are those of `tests/mutants`.\n"
SEEDS = 20


def refuted_by(index: int) -> list[str]:
    """The checks that refute a mutant at seed 0."""
    mutant = MUTANTS[index]
    found = [check for check in CHECKS.values() if applies(check, mutant.subject)]
    return [check.name for check in found if run_check(check, mutant.subject).verdict == "refuted"]


def refutations(index: int) -> list[Result]:
    """A mutant against its own check, a result per seed."""
    mutant = MUTANTS[index]
    return [run_check(CHECKS[mutant.check], mutant.subject, seed=seed) for seed in range(SEEDS)]


def alarms(job: tuple[int, int, str]) -> tuple[int, int, list[Result]]:
    """A correct subject, a seed, and what refutes the one with the other."""
    index, seed, device = job
    correct = CORRECT[index]
    # drawn tensors lie on the device; the witness' models do not
    drawn = None if device == "cpu" else [x.name for x in CHECKS.values() if x.surface not in ("witness", "press")]
    results = iter_results(correct.subject, expected_failures=correct.expected, select=drawn, seed=seed, device=device)
    # what is expected to fail does so in most draws, not in all
    return index, seed, [r for r in results if r.verdict in ("refuted", "untested")]


def _settle() -> None:
    torch.set_num_threads(1)
    if torch.cuda.is_available() and not torch.cuda.is_initialized():
        torch.cuda.set_device(os.getpid() % torch.cuda.device_count())


def in_parallel(function, jobs, start="fork", until=None):
    """Results from a process per core, in the order of the jobs; with a time of the clock, as they come until then."""
    with get_context(start).Pool(os.cpu_count(), _settle) as pool:
        if until is None:
            yield from pool.imap(function, jobs)
            return
        results = pool.imap_unordered(function, jobs)
        try:
            for _ in jobs:
                yield results.next(min(threading.TIMEOUT_MAX, max(0, until - time.perf_counter())))
        except multiprocessing.TimeoutError:
            print("time is over: the seeds that are left are not tried", file=sys.stderr)


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def matrix() -> str:
    refuting = dict(zip((m.name for m in MUTANTS), in_parallel(refuted_by, range(len(MUTANTS))), strict=True))
    laws, mutants = [], []
    for check in CHECKS.values():
        found = [name for name, checks in refuting.items() if check.name in checks]
        alone = [name for name in found if refuting[name] == [check.name]]
        laws.append((f"`{check.name}`", check.law, check.in_words() or "-", len(found), code(alone) or "**none**"))
    for mutant in MUTANTS:
        others = [name for name in refuting[mutant.name] if name != mutant.check]
        own = f"`{mutant.check}`" if mutant.check in refuting[mutant.name] else f"**not** `{mutant.check}`"
        mutants.append((f"`{mutant.name}`", mutant.bug, mutant.source or "-", own, code(others) or "-"))
    return (
        f"## {len(laws)} laws\n\n`python tools/bench_laws.py matrix`: every check on every mutant that it applies to, "
        "quick profile, seed 0.\n\n"
        + table(("check", "law", "applies with", "mutants refuted", "of which no other check refutes"), laws)
        + f"\n## {len(mutants)} mutants\n\n"
        + table(("mutant", "its bug", "seen in", "must be refuted by", "is also refuted by"), mutants)
    )


def versions() -> str:
    modules = ", ".join(f"{x.__name__} {x.__version__.split('+')[0]}" for x in (torch, hypothesis))
    return f"Python {platform.python_version()}, {modules}"


def false_alarms(device: str, until: float = float("inf")) -> str:
    """A table of the correct subjects and of the checks that refute them with any of the seeds done by then."""
    wanted = {index: SEEDS if device == "cuda" else each.seeds for index, each in enumerate(CORRECT)}
    # all subjects with a seed before the next seed, so that each has as many where time is short
    jobs = sorted(((index, seed, device) for index in wanted for seed in range(wanted[index])), key=lambda job: job[1])
    false: dict[int, set[str]] = {index: set() for index in wanted}
    seeds = Counter[int]()
    for index, seed, found in in_parallel(alarms, jobs, "spawn" if device == "cuda" else "fork", until):
        seeds[index] += 1
        false[index] |= {r.check for r in found}
        for r in found:
            print(f"{CORRECT[index].name}, seed {seed}: {r.check} {r.verdict}: {r.counterexample}", file=sys.stderr)
    rows = [
        (f"`{each.name}`", seeds[index], code(sorted(false[index])) or ("none" if seeds[index] else "not run"),
         "; ".join(f"`{name}`: {reason}" for name, reason in each.expected.items()) or "-")
        for index, each in enumerate(CORRECT)
    ]  # fmt: skip
    return table(("subject", "seeds", "false alarms", "expected failures"), rows)


def speed() -> str:
    rows, seconds, missed = [], [], []
    for mutant, results in zip(MUTANTS, in_parallel(refutations, range(len(MUTANTS))), strict=True):
        times = [r.seconds for r in results]
        found = [r for r in results if r.verdict == "refuted"]
        said = [r for r in found if mutant.words in (r.counterexample or "")]
        seconds += times
        missed += [mutant.name] if len(said) < SEEDS else []
        rows.append(
            (f"`{mutant.name}`", f"`{mutant.check}`", f"{len(found)} of {SEEDS}", len(said),
             f"{statistics.median(r.examples for r in results):g}", f"{statistics.median(times):.2f}",
             f"{max(times):.2f}")
        )  # fmt: skip
    print(f"not in every seed: {missed}", file=sys.stderr)
    return (
        "## Seconds to refutation\n\n`python tools/bench_laws.py speed`: each mutant against its check, quick profile, "
        f"seeds 0 to {SEEDS - 1}, shrinking included, imports not. A process for each of {os.cpu_count()} CPU cores "
        f"({platform.machine()}), one thread each; {versions()}.\n\n"
        f"{len(MUTANTS) - len(missed)} of {len(MUTANTS)} mutants refuted with every seed; median "
        f"{statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s.\n\n"
        + table(("mutant", "check", "refuted", "in the words asked", "examples, median", "median s", "worst s"), rows)
    )


def correct() -> str:
    return (
        "## Correct subjects\n\n`python tools/bench_laws.py correct`: the whole catalogue, quick profile.\n\n"
        + false_alarms("cpu")
    )


def cuda(limit: float) -> str:
    begin, gpus = time.perf_counter(), torch.cuda.device_count()
    correct = false_alarms("cuda", begin + limit)
    seconds = time.perf_counter() - begin
    return (
        "## Correct subjects on CUDA tensors\n\n`python tools/bench_laws.py cuda`: all laws but those that the witness "
        f"reads on the CPU, quick profile, on {gpus} {torch.cuda.get_device_name()} shared by {os.cpu_count()} "
        f"processes, in {seconds:.0f} s; {versions()}.\n\n" + correct
    )


def write(part: str) -> bool:
    """Put a part into its place in the document; whether that changed it."""
    before = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else HEAD
    head, *parts = before.split("\n## ")
    sections = {section.split("\n", 1)[0]: section for section in parts}
    new = part.strip().removeprefix("## ").split("\n## ")
    order = ("laws", "mutants", "Seconds to refutation", "Correct subjects", "Correct subjects on CUDA tensors")
    sections |= {section.split("\n", 1)[0]: section for section in new}
    kept = {next(name for name in order if title.endswith(name)): section for title, section in sections.items()}
    ordered = [kept[name] for name in order if name in kept]
    after = "\n\n## ".join([head.strip(), *(s.strip() for s in ordered)]) + "\n"
    DOCUMENT.write_text(after, encoding="utf-8")
    return after != before


def main() -> int:
    commands = {"matrix": matrix, "speed": speed, "correct": correct, "cuda": cuda}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands)
    parser.add_argument("--seconds", type=float, default=210, help="of cuda, the start of its processes included")
    options = parser.parse_args()
    part = cuda(options.seconds) if options.command == "cuda" else commands[options.command]()
    changed = write(part)
    if options.command != "matrix":
        return 0
    bare = [line for line in part.splitlines() if "**" in line]
    print("\n".join([f"{DOCUMENT.name} {'changed' if changed else 'is as it was'}", *bare]))
    return int(changed or bool(bare))


if __name__ == "__main__":
    sys.exit(main())
