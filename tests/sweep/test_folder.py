"""Whatever is killed, and however many share a folder: nothing is lost, and nothing counts twice."""

from __future__ import annotations

import errno
import json
import os
import resource
import threading
import time

import pytest
import sweeping
from commands import IN_FULL

from knorm.sweep.folder import Folder
from knorm.sweep.table import join, stored

CELLS = sweeping.CELLS


def table(place, cells=CELLS):
    """What the results add up to, without the times that they took."""
    joined = join(Folder(place), cells)
    return joined.damage, joined.failures, joined.done


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path / "out", expire=0.3)
    made.begin(["row"], {}, {})
    return made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    assert sweeping.run(place, CELLS).finished == len(CELLS)
    return table(place)


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """How many points there are to die at while the cells are done."""
    code, count = sweeping.killed(tmp_path_factory.mktemp("whole"), -1)
    assert code == 0
    return count


@pytest.mark.parametrize("tenth", range(10))
def test_killed_at_fifty_points_spread_over_claim_write_and_rename(tenth, points, undisturbed, tmp_path):
    assert points >= 50
    for point in range(tenth * 5, tenth * 5 + (5 if IN_FULL else 2)):
        place = tmp_path / str(point)
        assert sweeping.killed(place, point * points // 50)[0] == -9
        before = {file: file.stat().st_mtime_ns for file in (place / "results").glob("[!.]*")}
        assert sweeping.run(place, CELLS, expire=0.1).finished == len(CELLS)
        assert {file: file.stat().st_mtime_ns for file in before} == before, "what was done is not done again"
        assert {file.name for file in (place / "results").glob("[!.]*")} == {f"{name}.json" for name in CELLS}
        Folder(place, expire=-1).begin({str(cell.row) for cell in CELLS.values()}, {}, {})
        assert not [*(place / "claims").iterdir()], "the claims of the dead are swept up"
        assert table(place) == undisturbed


def test_a_claim_is_exclusive_and_can_be_given_back(folder):
    other = Folder(folder.place, expire=0.3)
    assert folder.claim("a")
    assert not other.claim("a")
    other.release("a")  # not its own
    assert not other.claim("a")
    folder.release("a")
    assert other.claim("a")


def test_a_claim_expires_where_no_heart_beats_and_not_where_one_does(folder):
    other = Folder(folder.place, expire=0.3)
    assert folder.claim("dead")
    time.sleep(0.4)
    assert other.claim("dead")
    folder.release("dead")
    assert not folder.claim("dead"), "a claim that was taken over is not given back by its first holder"
    with folder.heart():
        assert folder.claim("alive")
        time.sleep(0.7)
        assert not other.claim("alive")
    assert other.claim("alive"), "the end of the heart gives back what is left"


def test_of_many_who_take_an_expired_claim_over_one_succeeds(folder):
    for round in range(50):
        name = f"cell{round}"
        assert folder.claim(name)
        os.utime(folder.claims / name, (1, 1))
        others = [Folder(folder.place, expire=30) for _ in range(4)]
        start, won = threading.Barrier(4), []

        def race(other, name=name, start=start, won=won):
            start.wait()
            won.append(other.claim(name))

        threads = [threading.Thread(target=race, args=(other,)) for other in others]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(won) == 1


def test_a_claim_that_is_renewed_before_it_is_replaced_stays_its_holders(folder, monkeypatch):
    assert folder.claim("a")
    os.utime(folder.claims / "a", (1, 1))
    create = Folder._create

    def late(self, path):
        create(self, path)
        os.utime(folder.claims / "a")  # the holder's heart beats after all

    monkeypatch.setattr(Folder, "_create", late)
    assert not Folder(folder.place, expire=0.3).claim("a")
    monkeypatch.undo()
    folder.release("a")
    assert not (folder.claims / "a").exists(), "it was still the first one's"


def test_one_that_was_killed_while_it_took_a_claim_over_is_in_nobodys_way(folder):
    assert folder.claim("a")
    for file in (folder.claims / "a", folder.claims / ".a.lock"):
        file.touch()
        os.utime(file, (1, 1))
    other = Folder(folder.place, expire=0.3)
    assert [other.claim("a"), other.claim("a")] == [False, True]


def test_claims_do_not_depend_on_this_machines_clock(folder, monkeypatch):
    assert folder.claim("a")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert not Folder(folder.place, expire=0.3).claim("a")


def test_processes_on_one_folder_share_the_cells(tmp_path, undisturbed):
    done = []

    def work(fields, hint):
        done.append(fields["method"]["target"])
        time.sleep(0.05)
        return sweeping.made_up(fields, hint)

    threads = [threading.Thread(target=sweeping.run, args=(tmp_path, CELLS, work)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == len(CELLS)
    assert table(tmp_path) == undisturbed


def test_a_process_waits_for_cells_of_others_and_takes_them_when_they_expire(tmp_path, undisturbed):
    folder, states = Folder(tmp_path), []
    folder.begin({str(cell.row) for cell in CELLS.values()}, {}, {"models": ["m"]})
    assert folder.claim(next(iter(CELLS)))  # and nothing comes of it
    options = {"expire": 0.5, "report": lambda progress: states.append(progress.waiting)}
    assert sweeping.run(tmp_path, CELLS, **options).finished == len(CELLS)
    assert any(states)
    assert table(tmp_path) == undisturbed


@pytest.mark.parametrize("more", [{"methods": 4}, {"blocks": 3}])
def test_a_method_or_windows_more_add_only_their_cells(more, tmp_path):
    sweeping.run(tmp_path, CELLS)
    larger, done = sweeping.make_cells(**more), []

    def work(fields, hint):
        done.append(fields)
        return sweeping.made_up(fields, hint)

    progress = sweeping.run(tmp_path, larger, work)
    assert progress.before == len(CELLS)
    assert len(done) == len(larger) - len(CELLS)
    assert progress.finished == len(larger)


def test_a_failure_is_a_result_and_done_again_when_asked_for(tmp_path):
    cells = sweeping.make_cells(methods=2)
    assert sweeping.run(tmp_path, cells, sweeping.fails).failed == 4
    assert sweeping.run(tmp_path, cells).finished == 4, "it is not done again by itself"
    assert [reason for _, reason in join(Folder(tmp_path), cells).failures] == ["it said no"] * 4
    progress = sweeping.run(tmp_path, cells, retry=True)
    assert (progress.failed, progress.done) == (0, 4)
    assert join(Folder(tmp_path), cells).failures == []
    assert not [*(tmp_path / "results").glob("*.failed.json")]


def test_two_who_retry_do_each_failed_cell_once(tmp_path):
    cells = sweeping.make_cells(methods=2)
    sweeping.run(tmp_path, cells, sweeping.fails)
    done = []

    def work(fields, hint):
        done.append(1)
        time.sleep(0.05)
        return sweeping.fails(fields, hint)

    threads = [threading.Thread(target=sweeping.run, args=(tmp_path, cells, work), kwargs={"retry": True})] * 1
    threads += [threading.Thread(target=sweeping.run, args=(tmp_path, cells, work), kwargs={"retry": True})]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == len(cells)


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path, undisturbed):
    """A limit on the size of files stands for it: it strikes in the write, where a full disk does."""

    def large(fields, hint):
        return sweeping.made_up(fields, hint) | {"environment": {"x": "y" * 100_000}}

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError) as told:
            sweeping.run(tmp_path, CELLS, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told.value.errno == errno.EFBIG
    assert not [*(tmp_path / "results").iterdir()]
    assert not [*(tmp_path / "claims").iterdir()]
    sweeping.run(tmp_path, CELLS)
    assert table(tmp_path) == undisturbed


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis\.tex, and no sweep: give a new or an empty folder"):
        Folder(tmp_path).begin(["a"], {}, {})
    with pytest.raises(ValueError, match="is no folder"):
        Folder(tmp_path / "thesis.tex").known()


def test_a_folder_of_another_plan_is_refused_and_of_a_larger_one_is_not(tmp_path):
    Folder(tmp_path).begin(["a", "b"], {}, {"models": ["m"]})
    Folder(tmp_path).begin(["b", "c"], {}, {"models": ["m", "n"]})
    with pytest.raises(ValueError, match=r"is the folder of another plan \(models: m, n\): give another folder"):
        Folder(tmp_path).begin(["a"], {}, {})


@pytest.mark.parametrize("text", ["", "{}", '{"form": "x"}', "[]"])
def test_a_damaged_plan_of_a_folder_is_told(text, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged, or of another program"):
        Folder(tmp_path).known()


def test_a_damaged_result_is_named(tmp_path):
    sweeping.run(tmp_path, CELLS)
    file = tmp_path / "results" / f"{next(iter(CELLS))}.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(ValueError, match=f"{file.name} is damaged: remove it, and its cell is done again"):
        table(tmp_path)


@pytest.mark.parametrize("change", [{"method": None}, {"method": {}}, {"strange": 1}])
def test_a_result_of_another_version_is_named(change, tmp_path):
    sweeping.run(tmp_path, CELLS)
    name = next(iter(CELLS))
    plan, file = tmp_path / "plan.json", tmp_path / "results" / f"{name}.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "study": {"cells": [name], "plan": {"windows": 4}}}))
    result = json.loads(file.read_text())
    result["cell"] |= change
    if not change.get("method", True):
        del result["cell"]["method"]
    file.write_text(json.dumps(result))
    with pytest.raises(ValueError, match=f"{name}.json is no result of this version of knorm"):
        stored(Folder(tmp_path))


def test_what_killed_processes_left_half_written_is_swept_up(folder):
    for file in (folder.results / ".a.json.x", folder.claims / ".a.b"):
        file.touch()
        os.utime(file, (1, 1))
    folder.begin(["row"], {}, {})
    assert not [*folder.results.iterdir(), *folder.claims.iterdir()]


def test_the_rows_others_learn_from_are_told_how_to_run(tmp_path):
    engine = sweeping.AtOnce()
    folder = Folder(tmp_path)
    folder.begin(["row"], {}, {})
    sweeping.drive(folder, CELLS, engine)
    told = [hint for hint in engine.hints if hint]
    assert told == [{"how": "two calls", "checked": "checked"}] * 2  # the second block of the two methods
