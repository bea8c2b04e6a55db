"""Run checks against a target on many drawn cases, and say what came of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis.errors import UnsatisfiedAssumption

import knorm.laws.catalogue  # noqa: F401  enters every check
from knorm.laws.adapters import adapt
from knorm.laws.blame import is_ours
from knorm.laws.readings import LEAST, readings
from knorm.laws.registry import CHECKS, Check, Malformed, Refusal, Refuted, Vacuous, find
from knorm.laws.results import PROFILES, Profile, Result, judged
from knorm.laws.snippets import snippet
from knorm.laws.strategies import Cache, Text, caches, texts
from knorm.laws.subjects import Call, Subject, in_words
from knorm.laws.traits import Traits
from knorm.laws.witness import Reading, Witnessed


@dataclass(frozen=True)
class Effort:
    """Say how hard a check tries: drawn cases at most, and runs spent on making a counterexample smaller."""

    examples: int
    shrinks: int
    long: bool = False


EFFORT: dict[Profile, dict[bool, Effort]] = {  # by profile, and by whether a model has to run
    "quick": {False: Effort(60, 250), True: Effort(10, 25)},
    "thorough": {False: Effort(600, 1500, long=True), True: Effort(100, 150)},
}


def applies(check: Check, subject: Subject) -> bool:
    """Tell whether a subject has the surface that a check is run on, and promises what the check needs."""
    surfaces = {
        # a cache is judged by what attention sees; by what it stores only where it promises what that depends on
        "compressor": subject.compress is not None and (not subject.has_cache or subject.traits.scores is not None),
        "cache": subject.has_cache,
        "witness": subject.has_cache or subject.method is not None,
        "nll": subject.method is None and _has_nll(subject),
        "evaluator": subject.evaluate is not None,
    }
    return surfaces[check.surface] and not check.missing(subject.traits)


def _has_nll(subject: Subject) -> bool:
    """Whether the laws on perplexity can be asked: they hold bit for bit."""
    return subject.evaluate is not None or not subject.traits.lossy


Case = Cache | Text | Reading


def _size(case: Case) -> int:
    return case.keys.numel() if isinstance(case, Cache) else case.input_ids.numel()


class _Search:
    """One check's hunt for a case that refutes it.

    worst      the smallest case found, what it raised, and the calls that led there
    tried      cases drawn until the first one that refutes
    answered   cases on which the law had something to say
    evicted    of those, the ones in which something was evicted
    reasons    why the others were not answered, and how often
    """

    def __init__(self, check: Check, subject: Subject, device: str) -> None:
        self.check, self.subject, self.device = check, subject, device
        self.tried = self.answered = self.evicted = 0
        self.reasons: Counter[str] = Counter()
        self.worst: tuple[Case, Exception, list[Call]] | None = None

    @property
    def small(self) -> bool:
        return self.worst is not None and isinstance(self.worst[0], Cache) and self.worst[0].length <= 3

    def run(self, cases: Any, seed: int, examples: int, shrinks: int = 0) -> None:
        """Draw cases until one refutes; then spend `shrinks` runs on smaller ones."""
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
        """Tell whether a case refutes the law; keeps the smallest that does."""
        self.tried += self.worst is None
        self.subject.calls.clear()
        self.subject.evicted = False
        try:
            self.check.function(self.subject, case if isinstance(case, Reading) else case.on(self.device))
        except UnsatisfiedAssumption:
            raise
        except Vacuous:
            self.reasons["it has nothing to say of them"] += 1
            return False
        except Refusal as refusal:
            self.reasons[f"refused: {refusal}"] += 1
            return False
        except Exception as error:
            if isinstance(error, Malformed) and (self.subject.compress is not None or isinstance(case, Reading)):
                self.reasons[str(error)] += 1
                return False  # whether a target answers at all, and with a cache, is for other laws
            if not isinstance(error, Refuted) and (isinstance(case, Reading) or is_ours(error)):
                raise  # the witness has told what the subject raised
            if self.worst is None or _size(case) <= _size(self.worst[0]):
                self.worst = (case, error, self.subject.calls.copy())
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
        """Cases that count for the verdict: in which something was evicted, where the law speaks of that."""
        wanted = self.check.evicts and self.subject.is_to_evict
        return self.evicted if wanted else self.answered

    @property
    def reason(self) -> str:
        """Why too few cases counted, by the commonest reason."""
        (reason, count), *_ = [*self.reasons.most_common(1), ("too few cases were drawn", self.tried)]
        return f"{self.counted} of {self.tried} cases counted; in {count}: {reason}"


def run_check(
    check: Check, subject: Subject, *, profile: Profile = "quick", seed: int = 0, device: str = "cpu"
) -> Result:
    """Try to refute one law on drawn cases, then make the case that refutes it smaller.

    Whatever the subject raises refutes a law, or is a refusal. What comes out of here is a fault of knorm's own.

    Args:
        check: the law.
        subject: what is judged.
        profile: "quick" or "thorough".
        seed: the same seed draws the same cases.
        device: "cpu" or "cuda", where the drawn tensors lie.

    Returns:
        The result.

    Example:
        >>> from knorm.laws import Subject, Traits, find, run_check
        >>> halved = Subject("halved", Traits(), compress=lambda k, v, ratio: (k / 2, v))
        >>> run_check(find("pairing"), halved).verdict
        'refuted'
    """
    begin = time.perf_counter()
    search = _Search(check, subject, device)
    if check.surface == "witness":
        for turn in range(MOST_TURNS):
            if turn and (search.worst or search.counted >= LEAST or not search.counted):
                break
            for reading in readings(subject, check.reads, seed + turn, profile):
                if search.try_case(reading):
                    break
    else:
        _draw_cases(search, profile, seed)
    worst = search.worst
    fields: dict[str, Any] = {"verdict": "holds"}
    if search.counted < LEAST:
        fields = {"verdict": "untested", "reason": search.reason}
    if worst is not None:
        case, error, calls = worst
        said = str(error) if isinstance(error, Refuted) else f"{check.name}: {in_words(error)}"
        script = snippet(check, subject, case, calls)
        fields = {"verdict": "refuted", "counterexample": said, "given": repr(case), "snippet": script}
    fields |= {"examples": search.tried, "answered": search.answered, "evicted": search.evicted}
    return Result(check.name, check.law, check.family, seconds=time.perf_counter() - begin, **fields)


MOST_TURNS = 3  # of reading, and
MOST_ROUNDS = 8  # of drawing, until enough cases are answered


def _draw_cases(search: _Search, profile: Profile, seed: int) -> None:
    """Draw cases until enough are answered or one refutes; then draw smaller ones."""
    check, subject = search.check, search.subject
    effort = EFFORT[profile][check.surface != "compressor"]
    if check.surface != "compressor":
        for turn in range(MOST_ROUNDS):
            if not search.worst and (not turn or search.counted < LEAST):
                search.run(texts(subject.traits), seed + turn, effort.examples, effort.shrinks)
        return
    draw = partial(caches, subject.traits, exact=check.exact)
    for case in check.first(subject.traits):
        search.try_case(case)
    for turn in range(MOST_ROUNDS):
        if not search.worst and (not turn or search.counted < LEAST):
            search.run(draw(long=effort.long), seed + turn, effort.examples)
    if search.worst:  # a small one, if there is any; else the one that was fields is made smaller
        search.run(draw(small=True), seed, effort.examples, effort.shrinks)
    if search.worst and not search.small:
        search.run(draw(long=effort.long), seed, effort.examples, effort.shrinks)


def _chosen(select: Iterable[str] | None) -> list[Check]:
    """Choose checks by name or family, in the catalogue's order. Raises ValueError for an unknown name."""
    if select is None:
        return list(CHECKS.values())
    families = {check.family for check in CHECKS.values()}
    wanted = set(select)
    for name in wanted - families:
        find(name)
    return [check for check in CHECKS.values() if {check.name, check.family} & wanted]


def iter_results(
    subject: Subject,
    *,
    expected_failures: Mapping[str, str] | None = None,
    select: Iterable[str] | None = None,
    profile: Profile = "quick",
    seed: int = 0,
    device: str = "cpu",
) -> Iterator[Result]:
    """Run a subject through the laws, and yield each result as it comes.

    Args:
        subject: what is judged.
        expected_failures: check -> why it may fail; one that holds is reported.
        select: names of checks or families; by default all.
        profile: "quick" or "thorough".
        seed: the same seed draws the same cases.
        device: "cpu" or "cuda", where the drawn tensors lie.

    Yields:
        A Result for every check.

    Raises:
        ValueError: an unknown name of a check, a family or a profile.

    Example:
        >>> from knorm.laws import Subject, Traits, iter_results
        >>> first = Subject("first token", Traits(), compress=lambda k, v, ratio: (k[:, :, :1], v[:, :, :1]))
        >>> [result.verdict for result in iter_results(first, select=["order"])]
        ['holds']
    """
    expected = dict(expected_failures or {})
    for name in expected:
        find(name)
    if profile not in PROFILES:
        raise ValueError(f"profile={profile!r}, but should be one of {', '.join(PROFILES)}")
    for check in _chosen(select):
        if applies(check, subject):
            yield judged(run_check(check, subject, profile=profile, seed=seed, device=device), expected)
        else:
            yield unasked(check, subject)


def unasked(check: Check, subject: Subject) -> Result:
    """Make the result of a check that does not apply: it says which traits, or which surface, the check needs."""
    surface = {
        "cache": "a transformers cache",
        "witness": "a transformers cache or a press",
        "evaluator": "an evaluator of token NLLs",
    }
    needs = check.missing(subject.traits)
    reason = f"needs {check.in_words(needs) if needs else surface.get(check.surface, 'a compressor')}"
    return Result(check.name, check.law, check.family, "does not apply", reason=reason, needs=needs)


def check_compressor(
    compressor: Any,
    traits: Traits | Mapping[str, Any] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    *,
    select: Iterable[str] | None = None,
    profile: Profile = "quick",
    seed: int = 0,
    device: str = "cpu",
) -> list[Result]:
    """Run a compressor through every law that its traits ask of it.

    Args:
        compressor: a callable (keys, values, keep_ratio) -> (keys, values[, mask]), or anything that adapters.adapt
            takes: a class, a transformers cache, a function of one, a kvpress press, an evaluator.
        traits: what it promises (Traits, or a dict); by default its own __knorm_traits__.
        expected_failures: check -> why it may fail; one that holds is reported.
        select: names of checks or families; by default all.
        profile: "quick" or "thorough".
        seed: the same seed draws the same cases.
        device: "cpu" or "cuda", where the drawn tensors lie.

    Returns:
        A Result for every check.

    Raises:
        ValueError: an unknown name of a check, a family, a trait or a profile.
        TypeError: a compressor that cannot be adapted.

    Example:
        >>> from knorm.laws import check_compressor
        >>> def first(keys, values, keep_ratio):
        ...     return keys[:, :, :1], values[:, :, :1]
        >>> [result.verdict for result in check_compressor(first, {"rounding": "ceil"}, select=["retained_count"])]
        ['refuted']
    """
    subject = adapt(compressor, traits)
    return list(
        iter_results(
            subject,
            expected_failures=expected_failures,
            select=select,
            profile=profile,
            seed=seed,
            device=device,
        )
    )


def assert_holds(subject: Subject, check: Check, **options: Any) -> None:
    """Run one check; raise Refuted with the whole report where it does not hold."""
    __tracebackhide__ = True
    result = run_check(check, subject, **options)
    if result.verdict == "refuted":
        raise Refuted(describe(result))


def describe(result: Result) -> str:
    """Describe a refuted law in full: the law, what was given, what came out beside what should have, and a snippet.

    Args:
        result: one with the verdict "refuted".

    Returns:
        The lines.

    Example:
        >>> from knorm.laws import Subject, Traits, describe, find, run_check
        >>> halved = Subject("halved", Traits(), compress=lambda k, v, ratio: (k / 2, v))
        >>> describe(run_check(find("pairing"), halved)).startswith(find("pairing").law)
        True
    """
    lines = [f"{result.law}", f"  {result.counterexample}", f"  given: {result.given} (example {result.examples})"]
    return "\n".join([*lines, "", *(f"    {line}" for line in (result.snippet or "").splitlines())])


def parametrize_with_checks(
    compressors: Sequence[Any],
    *,
    expected_failures: Callable[[Any], Mapping[str, str]] | None = None,
    profile: Profile | None = None,
    seed: int | None = None,
) -> Any:
    """Decorate a test: pytest runs it for each compressor with each law that applies to it.

    Args:
        compressors: what adapters.adapt takes.
        expected_failures: returns, for a compressor, check -> why it may fail; marked xfail(strict).
        profile: by default that of --knorm-profile.
        seed: by default that of --knorm-seed.

    Returns:
        The decorator, of a test with the arguments `compressor` and `check`.

    Raises:
        ValueError: an unknown name of a check.

    Example:
        >>> import knorm
        >>> from knorm.laws import parametrize_with_checks
        >>> @parametrize_with_checks([knorm.compress])
        ... def test_compress(compressor, check):
        ...     check(compressor)
    """
    import pytest

    parameters = []
    for compressor in compressors:
        subject = adapt(compressor)
        expected = dict(expected_failures(compressor)) if expected_failures else {}
        for name in expected:
            find(name)
        for check in CHECKS.values():
            if applies(check, subject):
                marks: list[Any] = [pytest.mark.knorm]
                if check.name in expected:
                    marks.append(pytest.mark.xfail(strict=True, reason=expected[check.name]))
                run = partial(_run_in_pytest, check=check, subject=subject, profile=profile, seed=seed)
                parameters.append(pytest.param(compressor, run, marks=marks, id=f"{subject.name}-{check.name}"))
    return pytest.mark.parametrize(("compressor", "check"), parameters)


OPTIONS: dict[str, Any] = {"profile": "quick", "seed": 0}  # plugin.py sets them from pytest's command line


def _run_in_pytest(_: Any, *, check: Check, subject: Subject, profile: Profile | None, seed: int | None) -> None:
    __tracebackhide__ = True
    assert_holds(subject, check, profile=profile or OPTIONS["profile"], seed=OPTIONS["seed"] if seed is None else seed)
