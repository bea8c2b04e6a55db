"""The engine of a Ray cluster: a cell is a task, and Ray places it, begins it again, and brings its result back."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from knorm import __version__
from knorm.sweep.cells import Study, outcome
from knorm.sweep.drive import Unfit
from knorm.sweep.inputs import sources_of
from knorm.sweep.local import LOST, Work, measured
from knorm.sweep.plan import Plan

_AHEAD = 2  # tasks for each place: the next one is there when one ends, and a cluster that grows sees what waits


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError("--on ray needs the package ray: pip install 'knorm[ray]'") from None
    return ray


def connect(plan: Plan, where: Path) -> None:
    """Join the Ray cluster that is there (RAY_ADDRESS, or one of this machine), or start one on this machine.

    Args:
        plan: whose targets and texts are sent to the nodes, as far as they lie in its folder.
        where: that folder, which is the current one.

    Raises:
        ValueError: ray is not installed, or the cluster has another version of Python or Ray.
    """
    ray = _ray()
    if ray.is_initialized():
        return
    named = os.environ.get("RAY_ADDRESS")
    with tempfile.TemporaryDirectory(prefix="knorm-") as stage:
        _collect(plan, where, Path(stage))
        options = {"runtime_env": {"working_dir": stage}, "logging_level": "ERROR", "log_to_driver": False}
        try:
            try:
                ray.init(address=named or "auto", **options)
            except ConnectionError:
                if named:
                    raise
                ray.init(address="local", include_dashboard=False, **options)
        except (ConnectionError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"the Ray cluster {named or 'of this machine'} cannot be used: {said}") from None


def has_gpus() -> bool:
    """Tell whether a node of the cluster has a GPU."""
    return float(_ray().cluster_resources().get("GPU", 0)) >= 1


class Cluster:
    """Run cells as tasks of the cluster that is connected; no folder need be shared with it.

    Args:
        study: for its threads and its device.
        where: the folder that paths in the plan are seen from.
        alone: each cell gets all cores of a node, or a GPU, for itself.
        workers: cells that run at a time, at most; by default as many as the cluster has room for.
        run: what a worker does with a cell; by default measure.measure_cell.
    """

    def __init__(
        self, study: Study, where: Path, *, alone: bool = False, workers: int | None = None, run: Work | None = None
    ) -> None:
        self._ray = _ray()
        cpus, gpus, most = _room(study, alone)
        self._places = range(min(workers or 2**20, most * (1 if alone else _AHEAD)))
        threads = str(study.plan.threads)
        env = {"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}}
        remote = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=LOST - 1, runtime_env=env)
        self._task, self._where = remote(work), (str(where), run)
        self._running: dict[Any, tuple[int, str, dict[str, Any]]] = {}

    def free(self) -> Iterator[int]:
        """Generate the places that could take a cell."""
        taken = {place for place, _, _ in self._running.values()}
        yield from (place for place in self._places if place not in taken)

    def submit(self, place: int, name: str, fields: dict[str, Any], hint: Mapping[str, Any] | None) -> None:
        """Make a cell a task.

        Args:
            place: one of those that `free` generates.
            name: of the cell.
            fields: of Cell.as_json.
            hint: how the cell's row is run; None where that is not known.
        """
        self._running[self._task.remote(fields, hint, *self._where)] = place, name, fields

    def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        """Return (name, result) of a cell that has ended, in a list, which is empty after `seconds` without one.

        A cell to which Ray lost its workers, after it was begun again, has failed.

        Raises:
            Unfit: a worker lacks what the plan needs, or the cluster cannot run the task.
        """
        ready, _ = self._ray.wait([*self._running], num_returns=1, timeout=seconds)
        results = []
        for task in ready:
            _, name, fields = self._running.pop(task)
            results.append((name, self._result(task, fields)))
        return results

    def _result(self, task: Any, fields: dict[str, Any]) -> dict[str, Any]:
        errors = self._ray.exceptions
        try:
            answer = self._ray.get(task)
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
            return outcome(fields, failed=f"{LOST} workers were lost to it; the last one: {_first(error)}")
        except (errors.RayError, RuntimeError) as error:
            if "No module named 'knorm'" in str(error):
                raise Unfit(f"a node of the Ray cluster has no knorm: install knorm {__version__} on all") from None
            said = str(getattr(error, "cause", None) or _first(error))
            raise Unfit(f"the Ray cluster cannot do it: {said}") from None
        if isinstance(answer, str):
            raise Unfit(answer)
        return dict(answer)

    def close(self) -> None:
        """End all tasks at once."""
        for task in self._running:
            with contextlib.suppress(Exception):  # the cluster may be gone
                self._ray.cancel(task, force=True)
        self._running.clear()


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _room(study: Study, alone: bool) -> tuple[int, int, int]:
    """Return the cores and GPUs that a cell needs, and how many cells the cluster can run at a time."""
    nodes = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
    cpus, gpus = study.plan.threads, int(study.device == "cuda")
    if alone and not gpus:
        cpus = int(max(node.get("CPU", 0) for node in nodes))
    most = int(sum(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if gpus else 2**20) for node in nodes))
    if not most:
        raise ValueError(f"no node of the Ray cluster has {cpus} cores{' and a GPU' if gpus else ''} for a cell")
    return cpus, gpus, most


def places(study: Study) -> int:
    """Count the cells of `study` that the cluster can run at a time; ValueError where no node has room for one."""
    return _room(study, False)[2]


def _collect(plan: Plan, where: Path, stage: Path) -> None:
    """Copy what nodes without the plan's folder need: the sources of targets and the texts that lie in it."""
    files = [Path(text).absolute() for text in plan.texts]
    for entry in plan.methods:
        files += () if entry.target.endswith(":*") else sources_of(entry.target)
    for file in files:
        if file.is_file() and file.is_relative_to(where):
            target = stage / file.relative_to(where)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def work(
    fields: Mapping[str, Any], hint: Mapping[str, Any] | None, where: str, run: Work | None = None
) -> dict[str, Any] | str:
    """Measure a cell on a node, in the plan's folder if the node has it, else in a copy of what it names.

    Args:
        fields: of Cell.as_json; beyond its limit, in seconds, the cell has failed.
        hint: how the cell's row is run; None where that is not known.
        where: the plan's folder.
        run: what measures the cell; by default measure.measure_cell.

    Returns:
        The result, or in words why this node cannot measure the cell.
    """
    if os.path.isdir(where):
        os.chdir(where)
    try:
        with _limited(fields["limit"]):
            return (run or measured)(fields, hint)
    except ValueError as error:  # measure.Unusable
        return str(error)
    except _Late:
        return outcome(fields, failed=f"no result within {fields['limit']:g} s, the plan's limit")


class _Late(BaseException):
    """Say that a cell took too long; no method that catches exceptions catches it."""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
