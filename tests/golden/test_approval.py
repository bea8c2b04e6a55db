from __future__ import annotations

import itertools
import shlex

import numpy as np
import pytest
from goldens import CLEAN, NLL, NOISE, TOKENS, accept, candidate, measured, metric
from hypothesis import given
from hypothesis import strategies as st

from knorm.golden.approval import Refused, _rounded_up, approve, parse_permissions
from knorm.golden.format import Gate, Measured
from knorm.golden.gates import gate_changes
from knorm.golden.store import Checkout, Store

LOOSE = TOKENS.model_copy(update={"noise": NOISE.model_copy(update={"typical": 1.0})})
WORSE = measured(NLL * np.float32(1.01), ratio=1.503)


@pytest.fixture
def store(tmp_path):
    """A folder with one golden for each of two cases."""
    folder = tmp_path / "golden"
    folder.mkdir()
    store = Store(folder)
    for case in ("streaming", "prefill"):
        accept(store, candidate(case=case), reason="the first")
    return store


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def refusal(store, *candidates, reason="why", now=CLEAN, worse=(), gates=()):
    """The refusal of candidates, which writes nothing; with the command that it shows."""
    before, permissions = contents(store.folder), parse_permissions(worse, gates)
    with pytest.raises(Refused) as refused:
        approve(store, candidates, reason, now=now, permissions=permissions)
    assert contents(store.folder) == before
    names = [made.case for made, _ in candidates]
    return str(refused.value), refused.value.command(names, reason, permissions, " --golden-dir 'my goldens'")


def permitted(command):
    """The permissions in a command, as a shell would pass them."""
    words = shlex.split(command)
    following = list(itertools.pairwise(words))
    given = {option: [word for before, word in following if before == option] for option in words}
    return parse_permissions(given.get("--allow-worse", ()), given.get("--allow-gate", ()))


STALE = "knorm golden record streaming --golden-dir 'my goldens'"
REFUSED = {
    "no reason": (
        {"reason": "  "},
        "--reason is empty",
        "knorm golden accept streaming --reason '' --golden-dir 'my goldens'",
    ),
    "a reason that cannot be read": (
        {"reason": "\x1b[2J"},
        "--reason is empty",
        "knorm golden accept streaming --reason '' --golden-dir 'my goldens'",
    ),
    "a dirty tree": ({"now": Checkout("a" * 40, False, "c" * 64)}, "the tree has changes outside golden/", STALE),
    "other code": ({"now": Checkout("a" * 40, True, "d" * 64)}, "made by other code than this", STALE),
    "another commit": (
        {"now": Checkout("b" * 40, True, "c" * 64)},
        "made at another commit, aaaaaaaaaaaa, but this is bbbb",
        STALE,
    ),
}


@pytest.mark.parametrize(("options", "words", "command"), REFUSED.values(), ids=REFUSED)
def test_acceptance_is_refused(store, options, words, command):
    said, shown = refusal(store, (candidate(measured(seen=7)), {"nll/0.5": NLL}), **options)
    assert words in said
    assert shown == command


def test_a_candidate_of_a_dirty_tree_is_refused(store):
    dirty = candidate(now=Checkout("a" * 40, False, "c" * 64)), {"nll/0.5": NLL}
    said, command = refusal(store, dirty)
    assert "the candidate is of a tree with changes outside golden/" in said
    assert command == STALE


def test_what_a_cuda_runner_recorded_is_recorded_again_there(store):
    made = candidate(now=Checkout("a" * 40, True, "d" * 64), device="nvidia-h200")
    _, command = refusal(store, (made, {"nll/0.5": NLL}))
    assert command == "knorm golden record streaming --device cuda --golden-dir 'my goldens'"


def test_a_worse_metric_needs_to_be_allowed_by_name_and_per_cent(store):
    worse = candidate(WORSE), WORSE.tensors
    for allow, words in (
        ((), "streaming/cpu-x86_64: nll/0.5 is 1% worse, ppl_ratio/0.5 is 0.2% worse"),
        (("nll/0.5=0.5",), "nll/0.5 is 1% worse"),
        (("nll/*=1.1",), "ppl_ratio/0.5 is 0.2% worse"),
    ):
        assert words in refusal(store, worse, worse=allow)[0]
    accept(store, *worse, permissions=parse_permissions(["nll/*=1.1", "streaming:ppl_ratio/0.5=0.3"]))
    assert store.read("streaming", "cpu-x86_64")[0].metric("ppl_ratio/0.5").value == 1.503


@pytest.mark.parametrize("text", ["nll", "nll=", "=2", "nll=-1", "nll=much", "prefill:=2"])
def test_an_allowance_is_a_case_a_metric_and_a_per_cent(text):
    (with_case, without) = parse_permissions(["pre-fill:nll/0.5=2.5", "nll/0.5=2.5"])
    assert (with_case.case, with_case.metrics, with_case.percent) == ("pre-fill", "nll/0.5", 2.5)
    assert (without.case, without.metrics, without.percent) == (None, "nll/0.5", 2.5)
    with pytest.raises(ValueError, match="should be CASE:METRIC=PERCENT"):
        parse_permissions([text])


@pytest.mark.parametrize("text", ["", "prefill:"])
def test_a_gate_is_allowed_by_case_and_metric(text):
    (permission,) = parse_permissions([], ["prefill:nll/*"])
    assert (permission.case, permission.metrics, permission.percent) == ("prefill", "nll/*", None)
    with pytest.raises(ValueError, match="should be CASE:METRIC, e"):
        parse_permissions([], [text])


def test_a_permission_holds_for_the_case_that_it_names(store):
    both = [(candidate(WORSE, case=case), WORSE.tensors) for case in ("streaming", "prefill")]
    worse = ["streaming:nll/*=100", "streaming:ppl*=100"]
    said, command = refusal(store, *both, worse=worse)
    assert "prefill/cpu-x86_64: nll/0.5 is 1% worse" in said
    assert "streaming" not in said
    assert len(approve(store, both, "why", now=CLEAN, permissions=permitted(command))) == 2
    with pytest.raises(
        ValueError, match=r"names no case, but 2 goldens are accepted: --allow-worse 'prefill:nll/\*=2'"
    ):
        approve(store, both, "why", now=CLEAN, permissions=parse_permissions(["nll/*=2"]))
    with pytest.raises(
        ValueError, match=r"^--allow-gate 'prefil:\*': prefil is not accepted here, but prefill, stream"
    ):
        approve(store, both, "why", now=CLEAN, permissions=parse_permissions([], ["prefil:*"]))


def with_gates(gate):
    one, *rest = measured().metrics
    return Measured((one.model_copy(update={"gate": gate}), *rest), {"nll/0.5": NLL})


@pytest.mark.parametrize("reason", ["positions propagate to the next layer", "aggregate", "the gate is loosened"])
def test_a_gate_is_not_loosened_by_a_word_in_the_reason(store, reason):
    loose = candidate(with_gates(LOOSE)), {"nll/0.5": NLL}
    said, command = refusal(store, loose, reason=reason)
    assert "nll/0.5 is judged by another gate: typical 1e-05 becomes 1.0" in said
    assert "--allow-gate streaming:nll/0.5 " in command
    assert "judged by another gate" in refusal(store, loose, gates=["seen/*"], worse=["nll/*=100"])[0]
    accept(store, *loose, reason="500 runs", permissions=parse_permissions([], ["nll/*"]))
    assert store.read("streaming", "cpu-x86_64")[0].metrics[0].gate == LOOSE


def test_no_metric_is_lost_in_silence(store):
    less = candidate(Measured(measured().metrics[:3], {"nll/0.5": NLL})), {"nll/0.5": NLL}
    said, command = refusal(store, less)
    assert "streaming/cpu-x86_64: ppl_ratio/0.5 is gone" in said
    assert not gate_changes(candidate(), candidate(measured(seen=7)))
    accept(store, *less, permissions=permitted(command))
    assert store.read("streaming", "cpu-x86_64")[0].metric("ppl_ratio/0.5") is None


def test_a_refusal_names_every_problem_at_once_and_one_command_that_solves_them(store):
    first, *rest = WORSE.metrics
    both = [
        (candidate(Measured((first.model_copy(update={"gate": LOOSE}), *rest), WORSE.tensors)), WORSE.tensors),
        (candidate(Measured(WORSE.metrics[:2], WORSE.tensors), case="prefill"), WORSE.tensors),
    ]
    said, command = refusal(store, *both, reason="it's intended", worse=["prefill:nll/*=0.5"])
    assert said.splitlines() == [
        "nothing was accepted:",
        "  streaming/cpu-x86_64: nll/0.5 is 1% worse, ppl_ratio/0.5 is 0.2% worse",
        "  streaming/cpu-x86_64: nll/0.5 is judged by another gate: typical 1e-05 becomes 1.0",
        "  prefill/cpu-x86_64: nll/0.5 is 1% worse",
        "  prefill/cpu-x86_64: evicted_at/0.5, ppl_ratio/0.5 are gone",
    ]
    words = shlex.split(command)
    assert words[:5] == ["knorm", "golden", "accept", "streaming", "prefill"]
    assert words[words.index("--reason") + 1] == "it's intended"
    assert words[-2:] == ["--golden-dir", "my goldens"]
    approved = approve(store, both, "it's intended", now=CLEAN, permissions=permitted(command))
    assert [golden.case for golden in approved] == ["streaming", "prefill"]


def test_what_was_nothing_can_be_permitted_by_the_command_that_is_shown(tmp_path):
    (tmp_path / "golden").mkdir()
    store = Store(tmp_path / "golden")
    gate = Gate(rule="at_most", threshold=0.0)
    was, now = (candidate(Measured((metric("by[t]es", x, "memory", gate, "lower"),))) for x in (0.0, 5.0))
    accept(store, was, {})
    _, command = refusal(store, (now, {}))
    assert approve(store, [(now, {})], "why", now=CLEAN, permissions=permitted(command))


@given(st.floats(1e-6, 1e9))
def test_the_per_cent_that_are_shown_suffice(percent):
    assert percent <= float(_rounded_up(percent)) <= percent + 0.2


def test_a_damaged_golden_is_refused_with_the_rest(store):
    store.file("streaming", "cpu-x86_64").write_text("{")
    both = [(candidate(WORSE, case=case), WORSE.tensors) for case in ("streaming", "prefill")]
    said, command = refusal(store, *both)
    assert "streaming/cpu-x86_64.json is truncated, edited or no JSON" in said
    assert "prefill/cpu-x86_64: nll/0.5 is 1% worse" in said
    assert command is None


def test_anchors_are_those_of_the_same_configuration(store):
    made = candidate(measured(seen=7)).model_copy(update={"configuration": {"windows": 9}})
    (golden,) = approve(store, [(made, {"nll/0.5": NLL})], "more windows", now=CLEAN)
    assert golden.metric("seen/0.5").anchor == 7


def test_a_reason_is_one_line(store):
    accept(store, candidate(measured(seen=7)), reason="two\n lines")
    assert store.read("streaming", "cpu-x86_64")[0].provenance.reason == "two lines"
