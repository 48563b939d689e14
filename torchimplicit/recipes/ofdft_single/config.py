"""The settings of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.options import fraction, not_negative, option, positive
from torchimplicit.recipes.orbital_free.config import EstimatorName
from torchimplicit.recipes.runtime.table import Plan

GradientOptimizer = Literal["l-bfgs", "adam"]
"""Those that take a gradient, whoever estimates it."""


@dataclass(frozen=True, kw_only=True)
class SingleConfig:
    """One molecule, four estimators of the gradient, two optimizers: the same loss, and the time of each."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=2, together=100))

    molecule: str = "H2O"
    """By its formula."""

    estimators: tuple[EstimatorName, ...] = ("implicit", "damped", "eqprop", "eqprop-one-sided")
    """Exact implicit differentiation and damped, equilibrium propagation symmetric and one-sided."""

    optimizers: tuple[GradientOptimizer, ...] = ("l-bfgs", "adam")
    """Each with every estimator."""

    l_bfgs_iterations: int = 40
    """Of L-BFGS."""

    adam_iterations: int = 120
    """Of Adam."""

    learning_rate: float = 3e-2
    """Adam's peak."""

    level: float = 0.6
    """The time is taken until the loss has fallen to so much of its start."""

    pairs: bool = False
    """Let the linear term know where an atom's neighbours are; of one geometry it then knows nearly everything."""

    tail_weight: float = 0.0
    """What low densities weigh more in the loss; 0 is the loss of the slides."""

    grid: int = 0
    """Level of the integration grid, 0 to 9."""

    data_dir: Path | None = None
    """The folder of computed molecules. By default the user's cache; what is not there is computed by PySCF."""

    def __post_init__(self) -> None:
        positive(self, "l_bfgs_iterations", "adam_iterations", "learning_rate")
        not_negative(self, "tail_weight", "grid")
        fraction(self, "level")
        for name in ("estimators", "optimizers"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"{option(name)} must be different names, one at least")


def default() -> SingleConfig:
    """The table."""
    return SingleConfig()
