"""Laws that can be asked of an engine from outside: tokens go in, predictions come out.

Each is judged by KL against a run that should predict the same. What may differ is what noise does: the engine's own
full cache, or the condition, scored in large batches and again in small ones; where these are the same to the bit, with
each weight moved to the number next to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from knorm.engines.process import EngineLost, EngineRefused
from knorm.engines.scorer import Asked, Scorer, closing, compared
from knorm.evaluation.damage import PerToken
from knorm.laws.registry import Refuted, Silent, Untested

NOISE, FLOOR = 5, 5e-6  # a mean KL passes up to so many times the control's, or these nats a token
BLOCK = 16  # tokens in a row that are judged together
_JUMP, _BROKEN = 10, 0.5  # times the mean before it, and nats a token, beyond which what follows has broken
PROMPT, LONG, SHORT = 32, 320, 128  # tokens of a prompt, and of the windows of both kinds
KEPT = 4  # tokens that are seen by what a cache must be better than
CUT = ((20, 28), (4, 16))  # positions that leave the cache, the last ones first
Which = Literal["full", "target"]


class EngineSubject(Protocol):
    """Give scorers of an engine in its condition and with its full cache, and of its model elsewhere.

    Attributes:
        name: the target as it was written.
        text: the beginning of the text that the windows are cut from.
        tokens: the same in the model's tokens, as knorm cuts it.
        long: windows in which the context grows, int64 [windows, LONG or fewer].
        short: windows for what is scored several times, int64 [2, SHORT].
        movable: each weight can be moved to the number next to it.
    """

    name: str
    text: str
    tokens: list[int]
    long: Tensor
    short: Tensor
    movable: bool

    def scorer(
        self, which: Which, asked: Asked, *, small: bool = False, moved: bool = False, fresh: bool = False
    ) -> Any:
        """Return a scorer of the full cache or of the condition.

        Args:
            which: "full" or "target".
            asked: how it scores.
            small: reads in small batches.
            moved: each weight is moved to the number next to it.
            fresh: nothing was asked of it before.

        Returns:
            A Scorer with close().
        """
        ...

    def elsewhere(self, cut: tuple[tuple[int, int], ...] = ()) -> Any:
        """Return a scorer of the same weights in transformers; positions of `cut` leave its cache after the prompt."""
        ...

    def forgetful(self) -> Any:
        """Return a scorer of the same weights in transformers, where a token sees the last KEPT ones alone."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Cut `text` as the engine does. Raises EngineRefused where it has no tokenizer."""
        ...


class Uniform:
    """Score as who knows nothing does: every token is as likely as any other.

    Args:
        like: a scorer, whose vocabulary and chunks it takes.
    """

    def __init__(self, like: Scorer) -> None:
        self.like = like

    def logits(self, tokens: Tensor, prompt: int) -> Any:
        """Generate equal logits for the `tokens` after the `prompt`, in the chunks of the scorer that it is like."""
        return (torch.zeros_like(chunk) for chunk in self.like.logits(tokens, prompt))

    def close(self) -> None:
        """Do nothing."""


class After:
    """Score a window after another one, in the same process.

    Args:
        scorer: of an engine.
        before: the other window, int64 [T].
    """

    def __init__(self, scorer: Any, before: Tensor) -> None:
        self.scorer, self.before = scorer, before

    def logits(self, tokens: Tensor, prompt: int) -> Any:
        """Score the other window, forget what came of it, and score the `tokens` of this one after its `prompt`."""
        for _ in self.scorer.logits(self.before, prompt):
            pass
        return self.scorer.logits(tokens, prompt)

    def close(self) -> None:
        """Close the scorer."""
        self.scorer.close()


@dataclass(frozen=True)
class Noise:
    """Hold what noise does in a condition.

    Attributes:
        kl: nats a token, the mean.
        what: the control, in words.
    """

    kl: float
    what: str


@dataclass
class Trial:
    """Run what the laws ask for, each run once.

    Attributes:
        subject: the engine.
        shown: what the last law that holds was judged by, in words.
    """

    subject: EngineSubject
    shown: str = ""
    _noise: dict[str, Noise] = field(default_factory=dict)

    @cached_property
    def long(self) -> dict[str, PerToken]:
        """Score growing contexts: the full cache beside the condition, transformers, knowing nothing and forgetting."""
        subject = self.subject
        scorers: list[Any] = []
        with closing(scorers):
            scorers.append(subject.scorer("full", Asked()))
            scorers.append(subject.scorer("target", Asked()))
            elsewhere = subject.elsewhere()
            runs = [*scorers, elsewhere, Uniform(elsewhere), subject.forgetful()]
            names = ("target", "elsewhere", "uniform", "forgetful")
            pairs = [(0, place) for place in range(1, 5)]
            return dict(zip(names, compared(runs, subject.long, PROMPT, pairs), strict=True))

    def noise(self, which: Which) -> Noise:
        """Measure what noise does in `which`: large batches against small ones, else moved weights; each once."""
        if which not in self._noise:
            what = getattr(self.subject, "control", "other batches")  # a server cannot be asked for them
            noise = Noise(self._differs(which, small=True), what)
            if not noise.kl and self.subject.movable:
                noise = Noise(self._differs(which, moved=True), "weights moved in the last digit")
            self._noise[which] = noise
        return self._noise[which]

    def _differs(self, which: Which, **how: bool) -> float:
        scorers: list[Any] = []
        with closing(scorers):
            scorers.append(self.subject.scorer(which, Asked("two calls")))
            scorers.append(self.subject.scorer(which, Asked("two calls"), **how))
            (control,) = compared(scorers, self.subject.short, PROMPT, [(0, 1)])
        return float(control.kl.mean())

    def bound(self, *conditions: Which) -> float:
        """Return the mean KL that noise explains in `conditions`: NOISE times what it does, at least FLOOR.

        What the condition adds to that is rounding in its cache, which explains no more than it costs in all.
        """
        does = {which: NOISE * self.noise(which).kl for which in conditions}
        most = max(FLOOR, does.get("full", 0.0))
        if (rounded := does.get("target", 0.0)) <= most:
            return most
        return max(most, min(rounded, self.cost))

    @property
    def cost(self) -> float:
        """Return the mean KL between the full cache and the condition, nats a token."""
        return float(self.long["target"].kl.mean())

    def beside(self, asked: Asked, after: Tensor | None = None) -> PerToken:
        """Score short windows in the condition by forced decode, beside another way that should predict the same.

        Args:
            asked: the other way.
            after: a window that is scored before, in the same process.

        Returns:
            How the other way differs, [2, SHORT - PROMPT] each.
        """
        scorers: list[Any] = []
        with closing(scorers):
            scorers.append(self.subject.scorer("target", Asked(), fresh=after is not None))
            other = self.subject.scorer("target", asked)
            scorers.append(other if after is None else After(other, after))
            return compared(scorers, self.subject.short, PROMPT, [(0, 1)])[0]

    def within(self, tokens: PerToken, what: str, *conditions: Which) -> int:
        """Raise Refuted where predictions differ by more than noise does in any of the conditions.

        Args:
            tokens: how they differ.
            what: the name of the law.
            *conditions: whose noise counts.

        Returns:
            The number of tokens.

        Raises:
            Refuted: by more.
            Untested: no control disturbs this engine, and what its cache rounds may be rounded otherwise.
        """
        bound, mean = self.bound(*conditions), float(tokens.kl.mean())
        noise = max(map(self.noise, conditions), key=lambda each: each.kl)
        why = f"noise explains {bound:.2g} at most ({noise.what}: {noise.kl:.2g})"
        if mean <= bound:
            self.shown = f"{what}: mean KL {mean:.2g} nats a token; {why}"
            return tokens.kl.numel()
        if "target" in conditions and not self.noise("target").kl and mean <= self.cost:
            raise Untested(
                f"{what}: mean KL {mean:.2g} nats a token, which may be rounding: this cache's costs {self.cost:.2g}, "
                f"and with {self.noise('target').what} it is the same to the bit"
            )
        over = (~(tokens.kl <= bound)).nonzero()[0]  # what is no number too
        raise Refuted(
            f"{what}: mean KL {mean:.2g} nats a token, but {why}; first at token {int(over[1]) + PROMPT} of window "
            f"{int(over[0]) + 1}"
        )


_WORST = {"uniform": "chance", "forgetful": f"seeing the last {KEPT} tokens alone"}


def check_survives(trial: Trial) -> int:
    """The engine survives a cache that it accepts."""
    tokens, scorers = trial.subject.short[0], list[Any]()
    with closing(scorers):
        try:
            scorers.append(trial.subject.scorer("target", Asked()))
            for _ in scorers[0].logits(tokens, PROMPT):
                pass
        except EngineLost as lost:
            raise Refuted(f"survives: {lost}") from None
    return len(tokens) - PROMPT


def check_same_tokens(trial: Trial) -> int:
    """The engine cuts a text into the tokens that are scored."""
    try:
        theirs = trial.subject.tokenize(trial.subject.text)
    except EngineRefused as error:
        raise Silent(str(error)) from None
    ours = trial.subject.tokens
    if theirs == ours:
        return len(ours)
    pairs = enumerate(zip(theirs, ours, strict=False))
    place = next((place for place, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
    raise Refuted(
        f"same tokens: the engine cuts the text into {theirs[place : place + 4]} from token {place} on, but "
        f"{ours[place : place + 4]} are scored"
    )


def check_default_equals_transformers(trial: Trial) -> int:
    """With its full cache the engine predicts what transformers does with the same weights."""
    return trial.within(trial.long["elsewhere"], "default equals transformers", "full")


def check_accepted_cache_works(trial: Trial) -> int:
    """A cache that is accepted is better than chance, or none, and does not break at a length of the context."""
    whole, worst = trial.long["target"].kl, {name: trial.long[name].kl.mean(0) for name in _WORST}
    kl = whole.mean(0)
    if not bool(kl.isfinite().all()):
        place = PROMPT + int((~kl.isfinite()).nonzero()[0])
        raise Refuted(f"accepted cache works: from token {place} on what is predicted is no number")
    for place in range(BLOCK, len(kl) - BLOCK + 1):  # does it break at once?
        before, after = float(kl[:place].mean()), float(kl[place:].mean())
        if float(kl[place]) > _BROKEN < after and after > _JUMP * before:
            _broken(place, after, f"{before:.2g} before")
    for place in range(0, len(kl) - BLOCK + 1, BLOCK):  # or is it no better than knowing nothing?
        mean = float(kl[place : place + BLOCK].mean())
        for name, column in worst.items():
            if mean > (most := float(column[place : place + BLOCK].mean())):
                _broken(place, mean, f"{_WORST[name]} would give {most:.2g}")
    return whole.numel()


def _broken(place: int, mean: float, instead: str) -> None:
    raise Refuted(
        f"accepted cache works: from token {PROMPT + place} on the KL from the full cache is {mean:.2g} nats a token; "
        f"{instead}"
    )


def check_decode_equals_batch(trial: Trial) -> int:
    """Tokens that are decoded one by one are predicted as when they are scored in a batch."""
    return trial.within(trial.beside(Asked("two calls")), "decode equals batch", "full", "target")


def check_batch_changes_nothing(trial: Trial) -> int:
    """What is decoded in the same calls changes nothing."""
    companion = trial.subject.short.flip(0, 1)[0]
    return trial.within(trial.beside(Asked(companions=(companion,))), "batch changes nothing", "full", "target")


def check_order_changes_nothing(trial: Trial) -> int:
    """What was asked before changes nothing."""
    before = trial.subject.short.flip(0, 1)[0]
    return trial.within(trial.beside(Asked(), before), "order changes nothing", "full", "target")


def check_eviction_equals_transformers(trial: Trial) -> int:
    """With tokens taken out of its full cache the engine predicts what transformers does without them."""
    subject, scorers = trial.subject, list[Any]()
    with closing(scorers):
        scorers.append(subject.scorer("full", Asked(cut=CUT)))
        scorers.append(subject.elsewhere(CUT))
        scorers.append(subject.elsewhere())
        same, without = compared(scorers, subject.short, PROMPT, [(0, 1), (2, 1)])
    if float(without.kl.mean()) <= 2 * trial.bound("full"):
        raise Untested(
            f"taking tokens out changes too little to be seen: KL {float(without.kl.mean()):.2g} nats a token"
        )
    return trial.within(same, "eviction equals transformers", "full")


LAWS = (
    check_survives,
    check_same_tokens,
    check_default_equals_transformers,
    check_accepted_cache_works,
    check_decode_equals_batch,
    check_batch_changes_nothing,
    check_order_changes_nothing,
    check_eviction_equals_transformers,
)
