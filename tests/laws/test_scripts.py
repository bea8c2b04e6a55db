"""Programs that show a refutation: each is run, and prints what the counterexample says."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import in_a_new_process
from mutants import MUTANTS
from mutants.parts import TurnedCache, WindowCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from knorm.laws import CHECKS, Subject, Traits, run_check
from knorm.laws.loading import load_target
from knorm.laws.probe import FAMILIES
from knorm.laws.ranked import Ranked
from knorm.laws.reading import Reading
from knorm.laws.scripts import program
from knorm.laws.shown import RANKED, under_the_mask
from knorm.laws.witness import witness

_spec = importlib.util.spec_from_file_location("exam", Path(__file__).parents[2] / "tools" / "exam.py")
exam = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(exam)

CACHES = [mutant for mutant in MUTANTS if mutant.subject.make_cache is not None]
ALONE = "import sys; sys.modules['knorm'] = None; exec(compile(sys.stdin.read(), 'snippet', 'exec'))"


def importable(subject):
    """The subject with lines that import its cache."""
    kind = subject.make_cache
    opens = f"from {kind.__module__} import {kind.__name__}\ndef opened(keep_ratio, length, rows):\n"
    return replace(subject.again(), opens=f"{opens}    return {kind.__name__}(keep_ratio)")


@pytest.fixture
def ran(monkeypatch, capsys):
    """Return a function that runs a program here and returns what it printed, or raised."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])
    for module in (modeling_llama, modeling_gpt_neox):
        monkeypatch.setattr(module, "eager_attention_forward", module.eager_attention_forward)

    def run(code):
        scope = {}
        try:
            with torch.random.fork_rng(), torch.enable_grad():  # which come back as they were
                exec(compile(code, "snippet", "exec"), scope)
        except Exception as error:
            return f"{type(error).__name__}: {error}", scope
        return capsys.readouterr().out, scope

    return run


@pytest.mark.parametrize("mutant", CACHES, ids=lambda mutant: mutant.name)
def test_a_program_shows_what_is_wrong_with_each_mutant(mutant, ran):
    result = run_check(CHECKS[mutant.check], importable(mutant.subject))
    assert "import knorm" not in result.snippet
    assert "from knorm" not in result.snippet
    tries = 10 if mutant.name == "RollsDice" else 1  # which may fall alike twice
    printed = [ran(result.snippet)[0] for _ in range(tries)]
    assert any(exam.confirms(lines, result.counterexample) for lines in printed), printed


@pytest.mark.parametrize("real", [False, True], ids=["drawn keys", "its own keys"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_program_sees_what_the_witness_sees(family, real, ran):
    if family not in ("llama", "gpt_neox"):
        pytest.importorskip(f"transformers.models.{family}")
    subject = replace(load_target("transformers:StaticCache"), shows="run, *_ = read()")
    reading = Reading(prompt=5, calls=(1, 2, 7), rows=2, seed=4, family=family, real=real, scale=30.0)
    _, scope = ran(program(subject, reading))
    looks = witness(subject, reading).looks
    assert len(looks) == len(scope["run"]) == 8
    for look in looks:
        tokens, seen, _, _ = scope["run"][look.call, look.layer]
        assert torch.equal(tokens, look.tokens)
        assert torch.equal(seen, look.seen)


@pytest.mark.parametrize(("cache", "positions"), [(WindowCache, "kept"), (TurnedCache, "renumbered")])
def test_a_program_finds_a_right_cache_right(cache, positions, ran):
    subject = importable(Subject(cache.__name__, Traits(positions=positions), make_cache=cache))
    subject.shows = under_the_mask(renumbered=positions == "renumbered")
    reading = Reading(prompt=9, calls=(1, 2, 7), rows=2, seed=4, real=True)
    printed, scope = ran(program(subject, reading))
    assert float(printed.rpartition("by ")[2]) < 1e-5, printed
    for look in witness(subject, reading).looks:
        tokens, seen, _, _ = scope["run"][look.call, look.layer]
        assert torch.equal(tokens, look.tokens)
        assert torch.equal(seen, look.seen)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("target", "check"),
    [
        ("transformers:StaticCache", "rows_move"),
        ('transformers:QuantizedCache(backend="fp8")', "sees_tokens"),
    ],
)
def test_a_program_runs_where_there_is_no_knorm(target, check):
    result = run_check(CHECKS[check], load_target(target))
    done = in_a_new_process(ALONE, input=result.snippet)
    assert exam.confirms(done.stdout or done.stderr, result.counterexample), done.stderr


@pytest.mark.parametrize(
    ("printed", "counterexample", "confirmed"),
    [
        ("", "logits differ by 3", False),
        ("logits differ by 0.0", "logits differ by 3", False),
        ("logits differ by 3.0001", "logits differ by 3", True),
        ("IndexError: 9", "runs: raised IndexError: 9", True),
        ("ImportError: no knorm", "runs: raised IndexError: 9", False),
        ("the query at 3 sees [1, 3]\nthe query at 3 sees [1, 3]", "sees again: ...", False),
        ("the query at 3 sees [1, 3]", "sees itself: the query at 3 sees 0-2", False),
        ("the query at 3 sees [0, 1, 2]", "sees itself: the query at 3 sees 0-2", True),
        ("the query at 3 sees [1, 3]", "keeps the budget: sees 2 earlier tokens", False),
        ("6144 bytes are held, but", "sees what is held: 4,096 bytes are held", False),
        ("topk was given 2 of 9 scores that are not numbers", "sees by numbers: topk was given 1 of 9 scores", False),
        ("max was given 2 of 9 scores that are not numbers", "sees by numbers: topk was given 2 of 9 scores", False),
    ],
)
def test_a_program_that_shows_nothing_confirms_nothing(printed, counterexample, confirmed):
    assert exam.confirms(printed, counterexample) is confirmed


@pytest.mark.parametrize(
    ("rank", "operation", "numbers"),
    [
        (lambda x: x.max(dim=1), "max", 4),
        (lambda x: torch.min(x, 1), "min", 4),
        (lambda x: x[0].topk(1), "topk", 2),
        (lambda x: torch.argsort(x, descending=True), "argsort", 4),
        (lambda x: torch.ops.aten.sort(x), "sort", 4),
        (lambda x: torch.nn.functional.gumbel_softmax(x, hard=True), "max", 4),
    ],
)
def test_a_program_tells_what_is_ranked_as_the_law_does(rank, operation, numbers, capsys):
    scores = torch.tensor([[1.0, torch.nan], [2.0, 3.0]])

    def read():
        scores.max()  # of all: no place is asked for
        torch.maximum(scores, scores)
        torch.max(scores, scores)
        scores[1].topk(1)
        rank(scores)

    exec(RANKED, {"torch": torch, "read": read})
    with Ranked() as ranked:
        read()
    assert (ranked.operation, ranked.numbers) == (operation, numbers)
    assert capsys.readouterr().out == f"{operation} was given {ranked.nans} of {numbers} scores that are not numbers\n"
