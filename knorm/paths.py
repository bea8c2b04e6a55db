"""Where the package, what it ships, and its goldens are: the one module that knows."""

from __future__ import annotations

import os
from pathlib import Path

REPORTED = "reported"  # in the folder of goldens: published numbers, which belong to no case
PACKAGE = Path(__file__).parent
ASSETS = PACKAGE / "assets"  # the embedded model, texts, and, once installed, the goldens


def resolved(path: Path) -> Path:
    """Follow the links of a `path` that somebody wrote; one that leads round in a circle stays as it is.

    >>> resolved(Path("/usr/../etc")).as_posix()
    '/etc'
    """
    return Path(os.path.realpath(path))  # Path.resolve raises RuntimeError for a circle, or OSError: Python's version


def goldens() -> Path:
    """Return the folder of goldens: that of the checkout which knorm runs from, else what was installed with it."""
    source = PACKAGE.parent / "golden"
    return source if (PACKAGE.parent / "pyproject.toml").exists() and source.is_dir() else ASSETS / "goldens"
