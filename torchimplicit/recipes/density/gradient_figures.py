"""What is measured of the gradients at one molecule's minimum: its settings, and the figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import linear_regression
from typing import Literal

from torchimplicit.recipes.density.settings import MoleculeFiles
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import not_negative, option, own_first, positive

# -- The settings ------------------------------------------------------------------------------------------------------

State = Literal["fitted", "trained"]
"""The functional: only fitted, or one with less von Weizsäcker energy that was also trained."""

STATES: tuple[State, ...] = ("fitted", "trained")

WEIZSAECKER: dict[State, float] = {"fitted": 0.4, "trained": 0.05}

SPREAD: dict[State, float] = {"fitted": 0.1, "trained": 0.3}
"""Standard deviation of the weights in the enhancement factor's last layer."""

LEARNING_RATE = 3e-3

FELT = 0.05
"""Smallest share of the gradient that must come through the mode that is softened."""

TOLERANCE = 1e-8
"""Relative tolerance on the residual, for the solvers that have one."""


@own_first
@dataclass(frozen=True, kw_only=True)
class MoleculeGradientsConfig(MoleculeFiles):
    """One molecule and one functional with random network weights: every gradient estimator at its minimum."""

    molecule: str = "H2"
    """The molecule, by formula: H2, H2O, NH3, CH4 and others."""

    state: State = "fitted"
    """fitted: 0.4 times the von Weizsäcker energy and a network of small weights. trained: 0.05 times it and larger
    weights, then some steps of Adam, which widens the spectrum."""

    seed: int = 0
    """Random seed of the network's weights, the geometry and the directions."""

    sigma: float = 0.04
    """Standard deviation of the nuclei's random displacements, in angstrom; 0 keeps the molecule's own geometry."""

    training_steps: int = 60
    """Steps of Adam, for the trained state."""

    tolerance: float = 1e-10
    """Tolerance of the minimizations on the norm of the projected gradient, in hartree, in the overlap's
    coordinates."""

    directions: int = 6
    """Number of random directions in parameter space along which finite differences are taken."""

    step: float = 3e-3
    """Smallest step of the finite differences: the length of the parameters' displacement."""

    nudges: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4)
    """Nudges of equilibrium propagation, relative to the cotangent's length."""

    loss_nudges: tuple[float, ...] = (0.1, 1e-2, 1e-3, 1e-4)
    """Weights of the loss in the energy, for propagation with the whole loss."""

    loose: tuple[float, ...] = (1e-3, 1e-4, 1e-5, 1e-6, 1e-8)
    """Tolerances of the minimizations in equilibrium propagation."""

    beyond: tuple[float, ...] = (0.1, 0.5, 0.9, 1.1, 2.0, 5.0)
    """Weights of the loss, relative to the least eigenvalue, for the symmetric difference."""

    damping: float = 0.25
    """Damping, relative to the softest eigenvalue, in the runs that soften it."""

    softness: tuple[float, ...] = (1.0, 0.1, 1e-2, 1e-3, 1e-4, -1e-3, -1e-2, -0.1, -0.4)
    """Values to which the softest eigenvalue is moved, relative to its own."""

    descent_steps: int = 2000
    """Steps of gradient descent and Adam on the least-squares form of the adjoint system."""

    most_steps: int = 40
    """Largest number of steps of a minimization that may have no minimum."""

    repeats: int = 5
    """Number of times each adjoint solver is timed, in turn with the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "tolerance", "directions", "step", "damping", "descent_steps", "most_steps", "repeats")
        not_negative(self, "seed", "sigma", "training_steps")
        for name in ("nudges", "loss_nudges", "loose", "beyond"):
            if len(getattr(self, name)) < 2 or not all(value > 0 for value in getattr(self, name)):
                raise UserError(f"{option(name)} must be positive numbers, two at least")
        if 1.0 not in self.softness:
            raise UserError(f"{option('softness')} must hold 1, the eigenvalue as it is")


# -- The figures -------------------------------------------------------------------------------------------------------

FIT = (1e-6, 1e-2)
"""Range of errors in which slopes are fitted: smaller errors are the minimization's own, larger ones follow no power
law."""


@dataclass(frozen=True)
class Point:
    """The minimum.

    Attributes:
        size: basis functions.
        points: number of points of the grid.
        loss: half the squared distance to the Kohn-Sham density, per electron.
        saddles: minimizations that ended at a saddle before it was found.
        steps: steps of the last minimization.
        least, largest: eigenvalues of the projected Hessian in coordinates of the overlap.
        raw_least, raw_largest: in the coefficients themselves.
    """

    size: int
    points: int
    loss: float
    saddles: int
    steps: int
    least: float
    largest: float
    raw_least: float
    raw_largest: float

    @property
    def condition(self) -> float:
        return self.largest / self.least

    @property
    def raw_condition(self) -> float:
        return self.raw_largest / self.raw_least


@dataclass(frozen=True)
class Difference:
    """Finite differences along random directions, compared with the implicit gradient.

    Attributes:
        error: error of the vector of all directional derivatives, relative.
        worst: largest error of a single derivative.
    """

    error: float
    worst: float


@dataclass(frozen=True)
class Nudged:
    """Equilibrium propagation with one nudge; errors are relative to the implicit gradient.

    Attributes:
        nudge: relative to the cotangent's length.
    """

    nudge: float
    one_sided: float
    symmetric: float
    one_sided_status: str
    symmetric_status: str


@dataclass(frozen=True)
class Loosened:
    """Equilibrium propagation with the whole loss in the energy, with one weight and one tolerance of the minimization;
    one-sided and symmetric."""

    nudge: float
    tolerance: float
    one_sided: float
    symmetric: float


@dataclass(frozen=True)
class Beyond:
    """The symmetric difference with the whole loss, with a weight near or above the least eigenvalue.

    Attributes:
        share: weight over eigenvalue.
        error: relative.
        moved: the larger displacement of the two minimizations, over the distance to the Kohn-Sham density.
    """

    share: float
    error: float
    moved: float
    status: str


@dataclass(frozen=True)
class Damped:
    """One-sided propagation with the whole loss, and implicit differentiation damped by the same weight.

    Attributes:
        damping: damping of both gradients.
        apart: the relative distance between the two gradients.
        exact: that of the damped one from the implicit gradient.
    """

    damping: float
    apart: float
    exact: float


@dataclass(frozen=True)
class Softened:
    """Gradients after moving the softest eigenvalue that the gradient depends on.

    Attributes:
        eigenvalue: what it was moved to.
        norm, cosine: by estimator: over the length of, and with, the exact gradient before.
        status: by estimator, of the backward pass.
    """

    eigenvalue: float
    norm: dict[str, float]
    cosine: dict[str, float]
    status: dict[str, str]


@dataclass(frozen=True)
class Solved:
    """One solver of the adjoint system.

    Attributes:
        products: with the Hessian.
        seconds: CPU time of the process, the median of several, all ways in turn.
        error: relative error against the solution by eigendecomposition.
        status: the status, as text.
        trace: products and error along the way.
    """

    products: float
    seconds: float
    error: float
    status: str
    trace: list[list[float]]


@dataclass(frozen=True)
class MoleculeResults:
    """All measurements at one molecule's minimum.

    Attributes:
        automatic: errors of the nudge that is chosen: ``one_sided``, ``symmetric``.
        adjoint: by coordinates (``overlap``, ``raw``), then by name.
        product_seconds: CPU time of one product.
        assembled: products that the reference Hessian took once.
    """

    point: Point
    difference: Difference
    nudged: list[Nudged]
    automatic: dict[str, float]
    loosened: list[Loosened]
    beyond: list[Beyond]
    damped: list[Damped]
    softest: float
    damping: float
    softened: list[Softened]
    adjoint: dict[str, dict[str, Solved]]
    product_seconds: dict[str, float]
    assembled: int

    def slope(self, form: str) -> float:
        """Slope of the log error over the log nudge.

        Args:
            form: ``one_sided`` or ``symmetric``.
        """
        return slope([one.nudge for one in self.nudged], [float(getattr(one, form)) for one in self.nudged])

    def symmetric(self, weight: float, tolerance: float) -> float:
        """The error of the symmetric difference with this weight of the loss and tolerance (:class:`Loosened`)."""
        matching = (one for one in self.loosened if (one.nudge, one.tolerance) == (weight, tolerance))
        return next(matching).symmetric


def slope(nudges: Sequence[float], errors: Sequence[float]) -> float:
    """Least-squares slope of the log error over the log nudge; NaN with fewer than two usable errors.

    Args:
        nudges: falling.
        errors: their errors. Those after the least one come from the minimizations' tolerance.
    """
    falling = list(zip(nudges, errors, strict=True))[: list(errors).index(min(errors)) + 1]
    pairs = [(math.log(n), math.log(e)) for n, e in falling if FIT[0] < e < FIT[1]]
    return linear_regression(*zip(*pairs, strict=True)).slope if len(pairs) > 1 else math.nan
