"""Pages for people, one HTML file each with nothing to fetch, and the pictures in them."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Protocol

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torchimplicit.recipes.runtime.files import replacing
from torchimplicit.recipes.runtime.table import Record, Table

# -- Pages for people: one HTML file each, with no script and nothing to fetch -----------------------------------------


CSS = """
:root { color-scheme: light; --ink: #1f2937; --soft: #5b6472; --line: #e2e6ec; --paper: #ffffff; --ground: #f5f6f8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; }
h3 { font-size: 1.05rem; margin: 0 0 .5rem; }
p { margin: 0 0 .8rem; }
.lead { max-width: 52rem; font-size: 1.08rem; }
.tag { color: var(--soft); font-size: .9rem; margin: 0 0 .4rem; }
.notice { background: #fff4e0; border: 1px solid #f0c674; border-radius: .5rem; padding: .6rem .9rem;
  max-width: 52rem; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: .7rem; padding: 1.2rem 1.3rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.2rem; }
.keys { list-style: none; padding: 0; margin: 1rem 0 0; max-width: 60rem; }
.keys li { margin: .35rem 0; padding-left: 1.6rem; position: relative; }
.dot { display: inline-block; width: .75em; height: .75em; border-radius: 50%; margin-right: .55em; }
.keys .dot { position: absolute; left: 0; top: .45em; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption p { font-size: .95rem; margin: .7rem 0 0; }
figcaption .now { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .8rem; text-align: right; vertical-align: bottom; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
thead th { font-size: .88rem; line-height: 1.3; border-bottom: 2px solid #cbd2db; }
thead small { display: block; font-size: .82rem; color: var(--soft); font-weight: 400; }
tbody th { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
dl { margin: 1rem 0 0; font-size: .95rem; max-width: 60rem; }
dt { font-weight: 600; float: left; clear: left; margin-right: .5em; }
dd { margin: 0 0 .3rem; color: var(--soft); }
.settings td { text-align: left; vertical-align: top; }
.settings td:nth-child(2) { white-space: nowrap; font-weight: 600; }
.settings td:last-child { color: var(--soft); }
code { font: .92em ui-monospace, "DejaVu Sans Mono", Menlo, monospace; background: #eef0f3; padding: .1em .35em;
  border-radius: .3em; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .9rem; }
@media print { body { background: white; } .card { break-inside: avoid; } }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page; ``parts`` are HTML."""
    head = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)} – torchimplicit</title><style>{CSS}</style></head><body><main>",
    ]
    return "\n".join([*head, *parts, "</main></body></html>"]) + "\n"


def table(data: Table) -> str:
    """A table; the columns' notes stand below it."""
    head = "".join(
        f"<th scope='col'>{escape(column.title)}"
        + (f"<small>{escape(column.unit)}</small>" if column.unit else "")
        + "</th>"
        for column in data.columns
    )
    body = "".join(
        f"<tr><th scope='row'>{escape(row[0])}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in data.rows
    )
    notes = "".join(f"<dt>{escape(c.title)}</dt><dd>{escape(c.note)}</dd>" for c in data.columns if c.note)
    below = f"<dl>{notes}</dl>" if notes else ""
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{below}"


def figure(svg: str, caption: str) -> str:
    """A picture with its caption."""
    return f"<figure class='card'>{svg}<figcaption><p>{escape(caption)}</p></figcaption></figure>"


# -- A matplotlib figure as SVG that can stand inside an HTML page beside others ---------------------------------------


def svg(figure: Figure, name: str) -> str:
    """The ``<svg>`` element alone: no XML prologue, no metadata, and ids that begin with ``name``."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    return re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">', text, count=1)


# -- One look for every picture: matplotlib's settings, colours, and a figure with axes --------------------------------


COLOURS = ("#0b63a5", "#d1495b", "#2e8b57", "#8a5fbf", "#c77d0a", "#3d7f86", "#6b7280", "#b0417f")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (4, 1.2, 1, 1.2)), (0, (2, 1)))
MARKERS = "os^DvPX*"

FIGURE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3af",
    "axes.labelcolor": "#1f2937",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}


def axes(columns: int = 1, width: float = 6.0, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    """A figure with ``columns`` axes side by side, each ``width`` × ``height`` inches; no global state is touched."""
    figure = Figure(figsize=(columns * width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def style(index: int) -> dict[str, Any]:
    """Colour, line and marker of the series ``index``: each tells the first few series apart on its own."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4.5,
    }


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write it as PNG, in one move."""
    with replacing(path) as draft:
        figure.savefig(draft, dpi=dpi)


# -- A reproduction's page ---------------------------------------------------------------------------------------------


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
