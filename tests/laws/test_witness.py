"""The witness reads what attention is given, and the laws that are asked through it judge caches by nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mutants.parts import WindowCache
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from knorm.laws import CHECKS, Subject, Traits, check_compressor, run_check
from knorm.laws.adapters import adapt
from knorm.laws.blame import is_ours, is_refusal
from knorm.laws.known import KVPRESS, TRANSFORMERS
from knorm.laws.probe import FAMILIES, FOREIGN, Draws, probe, read_tags, tagged
from knorm.laws.reading import Reading
from knorm.laws.replay import replayed
from knorm.laws.traits import METHOD
from knorm.laws.witness import EMPTY, Unanswered, witness, witnessed

READING = Reading(prompt=9, calls=(1, 2, 7), rows=2, seed=3)
WINDOW = Subject("window", Traits(), make_cache=WindowCache)


def test_tags_name_their_token_and_survive_rounding_but_no_mixture():
    values = tagged(2, 3, 1, torch.arange(40))
    fields, sound = read_tags(values.bfloat16() * 0.93)
    assert sound.all()
    assert torch.equal(fields["position"], torch.arange(40).expand(2, 3, -1))
    assert fields["row"][1].unique().tolist() == [1]
    assert fields["head"][:, 2].unique().tolist() == [2]
    assert not read_tags((values[:, :, 1:] + values[:, :, :-1]) / 2)[1].any()
    assert not read_tags(values * 0)[1].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_cache_shows_each_query_all_before_it_with_the_keys_that_were_given(family):
    run = witness(adapt(DynamicCache), Reading(prompt=9, calls=(1, 2, 7), rows=2, family=family))
    assert len(run.looks) == 4 * 2
    for look in run.looks:
        seen = torch.arange(int(look.positions[-1]) + 1) <= look.positions[:, None]
        assert torch.equal(look.seen_by_token(seen.shape[1]), seen.expand(*look.seen.shape[:3], -1, -1))
        assert float(look.key_error.max()) < 1e-6
        assert not look.value_error.any()
    assert not run.evicted


def test_spare_slots_are_there_but_no_query_sees_them():
    run = witness(adapt(StaticCache), READING)
    look = run.looks[-1]
    assert int((look.tokens == EMPTY).sum())
    assert not (look.seen & (look.tokens == EMPTY)[:, :, None, None]).any()


def test_a_window_is_seen_to_evict():
    run = witness(WINDOW, READING)
    first = next(look for look in run.looks if look.call == 1)
    assert first.seen_tokens(0, 0, 0) == [7, 8, 9]
    assert run.evicted


@pytest.mark.parametrize("subject", [adapt(DynamicCache), WINDOW], ids=lambda subject: subject.name)
def test_what_was_seen_is_replayed_by_the_plain_model(subject):
    run = witness(subject, Reading(prompt=9, calls=(1, 2, 7), rows=2, real=True))
    logits = torch.cat(run.logits, 1)
    assert (logits - replayed(run, renumbered=False)[:, -logits.shape[1] :]).abs().max() < 1e-4


def test_the_probe_is_given_back_as_it_was():
    model = probe()
    before = dict(vars(model.config))
    witness(WINDOW, READING)
    assert vars(model.config) == before
    assert not [m for m in model.modules() if m._forward_hooks or hasattr(m, "masked_key_indices")]


def raised(function):
    try:
        function()
    except Exception as error:
        return error


def refuses():
    raise ValueError("a prompt of 3 tokens is too short")


def unpacks():
    a, b = [1, 2, 3]
    return a, b


def test_refusals_are_told_from_crashes():
    assert is_refusal(raised(refuses))
    assert not is_refusal(raised(unpacks)), "a ValueError of Python's own"
    assert not is_refusal(raised(lambda: {}["key"]))
    assert not is_ours(raised(refuses))


class Refusing(WindowCache):
    def __init__(self, keep_ratio):
        raise NotImplementedError("this cache wants another machine")


class Crashing(WindowCache):
    def update(self, *_, **__):  # a list of two
        return [*_][9]


def test_a_target_that_refuses_everything_is_untested_with_its_own_reason():
    result = run_check(CHECKS["sees_tokens"], Subject("refusing", Traits(), make_cache=Refusing))
    assert result.verdict == "untested"
    assert "refused: NotImplementedError: this cache wants another machine" in result.reason
    assert (result.answered, result.evicted) == (0, 0)


def test_a_crash_is_refuted_by_one_law():
    subject = Subject("crashing", Traits(), make_cache=Crashing)
    assert run_check(CHECKS["runs"], subject).verdict == "refuted"
    assert run_check(CHECKS["sees_tokens"], subject).verdict == "untested"
    result = run_check(CHECKS["positions"], subject)
    assert result.verdict == "untested"
    assert f"in {result.examples}: as the witness saw: tokens 0 to " in result.reason
    assert run_check(CHECKS["positions"], subject.again()).verdict == "refuted", "asked alone"
    with pytest.raises(Unanswered, match="IndexError"):
        witnessed(subject, READING)


class Overflowing(DynamicLayer):
    """Keeps the scale of its first call, beyond which there are no numbers: fp8 where a cast is not cut off."""

    def update(self, key_states, value_states, *_, **__):
        if not self.is_initialized:
            self.scale = key_states.abs().amax()
        beyond = key_states.abs() > self.scale
        return super().update(key_states.masked_fill(beyond, torch.nan), value_states)


class OverflowingCache(Cache):
    def __init__(self, keep_ratio):
        super().__init__(layer_class_to_replicate=Overflowing)


def test_keys_that_are_no_numbers_are_refuted_by_the_laws_about_keys_and_logits_alone():
    """A copy, or another run, that is NaN where the first one is does not differ from it."""
    subject = Subject("overflowing", replace(METHOD, lossy=0.1, evicts=False), make_cache=OverflowingCache)
    names = ("runs", "sees_tokens", "positions", "rows_move", "copy", "reset")
    found = {name: run_check(CHECKS[name], subject) for name in names}
    assert "the logits after call 1 after the prompt are NaN, but " in found["runs"].counterexample
    assert "but its key is not finite, as in " in found["sees_tokens"].counterexample
    assert [name for name, result in found.items() if result.verdict == "refuted"] == ["runs", "sees_tokens"]
    assert found["copy"].answered < found["copy"].examples


def test_what_a_cache_cannot_do_is_seen_though_nothing_can_be_compared():
    class Lacking(OverflowingCache):
        def batch_select_indices(self, indices):
            raise NotImplementedError

    class Always(Lacking):
        def update(self, key_states, value_states, layer_idx, *rest, **more):
            return super().update(key_states * torch.nan, value_states, layer_idx, *rest, **more)

    subject = Subject("always", replace(METHOD, lossy=0.1, evicts=False), make_cache=Always)
    found = {name: run_check(CHECKS[name], subject.again()) for name in ("copy", "reset", "rows_move")}
    assert [result.verdict for result in found.values()] == ["untested", "untested", "refuted"]
    assert "both runs predict NaN" in found["copy"].reason
    assert "batch_select_indices raised NotImplementedError" in found["rows_move"].counterexample


def test_logits_that_are_no_numbers_in_one_run_alone_are_refuted_in_words():
    class Once(OverflowingCache):
        def __deepcopy__(self, memo):
            other = DynamicCache()
            for index, layer in enumerate(self.layers):
                other.update(layer.keys.nan_to_num(0.0), layer.values, index)
            return other

    subject = Subject("once", replace(METHOD, lossy=0.1, evicts=False), make_cache=Once)
    said = "the copy, after the original went on,: logits are NaN or infinite in one of the two, but should be equal"
    assert said in run_check(CHECKS["copy"], subject).counterexample


def test_a_fault_of_knorms_own_is_no_verdict(monkeypatch):
    monkeypatch.setattr("knorm.laws.witness._allowed", None)
    with pytest.raises(TypeError, match="not callable"):
        run_check(CHECKS["sees_tokens"], Subject("window", Traits(), make_cache=WindowCache))


def test_what_evicts_nothing_is_not_said_to_hold():
    class Keeps(DynamicCache):
        def __init__(self, keep_ratio):
            super().__init__()

    result = run_check(CHECKS["sees_tokens"], Subject("keeps", Traits(), make_cache=Keeps))
    assert (result.verdict, result.evicted) == ("untested", 0)
    assert "nothing was evicted" in result.reason


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("cache", [pytest.param(DynamicCache, marks=pytest.mark.processes), StaticCache])
def test_no_law_on_what_attention_sees_is_refuted_by_a_cache_that_keeps_everything(cache):
    results = check_compressor(cache, select=["seen", "positions", "chunks", "left_padding", "crop"])
    assert {result.verdict for result in results} == {"holds", "does not apply"}


def test_every_known_trait_stands_for_a_sentence():
    for known in (*KVPRESS.values(), *TRANSFORMERS.values()):
        Traits(**known.traits)
        assert len(known.sentence.split()) > 5


def test_tokens_that_are_projected_may_be_none_or_more_than_a_reading_has():
    draws = Draws(probe(), 1, 20, 0)
    draws.begin(0)
    assert draws.tags(0, 1, 0).shape == draws.drawn_keys(0, 1, 0).shape == (1, 2, 0, 64)
    draws.begin(0)
    fields, sound = read_tags(draws.tags(1, 2, 600))
    assert sound.all()
    assert torch.equal(fields["position"][1, 1], torch.arange(600))
    draws.begin(5)
    keys = draws.drawn_keys(1, 1, 30)
    assert torch.equal(keys, draws.keys[1][:, :, torch.arange(5, 35) % 20])
    draws.begin(5)
    assert torch.equal(draws.drawn_keys(1, 1, 3), draws.keys[1][:, :, 5:8])
    draws.end()
    assert (read_tags(draws.tags(0, 1, 3))[0]["position"] >= FOREIGN).all()
