"""A record as Markdown, for the documentation and for readers on the code host."""

from __future__ import annotations

import re

from torchimplicit.recipes.runtime.table import Record


def record_text(record: Record, place: str) -> str:
    """The record without its title: what was done, the tables, the claims, the pictures, the notes, the command.

    Args:
        record: record of a table.
        place: where its figures and ``record.json`` are, as a link.
    """
    e = record.environment
    parts = [f"*{_escaped(record.source)}*", _escaped(record.protocol)]
    for sheet in record.sheets:
        parts += [f"## {_escaped(sheet.title)}", _escaped(sheet.table.markdown())]
    if record.claims:
        parts += ["## Claims"]
        parts += [f"- **{c.verdict}**: {_escaped(c.statement)}. {_escaped(c.measured)}" for c in record.claims]
    if record.pictures:
        parts += ["## Pictures"]
        parts += [f"![{_plain(p.caption)}]({place}/{p.file})\n\n{_escaped(p.caption)}" for p in record.pictures]
    if record.notes:
        parts += ["## Notes", *(f"- {_escaped(note)}" for note in record.notes)]
    parts += [
        "## How it was made",
        f"```sh\n{record.command}\n```",
        f"{record.seconds / 60:.0f} minutes on {e.device}, {e.cores} cores, {e.date}; torch {e.torch_version}, "
        f"torchimplicit {e.torchimplicit_version}, Python {e.python_version}. Every single run's figures are in "
        f"[record.json]({place}/record.json).",
    ]
    text = "\n\n".join(part for part in parts if part)
    text = text.replace(" ± ", "\u00a0±\u00a0")  # a figure and its spread stay on one line
    return re.sub(r"(?m)^(- .*)\n\n(?=- )", r"\1\n", text)


def record_readme(record: Record) -> str:
    """The README of a record's folder."""
    return f"# {record.title}\n\n{record_text(record, '.')}\n"


def _escaped(text: str) -> str:
    """Escape plain text for Markdown."""
    return re.sub(r"([<$*_`])", r"\\\1", text) if not text.startswith("|") else text.replace("<", "&lt;")


def _plain(text: str) -> str:
    return re.sub(r"[\[\]<>$*_`]", "", text)
