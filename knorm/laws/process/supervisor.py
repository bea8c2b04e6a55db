"""Checks in a process of their own: whatever a target does to it, a result comes of it.

Loads nothing heavy: the catalogue and the target are the worker's.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Generator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from knorm.laws.process.protocol import (
    TOKEN_BYTES,
    Done,
    Frames,
    Junk,
    Message,
    Plan,
    Request,
    Start,
    Wrong,
    new_board,
    write_start,
)
from knorm.laws.results import Result, judged
from knorm.processes import how_ended

LIMIT = 20.0  # seconds for a call
LOADING = 120.0  # for the worker's imports and the target's
LIMITS_IN_ALL = 1000  # for one check, however many calls it makes
IN_A_ROW = 3  # workers lost, after which no more are started
TICK = 0.1
CHUNK = 2**16  # bytes read at a time
MOST_OUTPUT = 2**20  # bytes of each of the target's two streams that are passed on
MARK = "KNORM_WORKER"  # an environment variable of a worker's, which what it starts inherits
MAIN = "from knorm.laws.process.start import main; main()"


class Lost(Exception):
    """Say that a worker died, hangs or sends what is no message; the message says how."""


class _Told(Exception):
    """A traceback of the worker's, as the cause of an error here."""

    def __str__(self) -> str:
        return f"in the worker:\n\n{self.args[0]}"


class Relay:
    """Prints the first MOST_OUTPUT bytes of each of the target's streams to stderr: stdout is knorm's alone."""

    def __init__(self) -> None:
        self._left = {"stdout": MOST_OUTPUT, "stderr": MOST_OUTPUT}

    def write(self, stream: str, data: bytes) -> None:
        """Print `data` of the target's `stream`, "stdout" or "stderr", or drop it, which is said once."""
        left = self._left[stream]
        if left <= 0:
            return
        self._left[stream] -= len(data)
        shown = data[:left]
        if len(data) >= left:
            shown += f"\n[the target's {stream} is cut here, after {MOST_OUTPUT:,} bytes]\n".encode()
        file = sys.stderr
        file.flush()
        if binary := getattr(file, "buffer", None):
            binary.write(shown)
        else:
            file.write(shown.decode("utf-8", "replace"))
        file.flush()


class Worker:
    """Run a process that answers `request`, and hear what it sends; what the target prints goes to `relay`."""

    def __init__(self, request: Request, relay: Relay | None = None) -> None:
        self._relay = relay or Relay()
        token = secrets.token_bytes(TOKEN_BYTES)
        self._frames = Frames(token)
        channel, theirs = os.pipe()
        self._mark, self._before = secrets.token_hex(8), running()
        code = f"import sys; sys.path[:] = {sys.path!r}; {MAIN}"
        try:
            with new_board() as (self.board, board):
                self.process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL if request.quiet else subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=(theirs, board),
                    env={**os.environ, MARK: self._mark},
                    cwd=request.folder,
                    start_new_session=True,  # so that what it starts can be ended with it
                )
                lifeline: Any = self.process.stdin
                with suppress(BrokenPipeError):
                    write_start(lifeline.fileno(), Start(token.hex(), theirs, board, request))
        finally:
            os.close(theirs)
        self._channel = os.fdopen(channel, "rb", buffering=0)
        self._selector = selectors.DefaultSelector()
        for name, pipe in (("", self._channel), ("stdout", self.process.stdout), ("stderr", self.process.stderr)):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                self._selector.register(pipe.fileno(), selectors.EVENT_READ, name)

    def hear(self, limit: float) -> Message:
        """Return the next message.

        Args:
            limit: Seconds in which the worker has to send it or to begin another call.

        Raises:
            Lost: Where the worker ends, does neither for that long, takes LIMITS_IN_ALL of it, or sends junk.
        """
        begin = since = time.monotonic()
        calls = self.board.calls
        while True:
            dead = self.process.poll() is not None
            closed = not self._read(0 if dead else TICK)
            if (message := self._next()) is not None:
                self._read(0)  # what it printed before
                return message
            if dead or closed:
                raise Lost(self._how())
            now = time.monotonic()
            if self.board.calls != calls:
                calls, since = self.board.calls, now
            if now - since > limit:
                raise Lost(f"no answer within {limit:g} s")
            if now - begin > LIMITS_IN_ALL * limit:
                raise Lost(f"no end within {LIMITS_IN_ALL * limit:g} s")

    def _next(self) -> Message | None:
        try:
            return self._frames.next()
        except Junk as junk:
            raise Lost(f"wrote to a file that is knorm's own: {junk}") from None

    def _read(self, seconds: float) -> bool:
        """Read what is there, a chunk of each pipe; whether the channel is still open."""
        for key, _ in self._selector.select(seconds):
            try:
                data = os.read(key.fd, CHUNK)
            except BlockingIOError:
                continue
            if not data:
                self._selector.unregister(key.fd)
            elif key.data:
                self._relay.write(key.data, data)
            else:
                self._frames.feed(data)
        return self._channel.fileno() in self._selector.get_map()

    def _how(self) -> str:
        end = time.monotonic() + 1
        while self.process.poll() is None and time.monotonic() < end:
            self._read(TICK / 10)
        for _ in range(2 * MOST_OUTPUT // CHUNK):  # its last words; what it started may go on for ever
            if not self._selector.get_map() or not self._selector.select(0):
                break
            self._read(0)
        code = self.process.returncode
        if code is None:
            return "closed the files that are not its own"
        return how_ended(code)

    def end(self) -> None:
        """End the worker and what it started, whatever they are doing."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # not its own while a child of its group is there
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        end_marked(self._mark, self._before)
        self._selector.close()
        for pipe in (self._channel, self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def end_marked(mark: str, before: Collection[int] = (), rounds: int = 100) -> None:
    """End the processes that inherited a worker's mark, in whatever session; Linux only, as it reads /proc.

    Args:
        mark: the value of the variable MARK.
        before: processes that are older than the worker.
        rounds: how often to look, at most: some may be starting others.
    """
    wanted = f"{MARK}={mark}".encode()
    for _ in range(rounds):
        environments = {process: _environment_of(process) for process in running() if process not in before}
        for process, environment in environments.items():
            if wanted in environment:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)
        # one that is becoming another program has an empty environment for a moment
        if not any(wanted in environment or environment == [b""] for environment in environments.values()):
            return
        time.sleep(0.01)


def running() -> frozenset[int]:
    """List the processes of this machine; none where there is no /proc."""
    try:
        return frozenset(int(name) for name in os.listdir("/proc") if name.isdecimal())
    except OSError:
        return frozenset()


def _environment_of(process: int) -> list[bytes]:
    """Read the variables that a process began with; none for another user's, and for one that ended."""
    try:
        os.readlink(f"/proc/{process}/exe")  # what ended has none
        return Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


class Supervisor:
    """Run `request` in workers, one after another where they are lost; a call may take `limit` seconds.

    Attributes:
        traits: what the target promises, once the first result is there.
    """

    def __init__(self, request: Request, limit: float = LIMIT) -> None:
        self.request, self.limit = request, limit
        self.expected = dict(request.expected)
        self.traits: Any = None
        self.code = ""
        self.worker: Any = None
        self.relay = Relay()

    def results(self) -> Generator[Result, None, None]:
        """Yield a Result for each check, as they come.

        The check that runs when a worker is lost is refuted, and the next goes on in a fresh one; after three in a row
        the rest is untested.

        Raises:
            ValueError: For a wrong request, and for a target that cannot be loaded.
        """
        lost, reason = 0, ""
        try:
            plan = self._load(self.request)
            for index, entry in enumerate(plan):
                if entry.verdict != "does not apply" and not reason and self.worker is None:
                    reason = self._go_on([later.check for later in plan[index:]])
                if entry.verdict == "does not apply" or reason:
                    yield replace(entry, reason=entry.reason or reason)
                    continue
                result, survived = self._next(entry)
                lost = 0 if survived else lost + 1
                if lost == IN_A_ROW:
                    reason = f"{lost} workers in a row were lost to the checks before"
                yield judged(result, self.expected)
        finally:
            self._end()

    def _load(self, request: Request) -> tuple[Result, ...]:
        self.worker = Worker(request, self.relay)
        try:
            message = self.worker.hear(LOADING)
        except Lost as lost:
            raise ValueError(f"{request.target} cannot be loaded: {lost}") from None
        if isinstance(message, Wrong):
            raise ValueError(message.message) from _Told(message.trace)
        if not isinstance(message, Plan):
            raise ValueError(f"{request.target} cannot be loaded: the worker spoke out of turn")
        self.traits, self.code = message.traits, message.code
        return message.checks

    def _go_on(self, names: list[str]) -> str:
        """Start a fresh worker; returns why that did not work."""
        try:
            self._load(replace(self.request, select=tuple(names)))
        except ValueError as error:
            return f"not loaded again: {error}"
        return ""

    def _next(self, entry: Result) -> tuple[Result, bool]:
        """The result of the check that is under way, and whether the worker can go on."""
        begin = time.monotonic()
        try:
            message = self.worker.hear(self.limit)
            if not isinstance(message, Done) or message.result.check != entry.check:
                raise Lost("the worker spoke out of turn")
            result, survived = message.result, message.survived
        except Lost as lost:
            from knorm.laws.process.worker import last_call

            seconds, survived = time.monotonic() - begin, False
            fields = last_call(self.worker.board, entry.check, str(lost), self.code)
            result = replace(entry, verdict="refuted", seconds=seconds, **fields)
        if not survived:
            self._end()
        return result, survived

    def _end(self) -> None:
        if self.worker is not None:
            self.worker.end()
            self.worker = None
