"""Which texts the witness reads: small ones first, so that the first to refute a law is the smallest."""

from __future__ import annotations

import random

from knorm.laws.reading import Reading
from knorm.laws.registry import Reads
from knorm.laws.results import Profile
from knorm.laws.subjects import Subject

LEAST = 20  # answered cases without which nothing is said to hold
RATIOS = (0.5, 0.3, 0.75, 0.5, 0.1)
CALLS = ((1, 1, 1, 1), (1, 2, 7), (2, 1, 1, 1), (7, 1, 2), (1,) * 9)
# For what acts every so many calls; of several rows, the fewer. Three, so that each family gets each.
LATE = ((1,) * 18 + (2, 7), (1,) * 34, (1,) * 18 + (2, 7))
SHORT = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 16, 17, 20, 24, 33, 40, 65, 70)
LONG = (5, 13, 24, 40, 65, 70, 80, 90, 100, 128, 129, 131, 140, 150, 160, 192, 200, 256, 270, 300)
LATER = (5, 24, 65, *LONG[LONG.index(100) :])  # for what acts late, often at a number of tokens only
FAMILIES = ("llama", "llama", "llama", "qwen2", "llama", "mistral", "llama", "qwen3")
ROUNDS = {"quick": 1, "thorough": 6}


def readings(subject: Subject, reads: Reads, seed: int, profile: Profile) -> list[Reading]:
    """List what the witness reads of a subject, from short to long.

    Args:
        subject: presses get longer prompts than caches, since many have windows of 64 tokens and more; what acts while
            tokens are decoded gets more calls.
        reads: as registry.Check says.
        seed: the same seed gives the same readings.
        profile: "thorough" reads six times as many.

    Returns:
        At least LEAST of them, so that a law can be said to hold.
    """
    chosen = random.Random(f"{seed} {reads}")
    press = subject.method is not None
    lengths = _lengths(subject, reads)
    sizes = CALLS if not subject.acts_late else LATE[:1] if reads == "rows" else LATE
    result = []
    for index, prompt in enumerate(sorted(lengths * ROUNDS[profile])):
        ratios = [ratio for ratio in RATIOS if subject.traits.affords(prompt, ratio)] or [1.0]
        families = FAMILIES if press else (*FAMILIES, "gpt_neox")
        rows = (2 + index % 2) if reads == "rows" else 1 + (index % 4 == 3)
        result.append(
            Reading(
                prompt,
                sizes[index % len(sizes)],
                keep_ratio=ratios[index % len(ratios)] if subject.budgeted else 1.0,
                rows=rows,
                seed=chosen.randrange(10**6),
                family="llama" if reads == "real" else families[index % len(families)],
                scale=_scale(reads, index),
                real=reads == "real",
                dtype="float16" if reads == "half" else "float32",
            )
        )
    return result


def _scale(reads: Reads, index: int) -> float:
    """Every fifth reading has large keys, in half precision every second: their squares overflow it."""
    if reads == "half":
        return 100.0 if index % 2 else 1.0
    return 30.0 if reads == "drawn" and index % 5 == 4 else 1.0


def _lengths(subject: Subject, reads: Reads) -> tuple[int, ...]:
    traits = subject.traits
    least = max(traits.prune_after, 2 * traits.protected, traits.min_length)
    lengths: tuple[int, ...] = SHORT if subject.method is None else LATER if subject.acts_late else LONG
    if traits.min_length:
        lengths = tuple(max(length, traits.min_length) for length in lengths)
    if least:
        lengths = (*lengths, *(least + extra for extra in (0, 1, 2, 5, 9, 20)))
    # more than must be answered: some are refused, and in some nothing is to be evicted
    more = 10 if subject.acts_late else 8 if reads == "rows" else len(lengths) - len(lengths) // 3
    return (*lengths, *lengths[-more:])
