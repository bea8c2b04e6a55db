"""Where goldens are kept: a folder of a checkout. Reading them, and writing them and candidates for them.

A candidate is one file with both the golden and its tensors. Only `accept` changes a golden, in one rename.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote

import numpy as np
from filelock import FileLock, Timeout
from safetensors.numpy import load

from knorm.git import git
from knorm.golden.files import Damaged, pack, parse
from knorm.golden.format import OF_TESTS, Golden, Tensors, digest
from knorm.paths import PACKAGE, REPORTED, goldens

_TEMPORARY, _LOCK, _CANDIDATE = ".tmp", ".lock", ".candidate"
_IGNORED = f"*{_CANDIDATE}\n{_LOCK}\n.*{_TEMPORARY}\n"
_LOCK_SECONDS = 10.0
_READS, _PAUSE_SECONDS = 50, 0.01  # of a changing golden; a pause outlasts a tick of the file system's clock


@dataclass(frozen=True)
class Checkout:
    """Hold the state of the sources: commit, clean (nothing changed outside golden/), hash of the package's code."""

    commit: str
    clean: bool
    code: str

    def code_of(self, sources: Sequence[Path]) -> str:
        """Hash the code under test: knorm's own, and the files and folders in `sources` of a project."""
        return hash_of_sources(self.code, sources) if sources else self.code


def hash_of_sources(code: str, sources: Sequence[Path]) -> str:
    """Hash the Python files in `sources`, and those in its folders, with `code`, the hash of knorm's own."""
    lines = [code]
    for source in sorted(sources):
        files = sorted(source.rglob("*.py")) if source.is_dir() else [source]
        lines += [f"{file.relative_to(source.parent).as_posix()} {digest(file.read_bytes())}" for file in files]
    return digest("\n".join(lines).encode())


def hash_of_code(package: Path = PACKAGE) -> str:
    """Hash the sources of `package`, by default knorm: a candidate is accepted only where the same code is."""
    files = sorted(package.rglob("*.py"))
    lines = [f"{file.relative_to(package).as_posix()} {digest(file.read_bytes())}" for file in files]
    return digest("\n".join(lines).encode())


def checkout(folder: Path) -> Checkout:
    """Read the state of the checkout that a golden folder lies in.

    An exported tree without git (a CUDA runner's) names its commit in KNORM_COMMIT; its code is compared on acceptance.

    Args:
        folder: of goldens.

    Returns:
        The commit, whether the tree is clean, and the hash of the code.

    Raises:
        ValueError: neither is there, or the folder is the checkout itself.
    """
    try:
        top = Path(git(folder, "rev-parse", "--show-toplevel")).resolve()
    except ValueError as error:
        if commit := os.environ.get("KNORM_COMMIT"):
            if not re.fullmatch(r"[0-9a-f]{40}", commit):
                raise ValueError(f"KNORM_COMMIT={commit}, but should be the 40 digits of a commit") from None
            return Checkout(commit, True, hash_of_code())
        raise ValueError(
            f"{folder} is in no git checkout, whose commit a golden names: give --golden-dir; or, for an export, "
            f"KNORM_COMMIT=... ({error})"
        ) from None
    inside = folder.resolve().relative_to(top).as_posix()
    if inside == ".":
        raise ValueError(f"--golden-dir {folder} is a whole checkout, but should be a folder of goldens in it")
    try:
        commit = git(top, "rev-parse", "--verify", "-q", "HEAD")
    except ValueError:
        raise ValueError(f"{top} has no commit yet, which a golden names: commit first") from None
    # Recording imports a project's code, whose bytecode changes nothing.
    spared = (f":(exclude,literal){inside}", ":(exclude,glob)**/__pycache__/**")
    dirty = git(top, "status", "--porcelain", "-uall", "--", ".", *spared)
    return Checkout(commit, not dirty, hash_of_code())


class Store:
    """Read and write a folder of goldens; only `write_candidate` and `accept` write.

    Args:
        folder: must exist; by default knorm's own.
        ours: it is the project's, and need not be there before something is recorded.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, folder: Path | None = None, *, ours: bool = False) -> None:
        self.folder = folder or goldens()
        given = folder is not None and not ours
        self.option = f" --golden-dir {quote(str(folder))}" if given else ""  # for commands that are to be pasted
        if ours and not os.path.lexists(self.folder):
            return
        if not self.folder.is_dir():
            raise ValueError(
                f"no goldens in {self.folder}: give --golden-dir the folder that holds <case>/<class>.json"
            )

    def prepare(self) -> None:
        """Make the folder if it is not there; git is told to ignore candidates in one that holds no golden yet.

        Raises:
            ValueError: it cannot be made.
        """
        ignored = self.folder / ".gitignore"
        if self.folder.is_dir() and (ignored.exists() or self.files):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make {self.folder}: {error.strerror}") from None
        _write(ignored, _IGNORED.encode())

    @cached_property
    def files(self) -> dict[tuple[str, str], Path]:
        """(case, device class) -> its file."""
        paths = sorted(self.folder.glob("*/*.json"))
        return {(f.parent.name, f.stem): f for f in paths if f.parent.name != REPORTED and f.name[0] != "."}

    @property
    def device_classes(self) -> set[str]:
        """Those that any case has a golden of."""
        return {device for _, device in self.files}

    def file(self, case: str, device_class: str) -> Path:
        """Return the path of the golden of `case` on `device_class`, whether or not it exists."""
        return self.folder / case / f"{device_class}.json"

    def read(self, case: str, device_class: str) -> tuple[Golden, Tensors]:
        """Read a golden and its tensors: the old ones or the new ones, whole, also while another process accepts.

        An `accept` in between removes the tensors that the golden read before it names, so what does not fit is read
        again, until it fits or the golden has stood still. No lock: the folder may be read-only.

        Args:
            case: its name.
            device_class: as environment.device_class names it.

        Returns:
            The golden, and its tensors by metric.

        Raises:
            Damaged: the golden cannot be trusted; names the file and the field.
            FileNotFoundError: there is none.
        """
        file, last = self.file(case, device_class), None
        for _ in range(_READS):
            try:
                return self._read_once(case, device_class)
            except Damaged as damaged:
                failure, state = damaged, _state(file)
            if state == last:
                break
            last = state
            time.sleep(_PAUSE_SECONDS)
        raise Damaged(f"{failure}; what changed since the last commit: git status -- {quote(str(file.parent))}")

    def _read_once(self, case: str, device_class: str) -> tuple[Golden, Tensors]:
        file = self.file(case, device_class)
        name = f"{case}/{file.name}"
        try:
            golden = parse(file.read_text(encoding="utf-8"), name)
        except FileNotFoundError:
            raise
        except UnicodeDecodeError:
            raise Damaged(f"{name} is no text") from None
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from None
        for field, inside, outside in (
            ("case", golden.case, case),
            ("device_class", golden.device_class, device_class),
        ):
            if inside != outside:
                raise Damaged(f"{name}: field {field!r} is {inside!r}: a copy of another golden; remove it")
        if golden.tensors is None:
            return golden, {}
        beside = self._tensors_file(golden)
        try:
            data = beside.read_bytes()
        except FileNotFoundError:
            raise Damaged(f"{case}/{beside.name} is missing, which field 'tensors' names") from None
        except OSError as error:
            raise Damaged(f"{case}/{beside.name} cannot be read ({error.strerror})") from None
        if digest(data) != golden.tensors:
            raise Damaged(f"{case}/{beside.name} is damaged: its sha256 is not that of field 'tensors'")
        return golden, load(data)

    def _tensors_file(self, golden: Golden) -> Path:
        return self.folder / golden.case / f"{golden.device_class}-{(golden.tensors or '')[:12]}.safetensors"

    def orphans(self, cases: Sequence[str]) -> list[str]:
        """Find what belongs to none of `cases` and to no test: folders of goldens, and goldens beside the folders."""
        folders = {file.parent.name for ending in ("json", "safetensors") for file in self.folder.glob(f"*/*.{ending}")}
        loose = [file.name for file in self.folder.glob("*.json")]
        return sorted(folders - {REPORTED, *cases, *self.of_tests}) + sorted(loose)

    @property
    def of_tests(self) -> list[str]:
        """List the goldens and candidates whose values come from tests; what cannot be read is none of them."""
        names = set()
        for file in [*self.files.values(), *self.candidates()]:
            with suppress(OSError, ValueError):
                text = file.read_text(encoding="utf-8") if file.suffix == ".json" else read_candidate(file)[0].text()
                if parse(text, file.name).configuration == OF_TESTS:
                    names.add(file.parent.name)
        return sorted(names)

    def leftovers(self) -> list[Path]:
        """Find what an interrupted write of a golden left behind; the next accept of that golden removes it."""
        return [file for case, device in self.files for file in self._stale(case, device)]

    def _stale(self, case: str, device_class: str) -> list[Path]:
        """Files of one golden's own names that it does not own; none where it cannot be read."""
        file = self.file(case, device_class)
        try:
            golden = parse(file.read_text(encoding="utf-8"), file.name)
        except (OSError, ValueError):
            return []
        name = re.escape(device_class)
        own = re.compile(rf"{name}-[0-9a-f]{{12}}\.safetensors|\.{name}[.-][\w.-]*\.\d+{re.escape(_TEMPORARY)}")
        paths = sorted(f for f in file.parent.iterdir() if own.fullmatch(f.name) and f.is_file() and not f.is_symlink())
        return [f for f in paths if f != self._tensors_file(golden)]

    # Candidates

    def candidates(self) -> list[Path]:
        """Find the candidates that wait beside their goldens."""
        return sorted(self.folder.glob(f"*/*{_CANDIDATE}"))

    def write_candidate(self, golden: Golden, tensors: Tensors) -> Path:
        """Write `golden` and its `tensors` as a candidate beside what it would replace, which stays as it is."""
        file = self.folder / golden.case / f"{golden.device_class}{_CANDIDATE}"
        self.prepare()
        with self._locked():
            _write(file, pack(tensors or {"none": np.zeros(1)}, {"golden": golden.text()}))
        return file

    def drop_candidate(self, case: str, device_class: str) -> Path | None:
        """Remove what an earlier recording left of `case` on `device_class`; return its path, None without any."""
        file = self.folder / case / f"{device_class}{_CANDIDATE}"
        if not file.is_file():
            return None
        with self._locked():
            file.unlink(missing_ok=True)
        return file

    def accept(self, golden: Golden, tensors: Tensors, candidate: Path | None = None) -> Path:
        """Write what was approved in place of the golden.

        Args:
            golden: what was approved.
            tensors: its tensors, by metric.
            candidate: the file it came from, which is removed if it lies beside the golden.

        Returns:
            The golden's path.
        """
        with self._locked():
            if tensors:
                _write(self._tensors_file(golden), pack(tensors))
            file = self.file(golden.case, golden.device_class)
            _write(file, golden.text().encode())  # here, and at no other point, the golden changes
            here = [candidate] if candidate and candidate.resolve().parent == file.parent.resolve() else []
            with suppress(OSError):  # the golden is accepted, whatever becomes of these
                for stale in (*self._stale(golden.case, golden.device_class), *here):
                    stale.unlink(missing_ok=True)
        self.__dict__.pop("files", None)
        return file

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with FileLock(self.folder / _LOCK, timeout=_LOCK_SECONDS):
                yield
        except Timeout:
            raise ValueError(
                f"another `knorm golden` has been writing to {self.folder} for {_LOCK_SECONDS:g} s: wait for it"
            ) from None
        except PermissionError as error:
            raise ValueError(f"cannot write to {self.folder}: {error.strerror}") from None


def _state(file: Path) -> tuple[int, int] | None:
    """What another file in its place, or another writing, would change."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def read_candidate(file: Path) -> tuple[Golden, Tensors]:
    """Read a candidate and its tensors.

    Args:
        file: a .candidate that `knorm golden record` wrote.

    Returns:
        The golden that it would become, and its tensors by name.

    Raises:
        ValueError: there is no such file.
        Damaged: it is no candidate, or not whole; in one line.
    """
    if not file.is_file():
        raise ValueError(f"there is no candidate {file}: knorm golden record makes one")
    try:
        data = file.read_bytes()  # once: another `record` may replace the file
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text = header.get("__metadata__", {}).get("golden", "")
    except Exception as error:  # whatever safetensors raises for dtypes that NumPy lacks
        raise Damaged(f"{file.name} is no candidate, or truncated ({error}): record it again") from None
    golden = parse(text, file.name)
    tensors = tensors if golden.tensors else {}
    if golden.tensors and digest(pack(tensors)) != golden.tensors:
        raise Damaged(f"{file.name}: its tensors are not those of field 'tensors': record it again")
    return golden, tensors


def _write(file: Path, data: bytes) -> None:
    """Atomically: whoever looks finds the old file or the new one, whole, whenever this is killed."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}{_TEMPORARY}")
    try:
        file.parent.mkdir(exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"cannot write {file}: {error.strerror}; it is as it was") from None
