"""Files from outside, read within limits: a device, a pipe or a folder is refused before it is opened."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def file_size(file: Path, most: int | None = None) -> int:
    """Measure a regular file without opening it; links are followed.

    Args:
        file: the path, as the user wrote it.
        most: the largest size accepted, in bytes.

    Returns:
        The size in bytes.

    Raises:
        ValueError: the path leads to no file, to something that is none, or to one larger than `most`.

    Example:
        >>> file_size(Path("/dev/zero"))
        Traceback (most recent call last):
        ValueError: /dev/zero is a device, but should be a file
    """
    try:
        status = os.stat(file)
    except FileNotFoundError:
        target = (
            f"is a link to {os.readlink(file)}, which is not there"
            if os.path.islink(file)
            else "cannot be read: it is not there"
        )
        raise ValueError(f"{file} {target}") from None
    except (OSError, ValueError) as error:  # a loop of links, a name too long, a folder closed to us, a null byte
        raise ValueError(f"{str(file)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    kind = next((kind for is_kind, kind in _KINDS if is_kind(status.st_mode)), None)
    if kind:
        raise ValueError(f"{file} is {kind}, but should be a file")
    if most is not None and status.st_size > most:
        raise ValueError(f"{file} has {status.st_size:,} bytes, but should have at most {most:,}")
    return status.st_size


def read_file(file: Path, most: int) -> bytes:
    """Read a regular file whole, but never more than `most` bytes.

    Args:
        file: the path, as the user wrote it.
        most: the largest size accepted, in bytes.

    Returns:
        What the file holds.

    Raises:
        ValueError: as `file_size`, and where the file grows beyond `most` or cannot be opened.

    Example:
        >>> read_file(Path("table.csv"), 2**20)  # doctest: +SKIP
        b'keep_ratio,ppl\\n'
    """
    file_size(file, most)
    try:
        # Without blocking: what was a file a moment ago may be a pipe by now.
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as stream:
            content = stream.read(most + 1)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    if len(content) > most:  # files of /proc claim to be empty
        raise ValueError(f"{file} has more than {most:,} bytes, the most that is read")
    return content


def read_text(file: Path, most: int) -> str:
    """Read the UTF-8 `file`, of at most `most` bytes, its byte-order mark left out.

    Raises ValueError as `read_file`, and for what is not UTF-8.
    """
    try:
        return read_file(file, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None


def write_whole(file: Path, write: Callable[[Path], object]) -> Path:
    """Write a file whole or not at all: beside it first, then renamed.

    Args:
        file: where it is to stand; links are followed.
        write: called with a path beside it, of the same suffix, which is renamed to `file` when it has been written.

    Returns:
        The file's path, links followed.

    Raises:
        OSError: the file could not be written; what was there is as it was.

    Example:
        >>> write_whole(Path("notes.txt"), lambda beside: beside.write_text("kept"))  # doctest: +SKIP
        PosixPath('/home/me/notes.txt')
    """
    file = file.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{file.name[:100]}.", suffix=file.suffix, dir=file.parent)
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        with open(beside, "rb") as stream:
            os.fsync(stream.fileno())
        mode = file.stat().st_mode if file.exists() else 0o666 & ~_umask()
        beside.chmod(mode & 0o777)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
    return file


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
