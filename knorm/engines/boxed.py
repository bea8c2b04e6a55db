"""The models in the box as GGUF files or folders, which engines read; and the file or folder of any other model."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from knorm.engines.conditions import Form
from knorm.paths import ASSETS
from knorm.rounding import rounded_otherwise
from knorm.sources import EMBEDDED_MODELS, find_model

Array = np.ndarray[Any, Any]


@contextlib.contextmanager
def model_file(
    name: str, model: PreTrainedModel, form: Form = "gguf", tokenizer: PreTrainedTokenizerFast | None = None
) -> Iterator[Path]:
    """Give the file or folder that an engine reads a model from.

    Args:
        name: of EngineTarget.model.
        model: the same, as knorm loads it; one in the box is written anew, and so is a GGUF file where the engine reads
            a folder: weights in float32.
        form: "gguf" for a file, "folder" for config.json and safetensors.
        tokenizer: what goes into a folder that is written; the models in the box have theirs there anyway.

    Yields:
        The path of a GGUF file or of a folder; gone, where it is a temporary one, when the context closes.

    Raises:
        ValueError: a model that is not there, or a package that is not installed.

    Example:
        >>> with model_file("embedded", load_embedded()[0]) as file:
        ...     file.read_bytes()[:4]
        b'GGUF'
    """
    boxed = name in EMBEDDED_MODELS
    place = find_model(name)
    if not boxed and (form == "gguf" or (isinstance(place, Path) and place.is_dir())):
        assert isinstance(place, Path)
        yield place
        return
    with _written(name, model, form, tokenizer) as path:
        yield path


def can_move(name: str, form: Form) -> bool:
    """Tell whether moved_file can write a model as the engine reads it: its weights would else be of other types.

    Args:
        name: as model_file has it.
        form: the same.

    Returns:
        False for a .gguf file that the engine reads itself.

    Example:
        >>> can_move("smollm2", "folder"), can_move("smollm2", "gguf")
        (True, False)
    """
    return form == "folder" or name in EMBEDDED_MODELS


@contextlib.contextmanager
def moved_file(name: str, model: PreTrainedModel, form: Form, dtype: str) -> Iterator[Path]:
    """Give a file or folder as model_file does, of the model with each weight moved to the number next to it.

    What an engine predicts with it differs as far as rounding does.

    Args:
        name: as model_file has it; can_move says yes.
        model: the same, which stays as it is.
        form: the same.
        dtype: in which the engine computes, and in which the weights are moved.

    Yields:
        A path, gone when the context closes.

    Example:
        >>> with moved_file("embedded", load_embedded()[0], "folder", "float32") as folder:
        ...     (folder / "model.safetensors").exists()
        True
    """
    with _written(name, rounded_otherwise(model, 1, getattr(torch, dtype)), form) as path:
        yield path


@contextlib.contextmanager
def _written(
    name: str, model: PreTrainedModel, form: Form, tokenizer: PreTrainedTokenizerFast | None = None
) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="knorm-") as folder:
        if form == "folder":
            write_folder(model, Path(folder), boxed=name in EMBEDDED_MODELS)
            if tokenizer and name not in EMBEDDED_MODELS:
                tokenizer.save_pretrained(folder)
            yield Path(folder)
            return
        file = Path(folder) / f"{name}.gguf"
        write_gguf(model, file)
        yield file


def write_folder(model: PreTrainedModel, folder: Path, *, boxed: bool) -> None:
    """Write a model's settings and its weights, in their dtype, as vLLM reads them.

    Args:
        model: a causal language model.
        folder: where they go.
        boxed: with the tokenizer of the models in the box.

    Example:
        >>> write_folder(load_embedded()[0], Path("model"), boxed=True)  # doctest: +SKIP
    """
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json") if boxed else ():
        shutil.copyfile(ASSETS / name, folder / name)


def write_gguf(model: PreTrainedModel, file: Path) -> None:
    """Write a model's weights, in float32 and without a tokenizer, as llama.cpp reads them.

    Args:
        model: a GPT-NeoX or a Llama.
        file: where it goes.

    Raises:
        ValueError: another architecture, or the package gguf is not installed.

    Example:
        >>> write_gguf(load_embedded()[0], Path("model.gguf"))  # doctest: +SKIP
    """
    try:
        import gguf
    except ImportError:
        raise ValueError(
            "writing a model in the box as GGUF needs the package gguf: pip install 'knorm[gguf]'"
        ) from None
    config: Any = model.config
    make = {"gpt_neox": _gpt_neox, "llama": _llama}.get(config.model_type)
    if make is None:
        raise ValueError(f"a {config.model_type} cannot be written as GGUF here, only a gpt_neox or a llama")
    weights = {name: weight.detach().float() for name, weight in model.base_model.state_dict().items()}
    architecture, tensors = make(config, weights)
    tensors["output.weight"] = model.get_output_embeddings().weight.detach().float()
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    rope, width = config.rope_parameters, config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture == "llama":
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_tokenizer_model("none")
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.cpu().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama(config: Any, weights: dict[str, torch.Tensor]) -> tuple[str, dict[str, torch.Tensor]]:
    names = {
        "self_attn.v_proj.weight": "attn_v.weight", "self_attn.o_proj.weight": "attn_output.weight",
        "mlp.gate_proj.weight": "ffn_gate.weight", "mlp.up_proj.weight": "ffn_up.weight",
        "mlp.down_proj.weight": "ffn_down.weight", "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
    }  # fmt: skip
    tensors = {
        "token_embd.weight": weights["embed_tokens.weight"],
        "output_norm.weight": weights["norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"layers.{layer}.", f"blk.{layer}."
        tensors |= {ours + name: weights[theirs + key] for key, name in names.items()}
        for key, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            projected = weights[f"{theirs}self_attn.{key}_proj.weight"]
            halves = projected.unflatten(0, (heads, 2, -1))  # llama.cpp rotates neighbours, transformers halves
            tensors[f"{ours}attn_{key}.weight"] = halves.transpose(1, 2).reshape(projected.shape)
    return "llama", tensors


def _gpt_neox(config: Any, weights: dict[str, torch.Tensor]) -> tuple[str, dict[str, torch.Tensor]]:
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
    }  # fmt: skip
    tensors = {
        "token_embd.weight": weights["embed_in.weight"],
        "output_norm.weight": weights["final_layer_norm.weight"],
        "output_norm.bias": weights["final_layer_norm.bias"],
    }
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"layers.{layer}.", f"blk.{layer}."
        for part in ("weight", "bias"):
            tensors |= {f"{ours}{name}.{part}": weights[f"{theirs}{key}.{part}"] for key, name in names.items()}
            joined = weights[f"{theirs}attention.query_key_value.{part}"]
            by_head = joined.unflatten(0, (config.num_attention_heads, 3, -1))  # all queries first, not a head's three
            tensors[f"{ours}attn_qkv.{part}"] = by_head.transpose(0, 1).reshape(joined.shape)
    return "gptneox", tensors
