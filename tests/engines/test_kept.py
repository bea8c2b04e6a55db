"""One engine's process for several scorers: each hears what it would hear of a process of its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from knorm.engines.kept import Kept
from knorm.engines.scorer import FRAME, Asked, compared

WINDOWS = torch.arange(2 * 32).view(2, 32)


class Engine:
    """A scorer whose logits say what was asked, one request at a time, as a process does."""

    def __init__(self):
        self.asked, self.requests, self.closed = Asked(), 0, False
        self.process = SimpleNamespace(answering=False, running=True)

    def logits(self, tokens, prompt):
        assert not self.process.answering
        self.process.answering, asked = True, self.asked
        self.requests += 1

        def heard():
            for place in range(prompt, len(tokens), FRAME):
                wanted = tokens[place : place + FRAME]
                scale = 1 if asked.how == "loop" else 2
                yield torch.nn.functional.one_hot(wanted, 64).float() * scale
            self.process.answering = False

        return heard()

    def tokenize(self, text, *, begin):
        return [len(text), begin]

    def close(self):
        self.closed = True


def test_two_scorers_hear_side_by_side_what_each_would_hear_alone():
    kept = Kept(Engine())
    both = [kept.scorer(Asked(how)) for how in ("loop", "two calls")]
    (together,) = compared(both, WINDOWS, 7, [(0, 1)])
    (alone,) = compared([Engine(), SimpleNamespace(logits=_two_calls)], WINDOWS, 7, [(0, 1)])
    for ours, expected in zip(together, alone, strict=True):
        assert torch.equal(ours, expected)
    assert together.kl.shape == (2, 25)
    assert float(together.kl.min()) > 0


def _two_calls(tokens, prompt):
    engine = Engine()
    engine.asked = Asked("two calls")
    return engine.logits(tokens, prompt)


@pytest.mark.parametrize("heard", [0, 1, 3, 7])
def test_the_rest_of_an_answer_waits_while_another_one_is_given(heard):
    kept = Kept(engine := Engine())
    first = kept.scorer(Asked()).logits(WINDOWS[0], 7)
    chunks = [next(first) for _ in range(heard)]
    other = [*kept.scorer(Asked()).logits(WINDOWS[1], 30)]
    assert torch.equal(torch.cat([*chunks, *first]).argmax(1), WINDOWS[0, 7:])
    assert torch.equal(torch.cat(other).argmax(1), WINDOWS[1, 30:])
    assert engine.requests == 2


def test_a_process_runs_on_unless_its_answer_was_not_heard():
    kept = Kept(engine := Engine())
    scorer = kept.scorer(Asked())
    assert kept.alive
    assert scorer.tokenize("abc", begin=True) == [3, True]
    for _ in scorer.logits(WINDOWS[0], 7):
        pass
    scorer.close()
    assert not engine.closed
    next(scorer.logits(WINDOWS[0], 7))
    scorer.close()
    assert engine.closed
