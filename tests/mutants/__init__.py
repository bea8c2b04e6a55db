"""Deliberately broken subjects, each with the check that must refute it and words that its counterexample must have.

A module per family of laws, a bug per subject. `correct` holds the subjects that no check may refute.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from knorm.laws import FAMILIES, Subject, Traits

_SURFACES = ("compress", "make_cache", "evaluate", "method")


class Mutant(NamedTuple):
    """A broken subject.

    subject   with the traits that it promises
    check     the name of the check that must refute it
    words     what the counterexample must contain
    source    where people shipped it, if they did
    """

    subject: Subject
    check: str
    words: str
    source: str = ""

    @property
    def name(self) -> str:
        return self.subject.name

    @property
    def bug(self) -> str:
        """The docstring's first line."""
        target = next(x for x in (getattr(self.subject, surface) for surface in _SURFACES) if x)
        return (target.__doc__ or "").strip().splitlines()[0]


MUTANTS: list[Mutant] = []
PROMISES = {"rounding": "ceil", "scores": "key_norm", "ties": "earlier", "nonfinite": "raise"}  # those of knorm's core


def mutant(check: str, words: str, source: str = "", *, surface: str = "compress", **traits: Any):
    """Enter a compressor, a cache class (surface="make_cache") or an evaluator (surface="evaluate")."""

    def enter(target):
        MUTANTS.append(Mutant(Subject(target.__name__, Traits(**traits), **{surface: target}), check, words, source))
        return target

    return enter


for _family in (*FAMILIES, "real"):
    import_module(f"{__name__}.{_family}")
