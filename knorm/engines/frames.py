"""Frames between knorm and an engine's process: fields as JSON, and numbers behind them. Needs no other package."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

MOST_FIELDS, MOST_NUMBERS = 2**24, 2**26  # bytes of a frame's two parts
_MARK = b"knE1"
_HEAD = struct.Struct(">4sII")  # mark, bytes of the fields, bytes of the numbers

Fields = dict[str, Any]


class Junk(ValueError):
    """Say that bytes are no frame."""


def pack(fields: Mapping[str, Any], numbers: bytes = b"") -> bytes:
    """Frame fields and the numbers behind them.

    Args:
        fields: what JSON can hold.
        numbers: as they lie in memory.

    Returns:
        The frame.

    Raises:
        Junk: either part is longer than a frame may be.

    Example:
        >>> pack({"kind": "done"})
        b'knE1\\x00\\x00\\x00\\x10\\x00\\x00\\x00\\x00{"kind": "done"}'
    """
    text = json.dumps(fields, allow_nan=False).encode()
    if len(text) > MOST_FIELDS or len(numbers) > MOST_NUMBERS:
        raise Junk(f"a frame of {len(text):,} + {len(numbers):,} bytes, more than one may have")
    return _HEAD.pack(_MARK, len(text), len(numbers)) + text + numbers


def read_frame(read: Callable[[int], bytes]) -> tuple[Fields, bytes]:
    """Read a frame.

    Args:
        read: returns as many bytes as it is asked for, or raises.

    Returns:
        The fields, and the numbers behind them.

    Raises:
        Junk: what comes is no frame.

    Example:
        >>> import io
        >>> read_frame(io.BytesIO(pack({"rows": 1}, b"1234")).read)
        ({'rows': 1}, b'1234')
    """
    head = read(_HEAD.size)
    if len(head) < _HEAD.size or head[: len(_MARK)] != _MARK:
        raise Junk("bytes that are no frame")
    _, text, numbers = _HEAD.unpack(head)
    if text > MOST_FIELDS or numbers > MOST_NUMBERS:
        raise Junk(f"a frame of {text:,} + {numbers:,} bytes")
    try:
        fields = json.loads(read(text))
    except (ValueError, RecursionError):
        raise Junk("a frame whose fields are not JSON") from None
    if not isinstance(fields, dict):
        raise Junk("a frame whose fields are no object")
    return fields, read(numbers) if numbers else b""
