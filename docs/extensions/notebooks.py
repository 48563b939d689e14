"""Markdown extension that links every example on docs/examples.md to its script and to a notebook made from it.

A picture ``![NAME](examples/NAME.png)`` is followed by links to both, which :func:`write` puts beside it.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from extensions.lines import LineExtension, no_options

_SCRIPTS = Path(__file__).parents[2] / "examples"
_PICTURE = re.compile(r"^!\[(?P<name>\w+)\]\(examples/(?P=name)\.png\)$", re.MULTILINE)


def notebook(name: str, script: str) -> str:
    """The notebook (nbformat 4.5) of a script: its docstring as text, then a cell for every block of its code."""
    tree = ast.parse(script)
    title, _, text = (ast.get_docstring(tree) or name).partition("\n")
    lines = script.splitlines()
    imports = (ast.Import, ast.ImportFrom)
    starts = [tree.body[0].end_lineno]  # type: ignore[list-item]
    for before, node in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(before, imports) and isinstance(node, imports):
            continue  # they share a cell
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
        while lines[first - 1].startswith("#"):
            first -= 1
        if not lines[first - 1].strip():
            starts.append(first)
    blocks = ["\n".join(lines[a:b]).strip("\n") for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    arguments = f'import sys\n\nsys.argv = ["{name}.py", "{name}.png"]  # as on the command line: draw the picture'
    cells = [("markdown", f"# {title}\n{text}")]
    cells += [("code", block) for block in (arguments, *blocks) if block]
    return json.dumps(
        {
            "cells": [
                {"cell_type": kind, "id": f"{name}-{number}".replace("_", "-"), "metadata": {}, "source": source}
                | ({"execution_count": None, "outputs": []} if kind == "code" else {})
                for number, (kind, source) in enumerate(cells)
            ],
            "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
            "nbformat": 4,
            "nbformat_minor": 5,
        },
        ensure_ascii=False,
        indent=1,
    )


def write(folder: Path) -> None:
    """Write every script and its notebook into ``folder``."""
    for path in sorted(_SCRIPTS.glob("*.py")):
        script = path.read_text(encoding="utf-8")
        (folder / path.name).write_text(script, encoding="utf-8")
        (folder / f"{path.stem}.ipynb").write_text(notebook(path.stem, script), encoding="utf-8")


class Links(LineExtension):
    """Links both below every example's picture."""

    def rewritten(self, text: str) -> str:
        links = r"\g<0>\n\n[Script](examples/\g<name>.py) · [Notebook](examples/\g<name>.ipynb)"
        return _PICTURE.sub(links, text)


makeExtension = no_options(Links)
