"""The catalogue: every law of a compressed cache as a check that anyone's compressor can be run through."""

from importlib import import_module

from knorm.laws.registry import CHECKS, Check, Malformed, Refuted, check, find
from knorm.laws.traits import KNORM, Traits

FAMILIES = (
    "count",
    "provenance",
    "order",
    "identity",
    "protection",
    "independence",
    "selection",
    "numerics",
    "memory",
    "attention",
    "cache",
    "perplexity",
    "schedule",
)
for _family in FAMILIES:  # in the order of the catalogue; each enters its checks
    import_module(f"knorm.laws.{_family}")

from knorm.laws.reproduce import reproduce  # noqa: E402
from knorm.laws.runner import (  # noqa: E402
    Result,
    check_compressor,
    describe,
    iter_results,
    parametrize_with_checks,
    run_check,
)
from knorm.laws.subjects import Kept, Subject  # noqa: E402

__all__ = [
    "CHECKS",
    "FAMILIES",
    "KNORM",
    "Check",
    "Kept",
    "Malformed",
    "Refuted",
    "Result",
    "Subject",
    "Traits",
    "check",
    "check_compressor",
    "describe",
    "find",
    "iter_results",
    "parametrize_with_checks",
    "reproduce",
    "run_check",
]
