"""A process that can write nowhere but under one folder, for attacks on knorm: Linux' Landlock, and limits.

What is restricted stays so until the process ends, its children included; no privilege is needed.
"""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # landlock system calls, the same numbers on every architecture
_NO_NEW_PRIVILEGES = 38
_WRITES = {  # access rights of the first version that has them
    1: sum(1 << bit for bit in (1, *range(4, 13))),  # write, remove, make: all but execute and read
    2: 1 << 13,  # move between folders
    3: 1 << 14,  # truncate
}
_MEMORY, _FILE = 8 * 2**30, 64 * 2**20  # bytes of address space beyond today's, and of one file


class _Rules(ctypes.Structure):
    _fields_ = (("handled", ctypes.c_uint64),)


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


class NoSandbox(OSError):
    """Say that this system cannot confine a process."""


def confine(folder: Path) -> None:
    """Let this process and its children write only under a folder, and little.

    Raises:
        NoSandbox: where the kernel has no Landlock; nothing may be attacked there.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE, None, 0, 1)
    if version < 3:
        raise NoSandbox("Landlock, version 3 or later (Linux 6.2), is needed to confine what the attack writes")
    handled = sum(_WRITES.values())
    rules = _Rules(handled)
    ruleset = libc.syscall(_CREATE, ctypes.byref(rules), ctypes.sizeof(rules), 0)
    for path, allowed in ((folder, handled), ("/dev/null", 1 << 1)):
        beneath = _Beneath(allowed, os.open(path, os.O_PATH | os.O_CLOEXEC))
        _refused(libc.syscall(_ADD, ruleset, 1, ctypes.byref(beneath), 0))
    _refused(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _refused(libc.syscall(_RESTRICT, ruleset, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE, _FILE))


def _refused(answer: int) -> None:
    if answer:
        raise NoSandbox(f"Landlock refused: {os.strerror(ctypes.get_errno())}")
