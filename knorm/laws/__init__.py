"""The catalogue: every law of a compressed cache as a check that anyone's compressor can be run through."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knorm.laws.catalogue import FAMILIES as FAMILIES
    from knorm.laws.registry import CHECKS as CHECKS
    from knorm.laws.registry import Check as Check
    from knorm.laws.registry import Condition as Condition
    from knorm.laws.registry import Malformed as Malformed
    from knorm.laws.registry import Refuted as Refuted
    from knorm.laws.registry import check as check
    from knorm.laws.registry import find as find
    from knorm.laws.results import Result as Result
    from knorm.laws.runner import check_compressor as check_compressor
    from knorm.laws.runner import describe as describe
    from knorm.laws.runner import iter_results as iter_results
    from knorm.laws.runner import parametrize_with_checks as parametrize_with_checks
    from knorm.laws.runner import run_check as run_check
    from knorm.laws.snippets import reproduce as reproduce
    from knorm.laws.subjects import Kept as Kept
    from knorm.laws.subjects import Subject as Subject
    from knorm.laws.traits import KNORM as KNORM
    from knorm.laws.traits import Traits as Traits

_HOME = {
    "CHECKS": "registry",
    "FAMILIES": "catalogue",
    "KNORM": "traits",
    "Check": "registry",
    "Condition": "registry",
    "Kept": "subjects",
    "Malformed": "registry",
    "Refuted": "registry",
    "Result": "results",
    "Subject": "subjects",
    "Traits": "traits",
    "check": "registry",
    "check_compressor": "runner",
    "describe": "runner",
    "find": "registry",
    "iter_results": "runner",
    "parametrize_with_checks": "runner",
    "reproduce": "snippets",
    "run_check": "runner",
}
__all__ = [*_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, with the whole catalogue entered: the supervisor needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'knorm.laws' has no attribute {name!r}")
    import_module("knorm.laws.catalogue")
    return getattr(import_module(f"knorm.laws.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
