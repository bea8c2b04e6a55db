"""What came of a check. Light: both processes of `knorm check` load it, the parent without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

Verdict = Literal["holds", "refuted", "expected failure", "unexpectedly holds", "untested", "does not apply"]
Profile = Literal["quick", "thorough"]
PROFILES: tuple[Profile, ...] = get_args(Profile)
MOST_TEXT, MOST_CODE = 10_000, 200_000  # characters


def shortened(text: str, most: int = MOST_TEXT) -> str:
    """Cut the middle out of a long text, and say so: what a target raises may have any length.

    Args:
        text: the text.
        most: characters to keep.

    Returns:
        The text, or its two ends around a count of what is cut.

    Example:
        >>> shortened("abcdefgh", 4)
        'ab ... [4 characters are cut] ... gh'
    """
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... [{len(text) - 2 * half:,} characters are cut] ... {text[-half:]}"


@dataclass(frozen=True)
class Result:
    """Hold the result of one check. Texts over MOST_TEXT are shortened, a snippet over MOST_CODE is dropped.

    Attributes:
        check: the check's name.
        law: the sentence that it tried to refute.
        family: the family of the law.
        verdict: "refuted" or "unexpectedly holds": the target failed. "holds", "expected failure": it did not.
            "untested": too few cases were answered, or evicted anything. "does not apply": its traits do not ask for
            the law.
        examples: how many cases were tried.
        answered: of these, on how many the law had something to say.
        evicted: of these, in how many something was evicted.
        fault: True where knorm itself broke off: nothing is said of the target.
        seconds: time to the verdict, making the counterexample smaller included.
        counterexample: the sentence with the evidence, of the smallest case that refutes the law.
        given: shapes, dtype and ratio of that case.
        snippet: Python that shows it.
        reason: why the check does not apply or is untested, or why a failure was expected; of what was judged with
            stand-in weights, that it was.
        needs: the traits that keep it from applying: with other values of these it would.

    Example:
        >>> Result("time_order", "Retained positions ascend.", "order", "refuted").failed
        True
    """

    check: str
    law: str
    family: str
    verdict: Verdict
    examples: int = 0
    seconds: float = 0.0
    counterexample: str | None = None
    given: str | None = None
    snippet: str | None = None
    reason: str | None = None
    needs: tuple[str, ...] = ()
    answered: int = 0
    evicted: int = 0
    fault: bool = False

    def __post_init__(self) -> None:
        for name in ("counterexample", "given", "reason"):
            text = getattr(self, name)
            if text is not None and len(text) > MOST_TEXT:
                object.__setattr__(self, name, shortened(text, MOST_TEXT - 100))
        if self.snippet is not None and len(self.snippet) > MOST_CODE:
            object.__setattr__(self, "snippet", f"# {len(self.snippet):,} characters: too long to print")

    @property
    def failed(self) -> bool:
        """Tell whether the target is to be mended."""
        return self.verdict in ("refuted", "unexpectedly holds")


def judged(result: Result, expected: Mapping[str, str]) -> Result:
    """Judge a result by the failures that were expected.

    Args:
        result: of one check.
        expected: check -> why it may fail.

    Returns:
        The result, its verdict changed where the check is among them.

    Example:
        >>> judged(Result("time_order", "", "order", "refuted"), {"time_order": "sorted by norm"}).verdict
        'expected failure'
    """
    if result.check not in expected or result.verdict not in ("refuted", "holds"):
        return result
    verdict: Verdict = "expected failure" if result.verdict == "refuted" else "unexpectedly holds"
    return replace(result, verdict=verdict, reason=expected[result.check])
