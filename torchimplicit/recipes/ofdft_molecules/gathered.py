"""What the runs of the table have left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torchimplicit.recipes.ofdft_molecules.config import MoleculesConfig
from torchimplicit.recipes.ofdft_molecules.rows import Row, name_of, rows_of
from torchimplicit.recipes.ofdft_runs import results_of
from torchimplicit.recipes.orbital_free.history import Results
from torchimplicit.recipes.orbital_free.measure import Quality, summarized
from torchimplicit.recipes.run import Run


@dataclass(frozen=True)
class Group:
    """The seeds of a row; there is one at least.

    Attributes:
        name, row: which.
        results: by seed.
    """

    name: str
    row: Row
    results: dict[int, Results]

    def each(self, figure: Callable[[Results], float]) -> list[float]:
        """Of every seed."""
        return [figure(one) for one in self.results.values()]

    def tested(self) -> list[Quality]:
        """The test molecules of all seeds."""
        return [quality for one in self.results.values() for quality in one.test]


def read(config: MoleculesConfig, runs: Mapping[str, Run]) -> list[Group]:
    """The rows that have a run."""
    groups = []
    for name, row in rows_of(config).items():
        found = {
            seed: one
            for seed in config.plan.all_seeds
            if (one := results_of(runs.get(name_of(name, seed)))) is not None
        }
        if found:
            groups.append(Group(name, row, found))
    return groups


def validated(one: Results) -> float:
    """The validation molecules' mean L1 per electron: what a reader may choose a row by."""
    return summarized(one.validation).l1
