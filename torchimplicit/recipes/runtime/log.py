"""Reads a run's CSV log, without Lightning, which writes it."""

from __future__ import annotations

import csv
from pathlib import Path

from torchimplicit.recipes.runtime.errors import DamagedFileError
from torchimplicit.recipes.runtime.files import no_larger

Row = dict[str, float]


def rows(path: Path) -> list[Row]:
    """The rows of a CSV log without empty cells; empty if there is no file."""
    if not path.is_file():
        return []
    no_larger(path, 1 << 30)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            read = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
        return [{name: float(value) for name, value in row.items()} for row in read if "step" in row]
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise DamagedFileError(f"{path} is damaged ({error}); train again, or restore it from a copy") from None
