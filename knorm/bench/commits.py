"""Two commits of knorm against each other: a worktree, fresh pairs of processes, and their turns.

A round is a fresh pair of processes, one of each commit. They generate in turns, never at the same time. Two processes
of the same code differ by more than two blocks of one process do (where memory lies, for one), so a round is the unit:
its log-ratio is the mean over its blocks.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from knorm.bench.counters import Counters
from knorm.bench.latency import METRICS, Sample, log_ratio, run_block, without_interruptions
from knorm.git import git
from knorm.paths import PACKAGE

_WORKER = Path(__file__).with_name("worker.py")
_PATIENCE = 10.0  # seconds for a worker to end by itself


def find_checkout() -> Path:
    """Find the git checkout that knorm runs from, else that of the current folder. Raises ValueError without one."""
    for folder in (PACKAGE.parent, Path.cwd()):
        with suppress(OSError, ValueError):
            top = Path(git(folder, "rev-parse", "--show-toplevel"))
            if (top / "knorm" / "__init__.py").is_file():
                return top
    raise ValueError(
        f"--against compares two commits, but neither {PACKAGE.parent} nor the current folder is a git checkout of "
        "knorm: run it in one"
    )


def resolve(root: Path, ref: str) -> str:
    """Resolve a reference to a commit.

    Args:
        root: the checkout.
        ref: a branch, a tag or a commit.

    Returns:
        Its 40 digits.

    Raises:
        ValueError: it names none.
    """
    try:
        return git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    except ValueError:
        raise ValueError(
            f"--against {ref}, but {root} has no commit, branch or tag of that name: git fetch it, or see git log"
        ) from None


def changed_files(root: Path) -> int:
    """Count the files of the package in the checkout `root` that differ from its last commit, new ones included."""
    return len(git(root, "status", "--porcelain", "--", "knorm").splitlines())


@contextmanager
def _terminable() -> Iterator[None]:
    """Being told to end (a cancelled CI job) cleans up as Ctrl-C does."""

    def end(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    was = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, was)


@contextmanager
def worktree(root: Path, commit: str) -> Iterator[Path]:
    """Check a commit out into a temporary folder, which is removed at the end, whatever happens (but for SIGKILL).

    Args:
        root: the checkout.
        commit: its 40 digits.

    Yields:
        The folder.

    Raises:
        ValueError: git cannot.
    """
    with _terminable(), tempfile.TemporaryDirectory(prefix="knorm-against-") as temporary:
        folder = Path(temporary) / "tree"
        try:
            try:
                git(root, "worktree", "add", "--detach", "--force", str(folder), commit)
            except ValueError as error:
                raise ValueError(f"commit {commit[:12]} does not build: {error}") from None
            if not (folder / "knorm" / "__init__.py").is_file():
                raise ValueError(f"commit {commit[:12]} does not build: it has no knorm/__init__.py")
            yield folder
        finally:
            with suppress(ValueError):
                git(root, "worktree", "remove", "--force", str(folder))
            with suppress(ValueError):
                git(root, "worktree", "prune")


@dataclass(frozen=True)
class Setup:
    """Hold what both commits are to do, as their processes receive it.

    Attributes:
        model: a folder.
        dtype: of the weights, as torch names it: "float32".
        device: "cpu", "cuda:1".
        threads: of a CPU.
        prompts: ids [batch][tokens] and new_tokens each.
        policies: fields of each Policy.
    """

    model: str
    dtype: str
    device: str
    threads: int
    prompts: tuple[dict[str, Any], ...]
    policies: tuple[dict[str, Any], ...]

    @property
    def new_tokens(self) -> list[int]:
        """Return how many tokens each prompt is followed by."""
        return [prompt["new_tokens"] for prompt in self.prompts]


class Worker:
    """Run a process of one commit, which generates on command (worker.py).

    Args:
        tree: where the commit is checked out.
        setup: what it loads before it answers.
        name: what messages call it.
    """

    def __init__(self, tree: Path, setup: Setup, name: str) -> None:
        self.name = name
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed in end)
        package = tree / "knorm"
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(package)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            encoding="utf-8",
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,  # Ctrl-C is the parent's to answer
        )
        self._send(asdict(setup))

    def wait_until_ready(self) -> None:
        """Raises ValueError, with the last line it said, for a commit that does not import or set up."""
        with suppress(_Gone):
            self._hear()
            return
        raise ValueError(f"{self.name} does not build or import: {self._last_line()}")

    def ask(self, what: str, arm: int, number: int) -> Any:
        """Have the process do one thing, and wait for it.

        Args:
            what: "prompt", "steps", or anything else to count.
            arm: index of the policy.
            number: of the prompt; for "steps", how many.

        Returns:
            What it answers: seconds of the prompt, or of each step, or the fields of Counters.

        Raises:
            ValueError: the process is gone; with the last line it said.
        """
        try:
            self._send([what, arm, number])
            return self._hear()
        except _Gone:
            raise ValueError(f"the process of {self.name} died: {self._last_line()}") from None

    def _send(self, message: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # its end is heard next

    def _hear(self) -> Any:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise _Gone

    def _last_line(self) -> str:
        self.process.wait(_PATIENCE)
        self.said.seek(0)
        lines = [line.strip() for line in self.said if line.strip()]
        return lines[-1] if lines else f"exit code {self.process.returncode}, without a word"

    def end(self) -> None:
        """End the process, whatever it is doing."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with suppress(OSError):
                    pipe.close()
        self.process.terminate()
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.said.close()


class _Gone(Exception):
    """A worker closed its pipe."""


@dataclass(frozen=True)
class _Distant:
    """One arm of a worker, as latency.run_block wants it."""

    worker: Worker
    arm: int

    def prompt(self, index: int) -> float:
        return float(self.worker.ask("prompt", self.arm, index))

    def steps(self, count: int) -> list[float]:
        return [float(step) for step in self.worker.ask("steps", self.arm, count)]


@dataclass
class Found:
    """Hold what the rounds gave, by policy in the order of Setup.

    logs       metric -> a log-ratio a round, of the new commit over the old
    old, new   counters
    interrupted   steps that count as 1.5 times their usual time
    """

    logs: list[dict[str, list[float]]] = field(default_factory=list)
    old: list[Counters] = field(default_factory=list)
    new: list[Counters] = field(default_factory=list)
    interrupted: int = 0


def against(
    trees: tuple[Path, Path],
    names: tuple[str, str],
    setup: Setup,
    *,
    rounds: int,
    blocks: int,
    on_block: Callable[[], None] = lambda: None,
) -> Found:
    """Time the old tree's knorm and the new one's in fresh pairs of processes.

    A block of each policy is run first and discarded.

    Args:
        trees: the old one and the new one.
        names: what errors call them.
        setup: model, prompts and policies of both.
        rounds: how many pairs of processes.
        blocks: of each policy, in each round.
        on_block: called after each block.

    Returns:
        Log-ratios and counters, by policy.

    Raises:
        ValueError: a commit that does not import, or whose process dies; the message names it.
    """
    outcome = Found()
    pairs: list[list[list[Sample]]] = [[] for _ in setup.policies]
    longest = max(range(len(setup.prompts)), key=lambda index: len(setup.prompts[index]["ids"][0]))
    for number in range(rounds):
        with ExitStack() as stack:
            pair = []
            for place in (number % 2, 1 - number % 2):  # who is started first takes turns too
                pair.append((place, Worker(trees[place], setup, names[place])))
                stack.callback(pair[-1][1].end)
            old, new = (worker for _, worker in sorted(pair, key=lambda placed: placed[0]))
            for worker in (old, new):
                worker.wait_until_ready()
            for policy in range(len(setup.policies)):
                if number == 0:
                    outcome.old.append(_counters(old.ask("count", policy, longest)))
                    outcome.new.append(_counters(new.ask("count", policy, longest)))
                arms = _Distant(old, policy), _Distant(new, policy)
                run_block(arms, setup.new_tokens)
                for block in range(blocks):
                    pairs[policy].append(run_block(arms, setup.new_tokens, flip=bool((number + block) % 2)))
                    on_block()
    for samples in pairs:
        calm, interrupted = without_interruptions(samples)
        outcome.interrupted += interrupted
        parts = [calm[start : start + blocks] for start in range(0, rounds * blocks, blocks)]
        outcome.logs.append(
            {m: [statistics.fmean(log_ratio(b, a, m) for a, b in part) for part in parts] for m in METRICS}
        )
    return outcome


def _counters(fields: Mapping[str, Any]) -> Counters:
    return Counters(**{**fields, "retained": tuple(fields["retained"])})


def describe(root: Path, changed: int) -> str:
    """Describe the new side in words: the commit that `root` is at, and that `changed` files differ from it."""
    commit = git(root, "rev-parse", "--short=12", "HEAD")
    files = "1 file" if changed == 1 else f"{changed} files"
    return f"the current tree ({commit}{f' and changes in {files}' if changed else ''})"
