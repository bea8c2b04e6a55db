"""Checks in a process of their own: whatever a target does to it, a result comes of it.

Loads nothing heavy: the catalogue and the target are the worker's. What is passed on are a Result's fields.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread
from types import ModuleType
from typing import Any

LIMIT = 20.0  # seconds for a call
LOADING = 120.0  # for the worker's imports and the target's
IN_A_ROW = 3  # workers lost, after which no more are started
TICK = 0.1


class Board(ctypes.Structure):
    """Memory that outlives a worker: what it was doing.

    calls        begun so far: a sign of life
    given        the call being made, in words
    call, size   its tensors, as laws.worker packs them
    """

    _fields_ = (
        ("calls", ctypes.c_uint64),
        ("given", ctypes.c_char * 1024),
        ("size", ctypes.c_uint64),
        ("call", ctypes.c_ubyte * 2**14),
    )


@dataclass(frozen=True)
class Request:
    """What to check: the arguments of `knorm check`, as they were given.

    target, kind   what adapters.load_target takes
    like           "knorm" for all that its own core promises, or None
    traits         NAME=VALUE, each in front of what is promised otherwise
    select         names of checks or families; None: all
    expected       check -> why it may fail
    quiet          the target's stdout is dropped
    verbose        tracebacks of what knorm itself stumbled over
    """

    target: str
    kind: str | None = None
    like: str | None = None
    traits: tuple[str, ...] = ()
    select: tuple[str, ...] | None = None
    expected: tuple[tuple[str, str], ...] = ()
    profile: str = "quick"
    seed: int = 0
    device: str = "cpu"
    quiet: bool = False
    verbose: bool = False


class Lost(Exception):
    """A worker died or hangs; the message says how."""


class _Told(Exception):
    """A traceback of the worker's, as the cause of an error here."""

    def __str__(self) -> str:
        return f"in the worker:\n\n{self.args[0]}"


def _work(pipe: Connection, board: Any, request: Request) -> None:
    """A worker's life, from before anything heavy is loaded."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    Thread(target=_follow_parent, daemon=True).start()
    if request.quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with suppress(Exception):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    from knorm.laws.process.worker import serve

    serve(pipe.send, board, request)
    os._exit(0)  # without waiting for the target's threads


def _follow_parent() -> None:
    parent: Any = parent_process()
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _without_main() -> Iterator[None]:
    """A spawned process runs its parent's script again; with an empty one it does not."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Worker:
    """A process that loads a target and checks it, and what is heard from there."""

    def __init__(self, request: Request) -> None:
        context = get_context("spawn")
        self.board: Any = context.RawValue(Board)
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(theirs, self.board, request))
        with _without_main():
            self.process.start()
        theirs.close()  # so that its end is noticed

    def hear(self, limit: float) -> Any:
        """The next message. Raises Lost where the worker ends, or neither sends nor calls for `limit` seconds."""
        calls, since = self.board.calls, time.monotonic()
        while not self.pipe.poll(TICK):
            if not self.process.is_alive() and not self.pipe.poll():
                raise Lost(self._how())
            if self.board.calls != calls:
                calls, since = self.board.calls, time.monotonic()
            elif time.monotonic() - since > limit:
                raise Lost(f"no answer within {limit:g} s")
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            raise Lost(self._how()) from None

    def _how(self) -> str:
        end = time.monotonic() + 1
        while self.process.is_alive() and time.monotonic() < end:  # join() would wait for ever if its files are closed
            time.sleep(TICK / 10)
        code = self.process.exitcode
        if code is None:
            return "closed the files that are not its own"
        if code >= 0:
            return f"ended the interpreter with exit code {code}"
        name = {one.value: one.name for one in signal.Signals}.get(-code, "unknown")
        hint = ", as when memory runs out" if name == "SIGKILL" else ""
        return f"the process ended with signal {-code} ({name}){hint}"

    def end(self) -> None:
        """Whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Supervisor:
    """Runs a request in workers, one after another where they are lost.

    traits   what the target promises, once the first result is there
    """

    def __init__(self, request: Request, limit: float = LIMIT) -> None:
        self.request, self.limit = request, limit
        self.expected = dict(request.expected)
        self.traits: dict[str, Any] = {}
        self.code = ""
        self.worker: Any = None

    def results(self) -> Generator[dict[str, Any], None, None]:
        """A Result's fields for each check, as they come.

        The check that runs when a worker is lost is refuted, and the next goes on in a fresh one; after three in a row
        the rest is untested. Raises ValueError for a wrong request and for a target that cannot be loaded.
        """
        lost, reason = 0, ""
        try:
            plan = self._load(self.request)
            for index, entry in enumerate(plan):
                if entry["verdict"] != "does not apply" and not reason and self.worker is None:
                    reason = self._go_on([later["check"] for later in plan[index:]])
                if entry["verdict"] == "does not apply" or reason:
                    yield {**entry, "reason": entry["reason"] or reason}
                    continue
                result, survived = self._next(entry)
                lost = 0 if survived else lost + 1
                if lost == IN_A_ROW:
                    reason = f"{lost} workers in a row were lost to the checks before"
                yield result
        finally:
            self._end()

    def _load(self, request: Request) -> list[dict[str, Any]]:
        self.worker = Worker(request)
        try:
            kind, told = self.worker.hear(LOADING)
        except Lost as lost:
            raise ValueError(f"{request.target} cannot be loaded: {lost}") from None
        if kind == "wrong":
            message, trace = told
            raise ValueError(message) from _Told(trace)
        self.traits, self.code = told["traits"], told["code"]
        plan: list[dict[str, Any]] = told["checks"]
        return plan

    def _go_on(self, names: list[str]) -> str:
        """Start a fresh worker; returns why that did not work."""
        try:
            self._load(replace(self.request, select=tuple(names)))
        except ValueError as error:
            return f"not loaded again: {error}"
        return ""

    def _next(self, entry: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """The result of the check that is under way, and whether the worker can go on."""
        begin, survived = time.monotonic(), True
        try:
            _, result = self.worker.hear(self.limit)
            survived = "CUDA error" not in (result["counterexample"] or "")  # after one, all that follow raise it too
        except Lost as lost:
            from knorm.laws.process.worker import last_call

            seconds, survived = time.monotonic() - begin, False
            found = last_call(self.worker.board, entry["check"], str(lost), self.code)
            result = {**entry, "verdict": "refuted", "seconds": seconds, **found}
        if not survived:
            self._end()
        if result["verdict"] == "refuted" and result["check"] in self.expected:
            result = {**result, "verdict": "expected failure", "reason": self.expected[result["check"]]}
        return result, survived

    def _end(self) -> None:
        if self.worker is not None:
            self.worker.end()
            self.worker = None
