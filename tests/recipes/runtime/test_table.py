"""A table in the terminal."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("tyro")

from rich.console import Console

from torchimplicit.recipes.runtime.table import Column, Table

NAMES = ["a name that is rather long, longer than a third of the screen", "another"]
TITLES = [f"figure {index} of them" for index in range(12)]
TABLE = Table(
    [Column("Name"), *(Column(title, "ms") for title in TITLES)],
    [[name, *(f"{index}{place}.123456" for index in range(12))] for place, name in enumerate(NAMES)],
)


@pytest.mark.parametrize("width", [60, 80, 300])
def test_no_figure_is_cut_at_any_width(width):
    screen = io.StringIO()
    Console(file=screen, width=width).print(TABLE.rich_rows(width))
    shown = screen.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert all(cell in shown for row in TABLE.rows for cell in row[1:])
    assert shown.count("another") == shown.count("Name") == (1 if width == 300 else shown.count("┏"))
    assert "…" not in shown
