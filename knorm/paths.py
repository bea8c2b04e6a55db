"""Where the package, what it ships, and its goldens are: the one module that knows."""

from __future__ import annotations

from pathlib import Path

REPORTED = "reported"  # in the folder of goldens: published numbers, which belong to no case
PACKAGE = Path(__file__).parent
ASSETS = PACKAGE / "assets"  # the embedded model, texts, and, once installed, the goldens


def goldens() -> Path:
    """Return the folder of goldens: that of the checkout which knorm runs from, else what was installed with it."""
    source = PACKAGE.parent / "golden"
    return source if (PACKAGE.parent / "pyproject.toml").exists() and source.is_dir() else ASSETS / "goldens"
