"""What the runs of the table have measured, by molecule and functional."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from torchimplicit.recipes.chemistry import known
from torchimplicit.recipes.ofdft_gradients.config import STATES, MoleculeGradientsConfig, State, TableConfig
from torchimplicit.recipes.ofdft_gradients.results import MoleculeResults, Softened
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Job

ESTIMATORS = ("implicit", "damped", "one-sided, whole loss", "symmetric")
REFERENCE = "reference Hessian"


@dataclass(frozen=True)
class Group:
    """The seeds of one molecule and functional."""

    molecule: str
    state: State
    results: list[MoleculeResults]

    @property
    def name(self) -> str:
        return f"{self.molecule}, {self.state}"

    def worst(self, figure: Callable[[MoleculeResults], float]) -> float:
        """The largest over the seeds."""
        return max(figure(one) for one in self.results)

    def least(self, figure: Callable[[MoleculeResults], float]) -> float:
        """The smallest over the seeds."""
        return min(figure(one) for one in self.results)

    def middle(self, figure: Callable[[MoleculeResults], float]) -> float:
        """The median over the seeds."""
        return median(figure(one) for one in self.results)

    def softened(self, factor: int) -> list[Softened]:
        """Of every seed, at the place ``factor`` of the softest eigenvalue's list."""
        return [one.softened[factor] for one in self.results]


STEP = 1e-3
"""Of the finite differences: with the recipe's, three times as long, the fifth derivative shows where a functional is
stiff. Shorter ones drown in rounding where the loss is as good as zero, which it is not here."""


def named(molecule: str, state: State, seed: int) -> str:
    """The name of a run."""
    return f"{molecule}-{state}-seed{seed}"


def jobs(config: TableConfig) -> list[Job]:
    """Seed by seed.

    Raises:
        UserError: a molecule is not known.
    """
    for molecule in config.molecules:
        known.named(molecule)
    return [
        Job(named(molecule, state, seed), "ofdft-gradients-molecule", one(config, molecule, state, seed))
        for seed in config.plan.all_seeds
        for molecule in config.molecules
        for state in STATES
    ]


def one(config: TableConfig, molecule: str, state: State, seed: int) -> MoleculeGradientsConfig:
    """The settings of a run."""
    return MoleculeGradientsConfig(
        step=STEP,
        molecule=molecule,
        state=state,
        seed=seed,
        sigma=config.sigma,
        grid=config.grid,
        data_dir=config.data_dir,
    )


def gathered(config: TableConfig, runs: dict[str, Run]) -> list[Group]:
    """Of the runs that are there."""
    return [group for group in _groups(config, runs) if group.results]


def _groups(config: TableConfig, runs: dict[str, Run]) -> Iterator[Group]:
    for molecule in config.molecules:
        for state in STATES:
            names = [named(molecule, state, seed) for seed in config.plan.all_seeds]
            there = [runs[name] for name in names if name in runs and (runs[name].path / "results.json").is_file()]
            yield Group(molecule, state, [MoleculeResults.of(run) for run in there])
