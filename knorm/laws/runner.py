"""Run a check against a compressor on many drawn caches, and say what came of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed

from knorm.laws.registry import CHECKS, Compressor, law
from knorm.laws.strategies import Cache, caches


@dataclass(frozen=True)
class Result:
    """What came of one check: verdict "holds" or "refuted", with the smallest counterexample's sentence."""

    check: str
    law: str
    verdict: str
    examples: int
    seconds: float
    counterexample: str | None = None


def run_check(name: str, compressor: Compressor, *, examples: int = 50, seed: int = 0) -> Result:
    """Try to refute one law with at most `examples` drawn caches, then shrink what refutes it.

    The same seed draws the same caches. Raises ValueError for a check that the catalogue does not have.
    """
    sentence, tried, begin = law(name), 0, time.perf_counter()

    @with_seed(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(caches())
    def attempt(cache: Cache) -> None:
        nonlocal tried
        tried += 1
        CHECKS[name](compressor, cache)

    counterexample = None
    try:
        attempt()
    except Exception as error:  # whatever a compressor raises refutes the law
        counterexample = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    verdict = "holds" if counterexample is None else "refuted"
    return Result(name, sentence, verdict, tried, time.perf_counter() - begin, counterexample)
