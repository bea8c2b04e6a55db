"""knorm: is a compressed KV cache correct, and did anything move?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knorm.cache import KnormCache as KnormCache
    from knorm.core import Compressed as Compressed
    from knorm.core import compress as compress
    from knorm.evaluation.ways import Evaluation as Evaluation
    from knorm.evaluation.ways import evaluate as evaluate
    from knorm.methods.door import method as method
    from knorm.methods.method import Method as Method
    from knorm.model_attention import attention as attention
    from knorm.models import load_embedded as load_embedded
    from knorm.perplexity import exact_nll as exact_nll
    from knorm.perplexity import stream_nll as stream_nll
    from knorm.policy import Policy as Policy
    from knorm.policy import retained_count as retained_count
    from knorm.schedule import evicted_at as evicted_at

_HOME = {
    "Compressed": "core",
    "Evaluation": "evaluation.ways",
    "KnormCache": "cache",
    "Method": "methods.method",
    "Policy": "policy",
    "attention": "model_attention",
    "compress": "core",
    "evaluate": "evaluation.ways",
    "evicted_at": "schedule",
    "exact_nll": "perplexity",
    "load_embedded": "models",
    "method": "methods.door",
    "retained_count": "policy",
    "stream_nll": "perplexity",
}
__all__ = [*_HOME]  # noqa: PLE0604
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import knorm` alone loads no torch."""
    if name == "laws":
        return import_module("knorm.laws")
    if name not in _HOME:
        raise AttributeError(f"module 'knorm' has no attribute {name!r}")
    return getattr(import_module(f"knorm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
