"""A reproduction's page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Protocol

from matplotlib.figure import Figure

from torchimplicit.recipes.html import document, figure, table
from torchimplicit.recipes.runtime.table import Record
from torchimplicit.recipes.svg import svg


class Drawn(Protocol):
    """A figure, its name and its caption."""

    @property
    def name(self) -> str:
        """Of the file."""

    @property
    def figure(self) -> Figure:
        """The figure."""

    @property
    def caption(self) -> str:
        """What it shows."""


def page(record: Record, drawings: Sequence[Drawn]) -> str:
    """The whole record, pictures included, in one file."""
    e = record.environment
    parts = [
        f"<p class='tag'>torchimplicit · {escape(e.date)}</p>",
        f"<h1>{escape(record.title)}</h1>",
        f"<p class='lead'>{escape(record.source)}</p>",
        f"<p class='lead'>{escape(record.protocol)}</p>",
    ]
    for sheet in record.sheets:
        parts += [f"<h2>{escape(sheet.title)}</h2>", f"<div class='card'>{table(sheet.table)}</div>"]
    if record.claims:
        parts.append("<h2>Claims</h2><ul>")
        parts += [
            f"<li><strong>{'Holds' if claim.holds else 'Fails'}</strong>: {escape(claim.statement)}. "
            f"{escape(claim.measured)}</li>"
            for claim in record.claims
        ]
        parts.append("</ul>")
    if drawings:
        pictures = [figure(svg(d.figure, d.name), d.caption) for d in drawings]
        parts += ["<h2>Pictures</h2>", '<div class="grid">', *pictures, "</div>"]
    if record.notes:
        parts += ["<h2>Notes</h2><ul>", *(f"<li>{escape(note)}</li>" for note in record.notes), "</ul>"]
    parts.append(
        f"<footer><p><code>{escape(record.command)}</code></p><p>{record.seconds / 60:.0f} minutes on "
        f"{escape(e.device)}, {e.cores} cores, torch {escape(e.torch_version)}, torchimplicit "
        f"{escape(e.torchimplicit_version)}.</p></footer>"
    )
    return document(record.title, parts)
