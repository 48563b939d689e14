"""What the table's runs came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchimplicit.recipes.fields.cost import FieldCost
from torchimplicit.recipes.fields.cost import read as read_costs
from torchimplicit.recipes.implicit_signals.config import SignalsConfig
from torchimplicit.recipes.implicit_signals.rows import COST, ROWS, Row, named
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.training.results import Results, steps_to_best


@dataclass(frozen=True)
class Measured:
    """The runs that are there.

    Attributes:
        runs: by the row's name and the seed.
        seeds: all of them.
        cost: of a step of each row; empty where it was not measured.
    """

    runs: dict[tuple[str, int], Results]
    seeds: Sequence[int]
    cost: dict[str, FieldCost]

    def of(self, row: Row) -> list[Results]:
        """The runs of a row, seed by seed."""
        return [self.runs[row.name, seed] for seed in self.seeds if (row.name, seed) in self.runs]

    def figures(self, row: Row, name: str) -> list[float]:
        """A figure of every run that came to its end."""
        return [one.test.figures[name] for one in self.of(row) if one.test is not None]

    def over_twin(self, row: Row) -> list[float]:
        """The PSNR less the explicit twin's, seed by seed."""
        found = []
        for seed in self.seeds:
            one, other = (self.runs.get((which.name, seed)) for which in (row, row.twin))
            if one is not None and other is not None and one.test is not None and other.test is not None:
                found.append(one.test.figures["PSNR"] - other.test.figures["PSNR"])
        return found

    def steps_to(self, row: Row) -> list[tuple[int | None, int]]:
        """After how many steps a run reaches its twin's best validation, beside the step at which the twin had it;
        ``None`` where it never does."""
        found = []
        for seed in self.seeds:
            own, other = (self.runs.get((which.name, seed)) for which in (row, row.twin))
            steps = steps_to_best(own, other, "PSNR")
            if steps is not None:
                found.append(steps)
        return found


def measured(config: SignalsConfig, runs: dict[str, Run]) -> Measured:
    """What is there."""
    found = {}
    for row in ROWS.values():
        for seed in config.plan.all_seeds:
            run = runs.get(named(row, seed))
            if run is not None and (run.path / "results.json").is_file():
                found[row.name, seed] = Results.of(run)
    return Measured(found, list(config.plan.all_seeds), read_costs(runs[COST]) if COST in runs else {})
