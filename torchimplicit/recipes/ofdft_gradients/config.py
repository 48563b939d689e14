"""The settings of the table and of its measurement on one molecule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import not_negative, option, positive

State = Literal["fitted", "trained"]
"""Which functional: one that is only fitted, or one of less von Weizsäcker energy that was trained too."""

STATES: tuple[State, ...] = ("fitted", "trained")


WEIZSAECKER: dict[State, float] = {"fitted": 0.4, "trained": 0.05}

SPREAD: dict[State, float] = {"fitted": 0.1, "trained": 0.3}
"""Standard deviation of the weights of the enhancement factor's last layer."""

LEARNING_RATE = 3e-3

FELT = 0.05
"""The least share of the gradient that comes through a mode which is moved."""

TOLERANCE = 1e-8
"""Relative, of the residual, for the solvers that have one."""


@dataclass(frozen=True, kw_only=True)
class MoleculeGradientsConfig:
    """One molecule and one functional with random network weights, and every gradient at its minimum."""

    molecule: str = "H2"
    """By its formula: H2, H2O, NH3, CH4 and others that are known."""

    state: State = "fitted"
    """fitted: c = 0.4 times the von Weizsäcker energy and a network of small weights. trained: c = 0.05 and larger
    weights, then some steps of Adam, which leaves a wider spectrum."""

    seed: int = 0
    """Of the network's weights, of the geometry and of the directions."""

    sigma: float = 0.04
    """Standard deviation of the displacements of the nuclei, in angstrom; 0: the molecule's own geometry."""

    grid: int = 0
    """Level of the integration grid."""

    data_dir: Path | None = None
    """The folder of computed molecules. By default the user's cache; what is not there is computed by PySCF."""

    training_steps: int = 60
    """Of Adam, for the trained state."""

    tolerance: float = 1e-10
    """Of the minimizations: the norm of the projected gradient, in hartree, in coordinates of the overlap."""

    directions: int = 6
    """Random directions in all parameters, along which finite differences are taken."""

    step: float = 3e-3
    """Of the finite differences: the length of the smallest displacement of the parameters."""

    nudges: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4)
    """Of equilibrium propagation, relative to the cotangent's length."""

    loss_nudges: tuple[float, ...] = (0.1, 1e-2, 1e-3, 1e-4)
    """Weights of the loss in the energy, for propagation with the whole loss."""

    loose: tuple[float, ...] = (1e-3, 1e-4, 1e-5, 1e-6, 1e-8)
    """Tolerances of the minimizations there."""

    beyond: tuple[float, ...] = (0.1, 0.5, 0.9, 1.1, 2.0, 5.0)
    """Weights of the loss over the least eigenvalue, for the symmetric difference."""

    damping: float = 0.25
    """Over the softest eigenvalue, where that is moved."""

    softness: tuple[float, ...] = (1.0, 0.1, 1e-2, 1e-3, 1e-4, -1e-3, -1e-2, -0.1, -0.4)
    """What the softest eigenvalue becomes, over what it was."""

    descent_steps: int = 2000
    """Of gradient descent and Adam on the least-squares form of the adjoint system."""

    most_steps: int = 40
    """Of a minimization that may have no minimum to find."""

    repeats: int = 5
    """How often each adjoint solver is timed, in turn with the others."""

    def __post_init__(self) -> None:
        positive(self, "tolerance", "directions", "step", "damping", "descent_steps", "most_steps", "repeats")
        not_negative(self, "seed", "sigma", "training_steps")
        for name in ("nudges", "loss_nudges", "loose", "beyond"):
            if len(getattr(self, name)) < 2 or not all(value > 0 for value in getattr(self, name)):
                raise UserError(f"{option(name)} must be positive numbers, two at least")
        if 1.0 not in self.softness:
            raise UserError(f"{option('softness')} must hold 1, the eigenvalue as it is")


def measurement() -> MoleculeGradientsConfig:
    """One molecule."""
    return MoleculeGradientsConfig()
