"""Markdown extension that puts tables of the newest recorded benchmark run into a page, so that no figure is copied.

A line ``{{ results NAME: HEADING }}`` becomes the section of that heading in ``benchmarks/results/NAME-*.md``,
``{{ results NAME }}`` the lines before the first section, which say how, on what and when, and
``{{ results NAME: figure }}`` the run's picture.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

from extensions.lines import LineExtension, PageError, no_options

_FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"
_FIGURE = re.compile(r"^!\[figure\]\((?P<file>[\w.-]+)\)$", re.MULTILINE)
_WANTED = re.compile(r"^\{\{ results (?P<name>\w+)(?:: (?P<heading>.+?))? \}\}$", re.MULTILINE)


def newest(folder: Path, name: str) -> Path:
    """The latest run of a benchmark; runs are named by their date."""
    runs = sorted(folder.glob(f"{name}-*.md"))
    if not runs:
        raise PageError(f"there is no benchmarks/results/{name}-*.md: run benchmarks/{name}.py")
    return runs[-1]


def section(text: str, heading: str | None) -> str:
    """The lines below the heading that starts with ``heading``; ``None``: those before the first one."""
    title, *parts = re.split(r"^## ", text, flags=re.MULTILINE)
    if heading is None:
        return title.split("\n", 1)[1].strip()
    for part in parts:
        first, _, rest = part.partition("\n")
        if first.startswith(heading):
            return rest.strip()
    raise PageError(f"no section '{heading}' among {[part.partition(chr(10))[0] for part in parts]}")


class Results(LineExtension):
    """Replaces every such line of the page."""

    def rewritten(self, text: str) -> str:
        def replace(match: re.Match[str]) -> str:
            path = newest(_FOLDER, match["name"])
            run = path.read_text(encoding="utf-8")
            if match["heading"] == "figure":
                picture = base64.b64encode(path.with_suffix(".png").read_bytes()).decode()
                return f"![the figures of {path.stem}](data:image/png;base64,{picture})"
            return section(_FIGURE.sub("", run).replace("<", "&lt;"), match["heading"])

        return _WANTED.sub(replace, text)


makeExtension = no_options(Results)
