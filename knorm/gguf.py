"""GGUF files: one file holds settings, tokenizer and quantised weights, and no code. transformers reads them.

The package `gguf`, with which transformers reads, trusts what a file says about its own lengths: a count of 2^60 makes
it fill the memory. So the header is walked here first, within limits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import struct
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from knorm.files import file_size
from knorm.weights import check_config

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # those of the models that knorm evaluates; Mistral's files say llama
_NAME = "model.gguf"
_LOADING = threading.Lock()
_VERSIONS = (2, 3)
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES, _MOST_ITEMS = 2**16, 2**22  # settings or tensors; items of all arrays, each an object in gguf's reader
_MOST_DIMENSIONS = 4
# Vocabularies whose merges were learned on single digits; transformers splits them as GPT-2's, digits with their space.
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")


@dataclass(frozen=True)
class Tensor:
    """Say where the tensor `name`, of so many `numbers`, lies.

    `kind` is GGML's number of a format, `offset` counts bytes from the first tensor on.
    """

    name: str
    numbers: int
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """Hold what a GGUF file says of itself.

    Attributes:
        settings: key -> number or text; of an array, how many items it has.
        tensors: in the order of the file.
        end: bytes of settings and tensor descriptions; the tensors begin after it.
        size: bytes of the file.
    """

    settings: dict[str, Any]
    tensors: tuple[Tensor, ...]
    end: int
    size: int


class _Reader:
    """Reads a file's fields one after another, never beyond its end."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.left, self.items = stream, size, _MOST_ITEMS

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"it ends {count - self.left:,} bytes too early")
        self.left -= count
        content = self.stream.read(count)
        if len(content) < count:  # it was cut short meanwhile
            raise ValueError("it ends too early")
        return content

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        content = self.take(self.number("<Q"))
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"it has a text that is not UTF-8: {content[:20]!r}") from None

    def value(self) -> Any:
        kind = self.number("<I")
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        raise ValueError(f"it has a setting of type {kind}, which GGUF does not know")

    def array(self) -> int:
        """Pass over an array; return how many items it has."""
        kind, count = self.number("<I"), self.number("<Q")
        if kind != _STRING and kind not in _NUMBERS:
            raise ValueError(f"it has an array of type {kind}, but should have arrays of numbers or texts")
        if count > self.items:
            raise ValueError(f"its arrays have more than {_MOST_ITEMS:,} items, the most that is read")
        self.items -= count
        if kind == _STRING:
            for _ in range(count):
                self.text()
        else:
            self.take(count * struct.calcsize(_NUMBERS[kind]))
        return count

    def tensor(self) -> Tensor:
        name, dimensions = self.text(), self.number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"its tensor {name!r} has {dimensions} dimensions, but should have at most 4")
        numbers = 1
        for _ in range(dimensions):
            numbers *= self.number("<Q")
        return Tensor(name, numbers, self.number("<I"), self.number("<Q"))


def read_header(file: Path) -> Header:
    """Read and check what a GGUF file says of itself, without any package for it.

    Args:
        file: the path, as the user wrote it.

    Returns:
        The settings and the tensors' places; no tensor is read.

    Raises:
        ValueError: it is no regular file, no GGUF of version 2 or 3, cut short, of an architecture that knorm does not
            evaluate, or it claims more than it can hold.

    Example:
        >>> read_header(Path("model.gguf")).settings["general.architecture"]  # doctest: +SKIP
        'llama'
    """
    size = file_size(file)
    with file.open("rb") as stream:
        reader = _Reader(stream, size)
        if reader.take(min(4, size)) != b"GGUF":
            raise ValueError("it does not begin with GGUF, as a file of that format does")
        version = reader.number("<I")
        if version not in _VERSIONS:
            raise ValueError(f"it is GGUF of version {version}, but should be of version 2 or 3")
        counts = {"tensors": reader.number("<Q"), "settings": reader.number("<Q")}
        for what, count in counts.items():
            if count > _MOST_ENTRIES:
                raise ValueError(f"it claims to have {count:,} {what}, but should have at most {_MOST_ENTRIES:,}")
        settings = {}
        for _ in range(counts["settings"]):
            key = reader.text()
            settings[key] = reader.value()
        tensors = tuple(reader.tensor() for _ in range(counts["tensors"]))
    architecture = settings.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"its architecture is {architecture!r}, but should be {', '.join(ARCHITECTURES)}")
    numbers = sum(tensor.numbers for tensor in tensors)
    if numbers > 8 * size:  # a bit for each is less than any format of GGML takes
        raise ValueError(f"its tensors claim to have {numbers:,} numbers, more than {size:,} bytes can hold")
    return Header(settings, tensors, size - reader.left, size)


def load_gguf(file: Path, source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load model and tokenizer from a GGUF file; quantised weights become floating-point numbers.

    Args:
        file: the GGUF file.
        source: the name that model and tokenizer go by.
        dtype: of the weights.

    Returns:
        What transformers' from_pretrained gives: (model, what did not fit), and the tokenizer.

    Raises:
        ValueError: as `read_header`; packages are missing; settings and tensors do not fit each other.

    Example:
        >>> (model, _), tokenizer = load_gguf(Path("model.gguf"), "mine", torch.float32)  # doctest: +SKIP
    """
    header = read_header(file)
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"GGUF needs the package {' and '.join(missing)}: pip install 'knorm[gguf]'")
    _check_tensors(header)
    # In a folder of its own: transformers would read settings, adapters and code that lie beside the file.
    with (
        _read_once(),
        tempfile.TemporaryDirectory(prefix="knorm-") as folder,
        contextlib.redirect_stderr(io.StringIO()),
    ):
        os.symlink(file.resolve(), Path(folder) / _NAME)
        shown: dict[str, Any] = {"gguf_file": _NAME, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(folder, **shown)
        _check_parameters(config, header)
        config._name_or_path = source
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
            **shown, **_dequantised(),
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder, **shown)
    model = loaded[0]
    for place, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):  # it is quantised no longer
        if hasattr(place, name):
            delattr(place, name)
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = source
    _correct(tokenizer, header.settings)
    return loaded, tokenizer


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Keep what is read: transformers reads a file three times, and makes all tensors' names for every module."""
    import gguf

    with _LOADING:  # two threads that put their own in place, of these or of stderr, would leave one of them there
        names = "GGUFReader", "get_tensor_name_map"
        own = {name: getattr(gguf, name) for name in names}
        try:
            for name in names:
                setattr(gguf, name, cache(own[name]))
            yield
        finally:
            for name in names:
                setattr(gguf, name, own[name])


def _correct(tokenizer: Any, settings: dict[str, Any]) -> None:
    """Make a tokenizer begin and split texts as its file says, where transformers does not."""
    begins = settings.get("tokenizer.ggml.add_bos_token")
    if begins is not None and tokenizer.add_bos_token != begins:  # transformers 5.2 begins every text
        tokenizer.add_bos_token = begins
        tokenizer.update_post_processor()
    if settings.get("tokenizer.ggml.pre") in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _dequantised() -> dict[str, Any]:
    """Arguments that keep newer releases of transformers from fetching kernels for packed weights."""
    try:
        from transformers import GgufConfig
    except ImportError:  # an older release, which knows dense weights only
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _check_tensors(header: Header) -> None:
    """Raise ValueError for a tensor of an unknown format, or one that lies beyond the end of the file."""
    import gguf

    alignment = header.settings.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"it is aligned to {alignment!r} bytes, but should be to a power of two")
    start = -(-header.end // alignment) * alignment
    for tensor in header.tensors:
        if tensor.kind not in {*gguf.GGMLQuantizationType}:
            raise ValueError(
                f"its tensor {tensor.name!r} has format {tensor.kind}, which the package gguf does not know"
            )
        block, length = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
        end = start + tensor.offset + tensor.numbers // block * length
        if end > header.size:
            raise ValueError(f"its tensor {tensor.name!r} ends at byte {end:,}, but the file has {header.size:,}")


def _check_parameters(config: Any, header: Header) -> None:
    """Raise ValueError for settings that ask for more weights than the file has: the rest would be made up."""
    check_config(config.to_dict())
    with torch.device("meta"):  # takes no memory
        model = AutoModelForCausalLM.from_config(config)
    wanted = sum(weight.numel() for weight in model.parameters())
    held = sum(tensor.numbers for tensor in header.tensors)
    if wanted > held:
        raise ValueError(f"its settings ask for {wanted:,} weights, but it has {held:,}")
