"""The one-page report: everything in one HTML file, with no script and nothing to fetch."""

from __future__ import annotations

import ast
import inspect
from dataclasses import asdict
from html import escape
from itertools import pairwise
from textwrap import dedent

from torchimplicit.recipes.digits.config import DigitsConfig
from torchimplicit.recipes.digits.estimators import ESTIMATORS
from torchimplicit.recipes.digits.report.captions import CAPTIONS
from torchimplicit.recipes.digits.report.style import look
from torchimplicit.recipes.digits.results import Results, summary_table
from torchimplicit.recipes.runtime.page import document
from torchimplicit.recipes.runtime.table import Table


def page(results: Results, pictures: dict[str, str]) -> str:
    """The page.

    Args:
        results: of the run.
        pictures: SVG by name; those without a caption are left out.
    """
    count = len(results.estimators)
    title = f"One equilibrium model, {_number(count)} gradient{'s' * (count > 1)}"
    parts = [
        f'<p class="tag">torchimplicit · {escape(results.environment.date)}</p>',
        f"<h1>{escape(title)}</h1>",
        introduction(results),
        keys(results),
        "<h2>What came out</h2>",
        summary(results),
        "<h2>How it came about</h2>",
        '<div class="grid">',
        *(picture(results, name, svg) for name, svg in pictures.items()),
        "</div>",
        "<h2>What the settings were</h2>",
        settings(results.config),
        footer(results),
    ]
    return document(title, parts)


def introduction(results: Results) -> str:
    """What was done, for somebody who has never met an equilibrium model."""
    count = len(results.estimators)
    text = (
        "<p class='lead'>A deep equilibrium model has no stack of layers. Its output is the state z that one small "
        "network f, the <em>cell</em>, leaves unchanged: z = f(z, x). A solver finds that state. To train the cell one "
        "needs the gradient of the state, and that can be exact, or a cheaper estimate.</p>"
        f"<p class='lead'>Here {_number(count)} classifier{'s' * (count > 1)} of {results.parameters:,} parameters "
        f"learned to read handwritten digits of 8 × 8 pixels, from {results.training_images} images; the accuracy is "
        f"measured on {results.validation_images} others."
    )
    if count > 1:
        text += (
            " They started from the same weights and saw the same batches in the same order. They differ in one line "
            "of code only, the gradient estimator:"
        )
    text += "</p>"
    if results.state != "complete":
        done = min(result.summary.steps for result in results.estimators.values())
        text += (
            f"<p class='notice'>This run was interrupted after {done} of {results.planned_steps} steps. Everything "
            "below shows what was done until then.</p>"
        )
    return text


def keys(results: Results) -> str:
    """One line for each estimator, with its colour."""
    lines = []
    for name, result in results.estimators.items():
        lines.append(
            f"<li>{_dot(name)}<strong>{escape(result.label)}</strong> {escape(ESTIMATORS[name].explanation)}</li>"
        )
    return f'<ul class="keys">{"".join(lines)}</ul>'


def summary(results: Results) -> str:
    """The table, and what its columns are."""
    table = summary_table(results.estimators)
    dots = [_dot(name) for name in results.estimators]
    notes = "".join(
        f"<dt>{escape(column.title)}</dt><dd>{escape(column.note)}</dd>" for column in table.columns if column.note
    )
    return f'<div class="card"><div class="scroll">{html_table(table, dots)}</div><dl>{notes}</dl></div>'


def html_table(table: Table, marks: list[str]) -> str:
    """The table with a mark before each row's name."""
    heads = "".join(
        f'<th scope="col">{escape(column.title)}<small>{escape(column.unit) or "&nbsp;"}</small></th>'
        for column in table.columns
    )
    rows = ""
    for mark, (first, *rest) in zip(marks, table.rows, strict=True):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        rows += f'<tr><th scope="row">{mark}{escape(first)}</th>{cells}</tr>'
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def picture(results: Results, name: str, svg: str) -> str:
    """One picture with its caption."""
    caption = CAPTIONS[name]
    return (
        f'<figure class="card" role="group" aria-label="{escape(caption.title)}"><h3>{escape(caption.title)}</h3>{svg}'
        f"<figcaption><p>{escape(caption.reading)}</p>"
        f'<p class="now">{escape(caption.numbers(results))}</p></figcaption></figure>'
    )


def settings(config: DigitsConfig) -> str:
    """Every setting with its value and what it means."""
    meanings = field_docs(DigitsConfig)
    rows = "".join(
        f"<tr><td><code>--{name.replace('_', '-')}</code></td><td>{escape(_value(value))}</td>"
        f"<td>{escape(meanings.get(name, ''))}</td></tr>"
        for name, value in asdict(config).items()
    )
    return f'<div class="card scroll"><table class="settings"><tbody>{rows}</tbody></table></div>'


def field_docs(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass."""
    (tree,) = ast.parse(dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for pair in pairwise(tree.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def footer(results: Results) -> str:
    """On what it was made, and how to make it again."""
    e = results.environment
    return (
        f"<footer><p>Made with torchimplicit {escape(e.torchimplicit_version)}, PyTorch {escape(e.torch_version)} and "
        f"Python {escape(e.python_version)} on {escape(e.device)}, {e.cores} cores, {e.threads} threads, "
        f"{escape(e.system)}; {results.wall_seconds:.0f} s in all. Times are of this machine and move with what else "
        "it does. All figures are in <code>results.json</code> beside this page, every step in "
        "<code>logs/metrics.csv</code>. The same seeds on the same machine give the same losses; "
        "<code>torchimplicit demo --seed 1</code> tries others.</p></footer>"
    )


def _dot(name: str) -> str:
    return f'<span class="dot" style="background:{look(name).colour}"></span>'


def _number(count: int) -> str:
    return ["no", "one", "two", "three", "four"][count]


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
