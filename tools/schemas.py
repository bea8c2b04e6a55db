"""Writes the JSON Schemas of what --json holds: python tools/schemas.py (docs/schemas)."""

from __future__ import annotations

import json
from pathlib import Path

from knorm.cli.schemas import FORMS, VERSION

FOLDER = Path(__file__).parent.parent / "docs" / "schemas"


def written() -> dict[str, str]:
    """File name -> its text, a schema each."""
    texts = {}
    for name, form in FORMS.items():
        head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"{name}, version {VERSION}"}
        schema = form.model_json_schema(by_alias=True, mode="serialization") | head
        texts[f"{name}.json"] = json.dumps(schema, indent=1) + "\n"
    return texts


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in written().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
