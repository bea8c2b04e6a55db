"""What a worker process does: load the target, run the checks, tell of both. The process is the supervisor's."""

from __future__ import annotations

import pickle
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from ctypes import memmove
from dataclasses import asdict, replace
from functools import wraps
from typing import Any

import torch

from knorm.laws.loading import load_target
from knorm.laws.registry import Check, find
from knorm.laws.runner import EFFORT, Result, _chosen, applies, iter_results
from knorm.laws.snippets import MOST_NUMBERS, snippet
from knorm.laws.strategies import Cache
from knorm.laws.subjects import Call, Subject, takes_layer
from knorm.laws.traits import KNORM, Traits, parse_trait, traits_of


def serve(send: Callable[[tuple[str, Any]], None], board: Any, request: Any) -> None:
    """Load and check, and send what comes of it.

    ("wrong", (message, traceback)); or ("plan", traits, code and all checks), then ("result", a Result's fields) for
    each check that applies. Nothing that the target raises comes out of here.

    board, request   a supervisor.Board and a supervisor.Request
    """
    torch.set_num_threads(1)
    try:
        checks = _checks(request)
        subject = load_target(request.target, request.kind, _traits(request))
    except BaseException as error:  # also what ends an interpreter
        plain = isinstance(error, (ValueError, TypeError, OSError))
        said = " ".join((str(error) if plain else f"{type(error).__name__}: {error}").split())
        send(("wrong", (said, traceback.format_exc())))
        return
    _watch(subject, board)
    plan = [_entry(check, subject) for check in checks]
    checked = [asdict(entry) for entry in plan]
    send(("plan", {"traits": asdict(subject.traits), "code": subject.code, "checks": checked}))
    for check, entry in zip(checks, plan, strict=True):
        if entry.verdict != "does not apply":
            board.given, board.size = b"", 0
            result = _run(check, subject, board, request)
            with suppress(Exception):
                sys.stdout.flush()
            send(("result", asdict(result)))


def _checks(request: Any) -> list[Check]:
    if request.profile not in EFFORT:
        raise ValueError(f"--profile {request.profile}, but should be one of {', '.join(EFFORT)}")
    for name, _ in request.expected:
        find(name)
    return _chosen(request.select)


def _traits(request: Any) -> Traits | dict[str, Any]:
    named = dict(map(parse_trait, request.traits))
    traits_of(None, named)  # refuses what there is not, before the target runs
    if request.like is None:
        return named
    if request.like != "knorm":
        raise ValueError(f"--like {request.like}, but should be knorm")
    return replace(KNORM, **named)


def _entry(check: Check, subject: Subject) -> Result:
    if applies(check, subject):
        return Result(check.name, check.law, check.family, "untested")
    return next(iter_results(subject, select=[check.name]))


def _run(check: Check, subject: Subject, board: Any, request: Any) -> Result:
    options: Any = {"profile": request.profile, "seed": request.seed, "device": request.device}
    found: dict[str, Any]
    try:
        return next(iter_results(subject, select=[check.name], expected_failures=dict(request.expected), **options))
    except Exception as error:
        if request.verbose:
            traceback.print_exc()
        found = {"verdict": "untested", "reason": f"knorm could not run it: {type(error).__name__}: {error}"}
    except BaseException as error:  # the target's own: nothing else raises one
        raised = f"raised {type(error).__name__}: {error}"
        found = {"verdict": "refuted", **last_call(board, check.name, raised, subject.code)}
    return Result(check.name, check.law, check.family, **found)


def _announce(board: Any, given: str, call: bytes = b"") -> None:
    board.calls += 1
    board.given = given.encode("utf-8", "replace")[: type(board).given.size]
    board.size = len(call) if len(call) <= len(board.call) else 0
    memmove(board.call, call, board.size)


def _packed(call: Call, takes_layer: bool) -> bytes:
    """A call in bytes, in microseconds: most are never read."""
    if call.keys.numel() > MOST_NUMBERS:
        return b""
    tensors = [
        (str(x.dtype), tuple(x.shape), x.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
        for x in (call.keys, call.values)
    ]
    return pickle.dumps((tensors, call.keep_ratio, call.layer if takes_layer else None))


def last_call(board: Any, check: str, what: str, code: str) -> dict[str, str | None]:
    """The counterexample, what was given and the snippet of a call that did not come back; code: the subject's."""
    given = board.given.decode("utf-8", "replace")
    said = f"{check.replace('_', ' ')}: {what}" + (f" [{given}]" if given else "")
    found: dict[str, str | None] = {"counterexample": said, "given": given or None, "snippet": None}
    if board.size:
        tensors, keep_ratio, layer = pickle.loads(bytes(board.call[: board.size]))
        keys, values = (_unpacked(*tensor) for tensor in tensors)
        subject = Subject("", Traits(), compress=lambda keys, values, keep_ratio, layer=None: None, code=code)
        call = Call(keys, values, keep_ratio, layer, (keys.stride(), values.stride()))
        found["snippet"] = snippet(find(check), subject, Cache(keys, values, keep_ratio), [call])
    return found


def _unpacked(dtype: str, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    kind = getattr(torch, dtype.removeprefix("torch."))
    return torch.frombuffer(bytearray(data), dtype=kind).view(shape) if data else torch.zeros(shape, dtype=kind)


def _watch(subject: Subject, board: Any) -> None:
    """Have every use of the target announced, and keep torch's defaults as the target sets them to the target."""
    defaults = _Defaults()
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


class _Defaults:
    """Torch's default dtype and device: the target's while it runs, float32 and the CPU while knorm does."""

    def __init__(self) -> None:
        self.theirs = self._swap((torch.float32, torch.device("cpu")))

    @staticmethod
    def _swap(wanted: tuple[torch.dtype, torch.device]) -> tuple[torch.dtype, torch.device]:
        found = torch.get_default_dtype(), torch.get_default_device()
        if found[0] != wanted[0]:
            torch.set_default_dtype(wanted[0])
        if found[1] != wanted[1]:
            torch.set_default_device(None if wanted[1].type == "cpu" else wanted[1])
        return found

    def of_target(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            ours = self._swap(self.theirs)
            try:
                return function(*arguments, **options)
            finally:
                self.theirs = self._swap(ours)

        return call
