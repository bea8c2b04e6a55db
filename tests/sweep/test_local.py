"""A pool of processes: what dies, hangs or does not fit, and what is left of it."""

from __future__ import annotations

import time

import pytest
import sweeping

from knorm.sweep.drive import Unfit, drive
from knorm.sweep.folder import Folder
from knorm.sweep.local import Pool, _gpu, places
from knorm.sweep.table import join

CELLS = sweeping.make_cells(methods=3, blocks=1)


def pooled(place, cells, work, workers=2, **env):
    folder = Folder(place)
    folder.begin(["row"], {}, {})
    pool = Pool(workers, "cpu", work=work, env=env)
    try:
        return drive(folder, cells, pool), join(folder, cells)
    finally:
        pool.close()
        assert not pool._workers


def test_a_pool_does_what_one_process_does(tmp_path):
    _, table = pooled(tmp_path / "pool", CELLS, sweeping.made_up)
    sweeping.run(tmp_path / "one", CELLS)
    assert table.damage == join(Folder(tmp_path / "one"), CELLS).damage


def test_a_method_that_kills_its_process_three_times_has_failed_and_the_others_have_not(tmp_path):
    progress, table = pooled(tmp_path, CELLS, sweeping.dies)
    assert progress.failed == 1
    assert [(cell.method.label, reason) for cell, reason in table.failures] == [
        ("a.py:m0 0.5", "3 workers were lost to it; the last one ended with signal 11 (SIGSEGV)")
    ]
    assert table.done == 2


def test_a_cell_that_is_killed_is_done_again(tmp_path):
    progress, table = pooled(tmp_path / "out", CELLS, sweeping.dies_once, KNORM_TEST_MARK=str(tmp_path / "mark"))
    assert (progress.failed, table.done) == (0, 3)


def test_a_cell_that_does_not_end_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("knorm.sweep.local._LOADING", 2.0)
    cells = sweeping.make_cells(methods=1, blocks=1, text="60", limit=0.5)
    _, table = pooled(tmp_path, cells, sweeping.waits)
    assert [reason for _, reason in table.failures] == ["no result within 0.5 s, the plan's limit"]


def test_a_worker_that_lacks_something_ends_the_sweep_and_no_method_is_blamed(tmp_path):
    with pytest.raises(Unfit, match="another knorm"):
        pooled(tmp_path, CELLS, sweeping.unfit)
    assert Folder(tmp_path).states() == {}
    assert not [*(tmp_path / "claims").iterdir()]


def test_closing_does_not_wait(tmp_path):
    pool = Pool(1, "cpu", work=sweeping.waits)
    (name, cell), *_ = sweeping.make_cells(text="60").items()
    pool.submit(0, name, cell.as_json(), None)
    time.sleep(0.5)
    begin = time.monotonic()
    pool.close()
    assert time.monotonic() - begin < 5


def test_a_worker_for_each_core_or_for_each_few(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    assert (places("cpu"), places("cpu", 4), places("cpu", 16)) == (8, 2, 1)


@pytest.mark.parametrize(("visible", "shared"), [("2,5", ["2", "5", "2", "5", "2"]), ("", ["0", "1", "0", "1", "0"])])
def test_more_workers_than_gpus_share_them_in_turn(monkeypatch, visible, shared):
    """The third of three was once given a GPU that is not there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [_gpu(place) for place in range(5)] == shared
