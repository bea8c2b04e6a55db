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

    >>> shortened("abcdefgh", 4)
    'ab ... [4 characters are cut] ... gh'
    """
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... [{len(text) - 2 * half:,} characters are cut] ... {text[-half:]}"


@dataclass(frozen=True)
class Result:
    """What came of one check. Texts longer than MOST_TEXT are shortened, a snippet longer than MOST_CODE is dropped.

    check, law, family   which
    verdict              "refuted" or "unexpectedly holds": the target failed. "holds", "expected failure": it did not.
                         "untested": too few cases were answered, or evicted anything.
                         "does not apply": its traits do not ask it
    examples             cases tried
    answered, evicted    of these, on which the law had something to say, and in which something was evicted
    fault                knorm itself broke off: nothing is said of the target
    seconds              until the verdict, making the counterexample smaller included
    counterexample       the sentence with the evidence, of the smallest case found
    given                that case: shapes, dtype, ratio
    snippet              Python that shows it
    reason               why it does not apply or is untested, or why a failure was expected
    needs                the traits that keep it from applying: with other values of these it would
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
        """Whether the target is to be mended."""
        return self.verdict in ("refuted", "unexpectedly holds")


def judged(result: Result, expected: Mapping[str, str]) -> Result:
    """Judge a result by the failures that were expected: check -> why."""
    if result.check not in expected or result.verdict not in ("refuted", "holds"):
        return result
    verdict: Verdict = "expected failure" if result.verdict == "refuted" else "unexpectedly holds"
    return replace(result, verdict=verdict, reason=expected[result.check])
