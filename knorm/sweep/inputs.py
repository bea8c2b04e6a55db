"""Digests of what a cell depends on: weights, texts, the sources of targets, knorm's code, versions.

Files are hashed, nothing is imported. A digest is the same in every process and on every machine with the same inputs.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from knorm.engines.conditions import engine_target
from knorm.files import file_size, read_file
from knorm.methods.known import version_of
from knorm.methods.targets import is_engine, parse_target
from knorm.paths import ASSETS, PACKAGE
from knorm.sources import EMBEDDED_MODELS, HUB_TEXTS, find_model, find_text

_NOT_IN_A_CELL = ("cli", "golden", "page", "sweep", "plugin.py", "scaffold.py", "__main__.py", "verify.py")
_IN_A_CELL = ("sweep/measure.py",)
_MOST_SOURCE = 2**24  # bytes of a source file
_PARTS = (".safetensors", ".json")  # of a model's folder


def digest(value: Any) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of `value` as JSON, whatever the order of its keys.

    NaN, an infinity, and what JSON cannot hold raise ValueError or TypeError.

    Example:
        >>> digest({"a": 1})
        '015abd7f5cc57a2dd94b7590f04ad808'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _of_files(files: Iterable[tuple[str, Path]]) -> str:
    """Hash files with their names, whatever their size. Raises ValueError for what is no regular file."""
    whole = hashlib.sha256()
    for name, file in sorted(files):
        file_size(file)  # a pipe, or a device without end, would be read for ever
        with open(file, "rb") as stream:
            whole.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()[:32]


@cache
def model_digest(name: str) -> str:
    """Hash a model's weights, settings and tokenizer; a model of the Hub is told by its name and commit.

    Args:
        name: as --model, see sources.find_model; a folder or a file is seen from the current folder; or an engine with
            its model.

    Returns:
        32 hexadecimal digits; of a folder, from its .safetensors and .json files alone.

    Raises:
        ValueError: no model has this name.
    """
    if is_engine(name):
        host = engine_target(name)
        return digest([host.engine, model_digest(host.model)])
    place = find_model(name)
    if place is None:
        folder = "llama/" if name == EMBEDDED_MODELS[1] else ""  # the tokenizer is shipped once
        shipped = {f"{folder}config.json", f"{folder}model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        lines = (ASSETS / "SHA256SUMS").read_text(encoding="ascii").splitlines()  # held when the model is loaded
        return digest(sorted(line for line in lines if line.split()[1] in shipped))
    if isinstance(place, re.Match):
        return digest([place["name"], place["revision"]])
    if place.is_file():
        return _of_files([("gguf", place)])
    return _of_files((file.name, file) for file in place.iterdir() if file.suffix in _PARTS and file.is_file())


@cache
def text_digest(name: str) -> str:
    """Hash a text; a data set of the Hub is told by its commit and its files.

    Args:
        name: as --text, see sources.find_text; a file is seen from the current folder.

    Returns:
        32 hexadecimal digits.

    Raises:
        ValueError: no text has this name.
    """
    place = find_text(name)
    if isinstance(place, re.Match):
        return digest(["hub", HUB_TEXTS.get(name, name)])
    return _of_files([("text", place or ASSETS / f"{name}.txt")])


@cache
def code_digest() -> str:
    """Hash those of knorm's sources that can change what a cell measures: 32 hexadecimal digits."""
    files = {file.relative_to(PACKAGE).as_posix(): file for file in PACKAGE.rglob("*.py")}
    kept = {name: file for name, file in files.items() if name.split("/")[0] not in _NOT_IN_A_CELL}
    return _of_files([*kept.items(), *((name, files[name]) for name in _IN_A_CELL if name in files)])


@cache
def versions(device: str) -> dict[str, str]:
    """Return the versions of Python, torch, transformers and numpy, the processor's architecture, and `device`.

    These are what numbers depend on besides the inputs. `device` is "cpu" or "cuda", and is returned as it is given.
    """
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {"python": platform.python_version(), "processor": platform.machine(), "device": device, **packages}


@cache
def sources_of(target: str) -> tuple[Path, ...]:
    """List the files that a target's code lies in: its own, and those beside it that they import.

    Args:
        target: as it is written, no pattern.

    Returns:
        Files in the folder of a target's file; all modules of an installed package; none for knorm's own.

    Raises:
        ValueError: a target that does not parse, or whose file or package is not there.
    """
    if target == "knorm":
        return ()
    parsed = parse_target(target)
    if parsed.file:
        return tuple(sorted(_with_imports(parsed.file)))
    package = parsed.where.partition(".")[0]
    if package in ("knorm", "transformers"):
        return ()  # hashed as knorm's code, and told by its version
    here = Path.cwd() / package  # before all others, as where targets are loaded
    if here.with_suffix(".py").is_file():
        return tuple(sorted(_with_imports(here.with_suffix(".py"))))
    spec = None if here.is_dir() else importlib.util.find_spec(package)
    folders = [here] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    if spec is not None and spec.origin and not folders:
        return tuple(sorted(_with_imports(Path(spec.origin))))
    return tuple(sorted(file for folder in folders for file in folder.rglob("*.py")))


def _with_imports(file: Path) -> set[Path]:
    """Follow the imports of a file to modules of its folder, as Python finds them there."""
    found, todo = set[Path](), [file]
    while todo:
        one = todo.pop()
        if one in found or not one.is_file():
            continue
        found.add(one)
        for name in _imported(one):
            base = file.parent.joinpath(*name.split("."))
            todo += [base.with_suffix(".py"), base / "__init__.py"] if name else []
    return found


def _imported(file: Path) -> Iterator[str]:
    try:
        top = ast.parse(read_file(file, _MOST_SOURCE))
    except (SyntaxError, ValueError, RecursionError):  # said when the target is loaded
        return
    for node in ast.walk(top):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (".".join(filter(None, [node.module, alias.name])) for alias in node.names)


@cache
def target_digest(target: str) -> str:
    """Hash a target's sources, with the version of the package that they belong to.

    Args:
        target: as it is written, no pattern; its budget and its arguments count for nothing here.

    Returns:
        32 hexadecimal digits, the same wherever the files lie.

    Raises:
        ValueError: a target that does not parse, or whose file or package is not there.
    """
    if is_engine(target):
        return digest([engine_target(target).version() or ""])
    files = sources_of(target)
    top = os.path.commonpath([file.parent for file in files]) if files else ""
    package = "" if target == "knorm" else parse_target(target).where.partition(".")[0]
    version = (version_of(package) if package.isidentifier() else None) or ""
    return digest([version, _of_files((Path(os.path.relpath(file, top)).as_posix(), file) for file in files)])


@cache
def model_type(name: str) -> str | None:
    """Return the architecture that the model `name` has in transformers, as "llama", without loading it.

    None where only loading would tell: a model of the Hub, a GGUF file, a folder whose config.json is not there or is
    damaged. ValueError where no model has this name.
    """
    if name in EMBEDDED_MODELS:
        return "llama" if name == EMBEDDED_MODELS[1] else "gpt_neox"
    place = find_model(name)
    if not isinstance(place, Path) or place.is_file() or not (place / "config.json").is_file():
        return None
    try:
        settings = json.loads(read_file(place / "config.json", _MOST_SOURCE))
        return str(settings["model_type"])
    except (ValueError, KeyError, TypeError):
        return None
