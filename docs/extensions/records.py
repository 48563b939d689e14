"""Markdown extension that puts the recorded result of ``torchimplicit reproduce`` into a page.

A line ``{{ record NAME }}`` becomes the record ``docs/records/NAME/record.json``: what was done, the tables with the
published numbers, the claims, the pictures, the notes and the command.
``{{ verdict NAME }}`` is how many of its claims hold. Pages with records lie one folder below ``docs``.
"""

from __future__ import annotations

import re
from pathlib import Path

from torchimplicit.recipes.runtime.files import read_json
from torchimplicit.recipes.runtime.markdown import record_text
from torchimplicit.recipes.runtime.settings import from_plain
from torchimplicit.recipes.runtime.table import Record

from extensions.lines import LineExtension, PageError, no_options

_FOLDER = Path(__file__).parents[1] / "records"
_WANTED = re.compile(r"^\{\{ record (?P<name>[\w-]+) \}\}$", re.MULTILINE)
_VERDICT = re.compile(r"\{\{ verdict (?P<name>[\w-]+) \}\}")


def load(folder: Path, name: str) -> Record:
    """The record of a table."""
    file = folder / name / "record.json"
    if not file.is_file():
        raise PageError(f"there is no {file}: run torchimplicit reproduce {name} --record docs/records")
    plain = read_json(file, quiet=True)
    return from_plain(Record, {**plain, "settings": {}, "runs": {}})


class Records(LineExtension):
    """Replaces every such line of the page."""

    def rewritten(self, text: str) -> str:
        def replace(match: re.Match[str]) -> str:
            return record_text(load(_FOLDER, match["name"]), f"../records/{match['name']}")

        def verdict(match: re.Match[str]) -> str:
            claims = load(_FOLDER, match["name"]).claims
            return f"{sum(c.holds is True for c in claims)} of {len(claims)}"

        return _VERDICT.sub(verdict, _WANTED.sub(replace, text))


makeExtension = no_options(Records)
