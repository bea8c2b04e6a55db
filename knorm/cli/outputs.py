"""Files that commands write: refused before the work where writing would harm, written beside and renamed after it."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from knorm import __version__
from knorm.files import file_size, write_whole
from knorm.methods.known import version_of
from knorm.paths import goldens

MADE_BY = "made with knorm"  # in the metadata of each figure
_RESULT = re.compile(rb'\{\s*("schema": ?"knorm-|"environment": \{\s*"knorm": )')
_GOLDEN = re.compile(rb'\{\s*"schema_version": \d+,\s*"case": ')
_FORCE = "knorm.force"
WRITTEN: list[Path] = []  # by this process, for whoever interrupts it
_LOOKED_AT = 4096  # bytes at either end of a file that tell whose it is


def file_option(flag: str, text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make an option that names a file to write; --force must be an option beside it."""
    return click.option(flag, type=click.Path(path_type=Path), metavar="FILE", callback=_writable, help=text)


def _remember(context: click.Context, _parameter: click.Parameter, force: bool) -> None:
    context.meta[_FORCE] = force


force_option = click.option(
    "--force",
    is_flag=True,
    is_eager=True,  # known before the files are looked at
    expose_value=False,
    callback=_remember,
    help="Overwrite files that knorm did not write.",
)


def _writable(context: click.Context, parameter: click.Parameter, file: Path | None) -> Path | None:
    """Find out before the work, not after it, that a result cannot or should not be written."""
    if file is not None and (problem := _problem(file, force=context.meta.get(_FORCE, False))):
        raise click.BadParameter(f"cannot write {file}: {problem}", param=parameter)
    return file


def _problem(file: Path, *, force: bool) -> str | None:
    """Return why a file should not be written, or None."""
    try:
        if not file.parent.is_dir():
            return f"there is no folder {file.parent}"
        file = file.resolve()  # through links: what they lead to is what would be overwritten
        if file.is_dir():
            return "it is a folder"
        if not file.parent.is_dir():
            return f"there is no folder {file.parent}, to which it links"
        exists = file.exists()
        if exists:
            file_size(file)  # refuses devices, pipes and sockets
        if not os.access(file.parent, os.W_OK) or (exists and not os.access(file, os.W_OK)):
            return "no permission"
        if _among_goldens(file):
            return "it lies among goldens, which only `knorm golden accept` writes"
        if exists and not force and not is_ours(file):
            return "knorm did not write what is there: give another name, or --force to overwrite it"
    except (OSError, RuntimeError) as error:  # a loop of links, a name too long
        return str(getattr(error, "strerror", None) or error)
    except ValueError as error:  # a null byte, or what is no file
        return str(error)
    return None


def _among_goldens(file: Path) -> bool:
    """Tell whether a file is a golden, lies beside one, or lies anywhere in the folder of knorm's own goldens."""
    if goldens().resolve() in file.parents:
        return True
    beside = (*file.parent.glob("*.json"), *file.parent.glob("*/*.json")) if _few(file.parent) else (file,)
    return any(_GOLDEN.match(_ends(path)) for path in beside if path.is_file())


def _few(folder: Path) -> bool:
    """Tell whether a folder is small enough to be looked through: no store of goldens has thousands of entries."""
    with os.scandir(folder) as entries:
        return sum(1 for _ in zip(entries, range(1000), strict=False)) < 1000


def is_ours(file: Path) -> bool:
    """Tell whether a command of knorm's wrote a file: a result, or a figure; empty files are anybody's."""
    ends = _ends(file)
    return not ends or bool(_RESULT.match(ends)) or MADE_BY.encode() in ends


def _ends(file: Path) -> bytes:
    with open(file, "rb") as stream, suppress(OSError):
        start = stream.read(_LOOKED_AT)
        stream.seek(max(len(start), os.fstat(stream.fileno()).st_size - _LOOKED_AT))
        return start + stream.read(_LOOKED_AT)
    return b"?"


def replace_file(file: Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all.

    Args:
        file: where it is to stand; links are followed.
        write: called with a path beside it, of the same suffix, which is renamed to `file` when it has been written.

    Raises:
        OSError: the file could not be written; what was there is as it was.

    Example:
        >>> replace_file(Path("curve.svg"), figure.savefig)  # doctest: +SKIP
    """
    WRITTEN.append(write_whole(file, write))


def environment() -> dict[str, str | None]:
    """Collect what results depend on."""
    packages = ("torch", "transformers", "numpy")
    return {
        "knorm": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{p: metadata.version(p) for p in packages},
        "kvpress": version_of("kvpress"),
    }


def write_programs(folder: Path, target: str, programs: Mapping[str, str]) -> None:
    """Write the programs that show refutations, each to FOLDER/TARGET-CHECK.py.

    Args:
        folder: where they go; it is made where it is not there.
        target: the target's name, of which letters, digits and points go into the names of the files.
        programs: check -> the program.

    Raises:
        ValueError: a file that knorm did not write has such a name, or nothing can be written there.
    """
    name = re.sub(r"[^\w.]+", "-", target).strip("-.")[:80]
    try:
        folder.mkdir(exist_ok=True)
        for check, text in programs.items():
            file = folder / f"{name}-{check}.py"
            if problem := _problem(file, force=False):
                raise ValueError(f"cannot write {file}: {problem}")
            header = f"# {target} is refuted by {check}: {MADE_BY} {__version__}\n"
            replace_file(file, partial(_write_text, header + text + "\n"))
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}") from error


_PAGE = {"index.html": MADE_BY.encode(), "results.json": b'"knorm-page"'}  # file -> what one of ours has


def check_page(folder: Path) -> None:
    """Raise ValueError, before the work, for a folder in which no page can be written: one that holds something else.

    A folder that is new, empty or holds a page of knorm's is fine; with --force, any.
    """
    force = bool(click.get_current_context().meta.get(_FORCE, False))
    try:
        there = sorted(entry.name for entry in os.scandir(folder)) if folder.exists() else []
        parts = [name for name in _PAGE if (folder / name).exists()]
        ours = bool(parts) and all(_PAGE[name] in _ends(folder / name) for name in parts)
        if not folder.exists() and not folder.absolute().parent.is_dir():
            raise ValueError(f"cannot write {folder}: there is no folder {folder.absolute().parent}")
        if there and not ours and not force:
            raise ValueError(f"cannot write {folder}: it holds {there[0]}, and no page: give a new or an empty folder")
    except NotADirectoryError:
        raise ValueError(f"cannot write {folder}: it is no folder") from None
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error.strerror or error}") from None
    for name in _PAGE if folder.exists() else ():
        if problem := _problem(folder / name, force=force):
            raise ValueError(f"cannot write {folder / name}: {problem}")


def write_page(folder: Path, html: str, parts: Mapping[str, Any]) -> None:
    """Write a page and the JSON beside it, each whole or not at all.

    Args:
        folder: that check_page has let pass; it is made where it is not there.
        html: the page.
        parts: the same as page.form.Page holds it.
    """
    folder.mkdir(exist_ok=True)
    page, data = (folder / name for name in _PAGE)
    replace_file(page, partial(_write_text, html))
    write_json(data, parts, indent=None)


def _write_text(text: str, file: Path) -> None:
    file.write_text(text, encoding="utf-8")


def write_json(file: Path | None, result: Mapping[str, Any], form: str = "", *, indent: int | None = 1) -> None:
    """Write what the command under way found as strict JSON, where a file is named.

    Args:
        file: the user's --json, or None.
        result: its fields, as schemas.FORMS has them. The name and the version of their schema and the environment come
            first.
        form: which of the command's forms it is, where there are several.
        indent: of its lines; None for all in one, which a large result halves.
    """
    if file is not None:
        from knorm.cli.schemas import FORMS, VERSION

        name = f"{_schema()}-{form}" if form else _schema()
        fields = {"schema": name, "schema_version": VERSION, "environment": environment(), **result}
        checked = FORMS[name].model_validate(fields).model_dump(mode="json", by_alias=True)
        replace_file(file, partial(_write_text, _dumped(checked, indent) + "\n"))


def _dumped(fields: Any, indent: int | None) -> str:
    separators = (",", ":") if indent is None else None
    return json.dumps(fields, indent=indent, separators=separators, allow_nan=False)


def _schema() -> str:
    """Name the schema of the command under way: knorm-ppl, knorm-golden-diff."""
    context, name = click.get_current_context(), ""
    while context.parent is not None:
        name = f"-{context.info_name}{name}"
        context = context.parent
    return f"knorm{name}"
