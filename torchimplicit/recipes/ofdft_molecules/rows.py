"""The rows of the table, and their runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.ofdft_molecules.config import MoleculesConfig
from torchimplicit.recipes.ofdft_runs import INNER_STEPS, molecules
from torchimplicit.recipes.orbital_free.config import OrbitalFreeTraining
from torchimplicit.recipes.runtime.table import Job

ENDLESS = 10**6
"""Iterations: the time ends a run."""


@dataclass(frozen=True)
class Row:
    """What differs from the recipe.

    Attributes:
        label: for people.
        changes: of the recipe's settings.
        energy: whether energies are trained.
        qm9: whether it is on those molecules.
    """

    label: str
    changes: dict[str, Any] = field(default_factory=dict)
    energy: bool = False
    qm9: bool = False


ROWS = {
    "gauss-newton": Row("Gauss–Newton"),
    "l-bfgs": Row("L-BFGS", {"optimizer": "l-bfgs"}),
    "adam": Row("Adam", {"optimizer": "adam"}),
    "energy": Row("Gauss–Newton; energies too", energy=True),
    "no-tails": Row("Gauss–Newton; tails not weighted", {"tail_weight": 0.0}),
    "no-pairs": Row("Gauss–Newton; neighbours not known", {"pairs": False}),
    "slides": Row("Adam; neither, as in the slides", {"optimizer": "adam", "tail_weight": 0.0, "pairs": False}),
    "qm9": Row("Gauss–Newton; QM9", energy=True, qm9=True),
}
"""By the name of their runs."""


def rows_of(config: MoleculesConfig) -> dict[str, Row]:
    """Those that are asked for.

    Raises:
        UserError: one that there is not.
    """
    unknown = [name for name in config.rows if name not in ROWS]
    if unknown:
        raise UserError(f"there is no row '{unknown[0]}'; the rows are {', '.join(ROWS)}")
    asked = config.rows or tuple(ROWS)
    return {name: row for name, row in ROWS.items() if name in asked and (config.qm9_limit or not row.qm9)}


def name_of(row: str, seed: int) -> str:
    """The name of a run."""
    return f"{row}-{seed}"


def jobs(config: MoleculesConfig) -> list[Job]:
    """Seed by seed, so that what slows the machine for a while slows all rows; those of QM9 at the end."""
    return [
        Job(name_of(name, seed), "ofdft-qm9" if row.qm9 else "ofdft-small", settings_of(config, row, seed))
        for qm9 in (False, True)
        for seed in config.plan.all_seeds
        for name, row in rows_of(config).items()
        if row.qm9 == qm9
    ]


def settings_of(config: MoleculesConfig, row: Row, seed: int) -> OrbitalFreeTraining:
    """The settings of a run. The seed is that of the weights and of the geometries, or of what is held out."""
    if row.qm9:
        chosen = molecules(
            config.qm9,
            grid=config.grid,
            data_dir=config.data_dir,
            limit=config.qm9_limit,
            held_out=config.qm9_held_out,
            geometry_seed=seed,
        )
    else:
        chosen = molecules(
            *config.molecules,
            grid=config.grid,
            data_dir=config.data_dir,
            distort=config.distort,
            train_copies=config.train_copies,
            validation_copies=config.validation_copies,
            test_copies=config.test_copies,
            geometry_seed=seed,
        )
    plain = OrbitalFreeTraining(
        molecules=chosen,
        iterations=ENDLESS,
        seconds=config.qm9_seconds if row.qm9 else config.seconds,
        learning_rate=config.learning_rate,
        energy_weight=config.energy_weight if row.energy else 0.0,
        inner_steps=INNER_STEPS,
        processes=config.processes,
        page=False,
        seed=seed,
    )
    return replace(plain, **row.changes)
