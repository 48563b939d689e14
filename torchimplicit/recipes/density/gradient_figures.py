"""What is measured of the gradients at one molecule's minimum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import linear_regression

from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.settings import from_plain

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

    @staticmethod
    def of(run: Run) -> MoleculeResults:
        """Read what a run has written."""
        return from_plain(MoleculeResults, run.read_json("results.json"))


def slope(nudges: Sequence[float], errors: Sequence[float]) -> float:
    """Least-squares slope of the log error over the log nudge; NaN with fewer than two usable errors.

    Args:
        nudges: falling.
        errors: their errors. Those after the least one come from the minimizations' tolerance.
    """
    falling = list(zip(nudges, errors, strict=True))[: list(errors).index(min(errors)) + 1]
    pairs = [(math.log(n), math.log(e)) for n, e in falling if FIT[0] < e < FIT[1]]
    return linear_regression(*zip(*pairs, strict=True)).slope if len(pairs) > 1 else math.nan
