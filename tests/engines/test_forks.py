"""A process that forks engines: each runs as one that was started for itself, and ends as such."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from knorm.engines import forks, process
from knorm.engines.forks import Nursery, forked
from knorm.paths import PACKAGE

pytestmark = pytest.mark.skipif(not forks.POSSIBLE, reason="engines are forked on Linux alone")

ECHO = """
import os, sys, time
from knorm.engines.forks import serve_forks
def prepare():
    with open({folder!r} + "/prepared", "a") as file:
        file.write("x")
def main():
    for line in sys.stdin:
        exec(line)
serve_forks(prepare, main)
"""


def command(folder, code=ECHO):
    bare = process._MAIN.format(package=str(PACKAGE), engines=str(PACKAGE / "engines"), module="vllm")
    return [sys.executable, "-c", bare + code.format(folder=str(folder))]


@pytest.fixture
def log():
    with tempfile.TemporaryFile() as file:
        yield file


@pytest.fixture(autouse=True)
def _ends_nurseries():
    yield
    forks.end_nurseries()
    forks._without.clear()


def start(tmp_path, log, limit=30.0, **variables):
    fork = forked(command(tmp_path), {**os.environ, **variables}, log.fileno(), limit)
    assert fork
    return fork


def told(fork, line):
    fork.stdin.write(f"print({line}, flush=True)\n".encode())
    fork.stdin.flush()
    return fork.stdout.readline().decode().strip()


def end(fork):
    os.killpg(fork.pid, signal.SIGKILL)
    fork.stdin.close()
    fork.stdout.close()
    return fork.wait(10)


def test_what_is_imported_once_is_forked_with_streams_a_group_and_a_folder_of_its_own(tmp_path, log, monkeypatch):
    one = start(tmp_path, log)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    other = start(tmp_path, log)
    assert told(one, "os.getpid()") == str(one.pid) == told(one, "os.getpgrp()")
    assert told(other, "os.getcwd()") == str(tmp_path / "sub") != told(one, "os.getcwd()")
    assert told(one, "len(os.listdir('/proc/self/fd'))") == "4", "its three streams, and the list of them"
    told(one, "print('said', file=sys.stderr, flush=True)")
    log.seek(0)
    assert log.read() == b"said\n"
    assert (tmp_path / "prepared").read_text() == "x"
    assert one.poll() is None
    assert (end(one), end(other)) == (-signal.SIGKILL, -signal.SIGKILL)


def test_how_a_fork_ends_is_told(tmp_path, log):
    for line, code in (
        ("os._exit(7)", 7),
        ("sys.exit(3)", 3),
        ("sys.exit()", 0),
        ("os.kill(os.getpid(), 11)", -signal.SIGSEGV),
        ("1 / 0", 1),
    ):
        fork = start(tmp_path, log)
        fork.stdin.write(f"{line}\n".encode())
        fork.stdin.close()
        assert fork.wait(10) == code == fork.poll()
        fork.stdout.close()
    log.seek(0)
    assert b"ZeroDivisionError" in log.read()
    slow = start(tmp_path, log)
    with pytest.raises(subprocess.TimeoutExpired):
        slow.wait(0.1)
    (nursery,) = forks._nurseries.values()
    forks.end_nurseries()
    assert slow.poll() is None
    slow.stdin.write(b"os._exit(7)\n")
    slow.stdin.close()
    assert slow.wait(10) == 7, "told by a nursery that takes no more requests"
    slow.stdout.close()
    assert nursery.process.wait(10) == 0, "it ends with its last fork"


def test_a_fork_whose_nursery_was_killed_goes_on(tmp_path, log):
    fork = start(tmp_path, log)
    (nursery,) = forks._nurseries.values()
    nursery.kill()
    assert fork.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        fork.wait(0.1)
    assert told(fork, "1") == "1"
    assert end(fork) == -signal.SIGKILL


def test_threads_are_given_forks_of_their_own(tmp_path, log):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: start(tmp_path, log), range(8)))
    assert [told(fork, "os.getpid()") for fork in found] == [str(fork.pid) for fork in found]
    assert len({fork.pid for fork in found}) == 8
    assert (tmp_path / "prepared").read_text() == "x"
    assert {end(fork) for fork in found} == {-signal.SIGKILL}


def test_an_interruption_leaves_nothing_behind(tmp_path, log, monkeypatch):
    end(start(tmp_path, log))
    (nursery,) = forks._nurseries.values()
    before = len(os.listdir("/proc/self/fd"))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Nursery, "_seen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, log)
    assert len(os.listdir("/proc/self/fd")) == before - 1, "its line is closed, and nothing else is open"
    assert nursery.process.poll() is not None
    monkeypatch.undo()
    other = start(tmp_path, log)
    assert told(other, "os.getpid()") == str(other.pid), "not the one that was asked for before"
    end(other)


def test_a_process_of_another_namespace_is_not_taken_for_ours(tmp_path, log, monkeypatch):
    monkeypatch.setattr(os, "getsid", lambda pid: 1)
    assert forked(command(tmp_path), {**os.environ}, log.fileno(), 30.0) is None


def test_what_a_wrapper_started_ends_with_it(tmp_path, log):
    wrapper = tmp_path / "wrapper"
    hangs = f"import os, time; print(os.getpid(), file=open('{tmp_path}/id', 'w'), flush=True); time.sleep(60)"
    wrapper.write_text(f'#!/bin/sh\n{sys.executable} -c "{hangs}"\n')
    wrapper.chmod(0o755)
    assert forked([str(wrapper)], {**os.environ}, log.fileno(), 1.0) is None
    left = Path("/proc", (tmp_path / "id").read_text().strip())
    until = time.monotonic() + 10
    while running(left) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(left)


def test_other_variables_want_another_nursery_and_those_of_tests_do_not(tmp_path, log):
    one = start(tmp_path, log, PYTEST_CURRENT_TEST="a")
    same = start(tmp_path, log, PYTEST_CURRENT_TEST="b", KNORM_X="c")
    assert (tmp_path / "prepared").read_text() == "x"
    other = start(tmp_path, log, OMP_NUM_THREADS="3")
    assert (tmp_path / "prepared").read_text() == "xx"
    assert told(other, "os.environ['OMP_NUM_THREADS']") == "3"
    assert told(same, "1") == "1", "it goes on where its nursery has ended"
    for fork in (one, same, other):
        end(fork)


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit(3)",
        "import time; time.sleep(60)",
        "import nothing_of_this_name",
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        # a thread is there: a fork of it would have its locks
        "import threading, time; threading.Thread(target=time.sleep, args=[60], daemon=True).start()" + ECHO,
    ],
)
def test_where_none_can_be_forked_there_is_none_and_nothing_is_left(tmp_path, log, code):
    before = {*os.listdir("/proc/self/fd")}
    begin = time.monotonic()
    assert forked(command(tmp_path, code), {**os.environ}, log.fileno(), 2.0) is None
    assert time.monotonic() - begin < 20
    assert {*os.listdir("/proc/self/fd")} == before
    assert not forks._nurseries
    begin = time.monotonic()
    assert forked(command(tmp_path, code), {**os.environ}, log.fileno(), 2.0) is None
    assert time.monotonic() - begin < 0.5, "it is not tried again"


def test_an_interpreter_that_cannot_be_started_is_for_another_to_say(tmp_path, log):
    assert forked([str(tmp_path / "nowhere")], {**os.environ}, log.fileno(), 2.0) is None


def test_a_nursery_and_its_forks_end_with_the_process_that_started_them(tmp_path):
    code = f"""
import os, sys, tempfile
sys.path.insert(0, {str(Path(__file__).parent)!r})
{process._MAIN.format(package=str(PACKAGE), engines=str(PACKAGE / "engines"), module="vllm")}
from knorm.engines.forks import forked, _nurseries
fork = forked({command(tmp_path)!r}, dict(os.environ), 2, 30)
(nursery,) = _nurseries.values()
print(fork.pid, nursery.process.pid, flush=True)
os._exit(0)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    left = [Path("/proc", pid) for pid in ended.stdout.split()]
    assert len(left) == 2
    until = time.monotonic() + 10
    while any(map(running, left)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(running, left))


def running(folder):
    try:
        return folder.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_fork_of_knorm_starts_a_nursery_of_its_own(tmp_path, log):
    first = Nursery(command(tmp_path), {**os.environ})
    forks._nurseries[os.getpid() + 1, "another's"] = first
    fork = start(tmp_path, log)
    assert first.process.poll() is None, "another process still uses it"
    end(fork)
    first.close()
