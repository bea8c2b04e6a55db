"""What methods of kvpress and transformers promise otherwise than others, and the sentence of theirs that says so.

A trait here is a promise that is not made: it keeps laws from being asked. Without a sentence of the documentation it
would hide a fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Known(NamedTuple):
    """Hold `traits`, and the sentence that they stand for."""

    traits: Mapping[str, Any]
    sentence: str


KVPRESS: Mapping[str, Known] = {  # kvpress 0.5.5, the docstrings of the classes
    "CAMPress": Known(
        {"merges_values": True, "deterministic": False},
        "CaM merges their value vectors into sequential neighbors before pruning. A Bernoulli merge mask [...] decides "
        "whether each merge occurs.",
    ),
    "ChunkKVPress": Known({"granularity": 20}, "Computes global importance scores, then selects tokens chunk by chunk"),
    "CompactorPress": Known(
        {"deterministic": False},
        "Compactor blends: geometry-based outlier scores via (approximate) statistical leverage on key embeddings; and "
        "non-causal, chunked attention.",
    ),
    "FinchPress": Known(
        {"positions": "renumbered", "batch_independent": False},
        "Only batch size 1 is supported. [...] Whether to rerotate keys after compression using RoPE for proper "
        "positional encoding.",
    ),
    "KeyRerotationPress": Known(
        {"positions": "renumbered"},
        "When tokens are pruned, remaining tokens need positional encodings adjusted for their new positions.",
    ),
    "LeverageScorePress": Known(
        {"deterministic": False},
        "Computes geometry-based outlier scores via (approximate) statistical leverage on key embeddings using a right "
        "Gaussian sketch.",
    ),
    "MergingPress": Known(
        {"merges_values": True},
        "Replaces hard eviction with weighted value blending: each evicted token's value is folded into its most "
        "cosine-similar surviving neighbor",
    ),
    "RandomPress": Known({"deterministic": False}, "Randomly selects which key-value pairs to prune."),
    "RestoreKVPress": Known(
        {"merges_values": True, "positions": "renumbered"},
        "n=8 restore tokens attend to the full KV cache in one LoRA-adapted pass, producing a context-conditioned "
        "restore cache that fills n*L*H slots of the same budget while the base evictor fills the rest",
    ),
    "ThinKPress": Known(
        {"lossy": 1.0, "evicts": False},
        "ThinK compresses the dimensions of the keys, and not the sequence length. [...] Here, we zero out the pruned "
        "dimensions",
    ),
}
TRANSFORMERS: Mapping[str, Known] = {  # transformers 5.24
    "QuantizedCache": Known({"lossy": 0.0625}, "A quantizer cache similar to what is described in the KIVI paper"),
}


def known_traits(names: Iterable[str], options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what the classes of these `names` promise otherwise, all together; a class that is not known, nothing.

    The `options` that a cache is made with may name nbits, which say how far rounding goes: by half a step, of
    2**nbits - 1 steps in a range of at most twice the largest number.

    >>> known_traits(["KeyRerotationPress", "KnormPress"])
    {'positions': 'renumbered'}
    """
    named = {**KVPRESS, **TRANSFORMERS}
    traits = {name: value for known in names if known in named for name, value in named[known].traits.items()}
    bits = (options or {}).get("nbits")
    if "lossy" in traits and type(bits) is int and bits > 0:
        traits["lossy"] = max(traits["lossy"], 1 / (2**bits - 1))
    return traits
