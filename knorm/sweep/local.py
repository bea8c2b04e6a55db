"""The engine of one machine: a pool of processes, one for each GPU or core, each with its model loaded once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from knorm.sweep.cells import outcome
from knorm.sweep.drive import Unfit

LOST = 3  # workers, after which a cell that they were at has failed
_LOADING = 300.0  # seconds that a worker may take beyond a cell's limit: imports, weights
Work = Callable[[Mapping[str, Any], Mapping[str, Any] | None], dict[str, Any]]


@dataclass
class _Worker:
    """Hold a process, and what it is at."""

    place: int
    process: Any
    pipe: Connection
    name: str = ""
    job: tuple[dict[str, Any], Mapping[str, Any] | None] | None = None
    since: float = 0.0
    warm: bool = False  # it has loaded what cells need


class Pool:
    """Run cells in processes of this machine.

    Args:
        workers: how many.
        device: "cpu" or "cuda"; with the latter each worker sees one GPU.
        work: what a worker does with a cell; by default measure.measure_cell.
        threads: that a worker may use.
        folder: that it runs in; by default the current one.
        env: further variables of the workers' environment.
    """

    def __init__(
        self,
        workers: int,
        device: str,
        *,
        work: Work | None = None,
        threads: int = 1,
        folder: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.device, self.work, self.folder = device, work or measured, str(folder or Path.cwd())
        self.env = {**(env or {}), **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))}
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, _Worker] = {}
        self._places = range(workers)
        self._losses: dict[str, int] = {}

    def free(self) -> Iterator[int]:
        """Generate the workers that have nothing to do."""
        yield from (p for p in self._places if p not in self._workers or self._workers[p].job is None)

    def submit(self, place: int, name: str, fields: dict[str, Any], hint: Mapping[str, Any] | None) -> None:
        """Give a cell to a worker, which is started where there is none.

        Args:
            place: of a worker that has nothing to do, from 0 up.
            name: of the cell.
            fields: of Cell.as_json.
            hint: how the cell's row is run; None where that is not known.
        """
        worker = self._workers.get(place)
        if worker is None:
            worker = self._workers[place] = self._started(place)
        worker.name, worker.job, worker.since = name, (fields, hint), time.monotonic()
        with contextlib.suppress(OSError):  # it died a moment ago: seen by wait
            worker.pipe.send(worker.job)

    def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        """Return (name, result) of the cells that have ended; wait for one, but no longer than `seconds`.

        A cell whose worker died is begun again; the third worker that is lost to it makes it a failed one, as does the
        plan's limit.

        Raises:
            Unfit: a worker lacks what the plan needs.
        """
        busy = [worker for worker in self._workers.values() if worker.job is not None]
        ready = wait([x for worker in busy for x in (worker.pipe, worker.process.sentinel)], seconds)
        results = []
        for worker in busy:
            if worker.pipe in ready or worker.process.sentinel in ready:
                result = self._heard(worker)
            else:
                result = self._overdue(worker)
            if result is not None:
                results.append((worker.name, result))
                worker.job = None
        return results

    def _heard(self, worker: _Worker) -> dict[str, Any] | None:
        try:
            answer = worker.pipe.recv()
        except (EOFError, OSError):
            return self._died(worker)
        if isinstance(answer, str):
            raise Unfit(answer)
        worker.warm = True
        return dict(answer)

    def _died(self, worker: _Worker) -> dict[str, Any] | None:
        worker.process.join(10)
        said = _how(worker.process.exitcode)
        assert worker.job is not None
        job, name = worker.job, worker.name
        self._end(worker)
        del self._workers[worker.place]
        self._losses[name] = self._losses.get(name, 0) + 1
        if self._losses[name] >= LOST:
            return outcome(job[0], failed=f"{LOST} workers were lost to it; the last one {said}")
        self.submit(worker.place, name, *job)
        return None

    def _overdue(self, worker: _Worker) -> dict[str, Any] | None:
        assert worker.job is not None
        limit = worker.job[0]["limit"]
        if time.monotonic() - worker.since <= limit + (0 if worker.warm else _LOADING):
            return None
        fields = worker.job[0]
        self._end(worker)
        del self._workers[worker.place]
        return outcome(fields, failed=f"no result within {limit:g} s, the plan's limit")

    def _started(self, place: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        env = {**self.env, **({"CUDA_VISIBLE_DEVICES": _gpu(place)} if self.device == "cuda" else {})}
        process = self._context.Process(target=_serve, args=(theirs, self.work, env, self.folder), daemon=False)
        process.start()
        theirs.close()
        return _Worker(place, process, ours)

    def _end(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join(10)
        worker.pipe.close()

    def close(self) -> None:
        """End all workers at once, whatever they are doing."""
        for worker in self._workers.values():
            if worker.job is not None:
                worker.process.kill()
            worker.pipe.close()  # which an idle one takes for the end
        for worker in self._workers.values():
            worker.process.join(2)
            self._end(worker)
        self._workers.clear()


def _gpu(place: int) -> str:
    """Name one of the GPUs that this process may use; with more workers than GPUs, they share them in turn."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = visible or [str(index) for index in range(places("cuda"))]
    return gpus[place % len(gpus)]


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    name = {number.value: number.name for number in signal.Signals}.get(-code, "unknown")
    return f"ended with signal {-code} ({name}){', as when memory runs out' if name == 'SIGKILL' else ''}"


def measured(fields: Mapping[str, Any], hint: Mapping[str, Any] | None) -> dict[str, Any]:
    """Load what measures cells, and return what measure.measure_cell makes of `fields` and `hint`."""
    from knorm.sweep.measure import measure_cell

    return measure_cell(fields, hint)


def _serve(pipe: Connection, work: Work, env: Mapping[str, str], folder: str) -> None:
    """Do cells until the parent is gone."""
    os.environ.update(env)  # before PyTorch is loaded
    os.chdir(folder)
    os.dup2(2, 1)  # stdout is the table's
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to hear, who ends us
    threading.Thread(target=_follow_parent, daemon=True).start()
    while True:
        try:
            fields, hint = pipe.recv()
        except EOFError:
            return
        try:
            answer: dict[str, Any] | str = work(fields, hint)
        except ValueError as error:  # measure.Unusable
            answer = str(error)
        pipe.send(answer)


def _follow_parent() -> None:
    """End this process, and what it is doing, when its parent is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)


def places(device: str, threads: int = 1) -> int:
    """Count the cells that this machine can run at a time, at least 1.

    On the `device` "cuda" that is one for each GPU; on "cpu", one for each `threads` of the cores that this process may
    use.
    """
    if device == "cuda":
        import torch

        return max(1, torch.cuda.device_count())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)
