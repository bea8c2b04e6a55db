"""What kvpress and transformers ship, how each is opened, and which weights of others a press reads."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec

TRIED = "0.5.5"  # of kvpress


def other_version() -> str:
    """Say which kvpress is installed, and which was tried.

    Returns:
        "kvpress 0.6.0 is installed, but 0.5.5 was tried: pip install kvpress==0.5.5"; nothing where they are the same.
    """
    installed = version_of("kvpress") or "of no known version"
    if installed == TRIED:
        return ""
    return f"kvpress {installed} is installed, but {TRIED} was tried: pip install kvpress=={TRIED}"


# Presses that are not opened by their class and a ratio alone: how kvpress' own documentation opens them.
PRESSES: Mapping[str, str] = {
    "AdaKVPress": "AdaKVPress(KnormPress())",
    "BlockPress": "BlockPress(KeyDiffPress())",
    "CAMPress": "CAMPress(KnormPress(), compression_interval=16, target_size=128)",
    "ChunkKVPress": "ChunkKVPress(KnormPress())",
    "ChunkPress": "ChunkPress(KnormPress(), chunk_length=64)",
    "ComposedPress": "ComposedPress([SnapKVPress(0.3), ThinKPress(0.2)])",
    "CompressionRatioDecodingPress": "CompressionRatioDecodingPress(KnormPress(), compression_interval=16)",
    "CriticalAdaKVPress": "CriticalAdaKVPress(KnormPress())",
    "CriticalKVPress": "CriticalKVPress(KnormPress())",
    "DMSPress": "DMSPress(KnormPress(), threshold=-6.0, sliding_window_size=32)",
    "DecodingPress": "DecodingPress(KnormPress(), compression_interval=16, target_size=128)",
    "DuoAttentionPress": "DuoAttentionPress(head_compression_ratio=0.5)",
    "EntropyGatedChunkKVPress": "EntropyGatedChunkKVPress(SnapKVPress(), chunk_length=10)",
    "KeyRerotationPress": "KeyRerotationPress(KnormPress())",
    "MergingPress": "MergingPress(KnormPress())",
    "PerLayerCompressionPress": "PerLayerCompressionPress(KnormPress(), [0.4, 0.5, 0.6, 0.5, 0.5, 0.5, 0.5])",
    "PrefillDecodingPress": "PrefillDecodingPress(KnormPress(0.5), DecodingPress(KnormPress(), "
    "compression_interval=16, target_size=128))",
    "SimLayerKVPress": "SimLayerKVPress(lazy_threshold=0.5, n_recent=64)",
    "ThinKPress": "ThinKPress(key_channel_compression_ratio=0.5)",
}
ABSTRACT = {"BasePress", "ScorerPress"}

# Presses that read weights which others have trained, and where those are.
WEIGHTS: Mapping[str, str] = {
    "DuoAttentionPress": "attention patterns of six models, from github.com/mit-han-lab/duo-attention",
    "ExpectedAttentionStatsPress": "statistics of its model: alessiodevoto/exp_att_stats_... on the hub",
    "FastKVzipPress": "gates of its model: Jang-Hyun/Fast-KVzip on the hub",
    "KVzapPress": "a surrogate of its model: nvidia/KVzap-... on the hub",
    "LUKVPress": "a budget curve of its model; kvpress has one, of Llama-3.1-8B-Instruct",
    "QFilterPress": "filters of its model: nthngdy/<model>_qfilt on the hub",
    "RestoreKVPress": "an adapter of its model: higokri/RestoreKV-<model> on the hub",
}

_QUANTO = 'QuantizedCache(backend="quanto")'
_NEEDS = {  # what stand-in weights of a press are made with, and a cache quantises with
    "RestoreKVPress": "peft",
    _QUANTO: "optimum.quanto",
}


def lacking(method: str) -> str:
    """Say which package stand-in weights of a press, or a cache, needs, if it is not installed.

    Args:
        method: name of the press' class, or a cache as CACHES has it.

    Returns:
        The package; nothing where nothing is lacking.

    Example:
        >>> lacking("KnormPress")
        ''
    """
    needs = _NEEDS.get(method, "")
    try:
        return needs if needs and find_spec(needs) is None else ""
    except ModuleNotFoundError:  # the package above it
        return needs


# Caches of transformers that keep all that they are given, and those that do not.
CACHES = ("DynamicCache", "StaticCache", 'QuantizedCache(backend="fp8")', _QUANTO)

NO_PRESS = ("gpt_neox",)  # architectures, as configurations name them, that presses cannot be hooked into


def version_of(package: str) -> str | None:
    """Return the version of a `package` that methods may come from; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
