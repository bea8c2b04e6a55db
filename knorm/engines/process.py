"""An engine's process, seen from knorm: started, asked, limited in time, and ended; whatever becomes of it is said."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from knorm.engines.forks import POSSIBLE, Forked, forked
from knorm.engines.frames import Fields, Junk, pack, read_frame
from knorm.paths import PACKAGE
from knorm.processes import how_ended

LIMIT = 300.0  # seconds for an answer
PYTHON = "KNORM_ENGINE_PYTHON"  # an environment variable: the interpreter that has the engines, if it is another
_CHUNK = 2**20  # bytes read at a time
_MOST_LOG, _LAST_LINES = 4000, 10  # bytes of the log's end that are looked at, and lines
_MOST_SAID = 300  # characters of it that are shown
_FOLDERS = re.compile(r"/[\w./+-]*/(?=[\w.-]+:\d+:)")  # of a source file, where somebody built the engine
_TELLING = re.compile(r"assert|error|fatal|abort", re.IGNORECASE)

# A package that is knorm in name and place alone, so that another Python finds these modules and nothing else of ours.
_MAIN = """
import sys, types
for name, folder in (("knorm", {package!r}), ("knorm.engines", {engines!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from knorm.engines.{module} import main
"""
_RUNS = "main()\n"
_FORKS = """
from knorm.engines.{module} import prepare
from knorm.engines.forks import serve_forks
serve_forks(prepare, main)
"""


@cache
def version_in(python: str | None, distribution: str) -> str | None:
    """Ask an interpreter for the version of a package.

    Args:
        python: the interpreter; None for this one.
        distribution: the name by which the package is installed.

    Returns:
        The version; None where it is not installed, or the interpreter does not answer.

    Example:
        >>> version_in(None, "knorm-has-no-such-package") is None
        True
    """
    code = f"from importlib import metadata; print(metadata.version({distribution!r}))"
    try:
        ended = subprocess.run([python or sys.executable, "-c", code], capture_output=True, text=True, timeout=60)  # noqa: PLW1510
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip() or None


class EngineError(ValueError):
    """Say in one line what an engine did in place of answering."""


class EngineRefused(EngineError):
    """Say what an engine refuses, with the reason that it gives."""


class EngineLost(EngineError):
    """Say that an engine died, hangs or sends what is no answer."""


class EngineProcess:
    """Run an engine in a process of its own.

    Args:
        name: of the engine, for messages.
        module: of knorm.engines, whose `main` serves it.
        install: what to type where it is not installed.
        python: an interpreter that has the engine; by default the variable PYTHON's, else this one.
        limit: seconds for an answer.
        environment: variables beside those of this process.
        forks: its module has a `prepare`, which imports the engine, and takes long: it is started from a process that
            has done so, where there is or can be one.

    Attributes:
        answering: a request was sent whose answer was not heard to its end.

    Raises:
        EngineError: the interpreter cannot be started.
    """

    def __init__(
        self,
        name: str,
        module: str,
        install: str,
        *,
        python: str | None = None,
        limit: float = LIMIT,
        environment: Mapping[str, str] | None = None,
        forks: bool = False,
    ) -> None:
        self.name, self.install, self.limit = name, install, limit
        self.python = python or os.environ.get(PYTHON) or sys.executable
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        code = _MAIN.format(package=str(PACKAGE), engines=str(PACKAGE / "engines"), module=module)
        variables = {**os.environ, "GGML_NO_BACKTRACE": "1", **(environment or {})}
        process: subprocess.Popen[bytes] | Forked | None = None
        if forks and POSSIBLE:
            command = [self.python, "-c", code + _FORKS.format(module=module)]
            process = forked(command, variables, self._log.fileno(), limit)
        try:
            process = process or subprocess.Popen(
                [self.python, "-c", code + _RUNS],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=variables,
                start_new_session=True,  # so that what it starts can be ended with it
            )
        except (OSError, ValueError) as error:
            self._log.close()
            why = getattr(error, "strerror", None) or error
            raise EngineError(f"{name}: no process of {self.python} can be started: {why}") from None
        assert process.stdin
        assert process.stdout
        self.process, self._stdin, self._stdout = process, process.stdin, process.stdout
        os.set_blocking(self._stdout.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout.fileno(), selectors.EVENT_READ)
        self._waiting, self.answering = bytearray(), False

    @property
    def running(self) -> bool:
        """Tell whether the process has not ended."""
        return self.process.poll() is None

    def begin(self, ask: str, **fields: Any) -> None:
        """Send a request, so that the engine sets to work; its parts are to be heard before the next one.

        Args:
            ask: what is asked for.
            **fields: what the request says.
        """
        assert not self.answering, "the answer to the request before has not been heard to its end"
        self.answering = True
        try:
            self._stdin.write(pack({"ask": ask, **fields}))
            self._stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._lost("before it was asked") from None

    def parts(self) -> Iterator[tuple[Fields, bytes]]:
        """Generate the parts of the answer to the request that was sent.

        Yields:
            The fields of each, and the numbers behind them.

        Raises:
            EngineRefused: the engine says no, with its reason.
            EngineLost: it dies, hangs, or sends something else.
        """
        while True:
            end = time.monotonic() + self.limit
            try:
                fields, numbers = read_frame(lambda count, end=end: self._exactly(count, end))  # type: ignore[misc]
            except Junk as junk:
                raise EngineLost(f"{self.name} answers with {junk}{self._tail()}") from None
            kind = fields.pop("kind", None)
            if kind == "part":
                yield fields, numbers
                continue
            self.answering = False
            if kind == "done":
                return
            self._raise(str(kind), fields)

    def ask(self, ask: str, **fields: Any) -> Fields:
        """Send a request as begin takes it, `ask` and `fields`, and return the fields of the one part of its answer.

        Raises what parts raises.
        """
        self.begin(ask, **fields)
        return self.heard()

    def heard(self) -> Fields:
        """Hear the answer to the request that was sent to its end, and return the fields of its one part.

        Raises what parts raises.
        """
        answers = list(self.parts())
        return answers[0][0] if answers else {}

    def _raise(self, kind: str, fields: Fields) -> None:
        reason = str(fields.get("reason", "no reason given"))
        if kind == "missing":
            module = fields.get("module")
            raise EngineError(
                f"{self.name} is not installed: {self.python} has no module {module!r}; {self.install}, "
                f"or name a Python that has it by --engine-python or {PYTHON}"
            )
        if kind == "refused":
            raise EngineRefused(f"{self.name} refuses: {reason}")
        raise EngineLost(f"{self.name} failed: {reason}{self._tail()}")

    def _exactly(self, count: int, end: float) -> bytes:
        while len(self._waiting) < count:
            left = end - time.monotonic()
            if left <= 0:
                self.close()
                raise EngineLost(f"{self.name} gave no answer within {self.limit:g} s, and was ended")
            if not self._selector.select(left):
                continue
            data = os.read(self._stdout.fileno(), _CHUNK)
            if not data:
                raise self._lost("while it was to answer")
            self._waiting += data
        data = bytes(self._waiting[:count])
        del self._waiting[:count]
        return data

    def _lost(self, when: str) -> EngineLost:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return EngineLost(f"{self.name} closed its pipe {when}{self._tail()}")
        return EngineLost(f"{self.name} died {when}: {how_ended(code)}{self._tail()}")

    def _tail(self) -> str:
        """Return the last words of the log, if there are any: an assertion or an error, else its last line."""
        if self._log.closed:
            return ""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _MOST_LOG))
        said = [" ".join(line.split()) for line in self._log.read().decode("utf-8", "replace").splitlines()]
        lines = [line for line in said if line][-_LAST_LINES:]
        telling = [line for line in lines if _TELLING.search(line)] or lines
        return f"; its log ends: {_FOLDERS.sub('', telling[-1])[-_MOST_SAID:]}" if telling else ""

    def close(self) -> None:
        """End the process and what it started, whatever they are doing."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        self._selector.close()
        self._log.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
