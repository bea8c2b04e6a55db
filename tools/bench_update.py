"""How many commands, and how long, is the way through an intended change? python tools/bench_update.py [--write]

A clone of this repository gets one: counts are rounded down instead of up. After its commit, only what knorm prints is
typed: the hint of `verify`, that of `record`, the command of a refusal. Then `verify` says that all holds. With --write
the result replaces what docs/goldens.md has of it. Exit code 1: more than four commands, or 60 s of waiting.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from marked import rewrite

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "goldens.md"
UP = "return -(-ratio.numerator * length // ratio.denominator)"
DOWN = "return max(1, ratio.numerator * length // ratio.denominator)"
MOST_COMMANDS, MOST_SECONDS, TRIES = 4, 60.0, 8
REASON = "counts are rounded down"


def typed(clone: Path, command: str) -> tuple[int, str, float]:
    """Run a command in the clone; its exit code, what it printed, and seconds."""
    words = shlex.split(command)
    assert words[0] == "knorm", command
    environment = {**os.environ, "PYTHONPATH": str(clone), "COLUMNS": "200"}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr, time.perf_counter() - begin


def git(clone: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=knorm", "-c", "user.email=knorm@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=clone, check=True, capture_output=True)


def hint(said: str) -> str | None:
    """The last command that was printed; its reason is filled in."""
    found = re.findall(r"(knorm golden (?:record|accept) .*)", said)
    return found[-1].replace('"..."', f'"{REASON}"').replace("'...'", f"'{REASON}'").rstrip(".") if found else None


def changed(clone: Path) -> None:
    file = clone / "knorm" / "policy.py"
    before = file.read_text(encoding="utf-8")
    assert before.count(UP) == 1
    file.write_text(before.replace(UP, DOWN), encoding="utf-8")
    git(clone, "commit", "-qam", REASON)


def way(clone: Path) -> list[tuple[str, int, float]]:
    """Follow what is printed from the first `verify` to the one that holds: (command, exit code, seconds)."""
    taken, command = [], "knorm golden verify"
    while len(taken) < TRIES:
        code, said, seconds = typed(clone, command)
        taken.append((command, code, seconds))
        if code == 0 and command == "knorm golden verify":
            return taken
        if code == 0 and " accept " in command:
            command = "knorm golden verify"
        elif (following := hint(said)) and following != command:
            command = following
        else:
            raise SystemExit(f"a dead end: {command} ended with {code}:\n{said}")
    raise SystemExit(f"no end after {TRIES} commands: {taken}")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="knorm-") as name:
        clone = Path(name) / "knorm"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        changed(clone)
        taken = way(clone)
    *needed, confirmed = taken
    seconds, commands = sum(seconds for _, _, seconds in needed), len(needed)
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{name} {metadata.version(name).partition('+')[0]}" for name in ("torch", "transformers"))
    held = commands <= MOST_COMMANDS and seconds <= MOST_SECONDS
    lines = [
        f"`python tools/bench_update.py`: {cores} cores ({platform.machine()}), Python {platform.python_version()}, "
        f"{versions}. Counts are rounded down in knorm itself, and only what it prints is typed.",
        "", "| command | exit code | s |", "| --- | --- | --- |",
        *(f"| `{shortened(command)}` | {code} | {took:.1f} |" for command, code, took in taken),
        "",
        f"{commands} commands and {seconds:.0f} s of waiting; {confirmed[2]:.0f} s more confirm it. Floor, at most "
        f"{MOST_COMMANDS} commands and {MOST_SECONDS:.0f} s: {'held' if held else 'MISSED'}",
    ]  # fmt: skip
    text = "\n".join(lines)
    print(text)
    if "--write" in sys.argv:
        rewrite(DOCUMENT, "update", text)
    return 0 if held else 1


def shortened(command: str) -> str:
    """Cut a long list of permissions."""
    words = shlex.split(command)
    return command if len(command) <= 120 else f"{shlex.join(words[:4])} ... ({len(words)} words, as printed)"


if __name__ == "__main__":
    sys.exit(main())
