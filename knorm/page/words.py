"""How verdicts and numbers are written: a sign and a word for each verdict, and each number with its exact value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from knorm.page.form import Judged

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
_WORDS = {
    "refuted": "REFUTED",
    "expected failure": "declared",
    "unexpectedly holds": "holds, though declared",
    "does not apply": "not asked",
}


def word_of(result: Judged) -> str:
    """Name a verdict as the page does; what knorm itself broke off says nothing of the method."""
    return "knorm failed" if result.fault else _WORDS.get(result.verdict, result.verdict)


def counted(results: Iterable[Judged]) -> str:
    """Count verdicts, in the order of the legend.

    >>> counted([])
    'nothing tried'
    """
    counts = Counter(map(word_of, results))
    told = (
        f"{counts[word]} {'hold' if word == 'holds' and counts[word] > 1 else word}" for word in SIGNS if counts[word]
    )
    return ", ".join(told) or "nothing tried"


def loud(word: str) -> bool:
    """Tell whether a verdict is more than that a law holds or is not asked."""
    return word not in ("holds", "not asked", "not run")
