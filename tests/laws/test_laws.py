from __future__ import annotations

import re
from dataclasses import asdict, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knorm import compress
from knorm.laws import (
    CHECKS,
    FAMILIES,
    KNORM,
    Kept,
    Malformed,
    Refuted,
    Result,
    Subject,
    Traits,
    check_compressor,
    describe,
    find,
)
from knorm.laws import registry as registry_module
from knorm.laws.registry import Condition, check
from knorm.laws.runner import run_check
from knorm.laws.snippets import reproduce
from knorm.laws.strategies import DTYPES, VOCABULARY, Cache, caches, larger_ratio, tagged_values, texts
from knorm.laws.subjects import CompressingCache, takes_layer
from knorm.laws.traits import METHOD, parse_trait, traits_of

KNORMS = Subject("knorm.compress", KNORM, compress=compress)


def subject(compressor, **traits):
    return Subject(compressor.__name__, Traits(**traits), compress=compressor)


def newest_first(keys, values, keep_ratio):
    kept = compress(keys, values, keep_ratio)
    return kept.keys.flip(2), kept.values.flip(2)


def raises(keys, values, keep_ratio):
    raise RuntimeError("out of luck")


# The registry


def test_every_family_has_checks_in_the_catalogues_order():
    families = [each.family for each in CHECKS.values()]
    assert [*dict.fromkeys(families)] == [*FAMILIES]


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_says_its_law_in_a_sentence(name):
    assert find(name).law.endswith(".")
    assert find(name).function.__name__ == f"check_{name}"


def test_the_traits_that_a_check_needs_make_both_the_condition_and_the_words():
    ties = find("ties")
    assert ties.in_words() == "scores=key_norm, merges_values=False, ties=earlier"
    assert ties.missing(KNORM) == ()
    assert ties.missing(Traits()) == ("scores", "ties")
    assert ties.in_words(ties.missing(Traits())) == "scores=key_norm, ties=earlier"
    assert ties.missing(replace(KNORM, merges_values=True)) == ("merges_values",)
    assert find("nesting").in_words(["scores"]) == "scores=key_norm or keys"
    assert find("time_order").in_words() == "time_order, merges_values=False"


def test_a_condition_beyond_values_names_its_traits_too():
    protected = find("protected_tokens")
    assert protected.in_words() == "ragged=False, merges_values=False, protect_first or protect_recent"
    assert protected.missing(Traits()) == ("protect_first", "protect_recent")
    assert protected.in_words(protected.missing(Traits())) == "protect_first or protect_recent"
    assert protected.missing(Traits(protect_recent=1)) == ()
    assert find("short_caches").missing(Traits(prune_after=1)) == ("prune_after",)


def test_few_laws_need_a_condition_beyond_values():
    odd = [each.name for each in CHECKS.values() if each.applies]
    assert odd == ["short_caches", "skipped_layers", "protected_tokens", "protection_refused", "sees_protected"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"needs": {"luck": True}}, "no trait is named 'luck'; there are acts, batch_independent, "),
        ({"applies": Condition(("luck",), bool)}, "no trait is named 'luck'; there are acts, batch_independent, "),
        ({"needs": {"rounding": ("ceil", "up")}}, "trait rounding='up', but should be ceil, floor, half_even, None"),
    ],
)
def test_a_check_asks_only_for_traits_and_values_that_there_are(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check(**options)


def test_an_unknown_check_is_refused():
    with pytest.raises(ValueError, match="no check is named 'time'; there are accepts, "):
        find("time")


def test_a_name_is_taken_once(monkeypatch):
    monkeypatch.setattr(registry_module, "CHECKS", dict(CHECKS))

    def check_luck(compressor, cache):
        """Luck holds."""

    check(needs={"ragged": True})(check_luck)
    entered = find("luck")
    assert (entered.law, entered.in_words(), entered.missing(Traits())) == ("Luck holds.", "ragged", ("ragged",))
    with pytest.raises(ValueError, match="'luck' is in the catalogue already"):
        check()(check_luck)


# Traits


@pytest.mark.parametrize(
    ("trait", "words"),
    [
        ({"rounding": "up"}, "trait rounding='up', but should be ceil, floor, half_even, None"),
        ({"ragged": 1}, "trait ragged=1, but should be true or false"),
        ({"protect_first": -1}, "trait protect_first=-1, but should be an integer of at least 0"),
        ({"skip_layers": (0, -1)}, "but should be layer indices"),
    ],
)
def test_a_value_that_a_trait_does_not_have_is_refused(trait, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Traits(**trait)


@pytest.mark.parametrize(
    ("rounding", "length", "ratio", "count"),
    [("ceil", 100, 0.55, 55), ("floor", 100, 0.29, 29), ("floor", 2, 0.4, 1), ("half_even", 10, 0.25, 2),
     ("half_even", 10, 0.35, 4), (None, 10, 0.5, None)],
)  # fmt: skip
def test_the_promised_count_is_exact(rounding, length, ratio, count):
    assert Traits(rounding=rounding).count(length, ratio) == count


def test_what_is_protected_must_be_afforded():
    traits = Traits(rounding="ceil", protect_first=1, protect_recent=2)
    assert [traits.affords(10, ratio) for ratio in (0.2, 0.3)] == [False, True]
    assert traits.affords(3, 0.1), "a cache no longer than its protections is left whole"


def test_a_targets_own_traits_give_way_to_those_given():
    def target():
        pass

    target.__knorm_traits__ = {"rounding": "floor", "ragged": True}
    assert traits_of(target, {"rounding": "ceil", "skip_layers": [0]}) == Traits("ceil", ragged=True, skip_layers=(0,))
    with pytest.raises(ValueError, match="no trait is named 'round'; there are "):
        traits_of(target, {"round": "ceil"})


@pytest.mark.parametrize(
    ("text", "pair"),
    [("rounding=ceil", ("rounding", "ceil")), ("time_order=false", ("time_order", False)),
     ("ties=None", ("ties", None)), ("protect_first=4", ("protect_first", 4)),
     ("skip_layers=0,1", ("skip_layers", (0, 1)))],
)  # fmt: skip
def test_a_trait_is_read_as_it_is_written(text, pair):
    assert parse_trait(text) == pair


# What is drawn


@settings(max_examples=40)
@given(caches())
def test_tagged_values_tell_their_place_in_every_dtype(cache):
    rows, heads, length = cache.keys.shape[:3]
    positions = cache.positions(Kept(cache.keys, cache.values))
    assert torch.equal(positions, torch.arange(length).expand(rows, heads, -1))
    assert cache.values[-1, -1, 0, :2].tolist() == [rows - 1, heads - 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tags_are_exact_far_beyond_the_lengths_drawn(dtype):
    cache = Cache(torch.zeros(1, 1, 60000, 4), tagged_values(1, 1, 60000, dtype), 0.5)
    assert torch.equal(cache.positions(Kept(cache.keys, cache.values))[0, 0], torch.arange(60000))


@settings(max_examples=40)
@given(caches(exact=True))
def test_exact_keys_have_exact_squares_in_every_dtype(cache):
    for dtype in DTYPES:
        assert torch.equal(cache.keys.to(dtype).square().sum(-1).double(), cache.norms())


@settings(max_examples=40)
@given(caches(Traits(rounding="ceil", protect_first=2, protect_recent=3)))
def test_drawn_ratios_cover_what_is_protected(cache):
    assert Traits(rounding="ceil", protect_first=2, protect_recent=3).affords(cache.length, cache.keep_ratio)


@settings(max_examples=40)
@given(texts())
def test_texts_have_a_prompt_something_after_it_and_real_tokens_in_every_row(text):
    assert 3 <= text.prompt < text.input_ids.shape[1] <= 20
    assert text.pads[0] == 0
    assert max(text.pads) <= text.prompt - 2
    assert 1 <= int(text.input_ids.min()) <= int(text.input_ids.max()) < VOCABULARY


@given(st.integers(1, 999))
def test_a_larger_ratio_lies_half_way_to_1_exactly(thousandths):
    ratio = thousandths / 1000
    assert Fraction(str(larger_ratio(ratio))) == (Fraction(thousandths, 1000) + 1) / 2


# Subjects


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda k, v: None, "returned None, but should return (keys, values)"),
        (lambda k, v: [(k, v)], "returned list of tuple of float32 [2, 1, 4, 4]"),
        (lambda k, v: (k[:1], v[:1]), "but should keep batch, heads and width, and as many values as keys"),
        (lambda k, v: (k[:, :, :2], v), "and as many values as keys"),
        (lambda k, v: (k.long(), v), "returned keys int64 [2, 1, 4, 4]"),
        (lambda k, v: (k, v, torch.ones(2, 4, dtype=torch.bool)), "returned a mask [2, 4], but should be [2, 1, 4]"),
    ],
)
def test_an_answer_that_is_no_cache_is_malformed(result, words):
    keys, values = torch.zeros(2, 1, 4, 4), tagged_values(2, 1, 4, torch.float32)
    with pytest.raises(Malformed, match=re.escape(words)):
        Subject("it", Traits(), compress=lambda k, v, _: result(k, v))(keys, values, 0.5)


def test_a_check_calls_with_copies_and_remembers_what_it_gave():
    def writes(keys, values, keep_ratio):
        keys.zero_()
        return keys, values

    keys, target = torch.ones(1, 1, 2, 4), subject(writes)
    target(keys, keys, 0.5)
    assert keys.all()
    assert target.calls[0].keys.all()


def test_layer_is_given_to_whom_takes_it():
    seen = []

    def takes(keys, values, keep_ratio, layer=None):
        seen.append(layer)
        return keys, values

    keys = torch.ones(1, 1, 2, 4)
    subject(takes)(keys, keys, 0.5, 3)
    subject(newest_first)(keys, keys, 0.5, 3)
    assert seen == [3]
    assert not takes_layer(newest_first)
    assert not takes_layer(min), "what has no signature"


def test_a_cache_around_a_compressor_counts_what_it_has_seen():
    cache, states = CompressingCache(KNORMS, 0.5), torch.rand(1, 2, 6, 4)
    cache.update(states, states, 0)
    cache.update(states[:, :, :1], states[:, :, :1], 0)
    assert (cache.get_seq_length(), cache.layers[0].keys.shape[2]) == (7, 4)
    assert cache.get_mask_sizes(2, 0) == (6, 3)


# The runner


def test_a_result_says_the_law_and_how_hard_it_tried():
    result = run_check(find("time_order"), KNORMS)
    assert (result.check, result.law, result.family) == ("time_order", "Retained positions ascend.", "order")
    assert (result.verdict, result.examples, result.failed) == ("holds", 60, False)
    assert result.seconds > 0


def test_a_refutation_says_what_was_given_and_what_came_out():
    result = run_check(find("time_order"), subject(newest_first))
    assert (result.verdict, result.failed) == ("refuted", True)
    assert "but should ascend" in result.counterexample
    assert result.given.startswith("keys [1, 1, ")
    report = describe(result)
    assert report.startswith(f"Retained positions ascend.\n  {result.counterexample}\n  given: {result.given}")
    assert report.endswith("print(kept[0].tolist(), kept[1].tolist(), sep='\\n')")


def test_the_same_seed_draws_the_same():
    def drawn(seed):
        given = []

        def watches(keys, values, keep_ratio):
            given.append((keys.shape, keep_ratio, float(keys.double().sum())))
            return compress(keys, values, keep_ratio)[:2]

        run_check(find("at_least_one"), subject(watches), seed=seed)
        return given

    assert drawn(3) == drawn(3) != drawn(4)


def test_a_snippet_shows_the_counterexample():
    code = "def compress(keys, values, keep_ratio):\n    return keys.flip(2), values.flip(2)"
    scope = {}
    exec(f"import torch\n{code}", scope)
    target = Subject("it", Traits(), compress=scope["compress"], code=code)
    result = run_check(find("time_order"), target)
    printed = []
    exec(result.snippet, {"print": lambda *lines, sep: printed.extend(lines)})
    positions = [int(tag[3]) for tag in printed[1][0][0]]
    assert f"positions {positions} retained" in result.counterexample


def test_an_answer_of_nan_to_what_is_finite_is_no_cache():
    """A mean over none is NaN in every call, and alone as in a batch: one law is refuted by it."""

    def merges(keys, values, keep_ratio):
        none = values[:, :, :0].mean(2, keepdim=True)
        return keys[:, :, -1:], values[:, :, -1:] + none

    target = subject(merges, scores="keys", merges_values=True)
    said = run_check(find("shape"), target).counterexample
    assert said.startswith("shape: returned NaN, but what was given is finite [keys [")
    for name in ("repeatable", "rows_alone", "layout"):
        result = run_check(find(name), target)
        assert (result.verdict, "shape: returned NaN" in result.reason) == ("untested", True), name


def test_a_law_about_models_is_reproduced_from_its_text():
    class Forgetful(CompressingCache):
        def get_seq_length(self, layer_idx=0):
            return 3

    target = Subject("it", METHOD, make_cache=lambda ratio: Forgetful(KNORMS, ratio))
    result = run_check(find("positions"), target)
    assert 'reproduce("positions", target, text)' in result.snippet
    scope = {}
    lines = [line for line in result.snippet.splitlines() if not line.startswith(("target", "reproduce"))]
    exec("\n".join(lines), scope)
    with pytest.raises(Refuted, match=re.escape("get_seq_length() is 3")):
        reproduce("positions", target, scope["text"])


def test_a_target_that_only_raises_breaks_one_law_and_leaves_the_others_untested():
    select = ["accepts", "pairing", "no_duplicates"]
    verdicts = {r.check: r.verdict for r in check_compressor(subject(raises), select=select)}
    assert verdicts == {"accepts": "refuted", "pairing": "untested", "no_duplicates": "untested"}


def test_a_target_that_leaves_the_interpreter_breaks_a_law():
    def leaves(keys, values, keep_ratio):
        raise SystemExit(3)

    result = run_check(find("accepts"), subject(leaves))
    assert "accepts: raised SystemExit: 3" in result.counterexample


def test_what_does_not_apply_says_what_it_needs():
    select = ["time_order", "crop", "same_tokens"]
    results = check_compressor(subject(newest_first, time_order=False), select=select)
    assert {r.check: (r.verdict, r.reason, r.needs) for r in results} == {
        "time_order": ("does not apply", "needs time_order", ("time_order",)),
        "crop": ("does not apply", "needs a transformers cache", ()),
        "same_tokens": ("does not apply", "needs an evaluator of token NLLs", ()),
    }


def test_a_text_of_the_targets_is_cut_and_says_so():
    def talks(keys, values, keep_ratio):
        raise ValueError("x" * 10**6)

    result = run_check(find("accepts"), subject(talks))
    assert len(result.counterexample) < 11_000
    assert "x ... [996,0" in result.counterexample
    assert f"[{result.given}]" in result.counterexample[-200:]
    wide = Result("accepts", "law", "family", "refuted", counterexample="a" * 10**6, snippet="b" * 10**6)
    assert len(wide.counterexample) <= 10_000
    assert wide.snippet == "# 1,000,000 characters: too long to print"
    assert Result(**asdict(wide)) == wide, "cut once: as it arrives"


def test_an_expected_failure_is_one_and_what_holds_after_all_is_reported():
    expected = {"time_order": "a slip", "dtype": "a guess", "ties": "not asked"}
    results = check_compressor(subject(newest_first), expected_failures=expected, select=expected)
    found = {r.check: (r.verdict, r.reason, r.failed) for r in results}
    assert found["time_order"] == ("expected failure", "a slip", False)
    assert found["dtype"] == ("unexpectedly holds", "a guess", True)
    assert found["ties"][0] == "does not apply"


def test_checks_are_chosen_by_name_or_family():
    names = [r.check for r in check_compressor(KNORMS, select=["memory", "time_order"])]
    assert names == ["time_order", "inputs_unwritten", "own_bytes", "frees_memory"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"select": ["memry"]}, "no check is named 'memry'"),
        ({"expected_failures": {"tim_order": "a slip"}}, "no check is named 'tim_order'"),
        ({"profile": "slow"}, "profile='slow', but should be one of quick, thorough"),
    ],
)
def test_unknown_names_are_refused(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_compressor(KNORMS, **options)


def random(keys, values, keep_ratio):
    """Any half of the tokens, by the global generator."""
    index = torch.randperm(keys.shape[2])[: max(1, keys.shape[2] // 2)].sort().values if keep_ratio < 1 else slice(None)
    return keys[:, :, index].clone(), values[:, :, index].clone()


def test_what_acts_by_chance_is_told_once():
    results = check_compressor(random, select=["independence", "numerics", "seen"])
    assert [result.check for result in results if result.failed] == ["repeatable"]
    apart = {result.check for result in results if result.needs == ("deterministic",)}
    assert {"rows_alone", "heads_alone", "no_leak", "layout"} <= apart


def test_targets_are_given_only_what_they_are_made_for():
    seen = set()

    def narrow(keys, values, keep_ratio):
        seen.add((keys.dtype, keys.shape[3], keys.shape[2] >= 6))
        return keys, values

    traits = {"dtypes": ["float32", "bfloat16"], "head_dim": [64], "min_length": 6, "scores": "key_norm"}
    check_compressor(narrow, traits)
    assert seen == {(torch.float32, 64, True), (torch.bfloat16, 64, True)}
