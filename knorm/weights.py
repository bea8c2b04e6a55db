"""The part of a model's folder that transformers gets to see: settings, a tokenizer.json and safetensors, all checked.

transformers looks for weights in many places: an index that names other files, pickles, adapters beside the model,
distributed checkpoints, GGUF, kernels from the Hub that config.json asks for. None of them is searched for here.
Instead transformers is shown a folder that holds the checked files and nothing else.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import CONFIG_MAPPING

from knorm.files import file_size, read_file

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
_OPTIONAL = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEMPLATE = "chat_template.jinja"  # transformers renders it in a sandbox
SMALL_FILES = ("config.json", "tokenizer.json", *_OPTIONAL, _TEMPLATE, INDEX, ADAPTER)
_MOST_SETTINGS, _MOST_TOKENIZER = 2**25, 2**28  # bytes; an index of 100,000 tensors has 10 MB, a large tokenizer 40
_MOST_LAYERS = 10_000  # all are built before the weights are looked at
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_PLAIN = ("eager", "sdpa", None)  # others may come from the Hub, as code
_FORMATS = {b"PK\x03\x04": "a zip, as pickled weights are", b"\x80": "a pickle", b"GGUF": "GGUF"}


@contextmanager
def checked_folder(folder: Path) -> Iterator[Path]:
    """Show transformers what it may open of a model's folder.

    Args:
        folder: holds config.json, tokenizer.json, and model.safetensors or an index of .safetensors beside it.

    Yields:
        A temporary folder: settings and tokenizer are copies, weights are links. It is gone when the context closes.

    Raises:
        ValueError: a file is missing, too large, a device, not JSON or not safetensors, or the settings ask for
            another format, for another place or for code.
        safetensors.SafetensorError: a weights file is damaged.

    Example:
        >>> with checked_folder(Path("model")) as checked:  # doctest: +SKIP
        ...     model = AutoModelForCausalLM.from_pretrained(checked)
    """
    small = _small_files(folder)
    weight_map = None if os.path.lexists(folder / WEIGHTS) else read_index(folder)
    names = [WEIGHTS] if weight_map is None else sorted(set(weight_map.values()))
    for name in names:
        _check_safetensors(folder / name)
    with tempfile.TemporaryDirectory(prefix="knorm-") as temporary:
        checked = Path(temporary)
        for name in names:
            (checked / name).symlink_to((folder / name).resolve())
        if weight_map is not None:
            small[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
        for name, content in small.items():
            (checked / name).write_bytes(content)
        yield checked


def read_index(folder: Path) -> dict[str, str]:
    """Read which file holds which tensor, for a model whose weights are spread over several.

    Args:
        folder: the model's folder.

    Returns:
        The name of a tensor -> the plain name of a .safetensors file in the same folder.

    Raises:
        ValueError: there is no index, or it names something else.

    Example:
        >>> read_index(Path("model"))  # doctest: +SKIP
        {'lm_head.weight': 'model-00002-of-00002.safetensors'}
    """
    if not os.path.lexists(folder / INDEX):
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        beside = f" (but {', '.join(others[:3])})" if others else ""
        raise ValueError(
            f"it has no file named {WEIGHTS}, and no {INDEX}{beside}: weights are read from safetensors only"
        )
    weight_map = _settings(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{INDEX} has no weight_map, which should say what file each tensor is in")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or {"/", "\\", "\0"} & {*name}:
            raise ValueError(
                f"{INDEX} looks for {key} in {name!r}, but should name a .safetensors file in the same folder: "
                "weights are read from nothing else"
            )
    return weight_map


def _small_files(folder: Path) -> dict[str, bytes]:
    """Everything but the weights, as transformers may see it: name -> content."""
    if os.path.lexists(folder / ADAPTER):
        raise ValueError(
            f"it has an adapter ({ADAPTER}), which is not read: merge it, and save the model as safetensors"
        )
    config = _settings(folder / "config.json")
    check_config(config)
    files = {"config.json": config} | {n: _settings(folder / n) for n in _OPTIONAL if os.path.lexists(folder / n)}
    for name in ("config.json", "tokenizer_config.json"):  # code of a repository's own is not even offered
        files.get(name, {}).pop("auto_map", None)
    # Paths of the machine that the tokenizer was saved on; transformers would prefer them to the files beside it.
    tokenizer = files.get("tokenizer_config.json", {})
    for key in [key for key in tokenizer if key.endswith("_file")]:
        del tokenizer[key]
    contents = {name: json.dumps(settings).encode() for name, settings in files.items()}
    if not os.path.lexists(folder / "tokenizer.json"):
        raise ValueError("it has no tokenizer.json, the only form of a tokenizer that is read")
    contents["tokenizer.json"] = read_file(folder / "tokenizer.json", _MOST_TOKENIZER)
    if os.path.lexists(folder / _TEMPLATE):
        contents[_TEMPLATE] = read_file(folder / _TEMPLATE, _MOST_SETTINGS)
    return contents


def _settings(file: Path) -> dict[str, Any]:
    content = read_file(file, _MOST_SETTINGS)
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds a {type(settings).__name__}, but should hold an object")
    return settings


def check_config(config: dict[str, Any]) -> None:
    """Raise ValueError for a `config` (of config.json) that leads transformers to code, other files or formats."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = config.get("auto_map") is not None
        raise ValueError(
            f"config.json has model_type {kind!r}, which this version of transformers does not know"
            + (": it is custom code in the model's repository, which is never run" if own else "")
        )
    for key, value in _entries(config):
        if key == "quantization_config" and value is not None:
            method = value.get("quant_method") if isinstance(value, dict) else value
            raise ValueError(f"its weights are quantised ({method}), but should be floating-point numbers")
        if key == "transformers_weights" and value not in (WEIGHTS, INDEX, None):
            raise ValueError(
                f"config.json asks for the weights in {value!r}, but they are read from {WEIGHTS} or {INDEX}"
            )
        if key in _ATTENTION and value not in _PLAIN:
            raise ValueError(
                f"config.json sets {key} to {value!r}, but should to 'eager' or 'sdpa': no other is loaded"
            )
        if key in ("experts_implementation", "kernel_config", "fusion_config") and value is not None:
            raise ValueError(f"config.json sets {key}, which may load code from elsewhere: take it out")
        if key in _LAYER_COUNTS and isinstance(value, int | float) and value > _MOST_LAYERS:
            raise ValueError(f"config.json has {key}={value}, but should have at most {_MOST_LAYERS:,} layers")


def _entries(settings: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield key, value
            yield from _entries(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _entries(value)


def _check_safetensors(file: Path) -> None:
    """Raise ValueError for what is no safetensors file, SafetensorError for a damaged one. Only the header is read."""
    file_size(file)
    with file.open("rb") as stream:
        start = stream.read(9)
    known = next((name for mark, name in _FORMATS.items() if start.startswith(mark)), None)
    if known and start[8:] != b"{":  # safetensors: the length of the header in 8 bytes, then the header, an object
        raise ValueError(f"{file.name} is {known}, but should be safetensors, the only format of weights that is read")
    with safe_open(file, "pt"):
        pass
