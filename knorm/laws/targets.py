"""How a target is written, and how it is called: what can be told without importing PyTorch, or the target."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import NamedTuple

CALLED_AS = {
    "function": "(keys, values, keep_ratio)",
    "class": "(keep_ratio), its instances as (keys, values)",
    "legacy": "(past_key_values, keep_ratio, prune_after, skip_layers)",
    "cache function": "(cache, keep_ratio)",
    "cache": "(keep_ratio), for a transformers cache",
    "evaluator": "(model, input_ids, keep_ratio, prompt_length)",
    "press": "(compression_ratio), for a press of kvpress",
}
KINDS = tuple(CALLED_AS)
FORMS = "path/to/file.py:name, package.module:name, or kvpress:PressName"
KVPRESS = "install it with pip install 'knorm[kvpress]' -c constraints-kvpress.txt"


class Place(NamedTuple):
    """Where a target lies: a file or a module, and a dotted path in it.

    where   as it was written before the last colon
    path    as it was written after it
    file    the file's absolute path; None for a module
    """

    where: str
    path: str
    file: Path | None


def find_target(spec: str) -> Place:
    """Find where a target lies; nothing of it runs.

    Args:
        spec: path/to/file.py:name, package.module:name or kvpress:PressName; the name may be dotted.

    Raises:
        ValueError: For another form, for a file that is not there, and for a module whose package is not there.
    """
    where, _, path = spec.rpartition(":")
    if not where or not path:
        raise ValueError(f"target {spec!r}, but should be {FORMS}")
    file = Path(where).resolve() if where.endswith(".py") or os.sep in where else None
    if file and (file.suffix != ".py" or not file.is_file()):
        raise ValueError(f"target {spec!r}: there is no Python file {file}; it should be {FORMS}")
    package = where.partition(".")[0]
    if not file and not _is_there(package):
        raise ValueError(f"target {spec!r}: {no_module(where, package or where)}")
    return Place(where, path, file)


def no_module(where: str, missing: str) -> str:
    """Say that importing `where` found no module of the name `missing`, and what to do."""
    todo = f"install it, or run this in the folder that has {missing}"
    package = missing.partition(".")[0]
    return f"importing {where}: there is no module {missing!r}; {KVPRESS if package == 'kvpress' else todo}"


def _is_there(package: str) -> bool:
    """Whether a package, looked for in the current folder too, can be found; it is not imported."""
    before = sys.path.copy()
    sys.path.insert(0, os.getcwd())
    try:
        return package in sys.modules or importlib.util.find_spec(package) is not None
    except ValueError:  # an empty name
        return False
    finally:
        sys.path[:] = before
