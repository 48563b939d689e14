"""What the table's runs came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from torchimplicit.recipes.fields.cost import FieldCost
from torchimplicit.recipes.fields.cost import read as read_costs
from torchimplicit.recipes.implicit_generalization.config import GeneralizationConfig
from torchimplicit.recipes.implicit_generalization.rows import COST, ROWS, Kind, Row, Subject, named, subjects
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.training.results import Results, steps_to_best


@dataclass(frozen=True)
class Measured:
    """The runs that are there.

    Attributes:
        runs: by the row's name, the picture and the seed.
        pictures: all of them.
        seeds: all of them.
        cost: of a step of each row; empty where it was not measured.
        folders: of the runs, for their pictures.
    """

    runs: dict[tuple[str, str, int], Results]
    pictures: list[Subject]
    seeds: Sequence[int]
    cost: dict[str, FieldCost]
    folders: dict[tuple[str, str, int], Run]

    def tested(self, row: Row, picture: str, seed: int) -> float | None:
        """The test PSNR of a run that came to its end."""
        found = self.runs.get((row.name, picture, seed))
        return None if found is None or found.test is None else found.test.figures["PSNR"]

    def by_seed(self, row: Row, kind: Kind | None = None) -> list[float]:
        """The mean over the pictures (of a kind), of every seed that has them all."""
        names = [one.name for one in self.pictures if kind in (None, one.kind)]
        found = []
        for seed in self.seeds:
            values = [value for name in names if (value := self.tested(row, name, seed)) is not None]
            if names and len(values) == len(names):
                found.append(fmean(values))
        return found

    def pairs(self, one: Row, other: Row, kind: Kind | None = None) -> list[tuple[float, float]]:
        """The test PSNR of both, wherever both were run with the same picture and seed."""
        found = []
        for picture in self.pictures:
            for seed in self.seeds:
                a, b = (self.tested(row, picture.name, seed) for row in (one, other))
                if a is not None and b is not None and kind in (None, picture.kind):
                    found.append((a, b))
        return found

    def difference(self, one: Row, other: Row, kind: Kind | None = None) -> list[float]:
        """Of the test PSNR, in every such pair."""
        return [a - b for a, b in self.pairs(one, other, kind)]

    def steps_to(self, row: Row, target: Row) -> list[tuple[int | None, int]]:
        """After how many steps a run's validation reaches the best validation of the target row, beside the step at
        which the target had it; ``None`` where it never does."""
        found = []
        for picture in self.pictures:
            for seed in self.seeds:
                own, other = (self.runs.get((one.name, picture.name, seed)) for one in (row, target))
                steps = steps_to_best(own, other, "PSNR")
                if steps is not None:
                    found.append(steps)
        return found


def measured(config: GeneralizationConfig, runs: dict[str, Run]) -> Measured:
    """What is there."""
    pictures, seeds = subjects(config), list(config.plan.all_seeds)
    found, folders = {}, {}
    for row in ROWS.values():
        for picture in pictures:
            for seed in seeds:
                run = runs.get(named(row, picture, seed))
                if run is not None and (run.path / "results.json").is_file():
                    found[row.name, picture.name, seed] = Results.of(run)
                    folders[row.name, picture.name, seed] = run
    return Measured(found, pictures, seeds, read_costs(runs[COST]) if COST in runs else {}, folders)
