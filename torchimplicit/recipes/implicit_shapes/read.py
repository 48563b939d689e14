"""What the table's runs came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchimplicit.recipes.implicit_shapes.config import ShapesConfig
from torchimplicit.recipes.implicit_shapes.measure import ShapesCost
from torchimplicit.recipes.implicit_shapes.measure import read as read_costs
from torchimplicit.recipes.implicit_shapes.rows import COST, ROWS, Row, named
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.training.results import Results


@dataclass(frozen=True)
class Measured:
    """The runs that are there.

    Attributes:
        runs: by the row's name and the seed.
        surfaces: of each, what ``surface.json`` says; empty where there is no surface.
        folders: of the runs, for their pictures.
        seeds: all of them.
        cost: ``None`` where it was not measured.
    """

    runs: dict[tuple[str, int], Results]
    surfaces: dict[tuple[str, int], dict[str, Any]]
    folders: dict[tuple[str, int], Run]
    seeds: Sequence[int]
    cost: ShapesCost | None

    def of(self, row: Row) -> list[Results]:
        """The runs of a row, seed by seed."""
        return [self.runs[row.name, seed] for seed in self.seeds if (row.name, seed) in self.runs]

    def figure(self, row: Row, seed: int, name: str) -> float | None:
        """A figure of a run that came to its end: of the test, or of the surface."""
        one = self.runs.get((row.name, seed))
        if one is None or one.test is None:
            return None
        found = {**one.test.figures, **self.surfaces.get((row.name, seed), {})}.get(name)
        return None if found is None else float(found)

    def figures(self, row: Row, name: str) -> list[float]:
        """That of all seeds that have it."""
        return [value for seed in self.seeds if (value := self.figure(row, seed, name)) is not None]

    def pairs(self, row: Row, other: Row, name: str) -> list[tuple[float, float]]:
        """That of both, wherever both have it."""
        found = [(self.figure(row, seed, name), self.figure(other, seed, name)) for seed in self.seeds]
        return [(a, b) for a, b in found if a is not None and b is not None]


def measured(config: ShapesConfig, runs: dict[str, Run]) -> Measured:
    """What is there."""
    found, surfaces, folders = {}, {}, {}
    for row in ROWS.values():
        for seed in config.plan.all_seeds:
            run = runs.get(named(row, seed))
            if run is None or not (run.path / "results.json").is_file():
                continue
            found[row.name, seed] = Results.of(run)
            folders[row.name, seed] = run
            if (run.path / "surface.json").is_file():
                surface = run.read_json("surface.json")
                surfaces[row.name, seed] = surface if surface["found"] else {}
    cost = read_costs(runs[COST]) if COST in runs else None
    return Measured(found, surfaces, folders, list(config.plan.all_seeds), cost)
