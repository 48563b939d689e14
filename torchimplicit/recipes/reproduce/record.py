"""What a reproduction came to, as data: ``record.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from torchimplicit.recipes.environment import Environment
from torchimplicit.recipes.tables import Table


@dataclass(frozen=True)
class Claim:
    """A statement that was tested.

    Attributes:
        statement: in words, with the figure aimed at.
        measured: what came out, in words.
        holds: whether it holds here.
    """

    statement: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Picture:
    """A figure of the record.

    Attributes:
        file: beside the record.
        caption: what it shows and how to read it.
    """

    file: str
    caption: str


@dataclass(frozen=True)
class Sheet:
    """A table of the record under its title."""

    title: str
    table: Table


@dataclass(frozen=True)
class Record:
    """A reproduction.

    Attributes:
        name: of the table.
        title: for people.
        source: what is reproduced: paper, table or figure.
        protocol: what was run and how the figures were selected, in a few sentences.
        sheets, claims, pictures: what came out; a published number stands beside ours.
        notes: what else a reader must know, such as what falls short and why.
        command: that made it.
        seconds: of all runs together.
        environment: on what.
        settings: of the table.
        runs: figures of every single run, by its name.
    """

    name: str
    title: str
    source: str
    protocol: str
    sheets: list[Sheet]
    claims: list[Claim]
    pictures: list[Picture]
    notes: list[str]
    command: str
    seconds: float
    environment: Environment
    settings: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, Any] = field(default_factory=dict)


def spread(values: Sequence[float], digits: int = 1, scale: float = 1.0) -> str:
    """Mean and standard deviation over seeds, for a table's cell: ``85.0 ± 0.2``; a dash if there are none."""
    if not values:
        return "–"
    mean = f"{scale * fmean(values):.{digits}f}"
    return f"{mean} ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else mean
