"""How verdicts and numbers are written: a sign and a word for each verdict, and each number with its exact value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from knorm.page.form import Judged, Pace

SIGNS = {  # a verdict's word -> its sign, and its class
    "holds": ("✓", "holds"),
    "REFUTED": ("✗", "refuted"),
    "declared": ("D", "declared"),
    "holds, though declared": ("!", "refuted"),
    "untested": ("?", "untested"),
    "not asked": ("·", "unasked"),
    "knorm failed": ("‼", "fault"),
    "not run": ("–", "unasked"),
}
TIMED = {  # a verdict on a time -> its sign, its class, and its word
    "PASS": ("✓", "holds", "not slower"),
    "FAIL": ("✗", "refuted", "slower"),
    "INCONCLUSIVE": ("?", "untested", "undecided"),
}
_FASTER = ("✓", "holds", "faster")
_WORDS = {
    "refuted": "REFUTED",
    "expected failure": "declared",
    "unexpectedly holds": "holds, though declared",
    "does not apply": "not asked",
}


def word_of(result: Judged) -> str:
    """Name the verdict of `result` as the page does: a key of SIGNS.

    Where knorm itself failed, that is the word, for the verdict says nothing of the method.
    """
    return "knorm failed" if result.fault else _WORDS.get(result.verdict, result.verdict)


def told(pace: Pace) -> tuple[str, str, str]:
    """Say what is known of a method's `pace`: sign, class and word; "faster" where all of the interval is below 1."""
    return _FASTER if pace.high < 1 else TIMED[pace.verdict]


def counted(results: Iterable[Judged]) -> str:
    """Count the verdicts of `results` in words, in the order of the legend, SIGNS.

    Example:
        >>> counted([])
        'nothing tried'
    """
    counts = Counter(map(word_of, results))
    told = (
        f"{counts[word]} {'hold' if word == 'holds' and counts[word] > 1 else word}" for word in SIGNS if counts[word]
    )
    return ", ".join(told) or "nothing tried"


def loud(word: str) -> bool:
    """Tell whether a verdict's `word` calls for reading: all do except "holds", "not asked" and "not run"."""
    return word not in ("holds", "not asked", "not run")


def legible(letters: Iterable[str]) -> bool:
    """Tell whether the `letters` of methods that cannot be told apart can be read: beyond 26, they are doubled.

    Example:
        >>> legible(["a", "ab", "b"]), legible(["z", "zaa"])
        (True, False)
    """
    return not any(one == other for word in letters for one, other in pairwise(word))
