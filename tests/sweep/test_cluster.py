"""A sweep on Ray: two nodes, one of which is killed; what a cluster may lack; a driver that dies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import sweeping
from commands import HOME, in_a_new_process, new_environment

from knorm.sweep import cluster
from knorm.sweep.cells import Study
from knorm.sweep.drive import Unfit, drive
from knorm.sweep.folder import Folder
from knorm.sweep.plan import Plan
from knorm.sweep.table import join

REASON = "ray is not installed: tox -e ray has it"
STUDY = Study(Plan(methods=["knorm"]), "cpu", [], [])
TESTS = Path(sweeping.__file__).parent


@pytest.fixture(scope="module")
def ray():
    """Ray, or a skip with the reason; where KNORM_REQUIRE_RAY is set, a failure."""
    if os.environ.get("KNORM_REQUIRE_RAY"):
        import ray
    else:
        ray = pytest.importorskip("ray", reason=REASON)
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    yield ray
    ray.shutdown()


@pytest.fixture
def nodes(ray, monkeypatch):
    """A cluster of two nodes on this machine, with a core each; the second can be killed."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HOME), str(TESTS)]))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = made.add_node(num_cpus=1)
    ray.init(address=made.address, logging_level="ERROR", log_to_driver=False)
    yield made, second
    ray.shutdown()
    made.shutdown()


def swept(place, cells, work, **options):
    folder = Folder(place)
    folder.begin(["row"], {}, {})
    engine = cluster.Cluster(STUDY, Path.cwd(), run=work, **options)
    try:
        return drive(folder, cells, engine), join(folder, cells)
    finally:
        engine.close()


def test_one_of_two_nodes_is_killed_in_the_middle_and_the_table_is_the_same(nodes, tmp_path):
    made, second = nodes
    cells = sweeping.make_cells(methods=4, blocks=6, text="0.5")

    def kill():
        while len(Folder(tmp_path / "ray").states()) < 6:
            time.sleep(0.05)
        made.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    progress, table = swept(tmp_path / "ray", cells, sweeping.waits)
    killer.join()
    assert progress.finished == len(cells)
    sweeping.run(tmp_path / "one", cells)
    assert table.damage == join(Folder(tmp_path / "one"), cells).damage
    assert len([*(tmp_path / "ray" / "results").iterdir()]) == len(cells)


def test_a_method_that_kills_its_worker_has_failed_and_the_others_have_not(nodes, tmp_path):
    cells = sweeping.make_cells(methods=3, blocks=1)
    _, table = swept(tmp_path, cells, sweeping.dies)
    ((cell, reason),) = table.failures
    assert cell.method.label == "a.py:m0 0.5"
    assert reason.startswith("3 workers were lost to it; the last one: ")
    assert table.done == 2


def test_a_cell_that_does_not_end_has_failed(nodes, tmp_path):
    cells = sweeping.make_cells(methods=1, blocks=1, text="60", limit=0.5)
    _, table = swept(tmp_path, cells, sweeping.waits)
    assert [reason for _, reason in table.failures] == ["no result within 0.5 s, the plan's limit"]


def test_a_node_that_lacks_something_ends_the_sweep_in_a_line(nodes, tmp_path):
    with pytest.raises(Unfit, match="a worker has another knorm"):
        swept(tmp_path, sweeping.make_cells(), sweeping.unfit)
    assert Folder(tmp_path).states() == {}
    assert not [*(tmp_path / "claims").iterdir()]


def test_no_room_for_a_cell_is_a_line(nodes, tmp_path):
    study = Study(Plan(methods=["knorm"], threads=5), "cpu", [], [])
    with pytest.raises(ValueError, match="no node of the Ray cluster has 5 cores for a cell"):
        cluster.Cluster(study, tmp_path)
    assert cluster.places(STUDY) == 2


def test_cells_that_want_to_be_alone_get_all_cores_of_a_node(nodes, ray):
    assert cluster.Cluster(STUDY, Path.cwd(), alone=True)._places == range(2)


PLAN = 'methods = ["knorm", "mine.py:newest"]\nwindow = 64\nwindows = 4\nwindows_per_cell = 2\ndevice = "cpu"\n'
MINE = "import helper\n\ndef newest(keys, values, keep_ratio):\n    return helper.newest(keys, values, keep_ratio)\n"
HELPER = """
def newest(keys, values, keep_ratio):
    count = max(1, int(keys.shape[2] * keep_ratio))
    return keys[:, :, -count:], values[:, :, -count:]
"""


@pytest.fixture
def study(tmp_path):
    """A plan with a method of two files."""
    for name, text in (("plan.toml", PLAN), ("mine.py", MINE), ("helper.py", HELPER)):
        (tmp_path / name).write_text(text)
    return tmp_path


def command(where, *arguments, **variables):
    full = [sys.executable, "-m", "knorm", "sweep", "plan.toml", *arguments]
    environment = new_environment(**variables)
    return subprocess.run(full, cwd=where, env=environment, capture_output=True, text=True, check=False)


def test_the_command_gives_the_same_file_on_ray_as_in_processes(ray, study):
    on_ray = command(study, "ray", "--on", "ray", "--json", "ray.json")
    assert on_ray.returncode == 0, on_ray.stderr
    assert command(study, "local", "--json", "local.json").returncode == 0
    assert (study / "ray.json").read_bytes() == (study / "local.json").read_bytes()


def test_a_node_without_the_plans_folder_is_sent_what_it_names(ray, study, tmp_path):
    """The folder is there, but its name is not: workers start in the copy that Ray sends."""
    code = """
        import sys
        from pathlib import Path
        from knorm.sweep import cluster
        init = cluster.Cluster.__init__
        cluster.Cluster.__init__ = lambda self, study, where, **rest: init(self, study, Path("/nowhere"), **rest)
        sys.argv = ["knorm", "sweep", "plan.toml", "out", "--on", "ray"]
        from knorm.cli import main
        main()
    """
    run = in_a_new_process(code, cwd=study)
    assert "6 of 6 cells are done" in run.stdout, run.stderr


@pytest.fixture
def node(ray, monkeypatch):
    """A cluster of one node, to which nobody is connected."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HOME), str(TESTS)]))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


def test_a_driver_that_is_killed_at_fifty_points_loses_nothing(node, tmp_path):
    """The driver writes what Ray brings back: killed in claim, write and rename, another goes on where it was."""
    whole = driver(tmp_path / "whole", -1, node.address)
    assert whole.returncode == 0, whole.stderr
    points = int(whole.stdout.split()[-1])
    undisturbed = join(Folder(tmp_path / "whole"), sweeping.CELLS).damage
    assert points >= 50
    for point in range(50):
        place = tmp_path / str(point)
        assert driver(place, point * points // 50, node.address).returncode == -9
        before = {file: file.stat().st_mtime_ns for file in (place / "results").glob("[!.]*")}
        assert sweeping.run(place, sweeping.CELLS, expire=0.1, rows=["row"]).finished == len(sweeping.CELLS)
        assert {file: file.stat().st_mtime_ns for file in before} == before
        assert join(Folder(place), sweeping.CELLS).damage == undisturbed
        assert {file.name for file in (place / "results").glob("[!.]*")} == {f"{x}.json" for x in sweeping.CELLS}


def driver(place, point, address):
    """Do the cells on the cluster in a process that ends at a point; prints how many there are."""
    code = f"""
        import os
        from pathlib import Path
        import ray
        import sweeping
        from knorm.sweep import cluster
        from knorm.sweep.cells import Study
        from knorm.sweep.drive import drive
        from knorm.sweep.folder import Folder
        from knorm.sweep.plan import Plan
        ray.init(address={address!r}, logging_level="ERROR", log_to_driver=False)
        folder = Folder(Path({str(place)!r}))
        folder.begin(["row"], {{}}, {{}})
        engine = cluster.Cluster(Study(Plan(methods=["knorm"]), "cpu", [], []), Path.cwd(), run=sweeping.made_up)
        points = sweeping.die_at({point}, {str(place)!r})
        drive(folder, sweeping.CELLS, engine)
        print(points())
    """
    return in_a_new_process(code, env=new_environment(TESTS))


def fake(monkeypatch, **parts):
    """A module `ray` that is none."""
    made = SimpleNamespace(is_initialized=lambda: False, **parts)
    monkeypatch.setitem(sys.modules, "ray", made)
    return made


def raising(error):
    def init(**options):
        raise error

    return init


def test_a_cluster_of_another_python_is_a_line(monkeypatch, tmp_path):
    said = "Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.12.1\nThis process ..."
    fake(monkeypatch, init=raising(RuntimeError(said)))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(
        ValueError, match=r"the Ray cluster head:6379 cannot be used: Version mismatch: .*Python: 3.12.1"
    ) as told:
        cluster.connect(STUDY.plan, tmp_path)
    assert "\n" not in str(told.value)


def test_a_cluster_that_is_named_and_not_there_is_a_line_and_none_is_started(monkeypatch, tmp_path):
    fake(monkeypatch, init=raising(ConnectionError("nobody at head:6379")))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(ValueError, match="the Ray cluster head:6379 cannot be used: nobody at head:6379"):
        cluster.connect(STUDY.plan, tmp_path)


def test_without_a_cluster_one_is_started_here(monkeypatch, tmp_path):
    asked = []

    def init(address, **options):
        asked.append(address)
        if address == "auto":
            raise ConnectionError

    fake(monkeypatch, init=init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster.connect(STUDY.plan, tmp_path)
    assert asked == ["auto", "local"]


def test_without_ray_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"--on ray needs the package ray: pip install 'knorm\[ray\]'"):
        cluster.connect(STUDY.plan, tmp_path)


def test_a_node_without_knorm_is_a_line(monkeypatch):
    errors = SimpleNamespace(
        WorkerCrashedError=KeyError, NodeDiedError=KeyError, OutOfMemoryError=KeyError, RayError=RuntimeError
    )

    def get(task):
        raise RuntimeError("The remote function failed to import: ModuleNotFoundError: No module named 'knorm'\n ...")

    engine = object.__new__(cluster.Cluster)
    engine._ray = SimpleNamespace(exceptions=errors, get=get)
    with pytest.raises(Unfit, match=r"a node of the Ray cluster has no knorm: install knorm [\d.]+ on all"):
        engine._result(None, {})
