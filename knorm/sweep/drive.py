"""Drive a study: cells are claimed, given to an engine, and their results written, until none is left."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from knorm.sweep.cells import CONTROL, Cell
from knorm.sweep.folder import Folder

_LOOK = 2.0  # seconds between looks at what other processes have done
_TICK = 0.2


class Unfit(ValueError):
    """Say that a worker cannot do what the plan asks, through no fault of a method: the sweep ends."""


class Engine(Protocol):
    """Run cells somewhere; what is submitted comes back from `wait`, in any order."""

    def free(self) -> Iterable[Any]:
        """Generate the places that could take a cell now; they are hashable, and stay the same from call to call."""

    def submit(self, place: Any, name: str, fields: dict[str, Any], hint: Mapping[str, Any] | None) -> None:
        """Begin a cell, and return before it is done.

        Args:
            place: one of those that `free` generates.
            name: of the cell, as `wait` returns it.
            fields: of Cell.as_json.
            hint: how the cell's row is run, {"how": ..., "checked": ...}; None where that is not known.
        """

    def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        """Return (name, result of cells.outcome) of the cells that have ended since the last call.

        It returns as soon as there is one, and without any after `seconds`.
        """

    def close(self) -> None:
        """End everything at once."""


@dataclass
class Progress:
    """Count what became of cells.

    Attributes:
        total: of the plan.
        before: done when this process began; done: by anybody since; failed and faults: among all results.
        running: here, now.
        waiting: True while others have claimed all that is left.
    """

    total: int
    before: int = 0
    done: int = 0
    failed: int = 0
    faults: int = 0
    running: int = 0
    waiting: bool = False
    began: float = field(default_factory=time.monotonic)

    @property
    def finished(self) -> int:
        """Return how many cells have a result."""
        return self.before + self.done

    @property
    def rate(self) -> float:
        """Return cells per second since this process began."""
        return self.done / max(1e-9, time.monotonic() - self.began)

    @property
    def left(self) -> float | None:
        """Return the seconds that the rest will take at this rate; None where no cell tells."""
        return (self.total - self.finished) / self.rate if self.done else None


class Queue:
    """Hand out `cells`, by name: first those that share a setting with what a place did last.

    Processes begin at different cells, so that they seldom want the same. A queue is true as long as cells are left.
    """

    def __init__(self, cells: Mapping[str, Cell]) -> None:
        self._groups: dict[tuple[Any, ...], deque[str]] = {}
        for name, cell in cells.items():
            self._groups.setdefault(cell.setting, deque()).append(name)
        shift = secrets.randbelow(2**30)
        for group in self._groups.values():
            group.rotate(-(shift % len(group)))
        self._last: dict[Any, tuple[Any, ...]] = {}
        self._users: dict[tuple[Any, ...], int] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    def next(self, place: Any) -> str:
        """Remove a cell for `place`, any hashable value, and return its name; an empty queue raises ValueError."""
        setting = self._last.get(place)
        if setting not in self._groups:
            if setting is not None:
                self._users[setting] -= 1
            setting = self._fresh(setting)
            self._users[setting] = self._users.get(setting, 0) + 1
            self._last[place] = setting
        group = self._groups[setting]
        name = group.popleft()
        if not group:
            del self._groups[setting]
        return name

    def _fresh(self, last: tuple[Any, ...] | None) -> tuple[Any, ...]:
        """Choose a setting that nobody is at, of the same model if there is one; else the one with most cells."""
        unused = [setting for setting in self._groups if not self._users.get(setting)]
        same = [setting for setting in unused if last is not None and setting[:2] == last[:2]]
        if choice := same or unused:
            return choice[0]
        return max(self._groups, key=lambda setting: len(self._groups[setting]))


def drive(
    folder: Folder,
    cells: Mapping[str, Cell],
    engine: Engine,
    *,
    retry: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Do the cells that have no result yet, beside any other processes that do so.

    Args:
        folder: made ready by Folder.begin.
        cells: by name.
        engine: closed by the caller.
        retry: do failed cells again.
        report: called when something has changed.

    Returns:
        What became of them.

    Raises:
        Unfit: a worker lacks what the plan needs.
        OSError: results cannot be written.
    """
    return _Drive(folder, cells, engine, retry, report).run()


class _Drive:
    def __init__(
        self, folder: Folder, cells: Mapping[str, Cell], engine: Engine, retry: bool, report: Callable[[Progress], None]
    ) -> None:
        self.folder, self.cells, self.engine, self.report = folder, cells, engine, report
        states = {name: state for name, state in folder.states().items() if name in cells}
        # failed cells that are to be done again, with the time of their failure: another process may be faster
        self.again = {name: folder.failed_since(name) for name, state in states.items() if retry and state == "failed"}
        self.left = {name for name in cells if name not in states or name in self.again}
        self.progress = Progress(len(cells), before=len(cells) - len(self.left))
        self.progress.failed = sum(state == "failed" for name, state in states.items() if name not in self.again)
        self.queue = Queue({name: cell for name, cell in cells.items() if name in self.left})
        self.blocked: list[str] = []  # claimed by others
        self.running: set[str] = set()
        self.hints: dict[tuple[Any, ...], Mapping[str, Any]] = {}
        self.looked = time.monotonic()

    def run(self) -> Progress:
        with self.folder.heart():
            while self.left:
                self._start()
                self.report(self.progress)
                if not self.running:
                    time.sleep(min(_TICK, self.folder.expire / 10))
                for name, result in self.engine.wait(_TICK) if self.running else []:
                    self._start_instead(name)
                    self._finish(name, result)
                self._look()
        self.report(self.progress)
        return self.progress

    def _start(self) -> None:
        for place in self.engine.free():
            if (name := self._claimed(place)) is None:
                break
            self.running.add(name)
            cell = self.cells[name]
            self.engine.submit(place, name, cell.as_json(), self.hints.get(cell.row))
        self.progress.running, self.progress.waiting = len(self.running), not self.running and bool(self.blocked)

    def _claimed(self, place: Any) -> str | None:
        while self.queue:
            name = self.queue.next(place)
            if not self.folder.claim(name):
                self.blocked.append(name)
            elif self._is_done(name):  # since we last looked
                self.folder.release(name)
                self._count(name)
            else:
                return name
        return None

    def _is_done(self, name: str) -> bool:
        """Tell whether another process has written a result that counts."""
        if name not in self.again:
            return self.folder.has(name)
        return self.folder.has(name, failed=False) or self.folder.failed_since(name) != self.again[name]

    def _start_instead(self, name: str) -> None:
        """Give the place that became free its next cell before the result is written: a disk may be slow."""
        self.running.discard(name)
        self._start()

    def _finish(self, name: str, result: dict[str, Any]) -> None:
        failed = result["failed"] is not None or result["fault"] is not None
        self.folder.write(name, result, failed=failed)
        self.folder.release(name)
        cell = self.cells[name]
        if result.get("damage") and cell.method.target != CONTROL:
            self.hints.setdefault(cell.row, {"how": result["damage"]["how"], "checked": result["damage"]["checked"]})
        self.progress.faults += result["fault"] is not None
        self._count(name, failed)

    def _count(self, name: str, failed: bool | None = None) -> None:
        if name in self.left:
            self.left.discard(name)
            self.progress.done += 1
            self.progress.failed += (not self.folder.has(name, failed=False)) if failed is None else failed

    def _look(self) -> None:
        """See what other processes have done, and try again for what they had claimed."""
        if not self.blocked or time.monotonic() - self.looked < min(_LOOK, self.folder.expire / 4):
            return
        self.looked = time.monotonic()
        blocked, self.blocked = self.blocked, []
        for name in blocked:
            if self._is_done(name):
                self._count(name)
            else:
                self.blocked.append(name)
        if not self.queue:  # whatever has expired is taken now
            self.queue = Queue({name: self.cells[name] for name in self.blocked})
            self.blocked = []
