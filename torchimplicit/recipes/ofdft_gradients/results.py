"""What is measured on one molecule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import linear_regression

from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.settings import from_plain

FIT = (1e-6, 1e-2)
"""Errors among which slopes are fitted: below is what the minimizations leave, above no power law."""


@dataclass(frozen=True)
class Point:
    """The minimum.

    Attributes:
        size: basis functions.
        points: of the grid.
        loss: half the squared distance to the Kohn-Sham density, per electron.
        saddles: minimizations that ended at a saddle before it was found.
        steps: of the last minimization.
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
    """Finite differences along random directions beside the implicit gradient.

    Attributes:
        error: of the vector of all directional derivatives, relative.
        worst: of the worst single one.
    """

    error: float
    worst: float


@dataclass(frozen=True)
class Nudged:
    """Propagation with one nudge; errors are relative, to the implicit gradient.

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
    """Propagation with the whole loss of one weight in the energy, minimized to one tolerance; both sides likewise."""

    nudge: float
    tolerance: float
    one_sided: float
    symmetric: float


@dataclass(frozen=True)
class Beyond:
    """The symmetric difference with the whole loss, its weight beside the least eigenvalue.

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
    """One-sided propagation with the whole loss, and damped implicit differentiation with its weight as damping.

    Attributes:
        damping: of both.
        apart: the relative distance between the two gradients.
        exact: that of the damped one from the implicit gradient.
    """

    damping: float
    apart: float
    exact: float


@dataclass(frozen=True)
class Softened:
    """Gradients where the softest eigenvalue that the gradient feels has been moved.

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
    """One way to solve the adjoint system.

    Attributes:
        products: with the Hessian.
        seconds: CPU time of the process, the median of several, all ways in turn.
        error: of the solution, relative, to that by the eigendecomposition.
        status: in words.
        trace: products and error along the way.
    """

    products: float
    seconds: float
    error: float
    status: str
    trace: list[list[float]]


@dataclass(frozen=True)
class MoleculeResults:
    """All of it.

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
        """Of log error over log nudge.

        Args:
            form: ``one_sided`` or ``symmetric``.
        """
        return slope([one.nudge for one in self.nudged], [float(getattr(one, form)) for one in self.nudged])

    @staticmethod
    def of(run: Run) -> MoleculeResults:
        """What a run has written."""
        return from_plain(MoleculeResults, run.read_json("results.json"))


def slope(nudges: Sequence[float], errors: Sequence[float]) -> float:
    """Of log error over log nudge, by least squares; not a number where fewer than two errors can be used.

    Args:
        nudges: falling.
        errors: of theirs. Those that follow the least one are what the minimizations leave.
    """
    falling = list(zip(nudges, errors, strict=True))[: list(errors).index(min(errors)) + 1]
    pairs = [(math.log(n), math.log(e)) for n, e in falling if FIT[0] < e < FIT[1]]
    return linear_regression(*zip(*pairs, strict=True)).slope if len(pairs) > 1 else math.nan
