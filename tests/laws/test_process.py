"""The two processes of `knorm check`: what crosses between them, and what a target does to that."""

from __future__ import annotations

import json
import os
import struct
import textwrap
import time
from pathlib import Path

import pytest
import torch
from commands import in_a_new_process

from knorm.laws import KNORM, Result, find
from knorm.laws.process import supervisor, worker
from knorm.laws.process.protocol import (
    MOST_BYTES,
    Board,
    Done,
    Frames,
    Junk,
    Packed,
    Plan,
    Request,
    Wrong,
    encode,
    pack_call,
    unpack_call,
)
from knorm.laws.process.supervisor import Lost, Relay, Supervisor, Worker

TOKEN = bytes(range(16))
RESULT = Result("accepts", "Law.", "provenance", "holds", 60, 0.5, needs=("ragged",))


# Frames

MESSAGES = (
    Wrong("no such file", "Traceback"),
    Plan(KNORM, "target = compress", (RESULT, RESULT)),
    Done(RESULT),
    Done(RESULT, survived=False),
)


@pytest.mark.parametrize("size", [1, 7, 10**6])
def test_messages_come_out_as_they_went_in_however_the_bytes_arrive(size):
    data = b"".join(encode(message, TOKEN) for message in MESSAGES)
    frames, heard = Frames(TOKEN), []
    for begin in range(0, len(data), size):
        frames.feed(data[begin : begin + size])
        while (message := frames.next()) is not None:
            heard.append(message)
    assert tuple(heard) == MESSAGES


def frame(payload, token=TOKEN, length=None):
    return token + struct.pack(">I", len(payload) if length is None else length) + payload


def with_field(sent, /, **changes):
    data = json.loads(encode(sent, TOKEN)[20:])
    return frame(json.dumps({**data, **changes}).encode())


def with_result(**changes):
    data = json.loads(encode(Done(RESULT), TOKEN)[20:])
    return frame(json.dumps({**data, "result": {**data["result"], **changes}}).encode())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"x", "bytes that no worker sends"),
        (b"junk" * 100, "bytes that no worker sends"),
        (frame(b"{}", token=bytes(16)), "bytes that no worker sends"),
        (encode(MESSAGES[0], TOKEN) + b"x", "bytes that no worker sends"),
        (frame(b"", length=2**32 - 1), "a message of 4,294,967,295 bytes"),
        (frame(b"", length=MOST_BYTES + 1), "a message of 4,194,305 bytes"),
        (frame(b""), "none"),
        (frame(b"cos\nsystem\n(S'true'\ntR."), "none"),
        (frame(b"[" * 100_000), "none"),
        (frame(b"[" + b"[]," * 100_000 + b"[]]"), "none"),
        (frame(b"{}"), "none"),
        (frame(b'{"kind": "other"}'), "none"),
        (frame(b'{"kind": "wrong", "message": "\xff", "trace": ""}'), "none"),
        (with_field(MESSAGES[0], message=3), "none"),
        (with_field(MESSAGES[1], traits={"rounding": "up"}), "none"),
        (with_field(MESSAGES[1], checks=[[]] * 100_000), "none"),
        (with_field(MESSAGES[2], survived="yes"), "none"),
        (with_result(verdict="fine"), "none"),
        (with_result(seconds="1"), "none"),
        (with_result(needs="ragged"), "none"),
        (with_result(counterexample={"a": 1}), "none"),
    ],
)
def test_what_is_no_message_is_junk(data, words):
    frames = Frames(TOKEN)
    frames.feed(data)
    with pytest.raises(Junk, match=words):
        [*iter(frames.next, None)]


def test_a_frame_that_is_not_there_in_full_is_waited_for():
    frames, data = Frames(TOKEN), encode(MESSAGES[0], TOKEN)
    for end in (0, 3, 16, 19, 20, len(data) - 1):
        frames = Frames(TOKEN)
        frames.feed(data[:end])
        assert frames.next() is None


def test_a_message_that_is_too_long_is_not_sent():
    with pytest.raises(ValueError, match="but should be at most 4,194,304"):
        encode(Plan(KNORM, "x" * MOST_BYTES, ()), TOKEN)


def test_texts_are_cut_where_they_are_read_too():
    frames = Frames(TOKEN)
    frames.feed(with_result(verdict="refuted", counterexample="a" * 10**6, given="b" * 10**6, snippet="c" * 10**6))
    result = frames.next().result
    assert len(result.counterexample) <= 10_000
    assert "characters are cut]" in result.given
    assert result.snippet == "# 1,000,000 characters: too long to print"


def test_half_a_surrogate_pair_crosses_as_a_question_mark():
    frames = Frames(TOKEN)
    frames.feed(encode(Wrong("a\ud800b", ""), TOKEN))
    assert frames.next().message == "a?b"


# Calls on the board

CALL = Packed(0.5, 1, (("float32", (1, 1, 2, 1), bytes(8)), ("float16", (1, 1, 0, 4), b"")))


def test_a_call_comes_out_as_it_went_in():
    assert unpack_call(pack_call(CALL)) == CALL


def packed(head, data=b""):
    text = json.dumps(head).encode()
    return struct.pack(">I", len(text)) + text + data


TWO = [["float32", [1, 1, 2, 1]], ["float32", [1, 1, 2, 1]]]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        pack_call(CALL)[:-1],
        pack_call(CALL) + b"x",
        struct.pack(">I", 2**32 - 1) + b"[]",
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        packed("text"),
        packed([0.5, None, TWO], bytes(15)),
        packed([0.5, None, TWO[:1]], bytes(8)),
        packed([0.5, "1", TWO], bytes(16)),
        packed(["0.5", None, TWO], bytes(16)),
        packed([float("nan"), None, TWO], bytes(16)),
        packed([0.5, None, [["load", [1, 1, 2, 1]], TWO[1]]], bytes(16)),
        packed([0.5, None, [["float32", [1, 1, -2, -1]], TWO[1]]], bytes(16)),
        packed([0.5, None, [["float32", [2**40, 0, 1, 1]], TWO[1]]], bytes(8)),
        packed([0.5, None, [["float32", [2]], TWO[1]]], bytes(16)),
        packed([0.5, None, [[[], [1, 1, 2, 1]], TWO[1]]], bytes(16)),
    ],
)
def test_what_is_no_call_gives_no_snippet(data):
    assert unpack_call(data) is None
    board = Board()
    board.given, board.size = b"keys", 2**64 - 1 if len(data) == 4 else len(data)
    board.call[: len(data)] = list(data)
    lost = worker.last_call(board, "time_order", "hangs", "")
    assert lost == {"counterexample": "time order: hangs [keys]", "given": "keys", "snippet": None}


# The process, with something lighter than the catalogue in it.

LIGHT = """
from knorm.laws.process.start import begin
send, board, request = begin()
import ctypes, fcntl, os, resource, signal, stat, subprocess, sys, time
from knorm.laws.process.protocol import Done, Wrong
resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, 2**22))
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
def pipes(): return [n for n in range(3, 2**16) if os.path.exists(f"/proc/self/fd/{n}") and is_pipe(n)]
def is_pipe(n): return stat.S_ISFIFO(os.fstat(n).st_mode)
def channel(): return next(n for n in pipes() if fcntl.fcntl(n, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY)
send(Wrong('begun', ''))
exec(request.target)
"""


@pytest.fixture
def begin(monkeypatch):
    """Start a worker that runs a few lines instead; it is ended in any case."""
    monkeypatch.setattr(supervisor, "MAIN", f"exec({LIGHT!r})")
    started = []

    def start(code, **options):
        started.append(Worker(Request(code, **options)))
        assert started[-1].hear(60).message == "begun"  # a limit is tried from here
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("os._exit(0)", "ended the interpreter with exit code 0"),
        ("os._exit(3)", "ended the interpreter with exit code 3"),
        ("raise SystemExit(4)", "ended the interpreter with exit code 4"),
        ("ctypes.string_at(0)", "the process ended with signal 11 (SIGSEGV)"),
        ("os.abort()", "the process ended with signal 6 (SIGABRT)"),
        ("os.kill(os.getpid(), 9)", "the process ended with signal 9 (SIGKILL), as when memory runs out"),
        ("os.kill(os.getpid(), 40)", "the process ended with signal 40 (unknown)"),
        ("time.sleep(60)", "no answer within 0.5 s"),
        ("while True: pass", "no answer within 0.5 s"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "no answer within 0.5 s"),
        ("os.closerange(3, 200); time.sleep(60)", "no answer within 0.5 s"),
        ("os.closerange(0, 2**20); time.sleep(60)", "closed the files that are not its own"),
        ("os.closerange(0, 2**20); os._exit(5)", "ended the interpreter with exit code 5"),
        ("os.fork() or time.sleep(30); os._exit(5)", "ended the interpreter with exit code 5"),
        ("subprocess.Popen(['sleep', '30']); os._exit(6)", "ended the interpreter with exit code 6"),
        ("os.fork() or send(Wrong('a copy', '')); os._exit(7)", "ended the interpreter with exit code 7"),
        ("x = bytes(2**33)", "ended the interpreter with exit code 1"),
        ("os.write(channel(), b'\\0\\0\\1\\0abc'); time.sleep(60)",
         "wrote to a file that is knorm's own: bytes that no worker sends"),
        ("while True: os.write(channel(), b'y' * 2**16)",
         "wrote to a file that is knorm's own: bytes that no worker sends"),
        ("os.write(channel(), send._token + b'\\0\\0\\1\\0abc'); time.sleep(60)", "no answer within 0.5 s"),
        ("os.write(channel(), send._token + b'\\xff' * 9); time.sleep(60)",
         "wrote to a file that is knorm's own: a message of 4,294,967,295 bytes"),
        ("os.write(channel(), send._token + b'\\0\\0\\0\\2{}'); time.sleep(60)",
         "wrote to a file that is knorm's own: a message that is none: "),
        ("os.write(channel(), send._token[:5]); os._exit(8)", "ended the interpreter with exit code 8"),
        ("while True: sys.stdout.write('flood' * 10**5)", "no answer within 0.5 s"),
        ("while True: os.write(2, b'flood' * 10**5)", "no answer within 0.5 s"),
    ],
)  # fmt: skip
def test_how_a_worker_was_lost_is_told_within_its_limit(begin, capfd, code, words):
    lost_one = begin(code)
    since = time.monotonic()
    with pytest.raises(Lost) as lost:
        lost_one.hear(0.5)
    assert time.monotonic() - since < 6
    assert str(lost.value).startswith(words)
    lost_one.end()
    assert sum(map(len, capfd.readouterr())) < 2**20 + 2**10


def test_what_was_sent_before_the_end_is_heard(begin):
    sends = begin("send(Wrong('1', '')); send(Wrong('x' * 9000, '')); board.given = b'call'; os._exit(3)")
    assert [sends.hear(9).message for _ in range(2)] == ["1", "x" * 9000]
    with pytest.raises(Lost, match="exit code 3"):
        sends.hear(9)
    assert sends.board.given == b"call"


def test_a_slow_worker_that_goes_on_calling_is_waited_for(begin):
    slow = begin("for _ in range(5): time.sleep(0.2); board.calls += 1\nsend(Wrong('done', ''))")
    assert slow.hear(0.6).message == "done"


def test_a_worker_that_only_pretends_to_call_is_ended_as_well(begin, monkeypatch):
    monkeypatch.setattr(supervisor, "LIMITS_IN_ALL", 2)
    busy = begin("while True: time.sleep(0.01); board.calls += 1")
    with pytest.raises(Lost, match="no end within 1 s"):
        busy.hear(0.5)


def test_a_target_finds_no_descriptor_where_it_looks_and_its_programs_inherit_none(begin):
    code = """
        low = [n for n in pipes() if n < 256]
        listed = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True).stdout
        own = {os.readlink(f"/proc/self/fd/{n}") for n in pipes()}
        inherited = [pipe for pipe in own if pipe in listed]
        send(Wrong(f"{low} {inherited} {len(own)} {sys.stdin.read()!r}", ""))
    """
    assert begin(textwrap.dedent(code)).hear(9).message == "[] [] 2 ''"


@pytest.mark.parametrize(
    "before", ["", "os.setpgid(0, 0); ", "os.setsid(); ", "os.setsid(); os.fork() and os._exit(0); "]
)
def test_what_a_worker_started_ends_with_it_in_whatever_session(begin, tmp_path, before):
    file = tmp_path / "child"
    line = f"{before}open({str(file)!r}, 'x').write(str(os.getpid())); time.sleep(60)"
    parent = begin(f"if os.fork() == 0:\n    {line}\nsend(Wrong('', '')); time.sleep(60)")
    parent.hear(9)
    end = time.monotonic() + 10
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    parent.end()
    child = Path(f"/proc/{file.read_text()}")
    for _ in range(100):
        if not child.exists() or " Z " in (child / "stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("it goes on")


def test_a_copy_that_comes_back_ends_and_one_of_a_copy_is_not_copied(begin, tmp_path):
    file = tmp_path / "pids"
    code = f"""
        for _ in range(6):
            os.fork()
        with open({str(file)!r}, "a") as pids:
            pids.write(f"{{os.getpid()}}\\n")
        send.end_copy()
        time.sleep(0.3)
        send(Wrong("one", ""))
        time.sleep(60)
    """
    assert begin(textwrap.dedent(code)).hear(9).message == "one"
    assert len(file.read_text().split()) <= 1 + 6 + 15  # of 64


def test_a_mark_ends_no_process_of_another_worker(begin):
    other = begin("time.sleep(0.5); send(Wrong('alive', '')); time.sleep(60)")
    begin("time.sleep(60)").end()
    assert other.hear(9).message == "alive"


def test_what_a_target_prints_is_passed_on_before_what_is_said_of_it(begin, capfd):
    prints = begin("print('out'); print('err', file=sys.stderr); send(Wrong('', '')); time.sleep(60)")
    prints.hear(9)
    out, err = capfd.readouterr()
    assert (out, sorted(err.splitlines())) == ("", ["err", "out"])  # stdout is knorm's alone


def test_a_quiet_worker_drops_what_is_printed(begin, capfd):
    prints = begin("print('out'); print('err', file=sys.stderr); send(Wrong('', '')); time.sleep(60)", quiet=True)
    prints.hear(9)
    assert capfd.readouterr() == ("", "err\n")


def test_output_is_cut_once_and_says_so(capfd, monkeypatch):
    monkeypatch.setattr(supervisor, "MOST_OUTPUT", 10)
    relay = Relay()
    for _ in range(5):
        relay.write("stdout", b"1234")
    relay.write("stderr", b"short")
    assert capfd.readouterr() == ("", "1234123412\n[the target's stdout is cut here, after 10 bytes]\nshort")


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_ends_with_its_parent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = """
        import os
        from knorm.laws.process.supervisor import Request, Worker
        worker = Worker(Request("nowhere.py:f"))
        print(worker.process.pid, flush=True)
        os.kill(os.getpid(), 9)
    """
    run = in_a_new_process(code)
    end = time.monotonic() + 10
    while alive(int(run.stdout)):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_request_that_is_longer_than_a_pipe_reaches_the_worker(begin):
    long = begin("send(Wrong(str(len(request.select)), ''))", select=("a" * 100,) * 5000)
    assert long.hear(9).message == "5000"


# The supervisor, with workers that tell what a test wants.


class Scripted:
    """Workers that send, or are lost with, what stands in `lives`, one list for each."""

    lives = ()

    def __init__(self, request, relay):
        self.request, self.script, self.board = request, [*Scripted.lives.pop(0)], Board()
        Scripted.selected.append(request.select)

    def hear(self, limit):
        said = self.script.pop(0)
        if isinstance(said, Exception):
            raise said
        return said

    def end(self):
        pass


def entry(name, verdict="untested", **found):
    check = find(name)
    return Result(check.name, check.law, check.family, verdict, **found)


def plan(*entries):
    return Plan(KNORM, "", entries)


@pytest.fixture
def supervise(monkeypatch):
    monkeypatch.setattr(supervisor, "Worker", Scripted)
    Scripted.selected = []

    def run(*lives, **options):
        Scripted.lives = [*map(list, lives)]
        return [*Supervisor(Request("target", **options)).results()]

    return run


NAMES = ("accepts", "shape", "time_order", "dtype", "empty")


def test_after_three_lost_in_a_row_the_rest_is_untested(supervise):
    first, other = plan(*map(entry, NAMES)), plan()
    results = supervise([first, Lost("hangs")], [other, Lost("died")], [other, Lost("died")])
    assert [result.verdict for result in results] == ["refuted"] * 3 + ["untested"] * 2
    assert results[0].counterexample == "accepts: hangs"
    assert {result.reason for result in results[3:]} == {"3 workers in a row were lost to the checks before"}
    assert Scripted.selected == [None, NAMES[1:], NAMES[2:]]


def test_a_check_that_comes_back_makes_good(supervise):
    first, other, fine = plan(*map(entry, NAMES)), plan(), Done(entry("shape", "holds"))
    lost = Lost("died")
    results = supervise([first, lost], [other, fine, lost], [other, lost], [other, lost])
    assert [result.verdict for result in results] == ["refuted", "holds", *["refuted"] * 3]


def test_laws_that_do_not_apply_need_no_worker(supervise):
    unasked = entry("copy", "does not apply", reason="needs a transformers cache")
    results = supervise([plan(entry("accepts"), unasked), Lost("died")])
    assert [result.verdict for result in results] == ["refuted", "does not apply"]


def test_a_target_that_does_not_load_again_leaves_the_rest_untested(supervise):
    results = supervise([plan(*map(entry, NAMES[:3])), Lost("died")], [Wrong("no disk", "trace")])
    assert [result.verdict for result in results] == ["refuted", "untested", "untested"]
    assert results[2].reason == "not loaded again: no disk"


def test_a_worker_that_did_not_survive_does_not_reach_the_next_check(supervise):
    broken = Done(entry("accepts", "refuted", counterexample="accepts: raised AcceleratorError"), survived=False)
    results = supervise([plan(*map(entry, NAMES[:2])), broken], [plan(), Done(entry("shape", "holds"))])
    assert [result.verdict for result in results] == ["refuted", "holds"]


def test_words_about_cuda_are_no_broken_cuda(supervise):
    said = Done(entry("accepts", "refuted", counterexample="accepts: raised ValueError: CUDA error: not one"))
    results = supervise([plan(*map(entry, NAMES[:2])), said, Done(entry("shape", "holds"))])
    assert [result.verdict for result in results] == ["refuted", "holds"]
    assert Scripted.selected == [None]


@pytest.mark.parametrize("initialized", [False, True])
def test_whether_cuda_is_broken_is_tried(monkeypatch, initialized):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert worker.cuda_is_broken() is initialized
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert worker.cuda_is_broken() is False


def test_a_loss_may_be_expected(supervise):
    (result,) = supervise([plan(entry("accepts")), Lost("died")], expected=(("accepts", "known"),))
    assert (result.verdict, result.reason) == ("expected failure", "known")


@pytest.mark.parametrize(("verdict", "judged"), [("refuted", "expected failure"), ("holds", "unexpectedly holds")])
def test_what_a_worker_says_is_judged_here(supervise, verdict, judged):
    (result,) = supervise([plan(entry("accepts")), Done(entry("accepts", verdict))], expected=(("accepts", "known"),))
    assert (result.verdict, result.reason) == (judged, "known")


@pytest.mark.parametrize("message", [plan(), Wrong("late", ""), Done(entry("shape", "holds"))])
def test_a_worker_that_speaks_out_of_turn_is_lost(supervise, message):
    (result,) = supervise([plan(entry("accepts")), message])
    assert (result.verdict, result.counterexample) == ("refuted", "accepts: the worker spoke out of turn")


def test_a_target_that_ends_the_worker_while_it_loads_is_wrong_usage(supervise):
    with pytest.raises(ValueError, match=r"^target cannot be loaded: ended the interpreter with exit code 3$"):
        supervise([Lost("ended the interpreter with exit code 3")])
    with pytest.raises(ValueError, match=r"^target cannot be loaded: the worker spoke out of turn$"):
        supervise([Done(entry("accepts"))])
