"""Results that commands wrote, read back: files of --json, and folders of sweeps. PyTorch is not needed here."""

from __future__ import annotations

import binascii
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from knorm.cli.joined import left_of
from knorm.cli.schemas import FORMS, VERSION
from knorm.files import read_text
from knorm.page.form import Page, Source
from knorm.strict import first_error

MOST_BYTES = 2**26  # of a file
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
SHOWN = (
    "knorm-check", "knorm-ppl", "knorm-ppl-methods", "knorm-explain", "knorm-explain-method", "knorm-sweep",
    "knorm-page",
)  # fmt: skip


@dataclass(frozen=True)
class Read:
    """Hold results as they were read: their name and form, what they are in that form, and where they are from."""

    name: str
    form: str
    result: Any
    sources: Sequence[Source]


def read_results(paths: Sequence[Path], without: Sequence[str] = ()) -> list[Read]:
    """Read results, in the order in which they were given.

    Args:
        paths: of files that --json wrote, of folders of sweeps, or of pages.
        without: names of results that are taken out of the pages.

    Returns:
        What each holds.

    Raises:
        ValueError: what cannot be read, is no result of knorm's, or not of this version; the same twice; a name in
            `without` that none in a page has.
    """
    results: list[Read] = []
    there: dict[str, None] = {}
    for path in paths:
        read = _page(path) or (_folder(path) if path.is_dir() else _file(path))
        if isinstance(read.result, Page):
            there |= dict.fromkeys(source.name for source in read.sources)
            page = left_of(read.result, without)
            read = Read(read.name, read.form, page, page.sources)
        for other in (source for before in results for source in before.sources):
            if other.digest in {source.digest for source in read.sources}:
                raise ValueError(f"{path} holds the same as {other.name}: give each result once")
        results.append(read)
    if unknown := next((name for name in without if name not in there), None):
        names = ", ".join(there) or "no page is given"
        raise ValueError(f"--without {unknown}: no results of a page have this name: {names}")
    return results


def _page(path: Path) -> Read | None:
    """Read the JSON beside a page, where `path` is the page's folder."""
    file = path / "results.json"
    return _file(file) if (path / "index.html").is_file() and file.is_file() else None


def _file(path: Path) -> Read:
    text = read_text(path, MOST_BYTES)
    fields = _parsed(path, text)
    name, version = fields.get("schema"), fields.get("schema_version")
    if not isinstance(name, str) or not name.startswith("knorm-"):
        _refuse(path, "is no result of knorm's")
    if name not in SHOWN:
        _refuse(path, f"is of the form {name}, which a page does not show")
    if version != VERSION:
        command = " ".join(name.split("-")[:2])
        raise ValueError(
            f"{path} is version {version} of {name}, but this knorm reads version {VERSION}: "
            f"run {command} again, or use the knorm that wrote it ({_version(fields)})"
        )
    try:
        result = FORMS[name].model_validate(fields, strict=False)
    except (ValidationError, RecursionError) as error:
        why = first_error(error) if isinstance(error, ValidationError) else "too deep"
        raise ValueError(f"{path} is not what {name} should be: {why}") from None
    versions = {name: version for name, version in result.environment.model_dump().items() if version}
    digest = hashlib.sha256(text.encode()).hexdigest()
    own = result.sources if isinstance(result, Page) else [_source(path, name, digest, versions, result)]
    return Read(path.resolve().name, name, result, own)


def _parsed(path: Path, text: str) -> dict[str, Any]:
    def no_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    if not text.strip():
        raise ValueError(f"{path} is empty: the command that was to write it has not ended")
    try:
        fields = json.loads(text, parse_constant=no_number)
    except RecursionError:
        _refuse(path, "is no result of knorm's")
    except ValueError as error:
        cut = text.lstrip().startswith("{") and not text.rstrip().endswith("}")
        why = "ends in the middle: it was cut off" if cut else f"is not JSON ({error})"
        _refuse(path, why)
    if not isinstance(fields, dict):
        _refuse(path, "is no result of knorm's")
    if _HALF.search(text):  # no page can hold half of a surrogate pair
        fields = json.loads(json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace"))
    return fields


def _refuse(path: Path, why: str) -> NoReturn:
    raise ValueError(f"{path} {why}: give files of --json of check, ppl, explain or sweep, folders of sweeps, or pages")


def _version(fields: dict[str, Any]) -> str:
    environment = fields.get("environment")
    return str(environment.get("knorm", "unknown"))[:40] if isinstance(environment, dict) else "unknown"


def _folder(path: Path) -> Read:
    """Join what a sweep's folder holds so far into the form that its --json has."""
    from knorm.cli.schemas.swept import Swept
    from knorm.cli.swept import table_fields
    from knorm.sweep.folder import Folder
    from knorm.sweep.table import stored

    try:
        study, table, versions = stored(Folder(path))
        if not table.done and not table.failures and not table.faults:
            raise ValueError(f"{path} has no results yet: {table.cells:,} cells are to do")
        fields = table_fields(study, table)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        binascii.Error,
    ) as error:  # of results that nobody's sweep wrote
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): give another folder") from None
    try:
        head = {"schema": "knorm-sweep", "schema_version": VERSION, "environment": _as_environment(versions)}
        result = Swept.model_validate({**head, **fields})
    except ValidationError as error:
        raise ValueError(f"{path} holds other results than this knorm writes: {first_error(error)}") from None
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
    return Read(path.resolve().name, "knorm-sweep", result, [_source(path, "knorm-sweep", digest, versions, result)])


def _as_environment(versions: dict[str, str]) -> dict[str, str]:
    """Fit what a cell notes of its environment into a result's; it does not note knorm's own version."""
    names = ("python", "torch", "transformers", "numpy")
    return {"knorm": "", "machine": versions.get("processor", ""), **{name: versions.get(name, "") for name in names}}


def _source(path: Path, form: str, digest: str, versions: dict[str, str], result: Any) -> Source:
    name = path.resolve().name
    if form != "knorm-sweep":
        return Source(name=name, form=form, digest=digest, versions=versions)
    missing = max(0, result.cells - result.done - len(result.failures))
    failed = [f"{cell.measure} of {cell.method}{_on(cell.model)}: {cell.reason}" for cell in result.failures]
    return Source(
        name=name, form=form, digest=digest, versions=versions, cells=result.cells, missing=missing, failed_cells=failed
    )


def _on(model: str) -> str:
    return f" on {model}" if model else ""
