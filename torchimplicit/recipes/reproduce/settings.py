"""The settings that every table has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.options import not_negative, positive


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which runs, and where."""

    seeds: int = 3
    """Runs of every row, each with its own seed."""

    first_seed: int = 0
    """The seeds are this one and those after it."""

    scale: Literal["cpu", "paper"] = "cpu"
    """cpu: minutes a row on one core. paper: the published settings, for GPUs."""

    parallel: int = 1
    """Runs at a time."""

    together: int = 1
    """Runs that one process does, one after the other: where they are short, its start would take as long as they."""

    cluster: Literal["local", "slurm"] = "local"
    """Where the runs go: processes of this machine, or Slurm jobs."""

    partition: str | None = None
    """Of Slurm."""

    hours: float = 24.0
    """After which a run is stopped; started again, it goes on from its last segment."""

    record: Path | None = None
    """Also copy the record and its figures into a folder of the table's name below this one."""

    def __post_init__(self) -> None:
        positive(self, "seeds", "parallel", "together", "hours")
        not_negative(self, "first_seed")

    @property
    def all_seeds(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)
