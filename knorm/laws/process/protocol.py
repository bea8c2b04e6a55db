"""What the two processes of `knorm check` say to each other: frames of typed JSON, and a board of shared memory.

The worker shares its process with a target, so the parent believes nothing that it reads. A frame begins with a token
that is drawn for each worker, has a limited length, and holds one of a few types of message. Nothing is unpickled or
executed. A target that sets out to deceive can: its code runs where the laws do. What is kept out is what a bug does.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from knorm.laws.results import Profile, Result, shortened
from knorm.laws.traits import Traits

MOST_BYTES = 4 * 2**20  # of a message
TOKEN_BYTES = 16
_HEAD = struct.Struct(f">{TOKEN_BYTES}sI")  # token, length of what follows


class Junk(Exception):
    """Bytes that are no message of a worker's; the message says what they are."""


@dataclass(frozen=True)
class Request:
    """Say what to check: the arguments of `knorm check`, as they were given.

    target, kind   what loading.load_target takes
    like           "knorm" for all that its own core promises, or None
    traits         NAME=VALUE, each in front of what is promised otherwise
    select         names of checks or families; None: all
    expected       check -> why it may fail
    profile, seed  how hard to try, and with which draws; device: where drawn tensors lie
    quiet          the target's stdout is dropped
    verbose        tracebacks of what knorm itself stumbled over
    folder         where the worker begins, and from where a target's path is read; None: here
    """

    target: str
    kind: str | None = None
    like: str | None = None
    traits: tuple[str, ...] = ()
    select: tuple[str, ...] | None = None
    expected: tuple[tuple[str, str], ...] = ()
    profile: Profile = "quick"
    seed: int = 0
    device: str = "cpu"
    quiet: bool = False
    verbose: bool = False
    folder: str | None = None


@dataclass(frozen=True)
class Start:
    """Start a worker: the parent's only message.

    Attributes:
        token: with which each of the worker's messages is to begin, in hexadecimal digits.
        channel: descriptor to send them through.
        board: descriptor of the board's file.
        request: what to do.
    """

    token: str
    channel: int
    board: int
    request: Request


@dataclass(frozen=True)
class Wrong:
    """Answer a wrong request, or one whose target cannot be loaded: a `message` of one line, and the `trace` of it."""

    message: str
    trace: str
    kind: Literal["wrong"] = "wrong"

    def __post_init__(self) -> None:
        for name in ("message", "trace"):
            object.__setattr__(self, name, shortened(getattr(self, name)))


@dataclass(frozen=True)
class Plan:
    """Describe a loaded target: its traits, the code that imports it, and in `checks` an entry each, tried or not."""

    traits: Traits
    code: str
    checks: Annotated[tuple[Result, ...], Field(fail_fast=True)]  # a list of a million errors is no help
    kind: Literal["plan"] = "plan"


@dataclass(frozen=True)
class Done:
    """Report the result of a check; survived: False if the worker is of no more use, as after an error of CUDA's."""

    result: Result
    survived: bool = True
    kind: Literal["done"] = "done"


Message = Wrong | Plan | Done
_MESSAGES: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])
_START = TypeAdapter(Start)


def _bytes(message: Any) -> bytes:
    """Strict JSON; what UTF-8 cannot write, as half a surrogate pair, becomes a question mark."""
    return json.dumps(asdict(message), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def encode(message: Message, token: bytes) -> bytes:
    """Frame `message`, with the worker's `token` in front. Raises ValueError for one longer than MOST_BYTES."""
    data = _bytes(message)
    if len(data) > MOST_BYTES:
        raise ValueError(f"a message of {len(data):,} bytes, but should be at most {MOST_BYTES:,}")
    return _HEAD.pack(token, len(data)) + data


class Frames:
    """Cut messages out of the bytes that come from the worker whose frames begin with `token`."""

    def __init__(self, token: bytes) -> None:
        self._token, self._waiting = token, bytearray()

    def feed(self, data: bytes) -> None:
        """Add `data` as it was read; `next` is to be called until it returns None before more is."""
        self._waiting += data

    def next(self) -> Message | None:
        """Return the next message; None if it is not there in full. Raises Junk for what is no message."""
        began = self._waiting[:TOKEN_BYTES]
        if began != self._token[: len(began)]:
            raise Junk("bytes that no worker sends")
        if len(self._waiting) < _HEAD.size:
            return None
        _, length = _HEAD.unpack_from(self._waiting)
        if length > MOST_BYTES:
            raise Junk(f"a message of {length:,} bytes")
        end = _HEAD.size + length
        if len(self._waiting) < end:
            return None
        data = bytes(self._waiting[_HEAD.size : end])
        del self._waiting[:end]
        try:
            return _MESSAGES.validate_json(data, strict=True)
        except ValidationError as error:
            raise Junk(f"a message that is none: {error.errors(include_input=False)[0]['msg'][:200]}") from None


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data` to the file `descriptor`, however few bytes a call takes."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_start(descriptor: int, start: Start) -> None:
    """Tell the worker that reads from `descriptor` what to do: `start`, with its length in front."""
    data = _bytes(start)
    write_all(descriptor, struct.pack(">I", len(data)) + data)


def read_start(descriptor: int) -> Start:
    """Read the parent's message from `descriptor`. Raises EOFError where the parent is gone."""

    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            if not (more := os.read(descriptor, count - len(data))):
                raise EOFError
            data += more
        return data

    return _START.validate_json(exactly(*struct.unpack(">I", exactly(4))), strict=True)


class Board(ctypes.Structure):
    """Memory that outlives a worker: what it was doing.

    calls        begun so far: a sign of life
    given        the call being made, in words
    call, size   its tensors, as pack_call packs them
    """

    _fields_ = (
        ("calls", ctypes.c_uint64),
        ("given", ctypes.c_char * 1024),
        ("size", ctypes.c_uint64),
        ("call", ctypes.c_ubyte * 2**14),
    )


def map_board(descriptor: int) -> Board:
    """Map the board in the memory of the file `descriptor`, which is not needed any longer."""
    return Board.from_buffer(mmap.mmap(descriptor, ctypes.sizeof(Board)))


@contextmanager
def new_board() -> Iterator[tuple[Board, int]]:
    """Make a board and a descriptor of its file, which has no name and is closed at the end of the block."""
    with tempfile.TemporaryFile() as file:
        file.truncate(ctypes.sizeof(Board))
        yield map_board(file.fileno()), file.fileno()


_SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a number
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True)
class Packed:
    """Hold a call: `keep_ratio`, `layer`, and as `tensors` (dtype, shape, data) of keys and of values."""

    keep_ratio: float
    layer: int | None
    tensors: tuple[tuple[str, tuple[int, ...], bytes], ...]


def pack_call(call: Packed) -> bytes:
    """Pack `call` into bytes, in microseconds: most are never read."""
    head = json.dumps([call.keep_ratio, call.layer, [[dtype, shape] for dtype, shape, _ in call.tensors]]).encode()
    return b"".join([_LENGTH.pack(len(head)), head, *(data for _, _, data in call.tensors)])


def unpack_call(data: bytes) -> Packed | None:
    """Unpack `data` that pack_call packed; None for anything else, since a target can write to the board."""
    try:
        (length,) = _LENGTH.unpack_from(data)
        begin = _LENGTH.size + length
        keep_ratio, layer, described = json.loads(data[_LENGTH.size : begin])
        tensors = []
        for dtype, shape in described:
            end = begin + _SIZES[dtype] * _numbers(shape)
            if end > len(data):
                return None
            tensors.append((dtype, tuple(shape), data[begin:end]))
            begin = end
        fits = (
            isinstance(keep_ratio, float)
            and math.isfinite(keep_ratio)
            and (layer is None or type(layer) is int)
            and len(tensors) == 2
        )
    except (ValueError, TypeError, KeyError, struct.error, RecursionError):
        return None
    return Packed(keep_ratio, layer, tuple(tensors)) if fits and begin == len(data) else None


def _numbers(shape: Sequence[int]) -> int:
    """Count the numbers of a cache of that shape. Raises ValueError for any other shape."""
    if len(shape) != 4 or not all(type(size) is int and 0 <= size < 2**20 for size in shape):
        raise ValueError(shape)
    return math.prod(shape)
