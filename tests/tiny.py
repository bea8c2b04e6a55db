"""Randomly initialised models of every supported architecture."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
ARCHITECTURES = {
    "gpt_neox": {},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
}

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}


def tiny(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: object):
    """A model of three layers and four heads of 16, with weights that spread norms and attention as trained ones do."""
    config = AutoConfig.for_model(
        kind,
        **{**SIZES, **ARCHITECTURES.get(kind, {}), **options},
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            spread = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.2 * spread if weight.ndim == 2 else weight + 0.3 * spread)
    return model


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
