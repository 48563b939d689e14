"""The settings of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.options import not_negative, option, positive
from torchimplicit.recipes.runtime.table import Plan


@dataclass(frozen=True, kw_only=True)
class MoleculesConfig:
    """Four molecules in new geometries, by three optimizers and four losses; then molecules of QM9, some held out."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=2, together=100))

    molecules: tuple[str, ...] = ("H2", "H2O", "NH3", "CH4")
    """By their formulas."""

    rows: tuple[str, ...] = ()
    """Which rows, by the names of their runs; without any, all."""

    seconds: float = 120.0
    """Of the processor's time, for every row of the four molecules."""

    distort: float = 0.04
    """Standard deviation, in angstrom, of the coordinates' displacement, another for every seed."""

    train_copies: int = 1
    """Distorted copies of every molecule to train on, beside the molecule itself."""

    validation_copies: int = 1
    """Others to select the weights by."""

    test_copies: int = 2
    """Others to test on."""

    learning_rate: float = 1e-2
    """Adam's peak."""

    energy_weight: float = 1.0
    """Of the energy term, in the rows that have one."""

    qm9: str = "qm9"
    """Where the molecules of the last row are from: qm9, which is downloaded, or a folder of xyz files."""

    qm9_limit: int = 60
    """How many, those with the fewest atoms; 0: no such row. They take some 140 MB each."""

    qm9_held_out: int = 8
    """Of them for validation alone, and as many for test alone."""

    qm9_seconds: float = 1500.0
    """Of the processor's time, for that row."""

    grid: int = 0
    """Level of the integration grid, 0 to 9."""

    processes: int = 1
    """Of a run, which share its molecules; the time is that of the first of them, whose share is the largest."""

    data_dir: Path | None = None
    """The folder of computed molecules. By default the user's cache; what is not there is computed by PySCF."""

    def __post_init__(self) -> None:
        positive(self, "seconds", "distort", "learning_rate", "energy_weight", "qm9_held_out", "qm9_seconds")
        positive(self, "validation_copies", "test_copies", "processes")
        not_negative(self, "train_copies", "qm9_limit", "grid")
        if not self.molecules or len(set(self.molecules)) < len(self.molecules):
            raise UserError(f"{option('molecules')} must be different molecules, one at least")
        if self.qm9_limit and self.qm9_limit <= 2 * self.qm9_held_out:
            raise UserError(
                f"--qm9-held-out {self.qm9_held_out} takes {2 * self.qm9_held_out} of --qm9-limit {self.qm9_limit} away"
            )


def default() -> MoleculesConfig:
    """The table."""
    return MoleculesConfig()
