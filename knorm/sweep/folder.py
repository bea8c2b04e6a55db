"""The folder of a sweep: a result in one file, written once by rename; claims with a heartbeat; no process ids.

plan.json          what the plan asked for when it was last run, and what loading its targets told
results/NAME.json  of a cell that is done; NAME.failed.json of one that failed
claims/NAME        somebody is at it: the file's time is renewed, and a claim that is not renewed expires
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from knorm.files import read_file, write_whole

EXPIRE = 60.0  # seconds
BEATS = 6  # in that time: so many missed, and a claim expires
_DONE, _FAILED = ".json", ".failed.json"
_MOST_BYTES = 2**28
_HALF_WRITTEN = 3600.0  # seconds after which a file that was not renamed never will be
_FORM = "knorm-sweep-folder"


class Folder:
    """Share the cells of a study among any processes that see the same folder.

    Args:
        place: the folder, which may not exist yet.
        expire: seconds without a heartbeat after which a claim is anybody's.
    """

    def __init__(self, place: Path, expire: float = EXPIRE) -> None:
        self.place, self.expire = place, expire
        self.results, self.claims = place / "results", place / "claims"
        self._prefix = f"{self.results}{os.sep}"  # of thousands of names, which pathlib would take a second to join
        self._mine = secrets.token_hex(8)
        self._held: set[str] = set()
        self._lock = threading.Lock()

    def known(self) -> dict[str, Any]:
        """Return what plan.json holds; empty for a folder that is new.

        Raises:
            ValueError: the folder holds something else.
        """
        file = self.place / "plan.json"
        if not self.place.is_dir() and (self.place.exists() or self.place.is_symlink()):  # a link that leads round
            raise ValueError(f"{self.place} is no folder: name one, which may not exist yet")
        if not file.exists():
            there = [entry.name for entry in os.scandir(self.place)] if self.place.is_dir() else []
            if visible := sorted(name for name in there if not name.startswith(".")):
                raise ValueError(f"{self.place} holds {visible[0]}, and no sweep: give a new or an empty folder")
            return {}
        try:
            fields: dict[str, Any] = json.loads(read_file(file, _MOST_BYTES))
            if fields["form"] != _FORM:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{file} is damaged, or of another program: give another folder") from None
        return fields

    def refuse_other(self, rows: Iterable[str]) -> None:
        """Raise ValueError where the folder's plan has none of `rows`, the names of Study.rows.

        A new folder refuses nothing; one that holds something else than a sweep raises ValueError too.
        """
        before = self.known()
        if before and not {*before["rows"]} & {*rows}:
            told = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in before["axes"].items())
            raise ValueError(f"{self.place} is the folder of another plan ({told}): give another folder")

    def begin(
        self,
        rows: Iterable[str],
        targets: Mapping[str, Any],
        axes: Mapping[str, Any],
        study: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the folder ready for a plan.

        Args:
            rows: the names of the plan's rows.
            targets: what loading targets told.
            axes: the plan in words, for messages.
            study: the plan with the names of its cells, from which table.stored joins the results.

        Raises:
            ValueError: the folder holds a plan that has no row in common with this one.
            OSError: it cannot be written.
        """
        rows = sorted(rows)
        self.refuse_other(rows)
        self.place.mkdir(parents=True, exist_ok=True)
        fields = {"form": _FORM, "axes": axes, "rows": rows, "targets": targets, "study": study or {}}
        if fields != self.known():
            write_whole(self.place / "plan.json", lambda beside: beside.write_text(json.dumps(fields, indent=1)))
        for folder in (self.results, self.claims):
            folder.mkdir(exist_ok=True)
        self._sweep_up()

    def _sweep_up(self) -> None:
        """Remove what killed processes left half done; it counts for nothing."""
        now = self._now()
        for folder, age in ((self.results, max(self.expire, _HALF_WRITTEN)), (self.claims, self.expire)):
            for entry in os.scandir(folder):
                with suppress(OSError):
                    useless = entry.name.startswith(".") or (folder == self.claims and self.has(entry.name))
                    if useless and now - entry.stat().st_mtime > age:
                        os.unlink(entry.path)

    def states(self) -> dict[str, str]:
        """Return "done" or "failed" for each cell that has a result, by its name."""
        found: dict[str, str] = {}
        if self.results.is_dir():
            for entry in os.scandir(self.results):
                name = entry.name
                if name.startswith(".") or not name.endswith(_DONE):
                    continue
                if name.endswith(_FAILED):
                    found.setdefault(name.removesuffix(_FAILED), "failed")
                else:
                    found[name.removesuffix(_DONE)] = "done"
        return found

    def has(self, name: str, *, failed: bool = True) -> bool:
        """Tell whether the cell `name` has a result; with `failed`, one that says that it failed counts too."""
        return os.path.exists(self._file(name, False)) or (failed and os.path.exists(self._file(name, True)))

    def _file(self, name: str, failed: bool) -> Path:
        return self.results / f"{name}{_FAILED if failed else _DONE}"

    def write(self, name: str, result: Mapping[str, Any], *, failed: bool) -> None:
        """Write a cell's result, once: where it is done already, this one is dropped.

        A result that did not fail removes one that did.

        Args:
            name: of the cell.
            result: of cells.outcome.
            failed: the result says that the cell failed.

        Raises:
            ValueError: the result holds NaN or an infinity.
            OSError: the disk is full, or the folder not to be written.
        """
        if not self.has(name, failed=False):
            text = json.dumps(result, allow_nan=False, separators=(",", ":"))
            write_whole(self._file(name, failed), lambda beside: beside.write_text(text, encoding="utf-8"))
        if not failed:
            self._file(name, True).unlink(missing_ok=True)

    def read(self, name: str) -> bytes | None:
        """Return the result of the cell `name` as it was written; None where there is none.

        Where there are two, the one that did not fail counts.
        """
        for failed in (False, True):
            with (
                suppress(FileNotFoundError),
                open(f"{self._prefix}{name}{_FAILED if failed else _DONE}", "rb", 0) as raw,
            ):
                return raw.read()
        return None

    def failed_since(self, name: str) -> float | None:
        """Return when the cell `name` failed, in seconds by the file system's clock; None where it did not."""
        with suppress(FileNotFoundError):
            return self._file(name, True).stat().st_mtime
        return None

    def claim(self, name: str) -> bool:
        """Take the cell `name`, unless somebody else is at it; a claim that has expired is taken over.

        Returns:
            True where it is ours until `release`, and nobody else's as long as the heart beats.
        """
        try:
            self._create(self.claims / name)
        except FileExistsError:
            if not self._taken_over(name):
                return False
        with self._lock:
            self._held.add(name)
        return True

    def _create(self, path: Path) -> None:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            os.write(descriptor, self._mine.encode())
        finally:
            os.close(descriptor)

    def _expired(self, path: Path) -> bool:
        with suppress(FileNotFoundError):
            return self._now() - path.stat().st_mtime > self.expire
        return False

    def _taken_over(self, name: str) -> bool:
        """Put our claim in the place of one that has expired; of those who try at the same time, one succeeds."""
        path, lock, ours = self.claims / name, self.claims / f".{name}.lock", self.claims / f".{name}.{self._mine}"
        if not self._expired(path):
            return False
        try:
            self._create(lock)
        except FileExistsError:
            if self._expired(lock):  # of one that was killed here
                lock.unlink(missing_ok=True)
            return False
        try:
            if not self._expired(path):  # another was faster
                return False
            self._create(ours)
            ours.replace(path)
            return True
        finally:
            ours.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)

    def release(self, name: str) -> None:
        """Give the claim of the cell `name` back, if it is still ours; else do nothing."""
        with self._lock:
            self._held.discard(name)
        path = self.claims / name
        with suppress(OSError):
            if path.read_text(encoding="ascii") == self._mine:
                path.unlink()

    def release_all(self) -> None:
        """Give all claims back."""
        for name in [*self._held]:
            self.release(name)

    def _now(self) -> float:
        """Return the time by the clock that stamps the claims, which may be a file server's."""
        path = self.claims / f".clock-{secrets.token_hex(8)}"  # made now
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)

    def _beat(self) -> None:
        with self._lock:
            held = [*self._held]
        for name in held:
            with suppress(OSError):  # lost: somebody else does it too, and one result counts
                os.utime(self.claims / name)

    @contextmanager
    def heart(self) -> Iterator[None]:
        """Renew the claims that are held, in a thread, until the context closes; then give back those that are left."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self.expire / BEATS):
                self._beat()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.release_all()
