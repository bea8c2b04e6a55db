"""Ask git about a checkout."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def git(folder: Path, *arguments: str) -> str:
    """Return what git prints in a folder, whatever repository a hook's environment names.

    Args:
        folder: where it runs.
        arguments: of git: a command and its options.

    Raises:
        ValueError: git is not installed, or failed; with what it said.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    except FileNotFoundError:
        raise ValueError("git is not installed, but knorm asks it which commit this is") from None
    except subprocess.CalledProcessError as error:
        message = " ".join(error.stderr.split()) or "it does not exist"
        raise ValueError(f"git {arguments[0]} failed in {folder}: {message}") from None
    return done.stdout.strip()
