"""The settings of the table, and of a training whose minimizations are counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.optimizing.names import OptimizerName
from torchimplicit.recipes.options import not_negative, option, positive
from torchimplicit.recipes.orbital_free.config import OrbitalFreeTraining
from torchimplicit.recipes.runtime.table import Plan


@dataclass(frozen=True, kw_only=True)
class CountedTraining:
    """A training, and its start and its end measured by two ways to find a density."""

    training: OrbitalFreeTraining = field(default_factory=lambda: OrbitalFreeTraining(spectrum=True, page=False))

    descent_tolerance: float = 1e-4
    """Of gradient descent with momentum, where the slides stop it."""

    descent_rate: float = 3e-3
    """Of gradient descent, likewise."""

    most_steps: int = 10_000
    """Of gradient descent, likewise."""

    tight_tolerance: float = 1e-8
    """Of L-BFGS with a kept Hessian."""

    def __post_init__(self) -> None:
        positive(self, "descent_tolerance", "descent_rate", "most_steps", "tight_tolerance")


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """Inner iterations and spectra along training: two ways to find a density, with and without what might help."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=3, together=100))

    molecules: tuple[str, ...] = ("CH4",)
    """By their formulas; they are trained together."""

    rows: tuple[str, ...] = ()
    """Which rows, by the names of their runs; without any, all that the optimizer can train."""

    iterations: int = 20
    """Of the outer optimizer."""

    measure_every: int = 5
    """Iterations between two counts and spectra."""

    weizsaecker: float = 0.2
    """The share of the von Weizsäcker kinetic energy: the less, the softer the functional."""

    penalty: float = 0.0
    """The factor of ∫ρ₋², in all rows but the one that tries it."""

    tail_weight: float = 0.0
    """What low densities weigh more in the loss; 0 is the loss of the slides."""

    optimizer: OptimizerName = "least-squares"
    """The outer one. Gauss-Newton goes far enough for the functional to become soft; it takes no penalty or correction
    that is drawn at random, whose rows need --optimizer l-bfgs or adam."""

    learning_rate: float = 1e-2
    """Adam's peak."""

    descent_steps: int = 2000
    """Of gradient descent, at most, in training by it; before and after training it is given 10,000, as in the
    slides."""

    hessian_weight: float = 1e-6
    """Of the penalty on the Hessian's size, in the row that tries it."""

    floor_weight: float = 1e-2
    """Of the penalty on a least eigenvalue below --floor, in the row that tries it."""

    floor: float = 0.5
    """See --floor-weight; in hartree."""

    grid: int = 0
    """Level of the integration grid, 0 to 9."""

    data_dir: Path | None = None
    """The folder of computed molecules. By default the user's cache; what is not there is computed by PySCF."""

    def __post_init__(self) -> None:
        positive(self, "iterations", "measure_every", "learning_rate", "descent_steps")
        positive(self, "hessian_weight", "floor_weight", "floor")
        not_negative(self, "weizsaecker", "penalty", "tail_weight", "grid")
        if not self.molecules or len(set(self.molecules)) < len(self.molecules):
            raise UserError(f"{option('molecules')} must be different molecules, one at least")


def default() -> StabilityConfig:
    """The table."""
    return StabilityConfig()


def training() -> CountedTraining:
    """One run."""
    return CountedTraining()
