"""How a process ended, in words."""

from __future__ import annotations

import signal


def how_ended(code: int) -> str:
    """Say how a process ended, by its return `code` as `subprocess` gives it.

    >>> how_ended(-9)
    'the process ended with signal 9 (SIGKILL), as when memory runs out'
    """
    if code >= 0:
        return f"ended the interpreter with exit code {code}"
    name = {number.value: number.name for number in signal.Signals}.get(-code, "unknown")
    hint = ", as when memory runs out" if name == "SIGKILL" else ""
    return f"the process ended with signal {-code} ({name}){hint}"
