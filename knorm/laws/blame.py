"""Whose fault an exception is: the method's, in words of its own or by a crash, or knorm's own."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path

import torch

from knorm.paths import PACKAGE

_REFUSING = (ValueError, AssertionError, NotImplementedError)
_LAWS, _TORCH = PACKAGE / "laws", Path(torch.__file__).parent
_THEIRS = {
    _LAWS / "subjects.py",
    _LAWS / "adapters.py",
    _LAWS / "ranked.py",
}  # they run a target's code, and speak for it


def is_refusal(error: BaseException) -> bool:
    """Tell whether an exception is a refusal: raised on purpose, with a sentence that says what is wrong.

    Args:
        error: as it was caught, with its traceback.

    Returns:
        True for a ValueError, AssertionError or NotImplementedError that a `raise` or `assert` gave several words;
        False for crashes, as of an index or a shape, whatever their type.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, _REFUSING) or len(str(error).split()) < 3 or not frames:
        return False
    frame = frames[-1]
    lines = linecache.getlines(frame.filename)
    # a statement may span lines: the frame names that of its end or of its beginning, as Python's version has it
    around = lines[max(0, (frame.lineno or 1) - 4) : frame.lineno] if lines else []
    return not lines or any(line.lstrip().startswith(("raise ", "assert ")) for line in around)


def is_ours(error: BaseException) -> bool:
    """Tell whether `error`, as caught, is knorm's own fault: the innermost code outside PyTorch is that of the laws."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    own = [file for file in files if not file.is_relative_to(_TORCH)]
    return bool(own) and own[-1].is_relative_to(_LAWS) and own[-1] not in _THEIRS
