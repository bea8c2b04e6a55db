"""`knorm sweep`: what it finds is what `knorm ppl` finds, however often it was interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import sweeping
from commands import in_a_new_process, new_environment, strict_json

from knorm.cli import schemas
from knorm.cli.swept import lasting
from knorm.cli.tables import UNCHANGED
from knorm.sweep import measure
from knorm.sweep.folder import Folder

ROOT = Path(__file__).parents[2]
MINE = """
import torch

def newest(keys, values, keep_ratio):
    count = max(1, int(keys.shape[2] * keep_ratio))
    return keys[:, :, -count:], values[:, :, -count:]

def breaks(keys, values, keep_ratio):
    raise RuntimeError("out of luck")

def idle(keys, values, keep_ratio):
    return keys, values
"""
PLAN = 'methods = ["knorm", "mine.py:newest"]\nwindow = 64\nwindows = 4\nwindows_per_cell = 2\ndevice = "cpu"\n'


@pytest.fixture
def sweep(run_knorm, monkeypatch, tmp_path):
    """Write a plan and run it, in this process; returns exit code, stdout, stderr."""
    (tmp_path / "mine.py").write_text(MINE)

    @contextmanager
    def here(ready, *, alone):
        before = os.getcwd()
        os.chdir(ready.where)
        yield sweeping.AtOnce(measure.measure_cell)
        os.chdir(before)

    monkeypatch.setattr("knorm.cli.sweep._engine", here)

    def run(plan, *arguments):
        Path("plan.toml").write_text(plan)
        return run_knorm("sweep", "plan.toml", "out", *arguments)

    return run


def test_its_rows_are_those_of_ppl_on_all_windows_at_once(sweep, run_knorm):
    code, said, _ = sweep(PLAN + "keep_ratio = [0.5, 0.25]", "--json", "swept.json")
    assert code == 0
    assert max(map(len, said.splitlines())) <= 80
    assert said.splitlines()[-1] == "10 of 10 cells are done"
    targets = ("knorm", "mine.py:newest")
    options = ("--keep-ratio", "0.5,0.25", "--window", "64", "--windows", "4", "--json", "ppl.json")
    assert run_knorm("ppl", *targets, *options)[0] == 0
    ours, theirs = strict_json("swept.json")["rows"], strict_json("ppl.json")["rows"]
    assert [row["method"] for row in ours] == [row["method"] for row in theirs]
    for our, their in zip(ours, theirs, strict=True):
        for name in their.keys() - {"seconds", "checked", "tokens_seen", "bytes_per_token", "kl_at_least"}:
            assert our[name] == their[name], (our["method"], name)
        assert our["bytes_per_token"] == pytest.approx(their["bytes_per_token"], rel=1e-12)
        assert our["tokens_seen"] == [pytest.approx(layer, rel=1e-12) for layer in their["tokens_seen"]]
    assert [row["letters"] for row in ours] == ["a", *(line.split()[-1] for line in said.splitlines()[5:9])]


def test_a_cache_that_keeps_everything_is_not_suspected_and_one_that_does_nothing_is(sweep):
    plan = PLAN.replace('"knorm", "mine.py:newest"', '"transformers:DynamicCache", "mine.py:idle"')
    code, said, _ = sweep(plan, "--json", "swept.json")
    assert code == 0
    assert [row["changed"] for row in strict_json("swept.json")["rows"]] == [False, False, False]
    assert [line for line in " ".join(said.split()).split("mine.py:idle 0.5: ")[1:] if line.startswith(UNCHANGED)]
    assert f"DynamicCache: {UNCHANGED}" not in " ".join(said.split())


def test_the_same_command_again_gives_the_same_table_and_runs_nothing(sweep, monkeypatch):
    assert sweep(PLAN, "--json", "first.json")[0] == 0
    monkeypatch.setattr("knorm.cli.sweep._engine", None)
    monkeypatch.setattr("knorm.sweep.folder.Folder.begin", None)  # its folder may be read-only
    code, said, _ = sweep(PLAN, "--json", "second.json")
    assert code == 0
    assert Path("first.json").read_bytes() == Path("second.json").read_bytes()
    assert "6 of 6 cells are done" in said


STORED = """
import json, sys
from pathlib import Path
from knorm.cli.swept import table_fields
from knorm.sweep.folder import Folder
from knorm.sweep.table import stored
study, table, versions = stored(Folder(Path(sys.argv[1])))
print(json.dumps([table_fields(study, table), versions["torch"], "torch" in sys.modules]))
"""


def test_its_folder_tells_the_same_table_without_the_plan_and_without_pytorch(sweep):
    plan = PLAN.replace('"mine.py:newest"', '"mine.py:newest", "mine.py:breaks"')
    sweep(plan, "--json", "swept.json")
    swept = strict_json("swept.json")
    told, version, loaded = json.loads(in_a_new_process(STORED, "out", check=True).stdout)
    assert version.startswith(swept["environment"]["torch"])
    assert not loaded
    again = schemas.FORMS["knorm-sweep"].model_validate({**swept, **told}).model_dump(mode="json", by_alias=True)
    assert again == swept
    for file in [*Path("out/results").iterdir()][::2]:
        file.unlink()
    told, _, _ = json.loads(in_a_new_process(STORED, "out", check=True).stdout)
    assert (told["cells"], told["done"] + len(told["failures"])) == (8, 4)
    assert {row["windows"] for row in told["rows"] if not row["complete"]} <= {2}


def test_what_is_planned_less_later_is_told_so_though_nothing_is_left_to_do(sweep):
    sweep(PLAN)
    sweep(PLAN.replace('"knorm", ', ""))
    told, _, _ = json.loads(in_a_new_process(STORED, "out", check=True).stdout)
    assert {row["method"] for row in told["rows"]} == {"full cache, again", "mine.py:newest"}


def test_a_dry_run_runs_nothing_and_learns_from_what_is_done(sweep):
    code, said, _ = sweep(PLAN, "--dry-run", "--json", "plan.json")
    assert code == 0
    assert not Path("out").exists()
    assert "plan.toml: 6 cells in 3 rows, 0 done; 6 to do" in said
    assert "Time: unknown until cells of this model are done" in said
    assert "if they differ as the embedded" in said
    planned = strict_json("plan.json")
    assert (planned["schema"], len(planned["planned"]), planned["seconds"]) == ("knorm-sweep-plan", 6, None)
    schemas.FORMS["knorm-sweep-plan"].model_validate(planned, strict=False)
    sweep(PLAN)
    code, said, _ = sweep(PLAN.replace("windows = 4", "windows = 6"), "--dry-run", "--json", "plan.json")
    assert "plan.toml: 9 cells in 3 rows, 6 done; 3 to do" in said
    planned = strict_json("plan.json")
    results = [json.loads(file.read_bytes()) for file in Path("out/results").iterdir()]
    mean = sum(result["seconds"] for result in results) / 6
    assert 0.2 < planned["seconds"] / (3 * mean) < 2
    assert planned["memory"] == max(result["memory"] for result in results)
    low, middle, high = planned["smallest_difference"]
    assert 0 < low <= middle <= high
    assert planned["measured_rows"] == 2
    code, said, _ = sweep(
        PLAN.replace("windows = 4", "windows = 6") + 'models = ["embedded", "embedded-llama"]', "--dry-run"
    )
    assert "To which comes the time of 9 cells, of models or measures of which none is done yet" in said
    assert "like others" not in said


def test_a_dry_run_tells_that_times_are_measured_one_by_one(sweep, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # its times are not looked at
    plan = 'methods = ["knorm"]\nwindow = 64\nnew_tokens = 3\nblocks = 8\ndevice = "cpu"\n'
    assert sweep(plan + 'measure = ["latency"]\nprompt_lengths = [8]')[0] == 0
    for measures, count in (('"latency"', 1), ('"latency", "laws"', 4)):
        more = f"measure = [{measures}]\nprompt_lengths = [8, 12]"
        code, said, _ = sweep(plan + more, "--dry-run", "--workers", "4", "--json", "plan.json")
        assert (code, strict_json("plan.json")["workers"]) == (0, count)
        assert f"{count} at a time on cpu" in said
        wall, work = re.search(r"Time: about (.+?), (.+?) of work", " ".join(said.split())).groups()
        assert wall == work
        assert "ΔNLL" not in said


def test_a_cell_that_fails_is_a_result_with_its_reason(sweep):
    plan = PLAN.replace('"mine.py:newest"', '"mine.py:newest", "mine.py:breaks"')
    code, said, _ = sweep(plan, "--json", "swept.json")
    assert code == 1
    reason = "mine.py:breaks raised RuntimeError: out of luck (mine.py, line 9)"
    assert "FAILED  mine.py:breaks 0.5 on embedded, 2 cells:" in said
    found = strict_json("swept.json")
    assert {failure["reason"] for failure in found["failures"]} == {reason}
    assert [row["method"] for row in found["rows"]][1:] == ["knorm", "mine.py:newest"]
    assert "6 of 8 cells are done, 2 failed: --retry does them again" in said


def test_a_fault_of_knorms_own_is_exit_3_and_blames_no_method(sweep, monkeypatch):
    monkeypatch.setattr("knorm.sweep.measure.sums_of", lambda tokens: 1 / 0)
    code, said, errors = sweep(PLAN, "--json", "swept.json")
    assert code == 3
    assert "a fault of knorm's own, in damage of full cache, again" in errors
    assert "ZeroDivisionError" in errors
    assert "FAILED" not in said
    assert all(failure["fault"] for failure in strict_json("swept.json")["failures"])


@pytest.mark.parametrize("error", ["ValueError('x')", "TypeError('x')", "KeyError('x')", "AssertionError()"])
def test_an_error_that_knorm_did_not_put_in_words_is_its_own_fault(sweep, monkeypatch, error):
    monkeypatch.setattr("knorm.sweep.measure.sums_of", lambda tokens: exec(f"raise {error}"))
    assert sweep(PLAN)[0] == 3


def test_a_text_that_is_too_short_ends_the_sweep_in_one_line(sweep):
    Path("short.txt").write_text("The cat sat on the mat. " * 30)
    code, said, errors = sweep(PLAN + 'texts = ["short.txt"]')
    assert (code, said) == (2, "")
    assert "short.txt has no 4 windows of 64 tokens for embedded, but " in " ".join(errors.split())
    assert not [*Path("out/results").glob("*.failed.json")], "no method is to blame"


def test_failures_are_told_where_nothing_else_is(sweep):
    code, said, errors = sweep(PLAN.replace("newest", "breaks"), "-q")
    assert (code, said) == (1, "")
    assert errors.startswith("knorm: ")
    assert "2 cells failed, the first mine.py:breaks 0.5 on embedded: mine.py:breaks raised RuntimeError" in errors


def test_laws_and_counters_stand_beside_damage(sweep):
    plan = PLAN.replace('"mine.py:newest"', '"transformers:DynamicCache"') + 'measure = ["counters"]\nnew_tokens = 4\n'
    code, said, _ = sweep(plan, "--json", "swept.json")
    assert code == 0, said
    found = strict_json("swept.json")
    counted = {row["method"]: row["counters"] for row in found["counted"]}
    assert counted["knorm 0.5"]["cache_bytes"] < counted["transformers:DynamicCache"]["cache_bytes"]
    assert "operators for the prompt" in said
    schemas.FORMS["knorm-sweep"].model_validate(found, strict=False)


@pytest.mark.processes
def test_laws_are_cells_too_and_a_refuted_one_is_shown(sweep):
    plan = 'methods = ["mine.py:newest", "mine.py:breaks"]\nmeasure = ["laws"]\ndevice = "cpu"\n'
    code, said, _ = sweep(plan, "--json", "swept.json")
    assert code == 1, said
    found = strict_json("swept.json")
    assert [row["method"] for row in found["laws"]] == ["mine.py:newest", "mine.py:breaks"]
    refuted = [[r["check"] for r in row["results"] if r["verdict"] == "refuted"] for row in found["laws"]]
    assert refuted == [["own_bytes"], ["accepts"]], "a slice of the whole, and an error at every call"
    assert found["failures"] == []
    assert "Laws of mine.py:newest: " in said
    assert "  REFUTED  " in said


def test_a_fault_of_knorms_own_in_a_law_is_no_refutation(sweep, monkeypatch):
    from knorm.laws.process.supervisor import Supervisor
    from knorm.laws.results import Result

    broken = Result("time_order", "x", "order", "untested", counterexample="it broke off", fault=True)
    monkeypatch.setattr(Supervisor, "results", lambda self: (one for one in [broken]))
    code, said, errors = sweep('methods = ["mine.py:newest"]\nmeasure = ["laws"]\ndevice = "cpu"\n')
    assert code == 3
    assert "time_order: it broke off" in errors
    assert "REFUTED" not in said


def test_latency_is_measured_alone_after_all_others(sweep, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # its times are not looked at
    plan = 'methods = ["knorm"]\nwindow = 64\nwindows = 2\nwindows_per_cell = 2\nnew_tokens = 3\nblocks = 8\n'
    phases = []
    engine = __import__("knorm.cli.sweep", fromlist=["_engine"])._engine

    @contextmanager
    def noted(ready, *, alone):
        phases.append(alone)
        with engine(ready, alone=alone) as made:
            yield made

    monkeypatch.setattr("knorm.cli.sweep._engine", noted)
    code, said, _ = sweep(plan + 'device = "cpu"\nmeasure = ["latency", "damage"]\n', "--json", "swept.json")
    assert code == 0, said
    assert phases == [False, True]
    (timed,) = strict_json("swept.json")["timed"]
    assert [row["method"] for row in timed["rows"]] == ["uncompressed", "knorm 0.5"]
    assert " of the uncompressed cache's: " in said


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("methods = []", "knorm: plan.toml: methods is empty: the plan has no cells"),
        ('methods = ["mine.py:nothing"]', "knorm: target 'mine.py:nothing': mine.py has no 'nothing'"),
        ('methods = ["knorm"]\ndevice = "cuda"', 'knorm: the plan has device = "cuda", but there is no CUDA device'),
    ],
)
def test_a_plan_that_cannot_run_is_one_line(plan, said, sweep, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, errors = sweep(plan)
    assert code == 2
    assert errors.startswith(said)
    assert len(errors.splitlines()) == 1
    assert not Path("out").exists()


def test_a_plan_that_is_not_there_is_one_line(run_knorm):
    code, _, errors = run_knorm("sweep", "nothing.toml", "out")
    assert (code, errors) == (2, "knorm: nothing.toml cannot be read: it is not there\n")


def test_the_folder_of_another_plan_is_one_line(sweep):
    sweep(PLAN)
    code, _, errors = sweep(PLAN.replace("window = 64", "window = 32"))
    assert code == 2
    assert "is the folder of another plan (models: embedded; methods: knorm, mine.py:newest; texts: narra" in errors
    assert len(errors.splitlines()) == 1


def test_a_full_disk_is_one_line_and_finished_cells_stay(sweep, monkeypatch):
    sweep(PLAN.replace("windows = 4", "windows = 2"))
    write = Folder.write

    def full(self, name, result, *, failed):
        raise OSError(28, "No space left on device", str(self.results / name))

    monkeypatch.setattr(Folder, "write", full)
    code, _, errors = sweep(PLAN)
    assert code == 2
    assert "No space left on device" in errors
    assert len(errors.splitlines()) == 1
    monkeypatch.setattr(Folder, "write", write)
    assert "6 of 6 cells are done" in sweep(PLAN)[1]


def test_the_rows_as_parquet(sweep):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra data")
    assert sweep(PLAN, "--parquet", "rows.parquet", "--json", "rows.json")[0] == 0
    assert parquet.read_table("rows.parquet").to_pylist() == strict_json("rows.json")["rows"]
    assert sweep(PLAN, "--parquet", "rows.parquet")[0] == 0, "knorm's own file is overwritten"


@pytest.mark.processes
def test_ctrl_c_stops_at_once_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "plan.toml").write_text(PLAN.replace("windows = 4", "windows = 40"))
    command = [sys.executable, "-m", "knorm", "sweep", "plan.toml", "out"]
    run = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=new_environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  it may be ignored here
    )
    end = time.monotonic() + 120
    while len([*(tmp_path / "out").glob("results/[!.]*")]) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    begin = time.monotonic()
    run.send_signal(signal.SIGINT)
    assert run.wait(30) == 130
    assert time.monotonic() - begin < 3
    assert "interrupted; written before: out" in run.stderr.read()
    assert not [*(tmp_path / "out" / "claims").iterdir()]
    again = subprocess.run(command, cwd=tmp_path, env=new_environment(), capture_output=True, text=True, check=True)
    assert "60 of 60 cells are done" in again.stdout


@pytest.mark.processes
def test_the_example_of_the_documentation_runs_in_three_minutes(tmp_path):
    begin = time.monotonic()
    command = [sys.executable, "-m", "knorm", "sweep", str(ROOT / "examples" / "study.toml"), str(tmp_path / "out")]
    run = subprocess.run(command, env=new_environment(), capture_output=True, text=True, check=True)
    assert time.monotonic() - begin < 180
    assert "24 of 24 cells are done" in run.stdout


def test_durations_are_for_people():
    assert [lasting(seconds) for seconds in (0.2, 59.6, 3600, 90061)] == ["0 s", "1 min 0 s", "1 h 0 min", "25 h 1 min"]


def test_a_plan_in_another_folder_is_read_as_seen_from_there(run_knorm):
    Path("study").mkdir()
    Path("study/mine.py").write_text(MINE)
    Path("study/plan.toml").write_text(PLAN)
    code, said, errors = run_knorm("sweep", "study/plan.toml", "out", "--dry-run")
    assert code == 0, errors
    assert "study/plan.toml: " in said
    code, _, errors = run_knorm("sweep", "study/gone.toml", "out")
    assert (code, errors) == (2, "knorm: study/gone.toml cannot be read: it is not there\n")
