"""The rows of the table, and their runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.ofdft_runs import molecules, results_of
from torchimplicit.recipes.ofdft_stability.config import CountedTraining, StabilityConfig
from torchimplicit.recipes.ofdft_stability.measure import Counted
from torchimplicit.recipes.orbital_free.config import OrbitalFreeTraining
from torchimplicit.recipes.orbital_free.history import Results
from torchimplicit.recipes.plain import from_plain
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Job

CORRECTED, PENALTY, DECAY = 4, 100.0, 1e-6
"""Iterates of the fixed-point correction; the factor of ∫ρ₋² in the row that tries it; likewise the weight decay."""

INNER_STEPS = 24
"""The most steps of L-BFGS in training; with the next one the Hessian would be made anew, by products, and a density
that is lost would take as long as ten that are found."""

Inner = Literal["descent", "l-bfgs"]
INNER: dict[Inner, str] = {"l-bfgs": "preconditioned L-BFGS", "descent": "gradient descent"}


@dataclass(frozen=True)
class Help:
    """What might help.

    Attributes:
        label: for people.
        changes: of the recipe's settings, by those of the table.
        drawn: whether the loss is drawn at random, which Gauss-Newton cannot take.
    """

    label: str
    changes: Callable[[StabilityConfig], dict[str, Any]]
    drawn: bool = False


HELPS = {
    "plain": Help("plain", lambda config: {}),
    "cold": Help("searches from the superposition", lambda config: {"cold": True}),
    "even": Help("fixed-point correction, even", lambda config: {"cold": True, "correction": CORRECTED}),
    "random": Help(
        "fixed-point correction, random",
        lambda config: {"cold": True, "correction": CORRECTED, "correction_random": True},
        True,
    ),
    "hessian": Help("penalty on the Hessian", lambda config: {"hessian_weight": config.hessian_weight}, True),
    "floor": Help(
        "penalty on a least eigenvalue", lambda config: {"floor_weight": config.floor_weight, "floor": config.floor}
    ),
    "decay": Help("weight decay", lambda config: {"decay": DECAY}),
    "negative": Help("penalty on negative densities", lambda config: {"penalty": PENALTY}),
}
"""By the second part of a row's name."""


@dataclass(frozen=True)
class Row:
    """The seeds of one way to find a density with one help; there is one at least.

    Attributes:
        inner, help: which.
        results: of the trainings, by seed.
        counted: at their starts and ends, by seed.
    """

    inner: Inner
    help: str
    results: dict[int, Results]
    counted: dict[int, Counted]

    @property
    def name(self) -> str:
        """Of the row."""
        return f"{self.inner}-{self.help}"

    @property
    def label(self) -> str:
        """For people."""
        return f"{INNER[self.inner]}; {HELPS[self.help].label}"


def all_rows(config: StabilityConfig) -> dict[str, tuple[Inner, str]]:
    """Those that are asked for, by their names.

    Raises:
        UserError: one that there is not, or that the optimizer cannot train.
    """
    every = {f"{inner}-{way}": (inner, way) for inner in INNER for way in HELPS}
    drawn = {name for name, (_, way) in every.items() if HELPS[way].drawn and config.optimizer == "least-squares"}
    for name in config.rows:
        if name not in every:
            raise UserError(f"there is no row '{name}'; the rows are {', '.join(every)}")
        if name in drawn:
            raise UserError(f"row '{name}' is drawn at random: it needs --optimizer l-bfgs or adam")
    return {name: row for name, row in every.items() if name in (config.rows or every.keys() - drawn)}


def name_of(row: str, seed: int) -> str:
    """The name of a run."""
    return f"{row}-{seed}"


def jobs(config: StabilityConfig) -> list[Job]:
    """Seed by seed; those of gradient descent at the end, which take far longer."""
    return [
        Job(name_of(name, seed), "ofdft-stability-training", settings_of(config, *row, seed))
        for inner in INNER
        for seed in config.plan.all_seeds
        for name, row in all_rows(config).items()
        if row[0] == inner
    ]


def settings_of(config: StabilityConfig, inner: Inner, way: str, seed: int) -> CountedTraining:
    """The settings of a run."""
    counted = CountedTraining()
    slow = inner == "descent"
    plain = OrbitalFreeTraining(
        molecules=molecules(*config.molecules, grid=config.grid, data_dir=config.data_dir),
        weizsaecker=config.weizsaecker,
        penalty=config.penalty,
        pairs=False,
        tail_weight=config.tail_weight,
        optimizer=config.optimizer,
        iterations=config.iterations,
        learning_rate=config.learning_rate,
        decay=0.0,
        measure_every=config.measure_every,
        inner=inner,
        inner_tolerance=counted.descent_tolerance if slow else counted.tight_tolerance,
        inner_steps=config.descent_steps if slow else INNER_STEPS,
        inner_rate=counted.descent_rate,
        spectrum=True,
        page=False,
        seed=seed,
    )
    return replace(counted, training=replace(plain, **HELPS[way].changes(config)))


def read(config: StabilityConfig, runs: Mapping[str, Run]) -> list[Row]:
    """The rows that have a run."""
    rows = []
    for name, (inner, way) in all_rows(config).items():
        results, counts = {}, {}
        for seed in config.plan.all_seeds:
            run = runs.get(name_of(name, seed))
            one = results_of(run)
            if run is not None and one is not None and (run.path / "counted.json").is_file():
                results[seed] = one
                counts[seed] = from_plain(Counted, run.read_json("counted.json"))
        if results:
            rows.append(Row(inner, way, results, counts))
    return rows
