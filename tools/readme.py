"""Run README's examples and put what they print into it: python tools/readme.py [--check]

A fenced block after `<!-- file: examples/NAME -->` is that file. One after `<!-- run: COMMAND -->` is what the command
prints in the folder examples/. With --check nothing is written; exit code 1 where README says something else. Times
and the last digits of measured numbers may differ between machines.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLES = ROOT / "examples"
_BLOCK = re.compile(r"(<!-- (file|run): (.+?) -->\n+```\w*\n)(.*?)(```\n)", re.DOTALL)
_SECONDS = re.compile(r"\d+(\.\d+)? s\b")
_NUMBER = re.compile(r"[-+±]?[\d,]*\d(\.\d+)?(e[-+]?\d+)?[%x]?")
_TOLERANCE = 0.02  # relative: what another CPU's rounding may do to a printed number


def blocks() -> list[tuple[str, str, str]]:
    """Return README's blocks: "file" or "run", the file or command, and what README says of it."""
    return [(kind, what, content) for _, kind, what, content, _ in _BLOCK.findall(README.read_text(encoding="utf-8"))]


def truth(kind: str, what: str) -> str:
    """Return what a block should hold: a file's content, or the command and what it prints."""
    if kind == "file":
        return (ROOT / what).read_text(encoding="utf-8")
    environment = {**os.environ, "COLUMNS": "80", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    done = subprocess.run(
        what, shell=True, cwd=EXAMPLES, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{what}: exit code {done.returncode}: {done.stderr}")
    lines = [line.rstrip() for line in done.stdout.replace(str(EXAMPLES), "...").splitlines()]
    return "\n".join([f"$ {what}", *lines]).rstrip() + "\n"


def same(said: str, printed: str) -> bool:
    """Tell whether two outputs agree: words and layout exactly, numbers within 2%, times not at all."""
    pairs = zip_longest(said.splitlines(), printed.splitlines(), fillvalue="")
    return all(_same_line(*pair) for pair in pairs)


def _same_line(said: str, printed: str) -> bool:
    ours, theirs = (_SECONDS.sub("TIME", line).split() for line in (said, printed))
    return len(ours) == len(theirs) and all(map(_same_word, ours, theirs))


def _same_word(said: str, printed: str) -> bool:
    if said == printed:
        return True
    numbers = [word.strip("[](),:;") for word in (said, printed)]
    if not all(map(_NUMBER.fullmatch, numbers)):
        return False
    a, b = (float(number.strip("+±%x").replace(",", "")) for number in numbers)
    tiny = max(abs(a), abs(b)) <= 1e-4  # rounding itself, printed
    return tiny or math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=0.011)


def main() -> None:
    """Write README anew, or check it."""
    text, wrong = README.read_text(encoding="utf-8"), 0

    def renew(match: re.Match[str]) -> str:
        nonlocal wrong
        head, kind, what, content, end = match.groups()
        now = truth(kind, what)
        if content != now and (kind == "file" or not same(content, now)):
            wrong += 1
            print(f"README says of {what}:\n{content}\nbut it is:\n{now}")
        return f"{head}{now}{end}"

    renewed = _BLOCK.sub(renew, text)
    if "--check" in sys.argv[1:]:
        sys.exit(wrong > 0)
    README.write_text(renewed, encoding="utf-8")


if __name__ == "__main__":
    main()
