"""Sweeps without models: cells whose results are made up, an engine that runs them at once, and deaths on time."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import time
from pathlib import Path

import numpy as np

from knorm.sweep.cells import CONTROL, Cell, Chosen, cell_of, outcome
from knorm.sweep.drive import drive
from knorm.sweep.folder import Folder


def make_cells(methods=3, blocks=2, windows=2, **changes):
    """Cells by name: of so many methods, each in so many blocks of windows."""
    fields = {
        "measure": "damage", "device": "cpu", "threads": 1, "seed": 0, "limit": 60.0, "inputs": {"code": "1"},
        "model": "m", "dtype": "float32", "text": "t", "window": 8, "prompt_length": 4, "batch": 1, "how": "auto",
    } | changes  # fmt: skip
    chosen = [Chosen(CONTROL), *(Chosen(f"a.py:m{i}", keep_ratio="0.5", form="function") for i in range(methods - 1))]
    cells = [
        Cell(method=one, first=windows * block, last=windows * (block + 1), **fields)
        for block in range(blocks)
        for one in chosen
    ]
    return {cell.name(): cell for cell in cells}


def made_up(fields, hint=None, scored=4):
    """A result that follows from the cell alone, but for its seconds."""
    cell = cell_of(fields)
    seed = int.from_bytes(hashlib.sha256(repr(sorted(fields.items(), key=str)).encode()).digest()[:4])
    draw, count = np.random.default_rng(seed), cell.last - cell.first
    kl = draw.random((count, scored))
    names = ("nll", "nll_full", "delta_nll", "same_top", "correct", "delta_p", "delta_p_squared")
    values = {
        "how": "two calls", "checked": "checked", "changed": True, "scored": scored, "tokens_seen": [[3.0, 2.5]],
        "sums": {name: draw.random(count).tolist() for name in names} | {"kl": kl.sum(1).tolist()},
        "kl": base64.b64encode(kl.tobytes()).decode(), "tokens_before": 5.0, "bytes_stored": 7.0, "bytes_full": 9.0,
    }  # fmt: skip
    return outcome(fields, values, seconds=time.perf_counter(), memory=1)


def fails(fields, hint=None):
    """A result that is a failure."""
    return outcome(fields, failed="it said no")


def waits(fields, hint=None):
    """A result after as many seconds as the text's name says."""
    time.sleep(float(fields["text"]))
    return made_up(fields, hint)


def dies(fields, hint=None):
    """No result: the process is gone, for the cells of one method."""
    if fields["method"]["target"].endswith("m0"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return made_up(fields, hint)


def dies_once(fields, hint=None):
    """No result at the first time."""
    mark = Path(os.environ["KNORM_TEST_MARK"])
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return made_up(fields, hint)


def unfit(fields, hint=None):
    """No result: the worker has not what it takes."""
    raise ValueError("a worker has another knorm than this process: give all workers the same")


class AtOnce:
    """An engine that runs a cell where it is submitted."""

    def __init__(self, work=made_up):
        self.work, self.results, self.hints = work, [], []

    def free(self):
        return [] if self.results else ["here"]

    def submit(self, place, name, fields, hint):
        self.hints.append(hint)
        self.results.append((name, self.work(fields, hint)))

    def wait(self, seconds):
        results, self.results = self.results, []
        return results

    def close(self):
        pass


def run(place, cells, work=made_up, *, expire=60.0, rows=(), **options):
    """Do the cells in a folder."""
    folder = Folder(Path(place), expire)
    folder.begin(rows or {str(cell.row) for cell in cells.values()}, {}, {"models": ["m"]})
    return drive(folder, cells, AtOnce(work), **options)


CALLS = ("open", "write", "close", "fsync", "replace", "rename", "unlink", "utime", "link")


def die_at(point, below=""):
    """End this process at one of its calls that change files: even points lie before a call, odd ones after it.

    below: only calls count that name a file of this folder. Returns how many points there are.
    """
    count = 0

    def wrapped(call):
        def counted(*arguments, **options):
            nonlocal count
            if below and not str(arguments[0]).startswith(str(below)):
                return call(*arguments, **options)
            before = count
            count += 2
            if before == point:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*arguments, **options)
            finally:
                if before + 1 == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        return counted

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    return lambda: count


def killed(place, point):
    """Do CELLS in a copy of this process that ends at a point; returns how it ended, and how many points there are."""
    ours, theirs = os.pipe()
    child = os.fork()  # a new Python takes a second, and this dies fifty times
    if child == 0:
        try:
            folder = Folder(Path(place), 60.0)
            folder.begin({str(cell.row) for cell in CELLS.values()}, {}, {"models": ["m"]})
            write, points = os.write, die_at(point)
            drive(folder, CELLS, AtOnce())
            write(theirs, str(points()).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    _, status = os.waitpid(child, 0)
    with os.fdopen(ours) as pipe:
        return os.waitstatus_to_exitcode(status), int(pipe.read() or 0)


CELLS = make_cells()
