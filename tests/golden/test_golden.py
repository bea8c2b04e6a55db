from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import IN_FULL
from filelock import FileLock
from goldens import CLEAN, NLL, accept, candidate, measured

from knorm.golden import store as module
from knorm.golden.approval import approve
from knorm.golden.files import Damaged, parse
from knorm.golden.format import Measured
from knorm.golden.store import Checkout, Store, checkout, hash_of_code, read_candidate
from knorm.golden.workspace import find_workspace


def started(kind, tmp_path):
    """A folder with one accepted golden, knorm's or one that a project declares."""
    if kind == "a project's":
        (tmp_path / "knorm.toml").write_text('golden_dir = "pins/golden"\n[case.streaming]\ntarget = "knorm"\n')
        store = find_workspace(start=tmp_path).store
        store.prepare()
    else:
        folder = tmp_path / "golden"
        folder.mkdir()
        store = Store(folder)
    accept(store, candidate(), reason="the first")
    return store


@pytest.fixture
def store(tmp_path):
    return started("knorm's", tmp_path)


@pytest.fixture(params=["knorm's", "a project's"])
def any_store(request, tmp_path):
    return started(request.param, tmp_path)


@pytest.fixture(params=["knorm's", pytest.param("a project's", marks=pytest.mark.processes)])
def slow_store(request, tmp_path):
    """As any_store, of which the quick run has one."""
    return started(request.param, tmp_path)


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def goldens(folder):
    """The accepted files alone: not the lock, temporary files, or candidates."""
    kept = {file: data for file, data in contents(folder).items() if file.suffix in (".json", ".safetensors")}
    return {file: data for file, data in kept.items() if not file.name.startswith(".")}


# Format


def test_a_golden_reads_back_as_it_was_accepted(store):
    golden, tensors = store.read("streaming", "cpu-x86_64")
    assert golden.provenance.reason == "the first"
    assert golden.metrics == candidate().metrics
    assert np.array_equal(tensors["nll/0.5"], NLL)
    text = store.file("streaming", "cpu-x86_64").read_text()
    assert "\n" in text, "readable, a line a field"
    assert not any(word in text for word in ("/home", "/tmp", os.uname().nodename)), "no paths, no hostnames"


def edited(text, change):
    fields = json.loads(text)
    change(fields)
    return json.dumps(fields)


BROKEN = {
    "truncated": (lambda text: text[: len(text) // 2], "is truncated, edited or no JSON"),
    "empty": (lambda text: "", "is truncated, edited or no JSON"),
    "a list": (lambda text: "[]", "field 'schema_version' is None, but this knorm reads 1"),
    "unknown version": (
        lambda text: edited(text, lambda f: f.update(schema_version=9)),
        "is 9, but this knorm reads 1",
    ),
    "an edited value": (
        lambda text: edited(text, lambda f: f["metrics"][1].update(value=99)),
        "field 'metrics' was edited",
    ),
    "an edited gate": (
        lambda text: edited(text, lambda f: f["metrics"][3]["gate"].update(threshold=9.0)),
        "field 'metrics' was edited",
    ),
    "an edited reason": (
        lambda text: edited(text, lambda f: f["provenance"].update(reason="x")),
        "'provenance' was edited",
    ),
    "an unknown field": (
        lambda text: edited(text, lambda f: f.update(more=1)),
        "field more: extra inputs are not permitted",
    ),
    "an unknown field inside": (
        lambda text: edited(text, lambda f: f["metrics"][0]["gate"].update(slack=1)),
        "field metrics.0.gate.slack: extra inputs",
    ),
    "a missing field": (
        lambda text: edited(text, lambda f: f.pop("environment")),
        "field environment: field required",
    ),
    "a number as text": (
        lambda text: edited(text, lambda f: f["environment"].update(threads="1")),
        "field environment.threads: input should be a valid integer",
    ),
    "not a number": (lambda text: text.replace('"value": 100', '"value": NaN'), "a value is NaN, but should be finite"),
    "infinite": (lambda text: text.replace('"value": 1.5', '"value": -Infinity'), "a value is -Infinity"),
    "a field twice": (
        lambda text: text.replace('"case"', '"tensors": null, "case"', 1),
        "field tensors stands there twice",
    ),
    "a metric twice": (
        lambda text: edited(text, lambda f: f["metrics"].append(f["metrics"][0])),
        "field 'metrics' has 'nll/0.5' twice",
    ),
    "no text": (lambda text: "\udcff", "is no text"),
}


@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN)
def test_a_damaged_golden_is_refused_and_the_field_named(store, change, words):
    file = store.file("streaming", "cpu-x86_64")
    file.write_text(change(file.read_text()), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(Damaged) as damaged:
        store.read("streaming", "cpu-x86_64")
    assert words in str(damaged.value)
    assert "streaming/cpu-x86_64.json" in str(damaged.value)
    assert f"git status -- {store.folder}/streaming" in str(damaged.value)
    assert "checkout" not in str(damaged.value), "that would throw an acceptance away which is not committed"
    assert "\n" not in str(damaged.value)


def test_damaged_tensors_are_refused(store):
    (file,) = store.folder.glob("*/*.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"\x01")
    with pytest.raises(Damaged, match="is damaged: its sha256 is not that of field 'tensors'"):
        store.read("streaming", "cpu-x86_64")
    file.unlink()
    with pytest.raises(Damaged, match=r"is missing, which field 'tensors' names"):
        store.read("streaming", "cpu-x86_64")


def test_a_golden_copied_to_another_case_or_class_is_refused(store):
    text = store.file("streaming", "cpu-x86_64").read_text()
    store.file("streaming", "nvidia-h200").write_text(text)
    with pytest.raises(Damaged, match=r"field 'device_class' is 'cpu-x86_64': a copy of another golden; remove it"):
        store.read("streaming", "nvidia-h200")
    (store.folder / "prefill").mkdir()
    store.file("prefill", "cpu-x86_64").write_text(text)
    with pytest.raises(Damaged, match="field 'case' is 'streaming': a copy"):
        store.read("prefill", "cpu-x86_64")
    assert store.orphans(["streaming"]) == ["prefill"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_recorded(bad):
    with pytest.raises(ValueError, match=r"streaming: metric ppl_ratio/0.5 is \w+, but should be finite"):
        candidate(measured(ratio=bad))
    with pytest.raises(ValueError, match=r"a token of nll/0.5 is not finite"):
        candidate(Measured(measured().metrics, {"nll/0.5": np.where(NLL > 5, np.float32(bad), NLL)}))


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give --golden-dir the folder"):
        Store(tmp_path / "nowhere")


# Candidates and acceptance


def test_a_candidate_is_one_file_and_leaves_the_golden_alone(store, tmp_path):
    before = goldens(store.folder)
    file = store.write_candidate(candidate(measured(seen=7)), {"nll/0.5": NLL})
    assert goldens(store.folder) == before
    elsewhere = tmp_path / "from-a-runner.candidate"
    elsewhere.write_bytes(file.read_bytes())
    golden, tensors = read_candidate(elsewhere)
    assert golden.metric("seen/0.5").value == 7
    assert np.array_equal(tensors["nll/0.5"], NLL)


def test_a_damaged_candidate_is_refused(store, tmp_path):
    file = store.write_candidate(candidate(), {"nll/0.5": NLL})
    data = file.read_bytes()
    for broken in (data[:-7], data[:100], b"", data.replace(b'\\"value\\": 100', b'\\"value\\": 101')):
        file.write_bytes(broken)
        with pytest.raises(Damaged, match=r"cpu-x86_64.candidate"):
            read_candidate(file)
    file.write_bytes(data[:-4] + b"\0\0\0\1")
    with pytest.raises(Damaged, match="its tensors are not those of field 'tensors'"):
        read_candidate(file)
    with pytest.raises(ValueError, match="there is no candidate"):
        read_candidate(tmp_path / "none.candidate")


def test_acceptance_keeps_the_anchor_and_removes_the_candidate_and_old_tensors(store):
    better = measured(NLL - np.float32(0.5), ratio=1.4)
    file = store.write_candidate(candidate(better), better.tensors)
    accept(store, candidate(better), better.tensors, "attends better", file=file)
    golden, tensors = store.read("streaming", "cpu-x86_64")
    assert golden.metric("ppl_ratio/0.5").value == 1.4
    assert golden.metric("ppl_ratio/0.5").anchor == 1.5, "the first accepted value"
    assert golden.provenance.reason == "attends better"
    assert np.array_equal(tensors["nll/0.5"], NLL - np.float32(0.5))
    assert not store.candidates()
    assert len([*store.folder.glob("*/*.safetensors")]) == 1


def test_a_candidate_of_too_few_runs_or_without_its_tokens_is_none():
    with pytest.raises(Damaged, match=r"field 'tensors' is null, but nll/0.5 is judged by its tokens"):
        candidate(Measured(measured().metrics, {}))
    with pytest.raises(Damaged, match="field metrics: tuple should have at least 1 item"):
        candidate(Measured((), {}))
    for place in ({"case": "../up"}, {"device": "../../evil"}, {"device": ""}):
        with pytest.raises(Damaged, match="string should match pattern"):
            candidate(**place)
    few = json.loads(candidate().text())
    few["provenance"]["runs"] = 1
    with pytest.raises(Damaged, match=r"field provenance.runs: input should be greater than or equal to 3"):
        parse(json.dumps(few), "a")


# Checkouts


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.delenv("KNORM_COMMIT", raising=False)
    folder = tmp_path / "project" / "golden"
    folder.mkdir(parents=True)
    (folder / "note").write_text("here")
    (folder.parent / "code.py").write_text("x = 1\n")
    git(folder.parent, "init", "-q")
    git(folder.parent, "add", "-A")
    git(folder.parent, "commit", "-qm", "one")
    return folder


def test_a_checkout_is_clean_until_something_outside_the_goldens_changes(repository):
    first = checkout(repository)
    assert len(first.commit) == 40
    assert first.clean
    assert first.code == hash_of_code()
    (repository / "new.json").write_text("{}")
    assert checkout(repository).clean
    (repository.parent / "code.py").write_text("x = 2\n")
    assert not checkout(repository).clean


def test_a_commit_that_changes_goldens_alone_is_no_other_commit(repository):
    then = checkout(repository)
    (repository / "new.json").write_text("{}")
    git(repository.parent, "add", "-A")
    git(repository.parent, "commit", "-qm", "goldens")
    store, now = Store(repository), checkout(repository)
    assert now.commit != then.commit
    accept(store, candidate(now=then), now=now)
    (repository.parent / "code.py").write_text("x = 2\n")
    git(repository.parent, "commit", "-qam", "code")
    with pytest.raises(ValueError, match=r"made at another commit.*code\.py"):
        accept(store, candidate(now=then), now=checkout(repository))


def test_outside_of_git_a_commit_has_to_be_named(tmp_path, monkeypatch):
    monkeypatch.delenv("KNORM_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(ValueError, match="is in no git checkout, whose commit a golden names"):
        checkout(tmp_path)
    monkeypatch.setenv("KNORM_COMMIT", "e" * 40)
    assert checkout(tmp_path) == Checkout("e" * 40, True, hash_of_code())
    monkeypatch.setenv("KNORM_COMMIT", "HEAD")
    with pytest.raises(ValueError, match="KNORM_COMMIT=HEAD, but should be the 40 digits of a commit"):
        checkout(tmp_path)


def test_inside_of_git_the_checkout_is_looked_at_whatever_is_named(repository, monkeypatch):
    (repository.parent / "code.py").write_text("x = 2\n")
    monkeypatch.setenv("KNORM_COMMIT", "e" * 40)
    found = checkout(repository)
    assert (found.clean, found.commit == "e" * 40) == (False, False)


def test_a_whole_checkout_is_no_folder_of_goldens_and_one_without_commits_has_none(repository, tmp_path):
    with pytest.raises(ValueError, match="is a whole checkout, but should be a folder of goldens in it"):
        checkout(repository.parent)
    folder = tmp_path / "new" / "gold[en] *"
    folder.mkdir(parents=True)
    git(folder.parent, "init", "-q")
    with pytest.raises(ValueError, match="has no commit yet, which a golden names: commit first"):
        checkout(folder)
    (folder.parent / "golden").write_text("changed")
    (folder / "a").write_text("a")
    git(folder.parent, "add", "-A")
    git(folder.parent, "commit", "-qm", "one")
    (folder.parent / "golden").write_text("changed again")
    assert not checkout(folder).clean, "what the folder's name would match as a pattern is not left out"


# Faults


def killed(line, action):
    """Run in a forked child that kills itself at the given line, of all it runs; how many those are if it lived."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        count = 0

        def trace(frame, event, _):
            nonlocal count
            if not any(
                name in frame.f_code.co_filename
                for name in ("store.py", "approval.py", "files.py", "filelock", "pathlib", "safetensors")
            ):
                return None
            if event == "line":
                count += 1
                if count == line:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            action()
        finally:
            sys.settrace(None)
            os.write(write, str(count).encode())
            os._exit(0)
    os.close(write)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with os.fdopen(read) as said:
        return None if killed else int(said.read())


def test_record_and_accept_killed_at_many_points_leave_the_old_golden_or_the_new(slow_store):
    points = 104 if IN_FULL else 15  # of each
    better = measured(NLL - np.float32(0.5), ratio=1.4)
    made = candidate(better)
    (approved,) = approve(slow_store, [(made, better.tensors)], "better", now=CLEAN)
    old, kills, new = goldens(slow_store.folder), 0, 0

    def restored():
        for path in slow_store.folder.rglob("*"):
            if path.is_file():
                path.unlink()
        for name, data in old.items():
            (slow_store.folder / name).write_bytes(data)

    for action in (
        lambda: slow_store.write_candidate(made, better.tensors),
        lambda: accept(slow_store, made, better.tensors, "better"),
    ):
        lines = killed(-1, action)
        restored()
        for line in np.linspace(1, lines, points).astype(int).tolist():
            kills += killed(line, action) is None  # a run or two may be shorter than the first by a line or two
            golden, tensors = Store(slow_store.folder).read("streaming", "cpu-x86_64")  # whole, whichever it is
            if golden.provenance.reason == "better":
                new += 1
                assert golden == approved
                assert np.array_equal(tensors["nll/0.5"], NLL - np.float32(0.5))
            else:
                assert old.items() <= contents(slow_store.folder).items(), "byte-identical"
            restored()
    assert kills >= 2 * points - 8
    assert new >= 1, "some kills came after the golden changed"


def test_a_project_whose_folder_was_made_when_it_was_killed_still_ignores_candidates(tmp_path):
    (tmp_path / "knorm.toml").write_text('[case.streaming]\ntarget = "knorm"\n')
    made = measured()

    def start():
        store = find_workspace(start=tmp_path).store
        store.prepare()
        store.write_candidate(candidate(made), made.tensors)

    kills, lines = 0, killed(-1, start)
    for line in range(1, lines, max(1, lines // 40)):
        shutil.rmtree(tmp_path / "golden", ignore_errors=True)
        kills += killed(line, start) is None
        start()
        assert (tmp_path / "golden" / ".gitignore").read_text() == "*.candidate\n.lock\n.*.tmp\n"
        assert read_candidate(*find_workspace(start=tmp_path).store.candidates())[0].case == "streaming"
    assert kills >= 30


def test_a_disk_without_room_for_a_projects_first_golden_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "knorm.toml").write_text('[case.streaming]\ntarget = "knorm"\n')
    store = find_workspace(start=tmp_path).store

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for owner, name, words in ((Path, "mkdir", r"cannot make .*golden"), (os, "fsync", r"cannot write .*gitignore")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(ValueError, match=f"{words}: No space left"):
                store.prepare()
    store.prepare()
    assert (store.folder / ".gitignore").exists()


def test_the_next_acceptance_removes_what_an_interrupted_one_left_and_nothing_else(store):
    folder = store.folder / "streaming"
    innocent = [
        "model.safetensors",
        ".notes.tmp",
        "cpu-x86_64-best.safetensors",
        "nvidia-h200-0123456789ab.safetensors",
        ".nvidia-h200.json.7.tmp",
        "../assets/cpu-x86_64-0123456789ab.safetensors",
        "cpu-x86_64.candidate",
    ]
    (store.folder / "assets").mkdir()
    for name in innocent:
        (folder / name).write_bytes(b"precious")
    (folder / ".cpu-x86_64.old.1.tmp").mkdir()
    store.file("prefill", "cpu-x86_64").parent.mkdir()
    store.file("prefill", "cpu-x86_64").write_bytes(b"\xff not a golden")
    (store.folder / "prefill" / "cpu-x86_64-0123456789ab.safetensors").write_bytes(b"precious")
    (folder / ".cpu-x86_64.json.77.tmp").write_text("half")
    (folder / "cpu-x86_64-0123456789ab.safetensors").write_bytes(b"of nobody")
    assert [f.name for f in store.leftovers()] == [".cpu-x86_64.json.77.tmp", "cpu-x86_64-0123456789ab.safetensors"]
    accept(store, candidate(measured(seen=7)))
    assert not store.leftovers()
    assert all((folder / name).exists() for name in innocent)
    assert (store.folder / "prefill" / "cpu-x86_64-0123456789ab.safetensors").exists()
    assert store.read("streaming", "cpu-x86_64")[0].metric("seen/0.5").value == 7


def test_a_folder_in_place_of_a_file_is_damage(store):
    store.file("streaming", "nvidia-h200").mkdir()
    with pytest.raises(Damaged, match=r"streaming/nvidia-h200.json cannot be read \(Is a directory\)"):
        store.read("streaming", "nvidia-h200")


def _accept_many(folder, letter):
    store = Store(folder)
    for _ in range(15):
        accept(store, candidate(measured(seen=ord(letter))), reason=letter)


def test_two_processes_at_once_write_one_after_the_other(slow_store):
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_accept_many, args=(slow_store.folder, letter)) for letter in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    golden, _ = Store(slow_store.folder).read("streaming", "cpu-x86_64")
    assert golden.metric("seen/0.5").value == ord(golden.provenance.reason)


def test_a_lock_that_is_held_is_named(any_store, monkeypatch):
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.05)
    before = goldens(any_store.folder)
    with (
        FileLock(any_store.folder / ".lock"),
        pytest.raises(ValueError, match=r"another `knorm golden` has been writing to"),
    ):
        any_store.write_candidate(candidate(), {"nll/0.5": NLL})
    assert goldens(any_store.folder) == before


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device"),
        (errno.EROFS, "Read-only file system"),
        (errno.EACCES, "Permission denied"),
    ],
)
def test_a_full_disk_or_a_read_only_folder_is_one_line_and_changes_nothing(any_store, monkeypatch, number, words):
    before = contents(any_store.folder)
    real = Path.open

    def failing(path, mode="r", *rest, **options):
        if "w" in mode:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", failing)
    better = measured(NLL - np.float32(0.5), ratio=1.4)
    for write in (
        lambda: any_store.write_candidate(candidate(better), better.tensors),
        lambda: accept(any_store, candidate(better), better.tensors),
    ):
        with pytest.raises(ValueError, match=rf"cannot write .*{words}; it is as it was"):
            write()
        assert contents(any_store.folder) == before


def test_a_disk_that_fills_up_while_the_golden_is_written_leaves_the_old_one(any_store, monkeypatch):
    before = goldens(any_store.folder)
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:  # after the tensors and their folder: at the golden itself
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    better = measured(NLL - np.float32(0.5), ratio=1.4)
    with pytest.raises(ValueError, match="No space left on device"):
        accept(any_store, candidate(better), better.tensors)
    assert before.items() <= goldens(any_store.folder).items()
    assert any_store.read("streaming", "cpu-x86_64")[0].provenance.reason == "the first"
    assert len(any_store.leftovers()) == 1


def test_a_folder_in_which_no_lock_can_be_made_is_one_line(any_store, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(ValueError, match=r"cannot write to .*Permission denied"):
        any_store.write_candidate(candidate(), {"nll/0.5": NLL})


def _accept_in_turns(folder, ready, over):
    """Accept two goldens of other tokens in turns until told to stop."""
    store = Store(folder)
    halves = [measured(NLL * np.float32(factor), ratio=1.0) for factor in (0.5, 0.25)]
    goldens_of = [candidate(half) for half in halves]
    while not over.is_set():
        for made, half in zip(goldens_of, halves, strict=True):
            store.accept(made, half.tensors)
        ready.set()


def test_a_reader_beside_a_writer_sees_the_old_golden_or_the_new_one_whole(slow_store):
    context = multiprocessing.get_context("fork")
    ready, over = context.Event(), context.Event()
    writer = context.Process(target=_accept_in_turns, args=(slow_store.folder, ready, over))
    writer.start()
    try:
        assert ready.wait(30)
        means, reading = set(), Store(slow_store.folder)
        for _ in range(3000):
            golden, tensors = reading.read("streaming", "cpu-x86_64")
            mean = golden.metric("nll/0.5").value
            assert mean == float(tensors["nll/0.5"].mean())
            means.add(mean)
    finally:
        over.set()
        writer.join()
    assert len(means) == 2, "both were seen"
    assert writer.exitcode == 0


def test_a_candidate_that_is_replaced_while_it_is_read_is_the_old_one_or_the_new(store, monkeypatch):
    other = measured(NLL * np.float32(0.5))
    file = store.write_candidate(candidate(), {"nll/0.5": NLL})
    real = Path.read_bytes

    def replaced(path):
        store.write_candidate(candidate(other), other.tensors)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", replaced)
    golden, tensors = read_candidate(file)
    assert golden.metric("nll/0.5").value == float(tensors["nll/0.5"].mean())


def test_a_golden_whose_tensors_never_fit_is_damaged_however_often_it_is_accepted(store, monkeypatch):
    file = store.file("streaming", "cpu-x86_64")
    (beside,) = store.folder.glob("*/*.safetensors")
    beside.unlink()
    real, reads = Path.read_text, []

    def touched(path, *rest, **options):
        reads.append(path)
        os.utime(file, ns=(len(reads), len(reads)))  # as if somebody wrote it again and again
        return real(path, *rest, **options)

    monkeypatch.setattr(Path, "read_text", touched)
    with pytest.raises(Damaged, match=r"is missing, which field 'tensors' names"):
        store.read("streaming", "cpu-x86_64")
    assert 1 < len(reads) < 1000
