"""Write what a benchmark printed between its marks in a document: <!-- bench: NAME --> and <!-- end -->."""

from __future__ import annotations

import re
from pathlib import Path


def rewrite(document: Path, name: str, text: str) -> None:
    """Put `text` between the marks of `name` in `document`; ends the program where it has none."""
    before = document.read_text(encoding="utf-8")
    marked = re.compile(rf"(<!-- bench: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    after, count = marked.subn(lambda match: f"{match[1]}\n{text.strip()}\n\n{match[2]}", before)
    if count != 1:
        raise SystemExit(f"{document} has no place for {name}: <!-- bench: {name} --> and <!-- end -->")
    document.write_text(after, encoding="utf-8")
