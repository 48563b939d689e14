"""MkDocs hook: puts the recorded result of ``torchimplicit reproduce`` into a page, so that no figure is copied.

A line ``{{ record NAME }}`` becomes the record ``docs/records/NAME/record.json``: what was done, the tables with the
published numbers, the claims, the pictures, the notes and the command.
``{{ verdict NAME }}`` is how many of its claims hold.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from torchimplicit.recipes.runtime.files import read_json
from torchimplicit.recipes.runtime.markdown import record_text
from torchimplicit.recipes.runtime.settings import from_plain
from torchimplicit.recipes.runtime.table import Record

_WANTED = re.compile(r"^\{\{ record (?P<name>[\w-]+) \}\}$", re.MULTILINE)
_VERDICT = re.compile(r"\{\{ verdict (?P<name>[\w-]+) \}\}")


def load(folder: Path, name: str) -> Record:
    """The record of a table."""
    file = folder / name / "record.json"
    if not file.is_file():
        raise PluginError(f"there is no {file}: run torchimplicit reproduce {name} --record docs/records")
    plain = read_json(file, quiet=True)
    return from_plain(Record, {**plain, "settings": {}, "runs": {}})


def on_page_markdown(markdown: str, page: Any, config: Any, **_: object) -> str:
    """Replaces every such line of the page."""
    folder = Path(config.docs_dir) / "records"
    up = "../" * (len(Path(page.file.src_uri).parts) - 1)

    def replace(match: re.Match[str]) -> str:
        return record_text(load(folder, match["name"]), f"{up}records/{match['name']}")

    def verdict(match: re.Match[str]) -> str:
        claims = load(folder, match["name"]).claims
        return f"{sum(c.holds is True for c in claims)} of {len(claims)}"

    return _VERDICT.sub(verdict, _WANTED.sub(replace, markdown))
