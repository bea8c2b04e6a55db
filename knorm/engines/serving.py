"""What every engine's process does: it answers requests until knorm goes away. Needs no package but the engine's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from knorm.engines.frames import Fields, Junk, pack, read_frame

Part = tuple[Fields, Any]  # fields, and a bytes-like object with numbers
Answer = Callable[[Fields], Iterator[Part]]


class Refusal(Exception):
    """Say why an engine refuses what it is asked for."""


def serve(begin: Callable[[], Answer]) -> None:
    """Answer requests from stdin on what was stdout, until stdin ends; whatever prints goes to stderr.

    Each request is answered by any number of parts, and then by one frame of kind done, refused or failed.

    Args:
        begin: imports the engine, and returns what answers a request.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    source, channel = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    answer: list[Answer] = []
    while True:
        try:
            request, _ = read_frame(lambda count: _exactly(source, count))
        except (EOFError, Junk):
            os._exit(0)  # without waiting for the engine's threads
        try:
            if not answer:
                answer.append(begin())
            for fields, numbers in answer[0](request):
                _write(channel, pack({"kind": "part", **fields}, bytes(numbers)))
            last: Fields = {"kind": "done"}
        except Refusal as refusal:
            last = {"kind": "refused", "reason": str(refusal)}
        except ModuleNotFoundError as error:
            last = {"kind": "missing", "reason": str(error), "module": error.name or ""}
        except Exception as error:
            last = {"kind": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split())[:2000]}
        _write(channel, pack(last))


def _exactly(descriptor: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        more = os.read(descriptor, count - len(data))
        if not more:
            raise EOFError
        data += more
    return bytes(data)


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
