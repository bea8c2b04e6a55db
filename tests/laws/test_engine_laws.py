"""The laws of engines, on a subject that is right because it is transformers itself, and on wrong ones."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from knorm.engines.cut import states_after_a_cut, states_of_the_last
from knorm.engines.process import EngineLost, EngineRefused
from knorm.engines.scorer import FRAME, ModelScorer
from knorm.evaluation.windows import cut_windows
from knorm.laws import engine
from knorm.laws.engine import LONG, PROMPT, SHORT, Trial
from knorm.laws.registry import Refuted, Silent, Untested
from knorm.models import load_text


class Right:
    """The embedded model in place of an engine; small changes of the logits stand for the noise of small batches."""

    name = "right"
    movable = True

    def __init__(self, model, tokenizer):
        self.model = model
        self.text = load_text("narrative")[:200]
        self.tokens = tokenizer(self.text).input_ids
        self.long = cut_windows(tokenizer, load_text("narrative"), LONG, 2).input_ids
        self.short = cut_windows(tokenizer, load_text("narrative"), SHORT, 2).input_ids

    def scorer(self, which, asked, *, small=False, moved=False, fresh=False):
        states = (
            (lambda tokens, prompt: states_after_a_cut(self.model, tokens, prompt, asked.cut)) if asked.cut else None
        )
        small_batches = (lambda x, place, tokens: x + 1e-3 * x.sin()) if small else None
        return Changed(Once(ModelScorer(self.model, states), ("cut", asked.cut)), small_batches)

    def elsewhere(self, cut=()):
        return self.scorer("full", engine.Asked(cut=cut))

    def forgetful(self):
        states = lambda tokens, prompt: states_of_the_last(self.model, tokens, prompt, engine.KEPT)  # noqa: E731
        return Once(ModelScorer(self.model, states), ("last", engine.KEPT))

    def tokenize(self, text):
        return self.tokens


class Once:
    """A scorer that computes a window once: most engines here predict what one model does, and change it."""

    known: ClassVar = {}

    def __init__(self, scorer, kind):
        self.scorer, self.kind = scorer, kind

    def logits(self, tokens, prompt):
        key = self.kind, tuple(tokens.tolist()), prompt
        if key not in self.known:
            self.known[key] = [*self.scorer.logits(tokens, prompt)]
        yield from self.known[key]

    def close(self):
        self.scorer.close()


class Changed:
    """A scorer whose logits are changed: by a function of a row, its token's place, and the window."""

    def __init__(self, scorer, change):
        self.scorer, self.change = scorer, change

    def logits(self, tokens, prompt):
        for number, chunk in enumerate(self.scorer.logits(tokens, prompt)):
            if self.change is None:
                yield chunk
            else:
                first = prompt + number * FRAME
                yield torch.stack([self.change(row, first + i, tokens) for i, row in enumerate(chunk)])

    def close(self):
        self.scorer.close()


GARBAGE = 12 * torch.randn(4096, generator=torch.Generator().manual_seed(0))


def is_target(which, asked, small):
    return which == "target"


# name of the law: (where it is wrong, how)
WRONG = {
    "default_equals_transformers": [
        (lambda which, asked, small: True, lambda row, place, tokens: 1.3 * row),
        (lambda which, asked, small: True, lambda row, place, tokens: row if place < 200 else row.roll(1)),
    ],
    "accepted_cache_works": [
        (is_target, lambda row, place, tokens: GARBAGE),
        (is_target, lambda row, place, tokens: row if place < 97 else row + GARBAGE / 4),
        (is_target, lambda row, place, tokens: row if place < 257 else 0 * row),
    ],
    "decode_equals_batch": [
        (lambda which, asked, small: asked.how == "two calls", lambda row, place, tokens: row + GARBAGE / 50),
        (
            lambda which, asked, small: which == "target" and asked.how == "loop",
            lambda row, place, tokens: row if place < 64 else 0.9 * row,
        ),
    ],
    "batch_changes_nothing": [
        (lambda which, asked, small: bool(asked.companions), lambda row, place, tokens: row + GARBAGE / 50)
    ],
    "eviction_equals_transformers": [
        (lambda which, asked, small: bool(asked.cut), lambda row, place, tokens: row + GARBAGE / 50)
    ],
}


class Wrong(Right):
    def __init__(self, model, tokenizer, where, change):
        super().__init__(model, tokenizer)
        self.where, self.change = where, change

    def scorer(self, which, asked, *, small=False, moved=False, fresh=False):
        right = super().scorer(which, asked, small=small, fresh=fresh)
        return Changed(right, self.change) if self.where(which, asked, small) else right

    def elsewhere(self, cut=()):
        return Right.scorer(self, "full", engine.Asked(cut=cut))


@pytest.fixture(scope="module")
def right(embedded):
    return Trial(Right(*embedded))


@pytest.mark.parametrize("law", engine.LAWS)
def test_a_right_engine_obeys(right, law):
    assert law(right) >= 32
    assert law.__doc__.strip().endswith(".")


@pytest.mark.parametrize(
    ("name", "where", "change"), [(name, *wrong) for name, several in WRONG.items() for wrong in several]
)
def test_a_wrong_engine_is_refuted(embedded, name, where, change):
    with pytest.raises(Refuted, match=rf"{name.replace('_', ' ')}: .* token \d+"):
        getattr(engine, f"check_{name}")(Trial(Wrong(*embedded, where, change)))


@pytest.mark.parametrize(("place", "change"), [(97, GARBAGE / 4), (257, -GARBAGE / 3), (PROMPT + 16, GARBAGE / 2)])
def test_the_first_position_that_breaks_is_named(embedded, place, change):
    wrong = Wrong(*embedded, is_target, lambda row, at, tokens: row if at < place else row + change)
    with pytest.raises(
        Refuted, match=f"from token {place} on the KL from the full cache is .* nats a token; .* before"
    ):
        engine.check_accepted_cache_works(Trial(wrong))


def test_damage_that_grows_with_the_context_has_not_broken(embedded):
    wrong = Wrong(*embedded, is_target, lambda row, at, tokens: row + GARBAGE * (at / 6000))
    assert engine.check_accepted_cache_works(Trial(wrong))


class Empty(Right):
    """An engine whose cache holds nothing: each token sees itself, which is far better than chance."""

    def scorer(self, which, asked, *, small=False, moved=False, fresh=False):
        if which == "full":
            return super().scorer(which, asked, small=small, fresh=fresh)
        return ModelScorer(self.model, lambda tokens, prompt: states_of_the_last(self.model, tokens, prompt, 1))


def test_a_cache_that_holds_nothing_is_refuted(embedded):
    trial = Trial(Empty(*embedded))
    with pytest.raises(Refuted, match=r"from token 32 on .* seeing the last 4 tokens alone would give"):
        engine.check_accepted_cache_works(trial)
    assert float(trial.long["target"].kl.mean()) < float(trial.long["uniform"].kl.mean())


class Undisturbed(Right):
    """An engine that rounds otherwise in batches, `times` as far as its cache does, and is the same in all batches."""

    times = 1.0
    moves = 0.0  # as far, if each weight is moved

    def scorer(self, which, asked, *, small=False, moved=False, fresh=False):
        change = GARBAGE / 50 if asked.how == "loop" else GARBAGE / 50 * (1 + self.times)
        change = change + GARBAGE.roll(1) / 50 * (self.moves if moved else 0)
        right = super().scorer(which, asked)
        return right if which == "full" else Changed(right, lambda row, place, tokens: row + change)


@pytest.mark.parametrize("movable", [False, True])
def test_what_rounding_may_do_where_no_control_shows_noise_is_not_refuted(embedded, movable):
    subject = Undisturbed(*embedded)
    subject.times, subject.movable = 0.5, movable
    with pytest.raises(Untested, match=r"mean KL .* may be rounding: this cache's costs .* the same to the bit"):
        engine.check_decode_equals_batch(Trial(subject))
    subject.times = 2.0
    with pytest.raises(Refuted, match="decode equals batch: mean KL"):
        engine.check_decode_equals_batch(Trial(subject))


def test_moved_weights_show_the_noise_of_an_engine_that_is_the_same_in_all_batches(embedded):
    """KL grows with the square: five times a fifth of a change, squared, is a fifth of what the whole change does."""
    subject = Undisturbed(*embedded)
    subject.moves = 0.2
    for times in (0.1, 0.4):
        subject.times, trial = times, Trial(subject)
        assert engine.check_decode_equals_batch(trial) == 2 * (SHORT - PROMPT)
        assert trial.noise("target").kl > 0
        assert "noise explains" in trial.shown
        assert "(weights moved in the last digit: " in trial.shown
        assert trial.bound("full", "target") < trial.cost / 4
    subject.times = 0.6
    with pytest.raises(Refuted, match=r"but noise explains .* \(weights moved in the last digit: "):
        engine.check_decode_equals_batch(Trial(subject))


def test_rounding_explains_no_more_than_the_cache_costs(embedded):
    subject = Undisturbed(*embedded)
    subject.moves, subject.times = 1.0, 0.9
    trial = Trial(subject)
    assert engine.check_decode_equals_batch(trial)
    assert trial.bound("full", "target") == trial.cost < trial.noise("target").kl * engine.NOISE
    subject.times = 1.2
    with pytest.raises(Refuted, match="decode equals batch: mean KL"):
        engine.check_decode_equals_batch(Trial(subject))


class Leaking(Right):
    """An engine that does not forget: what was asked before is mixed in."""

    def scorer(self, which, asked, *, small=False, moved=False, fresh=False):
        scorer, memory = super().scorer(which, asked, small=small, fresh=fresh), []

        class Remembering:
            def logits(self, tokens, prompt):
                first = not memory
                memory.append(tokens)
                for chunk in scorer.logits(tokens, prompt):
                    yield chunk if first or torch.equal(memory[0], tokens) else chunk + GARBAGE / 50

            def close(self):
                scorer.close()

        return Remembering()


def test_an_engine_that_remembers_is_refuted(embedded):
    subject = Leaking(*embedded)
    subject.long = subject.long[:1]
    with pytest.raises(Refuted, match="order changes nothing: mean KL"):
        engine.check_order_changes_nothing(Trial(subject))


class NotCut(Right):
    """An engine whose eviction does nothing, or takes out the tokens beside those that were meant."""

    by = None

    def scorer(self, which, asked, *, small=False, moved=False, fresh=False):
        cut = tuple((first + self.by, last + self.by) for first, last in asked.cut) if self.by else ()
        return super().scorer(which, engine.Asked(asked.how, asked.companions, cut), small=small)

    def elsewhere(self, cut=()):
        return Right.scorer(self, "full", engine.Asked(cut=cut))


@pytest.mark.parametrize("by", [None, 1, -1])
def test_an_eviction_of_other_tokens_is_refuted(embedded, by):
    subject = NotCut(*embedded)
    subject.by = by
    with pytest.raises(Refuted, match="eviction equals transformers: mean KL"):
        engine.check_eviction_equals_transformers(Trial(subject))


def test_an_engine_that_dies_is_refuted(embedded):
    class Dying(Right):
        def scorer(self, which, asked, *, small=False, moved=False, fresh=False):
            def die(row, place, tokens):
                if place == 70:
                    raise EngineLost("it died while it was to answer")
                return row

            return Changed(super().scorer(which, asked, small=small, fresh=fresh), die)

    with pytest.raises(Refuted, match="survives: it died while"):
        engine.check_survives(Trial(Dying(*embedded)))


@pytest.mark.parametrize("law", ["accepted_cache_works", "decode_equals_batch"])
def test_what_is_no_number_is_refuted(embedded, law):
    wrong = Wrong(*embedded, is_target, lambda row, place, tokens: row if place < 70 else row * float("nan"))
    with pytest.raises(Refuted, match=r"token 70"):
        getattr(engine, f"check_{law}")(Trial(wrong))


def test_tokens_that_are_cut_otherwise_are_refuted(embedded):
    class Begins(Right):
        def tokenize(self, text):
            return [0, *self.tokens]

    class Longer(Right):
        def tokenize(self, text):
            return [*self.tokens, 7]

    class Without(Right):
        def tokenize(self, text):
            raise EngineRefused("its file has no tokenizer")

    with pytest.raises(Refuted, match=r"same tokens: the engine cuts the text into \[0, \d+, .* from token 0 on"):
        engine.check_same_tokens(Trial(Begins(*embedded)))
    with pytest.raises(Refuted, match=r"into \[7\] from token \d+ on, but \[\] are scored"):
        engine.check_same_tokens(Trial(Longer(*embedded)))
    with pytest.raises(Silent, match="no tokenizer"):
        engine.check_same_tokens(Trial(Without(*embedded)))
