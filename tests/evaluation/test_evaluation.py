from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import tiny, tokens
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from knorm import Policy, exact_nll
from knorm.evaluation import windows as cutting
from knorm.evaluation.curve import measure_row
from knorm.evaluation.runner import Runner
from knorm.evaluation.windows import Windows, cut_windows
from knorm.models import load_text

TEXT = load_text("encyclopedia")


def windows(rows, length):
    ids = tokens(rows, length)
    return Windows(ids, torch.arange(1, ids.numel() + 1).view(rows, length))


def test_windows_cut_the_text_and_count_its_bytes(embedded):
    cut = cut_windows(embedded[1], TEXT, 64, 5)
    assert cut.input_ids.shape == cut.byte_ends.shape == (5, 64)
    assert embedded[1].decode(cut.input_ids.flatten()).encode() == TEXT.encode()[: int(cut.byte_ends[-1, -1])]
    scored = embedded[1].decode(cut.input_ids[2, 10:])
    one = Windows(cut.input_ids[2:3], cut.byte_ends[2:3])
    assert one.scored_bytes(10) == len(scored.encode())


def test_a_token_that_ends_inside_a_character_counts_no_byte_twice(embedded):
    text = "naïve café — ünïcödé 漢字 " * 8
    cut = cut_windows(embedded[1], text, 8)
    assert int(cut.byte_ends[-1, -1]) <= len(text.encode())
    assert (cut.byte_ends.flatten().diff() >= 0).all()


def test_a_short_text_is_one_short_window_and_the_rest_of_a_long_one_is_left(embedded):
    count = len(embedded[1]("One two three.").input_ids)
    assert cut_windows(embedded[1], "One two three.", 512).input_ids.shape == (1, count)
    assert cut_windows(embedded[1], TEXT[:400], 30).input_ids.shape[1] == 30


def test_a_row_is_what_the_tokens_say():
    model, text, policy = tiny("llama"), windows(5, 40), Policy(0.5, prune_after=8, protocol="streaming")
    row = measure_row(Runner(model, text, batch=2), policy)
    nll = exact_nll(model, text.input_ids, policy).double()
    assert (row.windows, row.tokens) == (5, 5 * 39)
    assert row.ppl == pytest.approx(math.exp(float(nll.mean())), rel=1e-6)
    assert row.standard_error == pytest.approx(row.ppl * float(nll.mean(1).std()) / math.sqrt(5), rel=1e-5)
    assert row.bits_per_byte == pytest.approx(float(nll.mean()) / math.log(2), rel=1e-6), "one byte a token here"
    assert 4 <= row.final_cache <= 8
    assert 0 < row.recent < 16
    assert 0 <= row.accuracy <= 1


def test_a_prefill_row_scores_and_counts_after_the_prompt_only():
    row = measure_row(Runner(tiny("qwen2"), windows(3, 40), 30), Policy(0.3))
    assert row.tokens == 3 * 10
    assert row.final_cache == 9 + 10
    # The last token of the prompt sees it whole; nine queries follow, each with one token more.
    lengths = [30, *(9 + n for n in range(1, 11))]
    assert row.mean_cache == pytest.approx(sum(lengths) / len(lengths))


def test_skipped_layers_do_not_count_as_compressed():
    policy = Policy(0.5, prune_after=8, protocol="streaming", skip_layers=(0, 2))
    assert measure_row(Runner(tiny("llama"), windows(2, 40)), policy).final_cache <= 8
    everywhere = Policy(0.5, prune_after=8, protocol="streaming", skip_layers=(0, 1, 2))
    assert measure_row(Runner(tiny("llama"), windows(2, 40)), everywhere).final_cache == 40


def test_one_window_has_no_standard_error_and_a_short_one_no_sixteen_newest():
    row = measure_row(Runner(tiny("llama"), windows(1, 9)), Policy())
    assert row.standard_error is None
    assert row.recent is None


def test_numbers_that_mean_nothing_are_refused(embedded):
    model = tiny("llama")
    for factor in (torch.nan, 1e5):
        model.lm_head.weight.data *= factor if factor == factor else 1  # noqa: PLR0124
        if factor != factor:  # noqa: PLR0124
            model.lm_head.weight.data[0] = factor
        with pytest.raises(ValueError, match="the model's weights are damaged, or its dtype overflows"):
            measure_row(Runner(model, windows(2, 20)), Policy())
        model = tiny("llama")
    with pytest.raises(ValueError, match="within one character"):
        measure_row(Runner(embedded[0], cut_windows(embedded[1], "日")), Policy())


def test_what_cannot_be_scored_is_refused(embedded):
    with pytest.raises(ValueError, match="a prompt of 40 tokens is the whole window"):
        Runner(tiny("llama"), windows(2, 40), 40)
    with pytest.raises(ValueError, match="the text has 1 tokens, but needs at least two"):
        cut_windows(embedded[1], "a")
    with pytest.raises(ValueError, match="should be at least 1 of 2"):
        cut_windows(embedded[1], TEXT, 1)


@cache
def llama_like():
    """A tokenizer that marks spaces without splitting at them, as Llama's does, and with a token that spans some."""
    words = Tokenizer(BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    trainer = BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    words.train_from_iterator([TEXT.replace(" ", " ▁")], trainer)
    tokenizer = Tokenizer(words.model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_tokens(["the walked"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def uncut(tokenizer, text, length, most):
    """The windows by the definition: of all tokens of the text, the first."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, ends = encoding["input_ids"], [len(text[:end].encode()) for _, end in encoding["offset_mapping"]]
    own = min(length, len(ids))
    count = min(len(ids) // own, most)
    return (np.array(x[: count * own]).reshape(count, own).tolist() for x in (ids, ends))


WORDS = st.lists(
    st.sampled_from(["the", "walked", "internationalisation", "x" * 40, "'s", "1,200", "日本語", "é", "e\u0301", "..."])
    | st.sampled_from([" ", "  ", "\n", "\n\n", "\t", " \n ", "\r", "\u3000", "\xa0"]),
    min_size=2, max_size=120,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("kind", ["embedded", "llama-like"])
@given(text=WORDS, length=st.integers(2, 20), most=st.integers(1, 5), per_token=st.integers(1, 6))
def test_windows_are_those_of_the_whole_text_though_less_is_tokenised(embedded, kind, text, length, most, per_token):
    tokenizer = embedded[1] if kind == "embedded" else llama_like()
    assume(len(tokenizer(text, add_special_tokens=False).input_ids) >= 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "_BEYOND", 1 if kind == "embedded" else 12)  # so that texts this short have parts
        patch.setattr(cutting, "_PER_TOKEN", per_token)
        cut = cut_windows(tokenizer, text, length, most)
    ids, ends = uncut(tokenizer, text, length, most)
    assert cut.input_ids.tolist() == ids
    assert cut.byte_ends.tolist() == ends


class Counting:
    """A tokenizer that notes how much it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.given = tokenizer, []

    def __call__(self, text, **options):
        self.given.append(len(text))
        return self.tokenizer(text, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def test_a_text_is_tokenised_as_far_as_its_windows_need(embedded):
    counting = Counting(embedded[1])
    text = TEXT * 200
    cut = cut_windows(counting, text, 64, 5)
    assert sum(counting.given) < 5000 < len(text)
    assert torch.equal(cut.input_ids, cut_windows(embedded[1], TEXT, 64, 5).input_ids)


def test_a_part_is_cut_before_the_word_that_its_end_falls_into(embedded):
    counting = Counting(embedded[1])
    words = "a" * 3000 + " " + "extraordinarily " * 2000  # the first part ends within the first word
    cut = cut_windows(counting, words, 8, 2)
    assert len([size for size in counting.given if size]) > 1
    assert cut.input_ids.tolist() == next(uncut(embedded[1], words, 8, 2))


@pytest.mark.parametrize(
    ("text", "length", "most", "words"),
    [
        ("a" * 2**22, 512, 2, "no space from character 0 to"),
        ("ab " * 2**24, 512, 2**63, "the windows need more than 33,554,432 characters"),
        ("ab " * 2**24, 2**63, 1, "the windows need more than 33,554,432 characters"),
        ("ab " * 2**24, 512, None, "the windows need more than 33,554,432 characters"),
    ],
)
def test_what_would_take_gigabytes_to_tokenise_is_refused(embedded, text, length, most, words):
    with pytest.raises(ValueError, match=words):
        cut_windows(embedded[1], text, length, most)


def test_more_windows_than_there_are_is_all(embedded):
    whole = cut_windows(embedded[1], TEXT, 64)
    assert torch.equal(cut_windows(embedded[1], TEXT, 64, 2**63).input_ids, whole.input_ids)


@pytest.mark.parametrize(("length", "most"), [(2.5, 1), (8, 1.0), (8, True), ("8", 1), (8, -1), (-(2**63), 1)])
def test_settings_of_windows_that_are_no_counts_are_refused(embedded, length, most):
    with pytest.raises((TypeError, ValueError), match="should be"):
        cut_windows(embedded[1], TEXT, length, most)
