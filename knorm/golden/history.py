"""What was accepted for a golden over time, read from git: values, reasons, and the anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from knorm.git import git
from knorm.golden.files import Damaged, parse
from knorm.golden.format import Golden
from knorm.golden.store import Store


@dataclass(frozen=True)
class Entry:
    """Hold one accepted golden.

    commit   that brought it; None where it is not committed yet
    golden   what was accepted then
    """

    commit: str | None
    golden: Golden

    def value(self, metric: str) -> int | float | str | None:
        """Return the value of `metric`; None where it was not measured then."""
        found = self.golden.metric(metric)
        return found.value if found else None


def history(store: Store, case: str, device_class: str) -> tuple[list[Entry], list[str]]:
    """Read every version of a golden that git knows, and the one in the folder.

    Args:
        store: the folder of goldens, in a git checkout.
        case: the case's name.
        device_class: as its file is named.

    Returns:
        The accepted goldens, the oldest first; and commits whose golden this knorm cannot read.

    Raises:
        ValueError: the folder is in no checkout, or there never was a golden.

    Example:
        >>> entries, unread = history(Store(), "prefill", "cpu-x86_64")  # doctest: +SKIP
        >>> entries[0].golden.provenance.reason  # doctest: +SKIP
        'the first'
    """
    path = f"{case}/{device_class}.json"
    entries: list[Entry] = []
    unread: list[str] = []
    texts: list[tuple[str | None, str]] = []
    if store.folder.is_dir():
        for commit in reversed(git(store.folder, "log", "--format=%H", "--diff-filter=AMT", "--", path).split()):
            texts.append((commit, git(store.folder, "show", f"{commit}:./{path}")))
        file = store.file(case, device_class)
        if file.is_file():
            texts.append((None, file.read_text(encoding="utf-8")))
    for origin, text in texts:
        try:
            golden = parse(text, path)
        except Damaged:
            unread.append(origin or "the folder's")
            continue
        if not entries or entries[-1].golden.seal != golden.seal:  # a commit may have touched nothing in it
            entries.append(Entry(origin, golden))
    if not entries and not unread:
        raise ValueError(
            f"{path}: no golden was ever accepted in {store.folder}: knorm golden list shows those there are"
        )
    return entries, unread


def moving(entries: Sequence[Entry], patterns: Sequence[str] = ()) -> list[str]:
    """List the metrics to show.

    Args:
        entries: versions of a golden.
        patterns: names, or with * and ? several; without any, those whose accepted value ever changed, came or went.

    Returns:
        Names, in the order in which the golden has them.

    Raises:
        ValueError: a pattern that fits no metric.
    """
    names = [*dict.fromkeys(metric.name for entry in entries for metric in entry.golden.metrics)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"--metric {pattern} fits none of {', '.join(names)}")
    if patterns:
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return [name for name in names if len({entry.value(name) for entry in entries}) > 1]
