"""The runs of the table, and what they have left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torchimplicit.recipes.ofdft_runs import INNER_STEPS, molecules, results_of
from torchimplicit.recipes.ofdft_single.config import GradientOptimizer, SingleConfig
from torchimplicit.recipes.orbital_free.config import EstimatorName, OrbitalFreeTraining
from torchimplicit.recipes.orbital_free.history import Results
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Job

ESTIMATORS: dict[EstimatorName, str] = {
    "implicit": "implicit",
    "damped": "implicit, damped",
    "eqprop": "propagation, symmetric",
    "eqprop-one-sided": "propagation, one-sided",
}
OPTIMIZERS: dict[GradientOptimizer, str] = {"l-bfgs": "L-BFGS", "adam": "Adam"}


@dataclass(frozen=True)
class Row:
    """The seeds of one estimator with one optimizer; there is one at least."""

    estimator: EstimatorName
    optimizer: GradientOptimizer
    results: dict[int, Results]

    @property
    def label(self) -> str:
        """For people."""
        return f"{ESTIMATORS[self.estimator]}; {OPTIMIZERS[self.optimizer]}"

    @property
    def every(self) -> list[Results]:
        """Of all seeds."""
        return list(self.results.values())


def name_of(estimator: EstimatorName, optimizer: GradientOptimizer, seed: int) -> str:
    """The name of a run."""
    return f"{estimator}-{optimizer}-{seed}"


def jobs(config: SingleConfig) -> list[Job]:
    """Seed by seed, so that what slows the machine for a while slows all rows."""
    return [
        Job(name_of(estimator, optimizer, seed), "ofdft-one", settings_of(config, estimator, optimizer, seed))
        for seed in config.plan.all_seeds
        for optimizer in config.optimizers
        for estimator in config.estimators
    ]


def settings_of(
    config: SingleConfig, estimator: EstimatorName, optimizer: GradientOptimizer, seed: int
) -> OrbitalFreeTraining:
    """The settings of a run."""
    iterations = {"l-bfgs": config.l_bfgs_iterations, "adam": config.adam_iterations}[optimizer]
    return OrbitalFreeTraining(
        molecules=molecules(config.molecule, grid=config.grid, data_dir=config.data_dir),
        pairs=config.pairs,
        tail_weight=config.tail_weight,
        gradient=estimator,
        optimizer=optimizer,
        iterations=iterations,
        learning_rate=config.learning_rate,
        inner_steps=INNER_STEPS,
        measure_every=max(1, iterations // 4),
        page=False,
        seed=seed,
    )


def read(config: SingleConfig, runs: Mapping[str, Run]) -> list[Row]:
    """The rows that have a run."""
    rows = []
    for optimizer in config.optimizers:
        for estimator in config.estimators:
            found = {
                seed: one
                for seed in config.plan.all_seeds
                if (one := results_of(runs.get(name_of(estimator, optimizer, seed)))) is not None
            }
            if found:
                rows.append(Row(estimator, optimizer, found))
    return rows
