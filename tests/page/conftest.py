"""Results to make pages of, by the real commands, small."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from commands import command
from filelock import FileLock
from inline import Inline

ROOT = Path(__file__).parents[2]
TIMED = """methods = ["knorm", "transformers:DynamicCache"]
texts = ["encyclopedia"]
window = 64
measure = ["latency"]
new_tokens = 3
blocks = 8
device = "cpu"
"""
SMALL = ("--window", "64", "--windows", "2", "-q")
PLAN = 'methods = ["knorm", "mended.py:compress"]\nwindow = 64\nwindows = 4\nwindows_per_cell = 2\ndevice = "cpu"\n'


@pytest.fixture(scope="session")
def results(tmp_path_factory, request):
    """A folder with check.json, declared.json, ppl.json, curve.json, explain.json, timed.json, and folders of sweeps,
    study and timed; made once for all workers of pytest-xdist."""
    if not hasattr(request.config, "workerinput"):
        return made(tmp_path_factory.mktemp("results"))
    folder = tmp_path_factory.getbasetemp().parent / "results"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            half = folder.with_suffix(".half")
            half.mkdir()
            made(half).rename(folder)
    return folder


def made(folder):
    import sweeping

    from knorm.sweep import measure

    for name in ("mine.py", "mended.py"):
        shutil.copy(ROOT / "examples" / name, folder)
    (folder / "plan.toml").write_text(PLAN)
    (folder / "times.toml").write_text(TIMED)
    patch = pytest.MonkeyPatch()

    @contextlib.contextmanager
    def here(ready, *, alone):
        yield sweeping.AtOnce(measure.measure_cell)

    patch.setattr("knorm.laws.process.supervisor.Worker", Inline)
    patch.setattr("knorm.cli.sweep._engine", here)
    patch.setattr("knorm.bench.latency.check_alone", lambda device: None)  # whatever the times come to
    fp8 = 'transformers:QuantizedCache(backend="fp8")'

    def quiet(name):
        return "-q", "--json", f"{name}.json"

    declared = ("--expect-failure", "time_order=by norm")
    with contextlib.chdir(folder):
        codes = [
            command("check", "mine.py:compress", "mended.py:compress", "--select", "order,count", *quiet("check")),
            command("check", "mine.py:compress", "--select", "order", *declared, *quiet("declared")),
            command("ppl", "mended.py:compress", fp8, *SMALL, "--json", "ppl.json"),
            command("ppl", "--keep-ratio", "0.9,0.5", "--prune-after", "16", *SMALL, "--json", "curve.json"),
            command("explain", "mended.py:compress", *SMALL, "--tokens", "0", "--json", "explain.json"),
            command("sweep", "plan.toml", "study", "-q"),
            command("sweep", "times.toml", "timed", "-q", "--json", "timed.json"),
        ]  # fmt: skip
    patch.undo()
    assert codes == [1, 0, 0, 0, 0, 0, 0]
    return folder


@pytest.fixture
def loaded(results):
    """Read one of the results' files, to be changed and written elsewhere."""
    return lambda name: json.loads((results / name).read_text())
