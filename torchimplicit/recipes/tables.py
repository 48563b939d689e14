"""A table as plain data, drawn by the terminal and by the page alike."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table as RichTable
from rich.text import Text


@dataclass(frozen=True)
class Column:
    """A column's heading.

    Attributes:
        title: short.
        unit: of its figures; empty for none.
        note: what the figures are, in one sentence.
    """

    title: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text under columns; the first column names the row."""

    columns: list[Column]
    rows: list[list[str]]

    def rich(self) -> RichTable:
        """For the terminal, turned on its side: a column for each row, so that it fits 80 characters."""
        table = RichTable()
        head, *figures = self.columns
        table.add_column(head.title)
        for row in self.rows:
            table.add_column(Text(row[0]), justify="right")
        for index, column in enumerate(figures, start=1):
            name = column.title + (f" ({column.unit})" if column.unit else "")
            table.add_row(Text(name), *(Text(row[index]) for row in self.rows))
        return table

    def rich_rows(self) -> RichTable:
        """For the terminal, as it is."""
        table = RichTable()
        for index, column in enumerate(self.columns):
            name = column.title + (f"\n{column.unit}" if column.unit else "")
            table.add_column(name, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """For the documentation."""
        heads = [c.title + (f" ({c.unit})" if c.unit else "") for c in self.columns]
        lines = [heads, ["---", *("---:" for _ in heads[1:])], *self.rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        notes = "\n".join(f"- **{c.title}**: {c.note}" for c in self.columns if c.note)
        return table + (f"\n\n{notes}" if notes else "")
