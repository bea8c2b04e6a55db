"""The catalogue: every law of a compressed cache as a check that anyone's compressor can be run through."""

from knorm.laws import core  # noqa: F401  (enters its checks)
from knorm.laws.registry import CHECKS, Check, Compressor, Refuted, law
from knorm.laws.runner import Result, run_check

__all__ = ["CHECKS", "Check", "Compressor", "Refuted", "Result", "law", "run_check"]
