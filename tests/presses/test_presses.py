"""What the laws say of kvpress' presses, as attention sees them. Each verdict was seen with kvpress 0.5.5."""

from __future__ import annotations

import json

import pytest
from commands import in_a_new_process

pytest.importorskip("kvpress.presses", reason="kvpress is not installed: run tox -e kvpress")

import kvpress
from kvpress.presses.expected_attention_with_stats import ExpectedAttentionStats

from knorm.laws import CHECKS, Traits, run_check
from knorm.laws.adapters import adapt
from knorm.laws.loading import load_target
from knorm.laws.reading import Reading
from knorm.laws.standins import SAID, stood_in
from knorm.laws.witness import witnessed
from knorm.methods.known import PRESSES, WEIGHTS

FIRST_ROW = "all rows get the chunks that the first row's scores choose"
SHORT = "chunks of fewer tokens than the ends that it keeps have no queries"


def verdict(press, check):
    return run_check(CHECKS[check], adapt(press))


@pytest.mark.parametrize("check", ["sees_tokens", "sees_once", "sees_no_future", "attends_exactly"])
@pytest.mark.parametrize(
    "press",
    [
        kvpress.KnormPress,
        kvpress.AdaKVPress(kvpress.KnormPress()),
        kvpress.KeyRerotationPress(kvpress.KnormPress()),
        kvpress.ObservedAttentionPress,
    ],
    ids=["Knorm", "AdaKV", "KeyRerotation", "ObservedAttention"],
)
def test_a_press_that_acts_as_it_says_is_held_to_be_right(press, check):
    result = verdict(press, check)
    assert result.verdict == "holds"
    assert result.evicted >= 20


def test_chunks_are_chosen_by_the_first_row():
    result = verdict(kvpress.ChunkKVPress(kvpress.KnormPress()), "sees_alone")
    assert result.verdict == "refuted", FIRST_ROW
    assert "where the other rows are drawn anew" in result.counterexample


def test_a_crash_without_a_word_is_told_from_a_refusal():
    assert verdict(kvpress.CompactorPress, "runs").verdict == "refuted", SHORT
    window = verdict(kvpress.SnapKVPress, "runs")
    assert window.verdict == "holds", "a prompt shorter than its window is refused in a sentence"
    assert window.answered < window.examples


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_reads_weights_of_others_is_judged_with_stand_ins_and_says_so(name):
    pytest.importorskip("peft") if name == "RestoreKVPress" else None
    subject = load_target(f"kvpress:{PRESSES.get(name, name)}")
    result = run_check(CHECKS["sees_once"], subject)
    assert (result.verdict, result.reason) == ("holds", SAID)
    assert result.evicted >= 20
    assert run_check(CHECKS["sees_again"], subject).verdict == "holds", "the same weights each time"


def test_weights_of_its_own_are_left_to_a_press(tmp_path):
    named = {"dataset_name": "mine", "model_name": "mine", "num_samples": 1, "sample_seq_len": 1, "n_sink": 4}
    ExpectedAttentionStats(num_layers=2, num_heads=4, head_dim=64, **named).save_pretrained(tmp_path)
    own = kvpress.ExpectedAttentionStatsPress(stats_folder=str(tmp_path))
    assert not stood_in(own)
    assert [path for path, _ in stood_in(kvpress.DMSPress(kvpress.KVzapPress(), threshold=0.0))] == ["press.press"]
    result = run_check(CHECKS["sees_once"], adapt(own))
    assert (result.verdict, result.reason) == ("holds", None)


def test_masked_heads_are_read_as_the_librarys_own_attention_reads_them():
    run = witnessed(adapt(kvpress.AdaKVPress(kvpress.KnormPress())), Reading(prompt=40, calls=(1, 7)))
    look = next(look for look in run.looks if look.call == 1)
    assert look.tokens.shape[2] == 41, "nothing is freed"
    assert int(look.seen[..., 0, :].sum()) == 2 * 2 * (20 + 1), "two queries a head, half the prompt on average"


ORDER = """
import json, logging
logging.disable(logging.WARNING)
{imports}
from knorm.laws.loading import load_target
from knorm.laws.reading import Reading
from knorm.laws.witness import witnessed
seen = []
for press in ("AdaKVPress(KnormPress())", "SnapKVPress(window_size=8)", "ObservedAttentionPress", "KVzipPress"):
    run = witnessed(load_target("kvpress:" + press), Reading(prompt=40, calls=(1, 2, 7), seed=5))
    seen.append([[look.seen_tokens(0, head, -1) for head in (0, 1)] for look in run.looks])
print(json.dumps(seen))
"""


def test_which_package_is_imported_first_changes_nothing_that_is_seen():
    orders = ("import kvpress, knorm.laws.witness", "import knorm.laws.witness, kvpress", "")
    found = [in_a_new_process(ORDER.format(imports=imports), check=True).stdout for imports in orders]
    assert len(json.loads(found[0])) == 4
    assert found[0] == found[1] == found[2]


def test_a_press_is_named_on_the_command_line_and_told_of_misspellings():
    subject = load_target("kvpress:KnormPress", traits={"rounding": "floor"})
    assert subject.name == "KnormPress"
    assert subject.traits == Traits("floor", time_order=False, frees_memory=False, heads_independent=False)
    with pytest.raises(ValueError, match="kvpress has no 'KNormPress'; it has KnormPress"):
        load_target("kvpress:KNormPress")
    with pytest.raises(ValueError, match=r"write it with one, as AdaKVPress\(KnormPress\(\)\)"):
        load_target("kvpress:AdaKVPress")
