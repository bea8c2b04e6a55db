"""What the laws say of real methods: python tools/exam.py HEADING TARGET ... [--traits tools/exam.toml].

A TARGET is one of `knorm check`, kvpress:*, transformers:*, functions:* (of docs/peers/plans), or a folder: then
each of its files has a function, class or factory `good` that no law may refute and, unless it is a control, a `bug`
that one must. Traits that a file's own comments promise are declared in a TOML file, by the file's name. Writes a
section of docs/exam.md under HEADING, with --write, and prints it.

What a person makes of each refutation of a method stands in the same file, under [verdicts].

Every snippet is run in a fresh interpreter that has no knorm.

Exits 1 where a `good` is not held to be correct or a `bug` is, where a refutation was read by nobody, or where its
snippet does not show it; 3 where knorm itself broke off.
"""

from __future__ import annotations

import argparse
import ast
import logging
import re
import subprocess
import sys
import time
import tomllib
import warnings
from pathlib import Path
from typing import Any

import torch

from knorm.laws import Result, iter_results
from knorm.laws.catalogue.seen import listed
from knorm.laws.loading import load_target
from knorm.laws.standins import SAID
from knorm.methods.known import WEIGHTS, lacking, version_of
from knorm.methods.targets import expanded

ROOT = Path(__file__).parents[1]
TARGETS = ROOT / "docs" / "peers" / "plans" / "functions.py"
DOCUMENT = ROOT / "docs" / "exam.md"
HEAD = (
    "# The exam: what the laws say of real methods\n\nWritten by `tools/exam.py`, quick profile, seed 0. A law counts "
    "as untested where fewer than 20 cases were\nanswered, or evicted anything. Presses that read weights which others "
    "have trained are given stand-ins, seeded random\nnumbers of the right shape: the table says where.\n"
)
MOST = 400  # characters of a sentence
PACKAGES = ("kvpress", "transformers", "torch")


def targets_of(names: list[str]) -> list[tuple[str, str, str | None]]:
    """List what is examined: the target, the name of its traits, and "bug" or "good" where that is known."""
    found: list[tuple[str, str, str | None]] = []
    for name in names:
        if name == "functions:*":
            found += [(f"{TARGETS}:{line}", line, None) for line in promised()]
            continue
        if not Path(name).is_dir():
            found += [
                (target, target.rpartition(":")[2] if ".py:" in target else target, None) for target in expanded(name)
            ]
            continue
        for file in sorted(Path(name).glob("*.py")):
            text = file.read_text(encoding="utf-8")
            for variant in ("bug", "good"):
                if re.search(rf"^(def {variant}\(|class {variant}\b|{variant} = )", text, re.MULTILINE):
                    found.append((f"{file}:{variant}", file.stem, variant))
    return found


def promised() -> dict[str, dict[str, object]]:
    """Read what the projects of public functions promise, by the function's name."""
    checks = tomllib.loads((TARGETS.parent / "knorm.toml").read_text(encoding="utf-8"))["check"]
    return {name: check.get("traits", {}) for name, check in checks.items()}


def examine(target: str, traits: dict[str, object]) -> tuple[list[Result], str]:
    """Try every law that applies; returns the results, or what kept the target from being loaded."""
    if lacks := next((lacks for press in WEIGHTS if press in target and (lacks := lacking(press))), ""):
        return [], f"not run: its stand-in weights need {lacks}"
    try:
        subject = load_target(target, traits=traits)
    except ValueError as error:
        return [], f"not loaded: {error}"
    return [result for result in iter_results(subject) if result.verdict != "does not apply"], ""


def shown(result: Result) -> bool:
    """Tell whether the snippet of a refutation shows it: it runs in a fresh interpreter that has no knorm."""
    if not result.snippet:
        return False
    alone = "import sys; sys.modules['knorm'] = None; exec(compile(sys.stdin.read(), 'snippet', 'exec'))"
    done = subprocess.run(
        [sys.executable, "-c", alone], check=False, input=result.snippet, capture_output=True, text=True, timeout=300
    )
    return confirms(done.stdout if done.returncode == 0 else done.stderr, result.counterexample or "")


def confirms(printed: str, counterexample: str) -> bool:
    """Tell whether what a snippet printed, or raised, is what the counterexample says."""
    last = (printed.strip().splitlines() or [""])[-1]
    said = " ".join(counterexample.split())
    if seen := re.findall(r"the query at \d+ sees (\[.*\])", printed):
        return _seen(list(map(ast.literal_eval, seen)), said)
    if number := re.search(r"(?:differ by|mask by|is off by) ([\d.e+-]+|nan|inf)$", last):
        return f"{float(number[1]):.3g}" in said
    if held := re.match(r"(\d+) bytes are held", last):
        return f"{int(held[1]):,} bytes are held" in said
    if length := re.match(r"(\d+) is its length after (\d+) tokens", last):
        return f"is {length[1]} after {length[2]} tokens" in said
    if error := re.match(r"([\w.]*(?:Error|Exception|Interrupt))\b", last):
        return error[1].rpartition(".")[2] in said
    for words in (r"\w+ was given \d+ of \d+ scores", r"slot \d+ holds", "was not refused", "compression_ratio is"):
        if found := re.search(words, printed):
            return found[0].removesuffix(" holds") in said
    return bool(last)  # what a function returned: numbers for a reader


def _seen(tokens: list[list[int]], said: str) -> bool:
    """Tell whether lists of tokens that a query sees, of one run or of two, are those that a counterexample names."""
    if len(tokens) == 2:  # by chance, what is seen is another each time
        named = "is read again" in said or all(_named(sorted(each)) in said for each in tokens)
        return tokens[0] != tokens[1] and named
    (one,) = tokens
    count = re.search(rf"sees {len(one) - 1} (?:of the prompt's|earlier)", said)
    return _named(one) in said or bool(count)


def _named(tokens: list[int]) -> str:
    return listed(tokens).removesuffix(", ...")


def row(target: str, variant: str | None, results: list[Result], why: str, seconds: float) -> str:
    """Write a line of the table."""
    name = target if variant is None else f"{Path(target.partition(':')[0]).stem} `{variant}`"
    name = target.rpartition(":")[2] if target.startswith(str(TARGETS)) else name
    if why:
        return f"| {name} | {why} | | | | |"
    counts = [sum(result.verdict == verdict for result in results) for verdict in ("holds", "untested")]
    refuted = ", ".join(f"`{result.check}`" for result in results if result.verdict == "refuted") or "-"
    evicted = max((result.evicted for result in results), default=0)
    name += f", {SAID}" if any(SAID in (result.reason or "") for result in results) else ""
    return f"| {name} | {counts[0]} | {refuted} | {counts[1]} | {evicted} | {seconds:.0f} |"


def sentences(target: str, results: list[Result], judged: dict[str, str]) -> list[str]:
    """Write what came out, a line for each law that is refuted or untested, and what a person makes of it."""
    name = Path(target.partition(":")[0]).stem + ":" + target.rpartition(":")[2] if ".py:" in target else target
    lines = []
    for result in results:
        if result.verdict != "holds":
            said = " ".join(((result.counterexample if result.failed else result.reason) or "").split())
            said = said if len(said) <= MOST else f"{said[: MOST - 3]}..."
            said += "" if said.endswith(".") else "."
            verdict = f" **{judged[result.check]}**" if result.check in judged else ""
            lines.append(f"- {name}, `{result.check}` {result.verdict}: {said}{verdict}")
    return lines


def section(heading: str, names: list[str], declared: dict[str, dict[str, object]]) -> tuple[str, int]:
    """Examine the targets; returns the section and how many verdicts are not as they should be."""
    rows, notes, wrong, ran, evicting = [], [], 0, 0, 0
    verdicts = declared.get("verdicts", {})
    for target, name, variant in targets_of(names):
        begin = time.perf_counter()
        results, why = examine(target, declared.get(name, {}))
        rows.append(row(target, variant, results, why, time.perf_counter() - begin))
        print(rows[-1], flush=True)
        judged: Any = verdicts.get(re.sub(r".*?:(\w+).*", r"\1", target), {})
        notes += sentences(target, results, judged)
        unshown = [result.check for result in results if result.failed and not shown(result)]
        named = (
            ":".join([Path(target.partition(":")[0]).stem, target.rpartition(":")[2]]) if ".py:" in target else target
        )
        notes += [f"- {named}: the snippet of {', '.join(unshown)} does not show it without knorm."] if unshown else []
        wrong += len(unshown)
        ran += bool(results)
        evicting += any(result.evicted >= 20 for result in results)
        failed = any(result.verdict != "holds" for result in results) or bool(why)
        wrong += (variant == "good" and failed) or (variant == "bug" and not any(r.failed for r in results))
        wrong += variant is None and any(result.failed and result.check not in judged for result in results)
    versions = ", ".join(f"{package} {version}" for package in PACKAGES if (version := version_of(package)))
    lines = [
        f"## {heading}",
        "",
        f"{versions}. {len(rows)} targets, {ran} ran, {evicting} evicted in 20 cases or more.",
        "",
    ]
    lines += [
        "| target | hold | refuted | untested | cases that evicted | s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *rows, "", *notes, ""]), wrong


def write(heading: str, text: str) -> None:
    """Put a section into the document, in place of the one of that heading."""
    before = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else HEAD
    parts = re.split(r"(?=^## )", before, flags=re.MULTILINE)
    others = [part.rstrip("\n") + "\n" for part in parts[1:] if not part.startswith(f"## {heading}\n")]
    DOCUMENT.write_text("\n".join([HEAD, *sorted([*others, text])]), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heading")
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--traits", type=Path, default=ROOT / "tools" / "exam.toml")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        text, wrong = section(options.heading, options.targets, promised() | tomllib.loads(options.traits.read_text()))
    except Exception as error:
        print(f"knorm broke off: {error!r}", file=sys.stderr)
        return 3
    print(f"\n{text}")
    if options.write:
        write(options.heading, text)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
