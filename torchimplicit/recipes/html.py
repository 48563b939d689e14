"""Pages for people: one HTML file each, with no script and nothing to fetch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torchimplicit.recipes.tables import Table

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
