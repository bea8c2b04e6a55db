"""Start engines out of a process that has imported one: a fork imports nothing anew, and was asked nothing before.

Both sides stand here: `serve_forks` runs in the engine's Python, `Nursery` in knorm's. Importing vLLM takes several
times as long as loading a small model.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence

POSSIBLE = sys.platform == "linux"  # /proc tells how many threads there are: what has several is not forked
_MOST = 8192  # bytes of a request: the current folder
_PASSING = ("PYTEST_", "KNORM_")  # variables that no engine reads: where these alone differ, a nursery serves on


def serve_forks(prepare: Callable[[], None], main: Callable[[], None]) -> None:
    """Fork for each request on the socket that is stdin, until it is closed and the last fork has ended.

    A request is the folder to run in, with four descriptors: stdin, stdout and stderr of the fork, and a pipe for its
    exit code. The answer is its process number; 0 where none is forked, since there are threads.

    Args:
        prepare: imports the engine. Where it raises, this process ends: one that is started without says why.
        main: what a fork runs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    prepare()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, int] = {}
    heard = {line.fileno(), woken}
    while running or line.fileno() in heard:
        ready, _, _ = select.select([*heard], [], [])
        if woken in ready:
            os.read(woken, _MOST)
            _tell_ends(running)
        if line.fileno() not in ready:
            continue
        folder, given, *_ = socket.recv_fds(line, _MOST, 4)
        if not folder:
            heard.remove(line.fileno())
            continue
        alone = len(os.listdir("/proc/self/task")) == 1
        pid = os.fork() if alone else 0
        if alone and not pid:
            _become(main, folder, given, [line.fileno(), woken, wake, *running.values()])
        if pid:
            with contextlib.suppress(OSError):  # it may have done so itself, and ended
                os.setpgid(pid, pid)  # before anybody is told of a group that could be killed
        line.send(struct.pack("i", pid))
        for descriptor in given[: 3 if pid else 4]:
            os.close(descriptor)
        if pid:
            running[pid] = given[3]
    os._exit(0)


def _tell_ends(running: dict[int, int]) -> None:
    """Write the exit code of each fork that has ended, and forget it."""
    for pid in [*running]:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            pipe = running.pop(pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(pipe, struct.pack("i", os.waitstatus_to_exitcode(status)))
            os.close(pipe)


def _become(main: Callable[[], None], folder: bytes, given: Sequence[int], foreign: Sequence[int]) -> None:
    """Run `main` in this fork, with streams of its own, in a process group of its own; does not return."""
    code = 1
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for target, descriptor in enumerate(given[:3]):
            os.dup2(descriptor, target)
        for descriptor in {*given, *foreign}:
            os.close(descriptor)
        os.chdir(folder)
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


class Forked:
    """Hold a process that a nursery started, in what an engine's process needs of subprocess.Popen.

    Attributes:
        returncode: None until its end was seen.

    Args:
        pid: its number, and that of its process group.
        stdin: descriptor of what is written to it.
        stdout: descriptor of what it answers.
        ended: descriptor on which its exit code will come.
    """

    def __init__(self, pid: int, stdin: int, stdout: int, ended: int) -> None:
        self.pid, self.stdin, self.stdout = pid, os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")
        self.returncode: int | None = None
        self._ended = os.fdopen(ended, "rb")

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for its end.

        Args:
            timeout: seconds.

        Returns:
            The exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            heard = select.poll()
            heard.register(self._ended, select.POLLIN)
            if not heard.poll(1000 * timeout) or (not (said := self._ended.read(4)) and self._runs(timeout)):
                raise subprocess.TimeoutExpired("a fork", timeout)
            self.returncode = struct.unpack("i", said)[0] if said else -signal.SIGKILL
            self._ended.close()
        return self.returncode

    def _runs(self, timeout: float) -> bool:
        """Tell whether it outlives its nursery, which was killed, by so many seconds."""
        try:
            watched = os.pidfd_open(self.pid)
        except OSError:
            return False
        heard = select.poll()
        heard.register(watched, select.POLLIN)
        runs = not heard.poll(1000 * timeout)
        os.close(watched)
        return runs


class Nursery:
    """Hold a process that has imported an engine, and forks.

    Args:
        command: what to start.
        environment: all of its variables, which are its forks' too.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, contextlib.ExitStack() as undone:
            undone.callback(self.line.close)
            self.process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env=dict(environment), start_new_session=True,
            )  # fmt: skip
            undone.pop_all()

    def fork(self, log: int, limit: float) -> Forked | None:
        """Start a fork.

        Args:
            log: descriptor of what its stderr is written to.
            limit: seconds that it may take; importing the engine is part of the first one.

        Returns:
            The fork; None where there is none, whatever the reason.
        """
        pipes = [os.pipe() for _ in range(3)]
        (their_in, our_in), (our_out, their_out), (our_end, their_end) = pipes
        ours, pid = (our_in, our_out, our_end), 0
        self.line.settimeout(limit)
        try:
            socket.send_fds(self.line, [os.fsencode(os.getcwd())], [their_in, their_out, log, their_end])
            said = self.line.recv(4)
            pid = self._seen(struct.unpack("i", said)[0]) if said else 0
        except OSError:
            pass
        finally:  # also where somebody interrupts it
            for descriptor in (their_in, their_out, their_end, *(() if pid else ours)):
                os.close(descriptor)
        return Forked(pid, *ours) if pid else None

    def _seen(self, pid: int) -> int:
        """Return `pid`, or 0 where that is no process of the nursery's session: it has numbers of its own."""
        try:
            return pid if os.getsid(pid) == self.process.pid else 0
        except ProcessLookupError:
            return pid  # it has ended, and its exit code is told

    def close(self) -> None:
        """Let it end when its forks have."""
        self.line.close()

    def kill(self) -> None:
        """End it at once; its forks go on."""
        self.line.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it was started through too
        self.process.wait()


_nurseries: dict[object, Nursery] = {}  # one at most: each has as much memory as the engine's modules take
_closed: list[Nursery] = []  # which end when their forks have
_without: set[object] = set()  # keys of what could not be forked
_one_at_a_time = threading.Lock()


def forked(command: Sequence[str], environment: Mapping[str, str], log: int, limit: float) -> Forked | None:
    """Fork an engine's process from the one nursery that is kept, which is started where there is none for `command`.

    Args:
        command: what starts a nursery.
        environment: all variables of the engine.
        log: descriptor of what is written to stderr.
        limit: seconds until it is given up.

    Returns:
        The process; None where it is to be started without, now and from now on: what is wrong is seen there.
    """
    alike = sorted(item for item in environment.items() if not item[0].startswith(_PASSING))
    key = (os.getpid(), *command, *alike)  # a fork of this process has no nursery
    with _one_at_a_time:
        if key in _without:
            return None
        _closed[:] = [nursery for nursery in _closed if nursery.process.poll() is None]
        process = None
        try:
            if key not in _nurseries:
                end_nurseries()
                _nurseries[key] = Nursery(command, environment)
            process = _nurseries[key].fork(log, limit)
        except (OSError, ValueError):  # there is no such interpreter
            pass
        except BaseException:  # what was asked for may come yet
            _kill(key)
            raise
        if process is None:
            _without.add(key)
            _kill(key)
        return process


def _kill(key: object) -> None:
    if key in _nurseries:
        _nurseries.pop(key).kill()


@atexit.register
def end_nurseries() -> None:
    """Let go of what would start more engines; what it started goes on."""
    while _nurseries:
        key, nursery = _nurseries.popitem()
        if isinstance(key, tuple) and key[0] == os.getpid():
            nursery.close()
            _closed.append(nursery)
