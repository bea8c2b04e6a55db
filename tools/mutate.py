"""Do knorm's own judges notice a fault in knorm? Puts in one at a time, and writes docs/mutations.md.

    python tools/mutate.py run RESULTS.jsonl [--only NAME,NAME] [--tests] [--workers 2] [--limit 300]
    python tools/mutate.py table RESULTS.jsonl     # the document, from the last result of each fault
    python tools/mutate.py list

A fault of tools/mutations.toml is put into a temporary copy of the package, never into the checkout. `knorm verify`
then runs on that copy without the goldens, up to its first refuted line; with --tests, so do that module's tests.
`run` leaves out what RESULTS.jsonl has of the same code. Exit code 1: a fault was missed, or noticed against its word.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, DOCUMENT = ROOT / "knorm", ROOT / "docs" / "mutations.md"
TESTS = {
    "policy.py": ("policy", "core", "schedule"),
    "core.py": ("core",),
    "schedule.py": ("schedule",),
    "masked_attention.py": ("masked_attention", "perplexity"),
    "perplexity.py": ("perplexity",),
    "cache.py": ("cache",),
    "model_attention.py": ("model_attention", "cache"),
}
# The command itself, on a main job without goldens that ends at its first refuted line.
VERIFY = """
import os, sys
import knorm
from knorm import cli, verify
assert knorm.__file__.startswith(os.getcwd() + os.sep), f"{knorm.__file__} is not the copy"
whole = verify.verify
def first_refuted():
    for verdict in whole(goldens=False):
        yield verdict
        if not verdict.holds:
            return
verify.verify = first_refuted
sys.argv = ["knorm", "verify"]
sys.exit(cli.main())
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


@dataclass(frozen=True)
class Mutation:
    """One fault, as tools/mutations.toml explains its fields."""

    name: str
    file: str
    old: str
    new: str
    what: str
    nothing: str = ""


MUTATIONS = tuple(
    Mutation(name, **fields)
    for name, fields in tomllib.loads((ROOT / "tools" / "mutations.toml").read_text(encoding="utf-8")).items()
)


def source_of(mutation: Mutation) -> str:
    """The module's text with the fault in it. Raises ValueError where the old text does not occur exactly once."""
    text = (PACKAGE / mutation.file).read_text(encoding="utf-8")
    if (count := text.count(mutation.old)) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.old!r} occurs {count} times in {mutation.file}, but should once: "
            "mend the fault in tools/mutations.toml"
        )
    return text.replace(mutation.old, mutation.new)


def key_of(mutation: Mutation) -> str:
    """What a result is of: the fault, and the judges that it was tried on."""
    digest = hashlib.sha256(repr(mutation).encode())
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def run_in(folder: Path, limit: float, arguments: list[str]) -> tuple[int | None, str]:
    """Run Python in a folder, whose package it imports: the exit code (None: not within the limit), and the output.

    Whatever it has started ends with it.
    """
    output = folder / "output"
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(folder)}
    environment.pop("KNORM_PROCESSES", None)  # a fault is tried in one process
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, output.read_text(encoding="utf-8", errors="replace")


def try_mutation(
    mutation: Mutation, known: dict[str, Any] | None = None, *, tests: bool = False, limit: float = 300
) -> dict[str, Any]:
    """Put one fault into a copy, and let the judges look at it; what a known result of the same code says is kept."""
    begin = time.perf_counter()
    row: dict[str, Any] = {"name": mutation.name, "file": mutation.file, "key": key_of(mutation)}
    if known and known["key"] == row["key"]:
        row = {**known}
    with tempfile.TemporaryDirectory(prefix="knorm-mutant-") as name:
        folder = Path(name)
        shutil.copytree(PACKAGE, folder / "knorm")
        (folder / "knorm" / mutation.file).write_text(source_of(mutation), encoding="utf-8")
        if "exit" not in row:
            code, output = run_in(folder, limit, ["-c", VERIFY])
            said = re.search(r"^REFUTED\s+(.+)$", output, re.MULTILINE)
            last = output.strip().rpartition("\n")[2] if code is not None else f"no answer in {limit:g} s"
            row |= {"exit": code, "said": said[1] if said else last}
        if tests:
            files = [str(ROOT / "tests" / f"test_{each}.py") for each in TESTS[mutation.file]]
            options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={ROOT}"]
            config = ["-c", str(ROOT / "pyproject.toml")]
            code, output = run_in(folder, limit, ["-m", "pytest", *options, *config, *files])
            failed = re.search(r"^(?:FAILED|ERROR) \S*?::(\w+)", output, re.MULTILINE)
            row["tests"] = failed[1] if failed else "" if code == 0 else f"exit code {code}"
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def noticed(row: dict[str, Any]) -> bool:
    """The main job said which sentence does not hold."""
    return row["exit"] == 1 and row["said"].endswith("]")


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """The last result of each fault."""
    if not file.exists():
        return {}
    return {row["name"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


def run(file: Path, only: list[str], tests: bool, workers: int, limit: float) -> int:
    for mutation in MUTATIONS:
        source_of(mutation)  # all of them, before any work
    known = {mutation.name for mutation in MUTATIONS}
    if unknown := {*only} - known:
        raise ValueError(f"no fault is named {', '.join(sorted(unknown))}; `python tools/mutate.py list` names them")
    done = read_results(file)
    left = [
        m
        for m in MUTATIONS
        if (not only or m.name in only)
        and not (m.name in done and done[m.name]["key"] == key_of(m) and (not tests or "tests" in done[m.name]))
    ]
    missed = 0
    with ThreadPoolExecutor(workers) as pool, file.open("a", encoding="utf-8") as stream:
        jobs = {m.name: pool.submit(try_mutation, m, done.get(m.name), tests=tests, limit=limit) for m in left}
        for mutation in left:
            row = jobs[mutation.name].result()
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            missed += noticed(row) == bool(mutation.nothing)
            print(f"{'noticed ' if noticed(row) else 'MISSED  '} {mutation.name}: {row['said']}", flush=True)
    return 1 if missed else 0


def table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join(map(line, (head, ["---"] * len(head), *rows))) + "\n"


def shortened(text: str, most: int = 150) -> str:
    return text if len(text) <= most else text[: most - 4] + " ..."


def document(results: dict[str, dict[str, Any]]) -> str:
    """docs/mutations.md. Raises ValueError where a fault has no result."""
    if missing := [m.name for m in MUTATIONS if m.name not in results]:
        raise ValueError(f"there is no result for {', '.join(missing)}: python tools/mutate.py run RESULTS.jsonl")
    seen = [m for m in MUTATIONS if noticed(results[m.name])]
    nothing = [m for m in MUTATIONS if m.nothing]
    open_ = [m for m in MUTATIONS if not m.nothing and m not in seen]
    tried = [m for m in MUTATIONS if "tests" in results[m.name]]
    by_tests = [m for m in tried if results[m.name]["tests"]]
    rows = []
    for m in MUTATIONS:
        claim, _, evidence = results[m.name]["said"].partition(" [")
        evidence = re.sub(r"; [\d.]+ s\]$", "", evidence)
        says = f"{claim} *{shortened(evidence)}*" if m in seen else f"**not noticed**: {m.nothing or claim}"
        test = results[m.name].get("tests", "not run")
        rows.append([f"`{m.file}`", f"`{m.name}`", m.what, says, f"`{test}`" if test not in ("", "not run") else test])
    parts = [
        "# Do knorm's own judges notice a fault in knorm?\n",
        "Written by `tools/mutate.py`; the faults stand in `tools/mutations.toml`. Each is put alone into a copy "
        "of the package. Then `knorm verify` runs without the goldens: noticed means exit code 1 and the sentence that "
        "does not hold, of a law or a verdict. The tests are those of the faulty module, up to the first that fails.\n",
        f"{len(MUTATIONS)} faults: `knorm verify` notices {len(seen)}, and nothing observable changes by "
        f"{len(nothing)}; {len(open_)} are open. The tests notice {len(by_tests)} of {len(tried)}.\n",
        table(["module", "fault", "what it is", "what `knorm verify` says", "first test that fails"], rows),
    ]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list")
    for verb in ("run", "table"):
        verbs.add_parser(verb).add_argument("results", type=Path)
    running = verbs.choices["run"]
    running.add_argument("--only", default="")
    running.add_argument("--tests", action="store_true")
    running.add_argument("--workers", type=int, default=2)
    running.add_argument("--limit", type=float, default=300)
    given = parser.parse_args()
    try:
        if given.verb == "list":
            print("\n".join(f"{m.name:24} {m.file}: {m.what}" for m in MUTATIONS))
        elif given.verb == "run":
            only = [name for name in given.only.split(",") if name]
            return run(given.results, only, given.tests, given.workers, given.limit)
        else:
            DOCUMENT.write_text(document(read_results(given.results)), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"mutate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
