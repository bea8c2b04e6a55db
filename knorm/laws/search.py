"""The search for a case that refutes a law: readings of the witness, or cases that Hypothesis draws."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis.errors import UnsatisfiedAssumption

from knorm.laws.blame import is_ours
from knorm.laws.reading import Reading
from knorm.laws.readings import LEAST, readings
from knorm.laws.registry import Check, Malformed, Refusal, Refuted, Silent, Unfed, Vacuous
from knorm.laws.results import Profile
from knorm.laws.strategies import Cache, Text, caches, texts
from knorm.laws.subjects import Call, Subject
from knorm.laws.witness import Unanswered, Witnessed

_NUMBER = re.compile(r"\d+")  # reasons that differ in numbers alone are one
MOST_TURNS = 5  # of reading, the later ones of the longer half only, and
MOST_ROUNDS = 8  # of drawing, until enough cases are answered


@dataclass(frozen=True)
class Effort:
    """Say how hard a check tries: `examples` drawn at most, `shrinks` to make one smaller, and `long` ones or not."""

    examples: int
    shrinks: int
    long: bool = False


EFFORT: dict[Profile, dict[bool, Effort]] = {  # by profile, and by whether a model has to run
    "quick": {False: Effort(60, 250), True: Effort(10, 25)},
    "thorough": {False: Effort(600, 1500, long=True), True: Effort(100, 150)},
}


Case = Cache | Text | Reading


def _size(case: Case) -> int:
    return case.keys.numel() if isinstance(case, Cache) else case.input_ids.numel()


class Search:
    """Hunt for a case that refutes one check.

    Args:
        check: the law.
        subject: what may break it.
        device: where drawn cases lie; the witness has its own.

    Attributes:
        worst: the smallest case found, what it raised, the calls that led there, and the lines that show it.
        tried: how many cases were drawn until the first one that refutes.
        answered: on how many of them the law had something to say.
        evicted: in how many of those something was evicted.
        silent: on how many the target made no statement to be judged.
        reasons: why the others were not answered, and how often.
    """

    def __init__(self, check: Check, subject: Subject, device: str) -> None:
        self.check, self.subject, self.device = check, subject, device
        self.tried = self.answered = self.evicted = self.silent = 0
        self.reasons: Counter[str] = Counter()
        self.worst: tuple[Case, Exception, list[Call], str] | None = None

    @property
    def small(self) -> bool:
        return self.worst is not None and isinstance(self.worst[0], Cache) and self.worst[0].length <= 3

    def run(self, cases: Any, seed: int, examples: int, shrinks: int = 0) -> None:
        """Draw cases until one refutes; then look for smaller ones.

        Args:
            cases: a strategy of Hypothesis.
            seed: the same seed draws the same cases.
            examples: to draw, at most.
            shrinks: runs to spend on smaller ones.
        """
        found, left = False, shrinks

        def attempt(case: Any) -> None:
            nonlocal found, left
            if found and (left := left - 1) < 0:
                return  # enough: what is left of the search passes at once
            if self.try_case(case):
                found = True
                raise Refuted

        search = with_seed(seed)(
            settings(
                max_examples=examples,
                database=None,
                deadline=None,
                report_multiple_bugs=False,
                phases=(Phase.generate, Phase.shrink) if shrinks else (Phase.generate,),
                suppress_health_check=list(HealthCheck),
            )(given(cases)(attempt))
        )
        try:
            search()
        except Exception:
            if not found:
                raise

    def try_case(self, case: Any) -> bool:
        """Tell whether `case` refutes the law; keep the smallest that does."""
        self.tried += self.worst is None
        self.subject.calls.clear()
        self.subject.evicted, self.subject.shows = False, ""
        try:
            self.check.function(self.subject, case if isinstance(case, Reading) else case.on(self.device))
        except UnsatisfiedAssumption:
            raise
        except Vacuous as error:
            self.silent += isinstance(error, Silent)
            self.reasons[str(error) or "it has nothing to say of them"] += 1
            return False
        except Refusal as refusal:
            self.reasons[f"refused: {refusal}"] += 1
            return False
        except Exception as error:
            if isinstance(error, Malformed) and (self.subject.compress is not None or isinstance(case, Reading)):
                self.reasons[str(error)] += 1
                return False  # whether a target answers at all, and with a cache, is for other laws
            if isinstance(error, Unfed) and any(isinstance(run, Unanswered) for run in self.subject.runs.values()):
                self.reasons[f"as the witness saw: {error}"] += 1
                return False  # one cause is reported once
            if not isinstance(error, Refuted) and (isinstance(case, Reading) or is_ours(error)):
                raise  # the witness has told what the subject raised
            if self.worst is None or _size(case) <= _size(self.worst[0]):
                self.worst = (case, error, self.subject.calls.copy(), self.subject.shows)
            return True
        evicted = self.subject.evicted
        if isinstance(case, Reading):
            run = self.subject.runs.get(case)
            evicted = isinstance(run, Witnessed) and run.evicted
        self.answered += 1
        self.evicted += evicted
        if not evicted:
            self.reasons["nothing was evicted"] += 1
        return False

    @property
    def counted(self) -> int:
        """Count the cases that matter to the verdict: only those that evicted, where the law speaks of eviction."""
        wanted = self.check.evicts and self.subject.is_to_evict
        return self.evicted if wanted else self.answered

    def goes_on(self, turn: int) -> bool:
        """Tell whether round `turn`, from 0, is worth its time: some cases count, but not enough yet."""
        return self.worst is None and (not turn or 0 < self.counted < LEAST)

    @property
    def reason(self) -> str:
        """Say why too few cases counted, by the commonest reason."""
        kinds: Counter[str] = Counter()
        for reason, count in self.reasons.items():
            kinds[_NUMBER.sub("#", reason)] += count
        if not kinds:
            return f"{self.counted} of {self.tried} cases counted: too few were drawn"
        kind, count = kinds.most_common(1)[0]
        reason = next(reason for reason in self.reasons if _NUMBER.sub("#", reason) == kind)
        return f"{self.counted} of {self.tried} cases counted; in {count}: {reason}"


def read_cases(search: Search, profile: Profile, seed: int) -> None:
    """Let the witness read until enough cases are answered or one refutes.

    Args:
        search: takes the cases, and keeps count.
        profile: how hard to try.
        seed: the same seed reads the same texts.
    """
    for turn in range(MOST_TURNS):
        if search.goes_on(turn):
            cases = readings(search.subject, search.check.reads, seed + turn, profile)
            for reading in cases[len(cases) // 2 * (turn > 0) :]:  # what the short ones did not show, the long may
                if search.try_case(reading):
                    break


def draw_cases(search: Search, profile: Profile, seed: int) -> None:
    """Draw cases until enough are answered or one refutes; then draw smaller ones.

    Args:
        search: takes the cases, and keeps count.
        profile: how hard to try.
        seed: the same seed draws the same cases.
    """
    check, subject = search.check, search.subject
    effort = EFFORT[profile][check.surface != "compressor"]
    if check.surface != "compressor":
        for turn in range(MOST_ROUNDS):
            if search.goes_on(turn):
                search.run(texts(subject.traits), seed + turn, effort.examples, effort.shrinks)
        return
    draw = partial(caches, subject.traits, exact=check.exact)
    for case in check.first(subject.traits):
        search.try_case(case)
    for turn in range(MOST_ROUNDS):
        if search.goes_on(turn):
            search.run(draw(long=effort.long), seed + turn, effort.examples)
    if search.worst:  # a small one, if there is any; else the one that was found is made smaller
        search.run(draw(small=True), seed, effort.examples, effort.shrinks)
    if search.worst and not search.small:
        search.run(draw(long=effort.long), seed, effort.examples, effort.shrinks)
