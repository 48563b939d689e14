"""MkDocs hook: puts the recorded result of ``torchimplicit reproduce`` into a page, so that no figure is copied.

A line ``{{ record NAME }}`` becomes the record ``docs/records/NAME/record.json``: what was done, the tables with the
published numbers, the claims, the pictures, the notes and the command.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from torchimplicit.recipes.runtime.files import read_json
from torchimplicit.recipes.runtime.settings import from_plain
from torchimplicit.recipes.runtime.table import Record

_WANTED = re.compile(r"^\{\{ record (?P<name>[\w-]+) \}\}$", re.MULTILINE)


def load(folder: Path, name: str) -> Record:
    """The record of a table."""
    file = folder / name / "record.json"
    if not file.is_file():
        raise PluginError(f"there is no {file}: run torchimplicit reproduce {name} --record docs/records")
    plain = read_json(file, quiet=True)
    return from_plain(Record, {**plain, "settings": {}, "runs": {}})


def text_of(record: Record, pictures: str) -> str:
    """The record as a page's text; ``pictures`` is where its figures are, seen from the page."""
    e = record.environment
    parts = [f"*{_escaped(record.source)}*", _escaped(record.protocol)]
    for sheet in record.sheets:
        parts += [f"## {_escaped(sheet.title)}", _escaped(sheet.table.markdown())]
    if record.claims:
        parts += ["## Claims"]
        parts += [f"- **{c.verdict}**: {_escaped(c.statement)}. {_escaped(c.measured)}" for c in record.claims]
    if record.pictures:
        parts += ["## Pictures"]
        parts += [f"![{_plain(p.caption)}]({pictures}/{p.file})\n\n{_escaped(p.caption)}" for p in record.pictures]
    if record.notes:
        parts += ["## Notes", *(f"- {_escaped(note)}" for note in record.notes)]
    parts += [
        "## How it was made",
        f"```sh\n{record.command}\n```",
        f"{record.seconds / 60:.0f} minutes on {e.device}, {e.cores} cores, {e.date}; torch {e.torch_version}, "
        f"torchimplicit {e.torchimplicit_version}, Python {e.python_version}. Every single run's figures are in "
        f"[record.json]({pictures}/record.json).",
    ]
    text = "\n\n".join(part for part in parts if part)
    text = text.replace(" ± ", "\u00a0±\u00a0")  # a figure and its spread stay on one line
    return re.sub(r"(?m)^(- .*)\n\n(?=- )", r"\1\n", text)


def _escaped(text: str) -> str:
    """Plain text inside Markdown: no formula, no markup by accident."""
    return re.sub(r"([<$*_`])", r"\\\1", text) if not text.startswith("|") else text.replace("<", "&lt;")


def _plain(text: str) -> str:
    return re.sub(r"[\[\]<>$*_`]", "", text)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: object) -> str:
    """Replaces every such line of the page."""
    folder = Path(config.docs_dir) / "records"
    up = "../" * (len(Path(page.file.src_uri).parts) - 1)

    def replace(match: re.Match[str]) -> str:
        return text_of(load(folder, match["name"]), f"{up}records/{match['name']}")

    return _WANTED.sub(replace, markdown)
