"""What a worker process does: load the target, run the checks, tell of both. The process is the supervisor's."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from ctypes import memmove
from functools import wraps
from typing import Any

import torch

from knorm.laws.loading import load_target
from knorm.laws.process.protocol import Board, Done, Message, Packed, Plan, Request, Wrong, pack_call, unpack_call
from knorm.laws.process.usage import promised
from knorm.laws.registry import Check, find
from knorm.laws.results import Result
from knorm.laws.runner import _chosen, applies, run_check, settled, unasked
from knorm.laws.snippets import MOST_NUMBERS, snippet
from knorm.laws.strategies import Cache
from knorm.laws.subjects import Call, Subject, in_words, takes_layer
from knorm.laws.traits import Traits


def serve(
    send: Callable[[Message], None], board: Board, request: Request, end_copy: Callable[[], None] = lambda: None
) -> None:
    """Load and check, and send what comes of it: Wrong, or a Plan and then Done for each check that applies.

    Nothing that the target raises comes out of here.

    Args:
        send: takes each message to the parent.
        board: where each call is noted before it is made.
        request: what to check.
        end_copy: called after each call of the target: ends a process that is not the worker.
    """
    torch.set_num_threads(1)
    try:
        checks = _chosen(request.select)
        subject = load_target(request.target, request.kind, promised(request))
    except BaseException as error:  # also what ends an interpreter
        plain = isinstance(error, (ValueError, TypeError, OSError))
        said = " ".join((str(error) if plain else in_words(error)).split())
        send(Wrong(said, traceback.format_exc()))
        return
    _watch(subject, board, end_copy)
    plan = [
        Result(check.name, check.law, check.family, "untested") if applies(check, subject) else unasked(check, subject)
        for check in checks
    ]
    send(Plan(subject.traits, subject.code, tuple(plan)))
    for check, entry in zip(checks, plan, strict=True):
        if entry.verdict != "does not apply":
            board.given, board.size = b"", 0
            if applies(check, subject):
                result = _run(check, subject, board, request)
                subject = settled(subject, result)
            else:  # by what became of a law before it
                result = unasked(check, subject)
            with suppress(Exception):
                sys.stdout.flush()
            send(Done(result, not cuda_is_broken()))


def cuda_is_broken() -> bool:
    """Find out whether CUDA is of no more use to this process: after some errors, all that follows raises them too."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _run(check: Check, subject: Subject, board: Board, request: Request) -> Result:
    fields: dict[str, Any]
    try:
        return run_check(check, subject, profile=request.profile, seed=request.seed, device=request.device)
    except MemoryError as error:  # what knorm itself needs is little
        fields = {"verdict": "refuted", **last_call(board, check.name, f"raised {in_words(error)}", subject.code)}
    except Exception as error:
        if request.verbose:
            traceback.print_exc()
        reason = f"knorm could not run it: {in_words(error)}"
        fields = {"verdict": "untested", "fault": True, "reason": reason}
    except BaseException as error:  # the target's own: nothing else raises one
        fields = {"verdict": "refuted", **last_call(board, check.name, f"raised {in_words(error)}", subject.code)}
    return Result(check.name, check.law, check.family, **fields)


def _announce(board: Board, given: str, call: bytes = b"") -> None:
    board.calls += 1
    board.given = given.encode("utf-8", "replace")[: type(board).given.size]
    board.size = len(call) if len(call) <= len(board.call) else 0
    memmove(board.call, call, board.size)


def _packed(call: Call, takes_layer: bool) -> bytes:
    if call.keys.numel() > MOST_NUMBERS:
        return b""
    tensors = [
        (
            str(x.dtype).removeprefix("torch."),
            tuple(x.shape),
            x.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes(),
        )
        for x in (call.keys, call.values)
    ]
    return pack_call(Packed(call.keep_ratio, call.layer if takes_layer else None, tuple(tensors)))


def last_call(board: Board, check: str, what: str, code: str) -> dict[str, Any]:
    """Describe a call that did not come back.

    Args:
        board: where it was noted.
        check: the name of the check that made it.
        what: what became of it, in words.
        code: lines that import the target.

    Returns:
        Fields of a Result: counterexample, given, snippet; None where the board holds nothing to show.
    """
    given = board.given.decode("utf-8", "replace")
    said = f"{check.replace('_', ' ')}: {what}" + (f" [{given}]" if given else "")
    fields: dict[str, Any] = {"counterexample": said, "given": given or None, "snippet": None}
    if packed := unpack_call(bytes(board.call[: board.size])):
        keys, values = (_unpacked(*tensor) for tensor in packed.tensors)
        subject = Subject("", Traits(), compress=lambda keys, values, keep_ratio, layer=None: None, code=code)
        call = Call(keys, values, packed.keep_ratio, packed.layer, (keys.stride(), values.stride()))
        fields["snippet"] = snippet(find(check), subject, Cache(keys, values, packed.keep_ratio), [call])
    return fields


def _unpacked(dtype: str, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    kind = getattr(torch, dtype)
    return torch.frombuffer(bytearray(data), dtype=kind).view(shape) if data else torch.zeros(shape, dtype=kind)


def _watch(subject: Subject, board: Board, end_copy: Callable[[], None]) -> None:
    """Have every use of the target announced, and keep torch's defaults as the target sets them to the target."""
    defaults = _Defaults(end_copy)
    layered = subject.compress is not None and takes_layer(subject.compress)

    def announce(given: str) -> None:
        _announce(board, given, _packed(subject.calls[-1], layered) if subject.compress and subject.calls else b"")

    subject.announce = announce
    if subject.compress is not None:
        subject.compress = defaults.of_target(subject.compress)
    if subject.evaluate is not None:
        subject.evaluate = defaults.of_target(subject.evaluate)
    if subject.make_cache is not None:
        make = defaults.of_target(subject.make_cache)

        def make_cache(keep_ratio: float) -> Any:
            _announce(board, f"a cache at ratio {keep_ratio}")
            return make(keep_ratio)

        subject.make_cache = make_cache
    if subject.open_cache is not None:
        subject.open_cache = defaults.of_target(subject.open_cache)


class _Defaults:
    """Torch's default dtype and device: the target's while it runs, float32 and the CPU while knorm does."""

    def __init__(self, end_copy: Callable[[], None]) -> None:
        self._end_copy = end_copy
        self.theirs = self._swap((torch.float32, torch.device("cpu")))

    @staticmethod
    def _swap(wanted: tuple[torch.dtype, torch.device]) -> tuple[torch.dtype, torch.device]:
        before = torch.get_default_dtype(), torch.get_default_device()
        if before[0] != wanted[0]:
            torch.set_default_dtype(wanted[0])
        if before[1] != wanted[1]:
            torch.set_default_device(None if wanted[1].type == "cpu" else wanted[1])
        return before

    def of_target(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            ours = self._swap(self.theirs)
            try:
                return function(*arguments, **options)
            finally:
                self._end_copy()
                self.theirs = self._swap(ours)

        return call
