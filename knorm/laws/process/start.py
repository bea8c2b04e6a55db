"""A worker's first steps, before anything heavy is loaded, and before there is a target in its process."""

from __future__ import annotations

import fcntl
import os
import resource
import secrets
import signal
import sys
import time
from contextlib import suppress
from threading import Thread

from knorm.laws.process.protocol import Board, Message, Request, encode, map_board, read_start, write_all

MOST_COPIES_DEEP = 2  # a pool's process may start one of its own


class Sender:
    """Hold a worker's end of the channel to its parent: the descriptor `channel`, and the `token` of its frames."""

    def __init__(self, channel: int, token: bytes) -> None:
        self._channel, self._token, self._process = channel, token, os.getpid()

    def __call__(self, message: Message) -> None:
        """Send a message; a copy of the process ends instead."""
        self.end_copy()
        write_all(self._channel, encode(message, self._token))

    def end_copy(self) -> None:
        """End a copy of the process that the target made and that came back to knorm's code: one worker goes on."""
        if os.getpid() != self._process:
            os._exit(1)


def begin() -> tuple[Sender, Board, Request]:
    """Read from stdin what is to be done, and put out of the target's reach what the parent listens to.

    Returns:
        The way to send messages, the board and the request.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _limit_copies()
    start = read_start(0)
    board = map_board(start.board)
    os.close(start.board)
    Thread(target=_follow_parent, args=(_hidden(0), os.getppid()), daemon=True).start()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if nothing:
        os.close(nothing)
    with suppress(Exception):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return Sender(_hidden(start.channel), bytes.fromhex(start.token)), board, start.request


def _hidden(descriptor: int) -> int:
    """Move a descriptor to a number that nobody expects; programs that the target starts do not inherit it."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(most, 2**16) if most != resource.RLIM_INFINITY else 2**16
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, most // 2 + secrets.randbelow(max(1, most // 2 - 16)))
    os.close(descriptor)
    return moved


def _limit_copies() -> None:
    """End a copy of a copy before it is copied too: a target that forks in every call would fill the machine."""
    depth = 0

    def deeper() -> None:
        nonlocal depth
        depth += 1

    def end_the_deepest() -> None:
        if depth >= MOST_COPIES_DEEP:
            os._exit(1)

    os.register_at_fork(before=end_the_deepest, after_in_child=deeper)


def _follow_parent(lifeline: int, parent: int) -> None:
    """End with the parent, whose end of this pipe closes when it dies."""
    try:
        os.read(lifeline, 1)
    except OSError:  # closed by the target
        while os.getppid() == parent:
            time.sleep(1)
    os._exit(1)


def main() -> None:
    """Live a worker's life."""
    send, board, request = begin()
    from knorm.laws.process.worker import serve

    serve(send, board, request, send.end_copy)
    os._exit(0)  # without waiting for the target's threads
