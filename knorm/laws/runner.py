"""Run checks against a target on many drawn cases, and say what came of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import knorm.laws.catalogue  # noqa: F401  enters every check
from knorm.laws.adapters import adapt
from knorm.laws.model import CONFIG
from knorm.laws.probe import WIDTH
from knorm.laws.readings import LEAST
from knorm.laws.registry import CHECKS, Check, Refuted, Untested, find
from knorm.laws.results import PROFILES, Profile, Result, judged
from knorm.laws.search import Search, draw_cases, read_cases
from knorm.laws.snippets import snippet
from knorm.laws.standins import SAID
from knorm.laws.subjects import Subject, in_words
from knorm.laws.traits import Traits


def applies(check: Check, subject: Subject) -> bool:
    """Tell whether `subject` has the surface that `check` is run on, and promises what it needs."""
    surfaces = {
        # a cache is judged by what attention sees; by what it stores only where it promises what that depends on
        "compressor": subject.compress is not None and (not subject.has_cache or subject.traits.scores is not None),
        "cache": subject.has_cache,
        "witness": subject.has_cache or subject.method is not None,
        "press": subject.method is not None,
        "nll": subject.method is None and _has_nll(subject),
        "evaluator": subject.evaluate is not None,
    }
    model = _MODELS.get(check.surface)
    if model and not subject.traits.fits(*model):
        return False
    return surfaces[check.surface] and not check.missing(subject.traits)


_WITNESS, _SMALL = ("float32", WIDTH), ("float64", CONFIG["hidden_size"] // CONFIG["num_attention_heads"])
_MODELS = {"witness": _WITNESS, "press": _WITNESS, "cache": _SMALL, "nll": _SMALL}  # what laws on models run through
RANDOM = ("repeatable", "sees_again")  # what these refute draws by chance: others that compare runs say nothing more


def settled(subject: Subject, result: Result) -> Subject:
    """Return the subject as the later laws are asked of it: what was seen to act by chance is not compared with itself.

    Args:
        subject: what is judged.
        result: of the check that was just tried.

    Returns:
        The subject, or one that promises not to be deterministic.
    """
    if result.check not in RANDOM or result.counterexample is None:
        return subject
    return replace(subject, traits=replace(subject.traits, deterministic=False))


def _has_nll(subject: Subject) -> bool:
    """Tell whether the laws on perplexity can be asked: they hold bit for bit."""
    return subject.evaluate is not None or not subject.traits.lossy


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
    search = Search(check, subject, device)
    if check.surface in ("witness", "press"):
        read_cases(search, profile, seed)
    else:
        draw_cases(search, profile, seed)
    worst = search.worst
    fields: dict[str, Any] = {"verdict": "holds"}
    if search.silent > search.tried / 2 and search.counted < LEAST:
        fields = {"verdict": "does not apply", "reason": "it makes no statement that could be judged"}
    elif search.counted < LEAST:
        fields = {"verdict": "untested", "reason": search.reason}
    if worst is not None:
        case, error, calls, subject.shows = worst
        said = str(error) if isinstance(error, Refuted) else f"{check.name}: {in_words(error)}"
        script = snippet(check, subject, case, calls)
        fields = {"verdict": "refuted", "counterexample": said, "given": repr(case), "snippet": script}
    if subject.stands_in and fields["verdict"] != "does not apply":
        fields["reason"] = "; ".join([SAID, *([fields["reason"]] if "reason" in fields else [])])
    fields |= {"examples": search.tried, "answered": search.answered, "evicted": search.evicted}
    return Result(check.name, check.law, check.family, seconds=time.perf_counter() - begin, **fields)


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
            result = run_check(check, subject, profile=profile, seed=seed, device=device)
            yield judged(result, expected)
            subject = settled(subject, result)
        else:
            yield unasked(check, subject)


def unasked(check: Check, subject: Subject) -> Result:
    """Make the result of a `check` that does not apply to `subject`: it says which traits, or which surface, lack."""
    surface = {
        "cache": "a transformers cache",
        "witness": "a transformers cache or a press",
        "press": "a press",
        "evaluator": "an evaluator of token NLLs",
    }
    needs = check.missing(subject.traits)
    model = _MODELS.get(check.surface)
    if model and not subject.traits.fits(*model):
        needs, surface[check.surface] = (), f"a method that is made for {model[0]} and heads {model[1]} wide"
    reason = f"needs {check.in_words(needs) if needs else surface.get(check.surface, 'a compressor')}"
    return Result(check.name, check.law, check.family, "does not apply", reason=reason, needs=needs)


def check_compressor(
    compressor: Any,
    traits: Traits | Mapping[str, Any] | None = None,
    expected_failures: Expected = None,
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
        expected_failures: check -> why it may fail, or a function that returns that for the compressor; one that holds
            is reported.
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
            expected_failures=_expected(expected_failures, compressor),
            select=select,
            profile=profile,
            seed=seed,
            device=device,
        )
    )


def assert_holds(subject: Subject, check: Check, **options: Any) -> None:
    """Run one check, in a test.

    Args:
        subject: what is tested.
        check: the law.
        options: as run_check takes them: profile, seed, device.

    Raises:
        Refuted: the law does not hold; with the whole report.
        Untested: too few cases were answered; with the reason.
    """
    __tracebackhide__ = True
    result = run_check(check, subject, **options)
    if result.verdict == "refuted":
        raise Refuted(describe(result))
    if result.verdict == "untested":
        raise Untested(f"{result.law}\n  untested: {result.reason}")


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


Expected = Mapping[str, str] | Callable[[Any], Mapping[str, str]] | None


def _expected(expected: Expected, compressor: Any) -> dict[str, str]:
    return dict((expected(compressor) if callable(expected) else expected) or {})


def parametrize_with_checks(
    compressors: Sequence[Any],
    *,
    traits: Traits | Mapping[str, Any] | Callable[[Any], Traits | Mapping[str, Any] | None] | None = None,
    expected_failures: Expected = None,
    expected_untested: Expected = None,
    profile: Profile | None = None,
    seed: int | None = None,
) -> Any:
    """Decorate a test: pytest runs it for each compressor with each law that applies to it.

    Args:
        compressors: what adapters.adapt takes.
        traits: what they promise (Traits, or a dict), or a function that returns it for a compressor; by default each
            compressor's own __knorm_traits__.
        expected_failures: check -> why it may fail, or a function that returns that for a compressor; marked
            xfail(strict).
        expected_untested: the same of what may be untested; marked xfail, and red if refuted.
        profile: by default that of --knorm-profile.
        seed: by default that of --knorm-seed.

    Returns:
        The decorator, of a test with the arguments `compressor` and `check`.

    Raises:
        ValueError: an unknown name of a check or of a trait.
        TypeError: a compressor that cannot be adapted.

    Example:
        >>> import knorm
        >>> from knorm.laws import parametrize_with_checks
        >>> @parametrize_with_checks([knorm.compress])
        ... def test_compress(compressor, check):
        ...     check(compressor)
    """
    import pytest

    parameters, names = [], Counter[str]()
    for compressor in compressors:
        subject = adapt(compressor, traits(compressor) if callable(traits) else traits)
        names[subject.name] += 1
        name = subject.name if names[subject.name] == 1 else f"{subject.name}#{names[subject.name]}"
        expected, untested = _expected(expected_failures, compressor), _expected(expected_untested, compressor)
        for known in (*expected, *untested):
            find(known)
        for check in CHECKS.values():
            if applies(check, subject):
                marks: list[Any] = [pytest.mark.knorm]
                if check.name in expected:
                    marks.append(pytest.mark.xfail(strict=True, raises=Refuted, reason=expected[check.name]))
                if check.name in untested:
                    marks.append(pytest.mark.xfail(strict=False, raises=Untested, reason=untested[check.name]))
                run = partial(_run_in_pytest, check=check, subject=subject, profile=profile, seed=seed)
                parameters.append(pytest.param(compressor, run, marks=marks, id=f"{name}-{check.name}"))
    return pytest.mark.parametrize(("compressor", "check"), parameters)


OPTIONS: dict[str, Any] = {"profile": "quick", "seed": 0}  # plugin.py sets them from pytest's command line


def _run_in_pytest(_: Any, *, check: Check, subject: Subject, profile: Profile | None, seed: int | None) -> None:
    __tracebackhide__ = True
    assert_holds(subject, check, profile=profile or OPTIONS["profile"], seed=OPTIONS["seed"] if seed is None else seed)
