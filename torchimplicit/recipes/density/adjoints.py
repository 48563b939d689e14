"""Measures every gradient estimator at one molecule's minimum."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from torchimplicit._solve import flat_system, solve
from torchimplicit.coordinates import Metric
from torchimplicit.diagnostics import curvature
from torchimplicit.errors import ConvergenceWarning
from torchimplicit.gradients import DampedImplicit, EquilibriumPropagation, Gradient, Implicit
from torchimplicit.linear import (
    CG,
    LSMR,
    MINRES,
    Dense,
    HessianMemory,
    Jacobi,
    LinearOperator,
    LinearSolver,
    ReferenceHessian,
)
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.models.orbital_free import Molecule, OrbitalFree, OrbitalFreeConfig, fit_linear
from torchimplicit.models.orbital_free.second import hessian
from torchimplicit.problems import Minimum
from torchimplicit.recipes.density.chemistry import Geometry, distorted, named
from torchimplicit.recipes.density.integrals import need_pyscf
from torchimplicit.recipes.density.prepare import prepared
from torchimplicit.recipes.density.settings import (
    FELT,
    LEARNING_RATE,
    SPREAD,
    TOLERANCE,
    WEIZSAECKER,
    ChemistrySettings,
    MoleculeGradientsConfig,
)
from torchimplicit.recipes.density.storage import file_name
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import cache_folder
from torchimplicit.recipes.runtime.run import Run, threads
from torchimplicit.recipes.runtime.settings import from_plain
from torchimplicit.solution import Report, Solution, Status
from torchimplicit.solvers import LBFGS

# -- What is measured on one molecule ----------------------------------------------------------------------------------


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


# -- A molecule's density at the minimum of a functional, and the gradient of a loss by any estimator there ------------


TRIES = 4
"""How often a minimization that ended at a saddle point is restarted."""

_STANDING = LBFGS(rtol=0.0, atol=1e30)
"""A solver that takes no step."""


@dataclass(frozen=True)
class Estimate:
    """A gradient in all parameters of the functional, flattened, and the report of its backward pass."""

    gradient: Tensor
    report: Report

    @property
    def status(self) -> str:
        """The status, as text."""
        return Status(int(self.report.status.max())).name

    def error(self, exact: Tensor) -> float:
        """The relative error."""
        return float((self.gradient - exact).norm() / exact.norm())

    def cosine(self, exact: Tensor) -> float:
        return float(torch.cosine_similarity(self.gradient, exact, dim=0))


class Optimum:
    """A functional's minimum for a molecule, in the coordinates of the overlap.

    The loss is the whole squared distance, :math:`\\tfrac12\\lVert p-p_{gs}\\rVert_S^2`; its cotangent in these
    coordinates is the difference itself.

    Attributes:
        molecule, functional, metric, problem: what is minimized.
        reference: the Hessian that preconditions.
        value: the minimum, ``[n]``.
        saddles: how many minimizations ended at a saddle before it.
        steps: steps of the last minimization.
    """

    def __init__(self, molecule: Molecule, functional: OrbitalFree, tolerance: float):
        self.molecule, self.functional, self.tolerance = molecule, functional, tolerance
        self.metric = Metric(molecule.overlap)
        self.problem = functional.problem(molecule, self.metric)
        self.reference = ReferenceHessian().init()
        self.saddles = 0
        found = self.minimize(molecule.guess)
        for _ in range(TRIES):
            if float(curvature(self.problem, found.value, subspace=molecule.size).least) > 0:
                break
            self.saddles += 1
            found = self.minimize(self.beside(found.value.detach()))
        self.value, self.steps = found.value.detach(), int(found.steps)

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.functional.parameters())

    def solver(self, tolerance: float | None = None) -> LBFGS:
        """The solver of the minimizations."""
        return LBFGS(preconditioner=self.reference, rtol=0.0, atol=tolerance or self.tolerance, max_steps=300)

    def minimize(self, start: Tensor, tolerance: float | None = None) -> Solution:
        with quiet():
            return solve(self.problem, start, solver=self.solver(tolerance), throw=False)

    def beside(self, p: Tensor) -> Tensor:
        """A point near a saddle, displaced along its direction of descent."""
        operator, _ = self.system(self.problem, p)
        matrix = operator.spectrum_matrix(torch.float64)[0]
        soft = torch.linalg.eigh(matrix).eigenvectors[:, 0]
        return p + 0.05 * self.metric.inverse[0] @ soft

    def loss(self, p: Tensor) -> Tensor:
        gap = p - self.molecule.reference
        return 0.5 * gap @ (self.molecule.overlap @ gap)

    @cached_property
    def cotangent(self) -> Tensor:
        """Cotangent of the loss in the metric's coordinates, ``[n]``."""
        return self.metric.root[0] @ (self.value - self.molecule.reference)

    @property
    def per_electron(self) -> float:
        """The loss per electron."""
        return float(self.loss(self.value) / self.molecule.electrons)

    def estimate(self, estimator: Gradient, problem: Minimum | None = None) -> Estimate:
        """The loss's gradient by an estimator, at the minimum (of ``problem``, stationary at the same point)."""
        with quiet():
            found = solve(problem or self.problem, self.value, solver=_STANDING, gradient=estimator, throw=False)
            grads = torch.autograd.grad(self.loss(found.value), self.parameters, allow_unused=True)
        assert found.adjoint is not None
        return Estimate(flat(grads, self.parameters), found.adjoint)

    def propagation(self, nudge: float | None, *, symmetric: bool, curved: bool = False) -> EquilibriumPropagation:
        return EquilibriumPropagation(
            nudge=nudge, symmetric=symmetric, curved=curved, solver=self.solver(), subspace=256
        )

    def pulled(self, adjoint: Tensor) -> Tensor:
        """The gradient in the parameters that an adjoint vector (``[n]``, in the metric's coordinates) gives, flat."""
        p = self.value.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.functional(p, self.molecule), p, create_graph=True)
        along = -(self.metric.inverse[0] @ adjoint) @ slope
        return flat(torch.autograd.grad(along, self.parameters, allow_unused=True), self.parameters)

    def system(self, problem: Minimum, p: Tensor | None = None) -> tuple[LinearOperator, Tensor]:
        """The adjoint system in the problem's coordinates: the operator, and the right side ``[1, n]``."""
        p = self.value if p is None else p
        system, z, params = flat_system(problem, p, ())
        operator = system.operator(system.linearize(z, params), False)
        gap = p - self.molecule.reference
        u = self.molecule.overlap @ gap if problem.metric is None else self.metric.root[0] @ gap
        return operator, operator.project(u[None])


def flat(grads: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """Flatten gradients into one vector; a missing gradient counts as zero."""
    pairs = zip(grads, parameters, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])


def check(config: MoleculeGradientsConfig) -> None:
    """Refuse settings that cannot be run here.

    Raises:
        UserError: the molecule is not known; it is not computed yet and PySCF is missing.
    """
    geometry, settings, folder = _asked(config)
    if not (folder / file_name(geometry, settings)).is_file():
        need_pyscf()


def load(config: MoleculeGradientsConfig) -> Molecule:
    """The molecule in its geometry.

    Raises:
        UserError: it cannot be had.
    """
    geometry, settings, folder = _asked(config)
    found = prepared([geometry], settings, folder)
    if found.failures:
        raise UserError(f"{geometry.name}: {found.failures[0].reason}")
    return found.molecules[0]


def _asked(config: MoleculeGradientsConfig) -> tuple[Geometry, ChemistrySettings, Path]:
    """The molecule, how it is computed, and its folder."""
    geometry = named(config.molecule)
    if config.sigma > 0:
        geometry = distorted(geometry, config.sigma, config.seed, 0)
    return geometry, ChemistrySettings(grid=config.grid), config.data_dir or cache_folder("molecules")


def made(config: MoleculeGradientsConfig, molecule: Molecule) -> Optimum:
    """The functional, with its linear term fitted and, if asked for, trained; and its minimum.

    The network is drawn after the fit: fitted around it, the linear term alone may put the minimum at the reference,
    where the loss has no gradient to compare.
    """
    functional = OrbitalFree(OrbitalFreeConfig(weizsaecker=WEIZSAECKER[config.state]))
    metric = Metric(molecule.overlap)
    fit_linear(functional, [molecule], [metric])
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        layers = [m for m in functional.modules() if isinstance(m, torch.nn.Linear)]
        for layer in layers:
            bound = layer.in_features**-0.5
            for tensor in (layer.weight, layer.bias):
                if layer is layers[-1]:
                    tensor.normal_(std=SPREAD[config.state], generator=generator)
                else:
                    tensor.uniform_(-bound, bound, generator=generator)
    if config.state == "trained":
        _train(functional, molecule, metric, config.training_steps)
    return Optimum(molecule, functional, config.tolerance)


def _train(functional: OrbitalFree, molecule: Molecule, metric: Metric, steps: int) -> None:
    """Adam on the loss per electron, with the exact gradient, warm-started."""
    problem, reference, p = functional.problem(molecule, metric), ReferenceHessian().init(), molecule.guess
    solver = LBFGS(preconditioner=reference, rtol=0.0, atol=1e-7)
    estimator = Implicit(linear_solver=MINRES(preconditioner=reference, rtol=1e-6))
    optimizer = torch.optim.Adam(functional.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        with quiet():
            found = solve(problem, p, solver=solver, gradient=estimator, throw=False)
            gap = found.value - molecule.reference
            loss = 0.5 * gap @ (molecule.overlap @ gap) / molecule.electrons
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        p = found.value.detach()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings about solves that do not converge: they are measured here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


# -- Finite differences of the loss along random directions in all parameters ------------------------------------------


def difference(optimum: Optimum, exact: Tensor, directions: int, step: float, generator: torch.Generator) -> Difference:
    """The fourth-order central difference along each direction, minimizing again at every displacement.

    Args:
        optimum: left as it was.
        exact: the gradient, flat.
        directions: how many.
        step: the length of the smaller displacement.
        generator: generator of the directions.
    """
    parameters = optimum.parameters
    felt = exact != 0  # coefficients of elements that the molecule lacks do nothing
    start = torch.nn.utils.parameters_to_vector(parameters).detach()

    def loss(moved: Tensor) -> float:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(moved, parameters)
            return float(optimum.loss(optimum.minimize(optimum.value).value))

    measured, expected = [], []
    try:
        for _ in range(directions):
            direction = torch.where(felt, torch.randn(len(start), dtype=start.dtype, generator=generator), 0)
            direction = step * direction / direction.norm()
            near, far = (loss(start + k * direction) - loss(start - k * direction) for k in (1, 2))
            measured.append((8 * near - far) / 12)
            expected.append(float(exact @ direction))
    finally:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(start, parameters)
    a, b = torch.tensor(measured, dtype=start.dtype), torch.tensor(expected, dtype=start.dtype)
    return Difference(error=float((a - b).norm() / b.norm()), worst=float(((a - b) / b).abs().max()))


# -- nudges ------------------------------------------------------------------------------------------------------------
#
# Equilibrium propagation over its nudge, the tolerance of its minimizations, and beyond the least eigenvalue.


def nudged(optimum: Optimum, exact: Tensor, nudges: Sequence[float]) -> list[Nudged]:
    """Both forms of propagation for every nudge."""
    found = []
    for nudge in sorted(nudges, reverse=True):
        one, two = (optimum.estimate(optimum.propagation(nudge, symmetric=symmetric)) for symmetric in (False, True))
        found.append(Nudged(nudge, one.error(exact), two.error(exact), one.status, two.status))
    return found


def automatic(optimum: Optimum, exact: Tensor) -> dict[str, float]:
    """The errors at the nudge that the estimator chooses."""
    return {
        name: optimum.estimate(optimum.propagation(None, symmetric=symmetric)).error(exact)
        for name, symmetric in (("one_sided", False), ("symmetric", True))
    }


def loosened(optimum: Optimum, exact: Tensor, nudges: Sequence[float], tolerances: Sequence[float]) -> list[Loosened]:
    """Propagation with the whole loss, written out: the energy plus the loss times its weight is minimized from the
    minimum, and the energy's derivative in the parameters is subtracted. All three minimizations have one tolerance."""
    found = []
    for tolerance in sorted(tolerances, reverse=True):
        middle = optimum.minimize(optimum.molecule.guess, tolerance).value.detach()
        for nudge in sorted(nudges, reverse=True):
            above, below = (_minimum(optimum, weight, middle, tolerance) for weight in (nudge, -nudge))
            one = (_slope(optimum, above) - _slope(optimum, middle)) / nudge
            two = (_slope(optimum, above) - _slope(optimum, below)) / (2 * nudge)
            size = exact.norm()
            errors = (float((estimate - exact).norm() / size) for estimate in (one, two))
            found.append(Loosened(nudge, tolerance, *errors))
    return found


def beyond(optimum: Optimum, exact: Tensor, least: float, shares: Sequence[float], most_steps: int) -> list[Beyond]:
    """The symmetric difference with the whole loss. Its negative side subtracts the weight from the Hessian."""
    found = []
    distance = optimum.cotangent.norm()
    solver = replace(optimum.solver(), max_steps=most_steps)
    for share in sorted(shares):
        weight = share * least
        values, worst = [], Status.CONVERGED
        for sign in (1, -1):
            problem = _with_loss(optimum, sign * weight)
            with quiet():
                ended = solve(problem, optimum.value, solver=solver, throw=False)
            values.append(ended.value.detach())
            worst = max(worst, Status(int(ended.status)))
        estimate = (_slope(optimum, values[0]) - _slope(optimum, values[1])) / (2 * weight)
        moved = max(float((optimum.metric.root[0] @ (v - optimum.value)).norm() / distance) for v in values)
        error = float((estimate - exact).norm() / exact.norm())
        found.append(Beyond(share, error, moved, worst.name))
    return found


def damped(optimum: Optimum, exact: Tensor, weights: Sequence[float]) -> list[Damped]:
    """The two gradients that should agree."""
    found = []
    for weight in sorted(weights, reverse=True):
        # the estimator's nudge is relative to the cotangent's length, and its spring is the nudge over that length
        nudge = weight * float(optimum.cotangent.norm())
        one = optimum.estimate(optimum.propagation(nudge, symmetric=False, curved=True)).gradient
        two = optimum.estimate(DampedImplicit(damping=weight, linear_solver=Dense()))
        found.append(Damped(weight, float((one - two.gradient).norm() / two.gradient.norm()), two.error(exact)))
    return found


def _with_loss(optimum: Optimum, weight: float) -> Minimum:
    energy = optimum.problem.energy
    return replace(optimum.problem, energy=lambda p: energy(p) + weight * optimum.loss(p))


def _minimum(optimum: Optimum, weight: float, start: Tensor, tolerance: float) -> Tensor:
    with quiet():
        found = solve(_with_loss(optimum, weight), start, solver=optimum.solver(tolerance), throw=False)
    return found.value.detach()


def _slope(optimum: Optimum, p: Tensor) -> Tensor:
    """The energy's derivative in the parameters at a density, flat."""
    energy = optimum.functional(p, optimum.molecule)
    return flat(torch.autograd.grad(energy, optimum.parameters, allow_unused=True), optimum.parameters)


# -- What becomes of every gradient as an eigenvalue of the Hessian goes to zero, and below ----------------------------


SYMMETRIC_NUDGE = 1e-3


def softest(optimum: Optimum, exact: Tensor) -> tuple[float, Tensor]:
    """The least eigenvalue, with its vector, among those that contribute a minimum share of the gradient's norm: a
    molecule's symmetry may hide the least one from the loss.

    Raises:
        ValueError: there is none.
    """
    operator, right = optimum.system(optimum.problem)
    values, vectors = torch.linalg.eigh(operator.dense()[0])
    for value, vector in zip(values, vectors.T, strict=True):
        if value <= 1e-8 * values[-1]:  # the constraint's normal
            continue
        part = optimum.pulled(vector * (right[0] @ vector) / value)
        if float(part @ exact) >= FELT * float(exact @ exact):
            return float(value), vector
    raise ValueError(f"no mode carries {FELT:.0%} of the gradient")


def softened(
    optimum: Optimum, exact: Tensor, eigenvalue: float, vector: Tensor, damping: float, config: MoleculeGradientsConfig
) -> list[Softened]:
    """Every gradient after adding half ``moved - eigenvalue`` times the square along ``vector`` to the energy: the
    point stays stationary, and the rest of the spectrum unchanged.

    Args:
        optimum: where.
        exact: the gradient before.
        eigenvalue, vector: see :func:`softest`.
        damping: damping of the damped gradients.
        config: what the eigenvalue is multiplied by, and how long a minimization may take.
    """
    found = []
    for factor in sorted(config.softness, reverse=True):
        problem = _moved(optimum, vector, (1 - factor) * eigenvalue)
        norm, cosine, status = {}, {}, {}
        reference = _reference(optimum, vector, (1 - factor) * eigenvalue)
        for name, estimator in _estimators(optimum, damping, reference, config.most_steps).items():
            estimate = optimum.estimate(estimator, problem)
            norm[name] = float(estimate.gradient.norm() / exact.norm())
            cosine[name], status[name] = estimate.cosine(exact), estimate.status
        found.append(Softened(factor * eigenvalue, norm, cosine, status))
    return found


def _estimators(optimum: Optimum, damping: float, reference: HessianMemory, most_steps: int) -> dict[str, Gradient]:
    solver = replace(optimum.solver(), preconditioner=reference, max_steps=most_steps)
    nudge = damping * float(optimum.cotangent.norm())
    return {
        "implicit": Implicit(linear_solver=Dense()),
        "damped": DampedImplicit(damping=damping, linear_solver=Dense()),
        "one-sided, whole loss": replace(optimum.propagation(nudge, symmetric=False, curved=True), solver=solver),
        "symmetric": replace(optimum.propagation(SYMMETRIC_NUDGE, symmetric=True), solver=solver),
    }


def _reference(optimum: Optimum, vector: Tensor, less: float) -> HessianMemory:
    """The Hessian of the shifted energy at the minimum."""
    inverse = optimum.metric.inverse[0]
    matrix = inverse @ hessian(optimum.functional, optimum.value, optimum.molecule) @ inverse
    reference = ReferenceHessian(refresh_after=1000).init()
    reference.keep((matrix - less * torch.outer(vector, vector))[None])
    return reference


def _moved(optimum: Optimum, vector: Tensor, less: float) -> Minimum:
    energy, along = optimum.problem.energy, optimum.metric.root[0] @ vector

    def energy_less(p: Tensor) -> Tensor:
        moved: Tensor = energy(p) - 0.5 * less * ((p - optimum.value) @ along).square()
        return moved

    return replace(optimum.problem, energy=energy_less)


# -- Ways to solve the adjoint system: the slides' descent on its least-squares form beside Krylov methods -------------


MOST = 2000
"""Largest number of steps of these solvers."""
STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000, 1500, 2000)
"""Step counts at which errors are recorded."""
RATES = (1e-3, 1e-2, 1e-1)
"""Learning rates of Adam, relative to the largest entry of the solution. The best one is reported, which favours
Adam."""
TIMED = 15
"""Number of steps timed for methods that take more than this."""


@dataclass(frozen=True)
class Way:
    """A solver or the name of a descent method, with the number of products per step."""

    name: str
    solver: LinearSolver | None
    products: int = 1
    normal: bool = False


def ways(reference: HessianMemory | None) -> list[Way]:
    """All solvers of the adjoint system.

    Args:
        reference: made by a minimization; ``None``: there is none in these coordinates.
    """
    common: dict[str, Any] = {"rtol": TOLERANCE, "max_steps": MOST}
    found = [
        Way("gradient descent, least squares", None, 2),
        Way("Adam, least squares", None, 2),
        Way("CG, normal equations", CG(**common), 2, normal=True),
        Way("LSMR", LSMR(**common), 2),
        Way("CG", CG(**common)),
        Way("MINRES", MINRES(**common)),
        Way("CG, Jacobi", CG(preconditioner=Jacobi(), **common)),
        Way("MINRES, Jacobi", MINRES(preconditioner=Jacobi(), **common)),
    ]
    if reference is not None:
        found += [
            Way("CG, reference Hessian", CG(preconditioner=reference, **common)),
            Way("MINRES, reference Hessian", MINRES(preconditioner=reference, **common)),
        ]
    return [*found, Way("dense", Dense())]


def solved(optimum: Optimum, problem: Minimum, descent_steps: int, repeats: int) -> tuple[dict[str, Solved], float]:
    """Every solver in the coordinates of ``problem``, and the CPU seconds of one product.

    The errors are looked at with products of the assembled matrix, which are those of the energy to rounding; the times
    are of products of the energy.
    """
    operator, right = optimum.system(problem)
    assembled = _assembled(operator)
    values, vectors = torch.linalg.eigh(assembled.spectrum_matrix(torch.float64)[0])
    true = assembled.project(((right @ vectors) / values) @ vectors.T)
    largest = float(values.abs().max())
    reference = optimum.reference if problem.metric is not None else None
    every = ways(reference)
    found: dict[str, Solved] = {}
    timings: dict[str, Callable[[], float]] = {}
    for way in every:
        trace, status = _traced(way, assembled, right, true, largest, descent_steps)
        found[way.name] = Solved(trace[-1][0], 0.0, trace[-1][1], status, trace)
        timings[way.name] = _timed(way, operator, right, trace[-1][0])
    seconds: dict[str, list[float]] = {way.name: [] for way in every}
    product: list[float] = []
    for _ in range(repeats):
        for name, timing in timings.items():
            seconds[name].append(timing())
        began = time.process_time()
        for _ in range(10):
            operator.product(right)
        product.append((time.process_time() - began) / 10)
    for name, times in seconds.items():
        found[name] = replace(found[name], seconds=median(times))
    return found, median(product)


def _assembled(operator: LinearOperator) -> LinearOperator:
    """The same operator as an assembled matrix."""

    def of(matrix: Tensor, null: Tensor | None, inner: LinearOperator | None) -> LinearOperator:
        def product(v: Tensor) -> Tensor:
            return v @ matrix

        return LinearOperator(
            product=product,
            transposed_product=product,
            block_product=product,
            batch=1,
            dim=operator.dim,
            dtype=operator.dtype,
            device=operator.device,
            symmetric=True,
            null=null,
            unprojected=inner,
        )

    def symmetric(matrix: Tensor) -> Tensor:
        return 0.5 * (matrix + matrix.T)

    inner = None
    if operator.unprojected is not None:
        inner = of(symmetric(operator.unprojected.dense()[0]), None, None)
    return of(symmetric(operator.dense()[0]), operator.null, inner)


def _traced(
    way: Way, operator: LinearOperator, right: Tensor, true: Tensor, largest: float, descent_steps: int
) -> tuple[list[list[float]], str]:
    """Pairs of products and error, and the final status."""

    def error(y: Tensor) -> float:
        return float((y - true).norm() / true.norm())

    if way.solver is None:
        looks = [step for step in STEPS if step < descent_steps] + [descent_steps]
        if way.name.startswith("gradient"):
            run = _descent(operator, right, largest, looks)
        else:
            runs = [_adam(operator, right, rate * float(true.abs().max()), looks) for rate in RATES]
            run = min(runs, key=lambda ys: error(ys[-1]))
        return [[2.0 * step, error(y)] for step, y in zip(looks, run, strict=True)], Status.MAX_STEPS.name
    system, b = (_squared(operator), operator.product(right)) if way.normal else (operator, right)
    end = way.solver.solve(system, b)
    trace: list[list[float]] = []
    if isinstance(way.solver, IterativeSolver):
        for step in STEPS:
            if step >= int(end.report.steps.max()):
                break
            part = replace(way.solver, max_steps=step, rtol=0.0).solve(system, b)
            trace.append([float(way.products * step), error(part.value)])
    products = float(operator.dim) if isinstance(way.solver, Dense) else float(way.products * end.report.steps.max())
    trace.append([products, error(end.value)])
    return trace, Status(int(end.report.status.max())).name


def _timed(way: Way, operator: LinearOperator, right: Tensor, products: float) -> Callable[[], float]:
    """A function that measures the solver's CPU seconds. For solvers with many steps, the first ones are timed and the
    result is scaled."""
    steps, solver = products / way.products, way.solver
    # preparing a preconditioner is not to be scaled
    part = solver is None or (isinstance(solver, IterativeSolver) and solver.preconditioner is None)
    scale = steps / TIMED if part and steps > TIMED else 1.0
    if scale > 1 and isinstance(solver, IterativeSolver):
        solver = replace(solver, max_steps=TIMED)

    def timing() -> float:
        began = time.process_time()
        if solver is None:
            y = torch.zeros_like(right)
            for _ in range(min(TIMED, round(steps))):
                y = y - 0.0 * operator.product(operator.product(y) - right)
        else:
            solver.solve(*((_squared(operator), operator.product(right)) if way.normal else (operator, right)))
        return scale * (time.process_time() - began)

    return timing


def _squared(operator: LinearOperator) -> LinearOperator:
    def product(v: Tensor) -> Tensor:
        return operator.product(operator.product(v))

    return replace(
        operator, product=product, transposed_product=product, block_product=None, restrict=None, unprojected=None
    )


def _descent(operator: LinearOperator, right: Tensor, largest: float, looks: list[int]) -> list[Tensor]:
    """Gradient descent on half the squared residual, with the step 1/λ_max of its Hessian."""
    y, seen = torch.zeros_like(right), []
    for step in range(1, looks[-1] + 1):
        y = y - operator.product(operator.product(y) - right) / largest**2
        if step in looks:
            seen.append(y)
    return seen


def _adam(operator: LinearOperator, right: Tensor, rate: float, looks: list[int]) -> list[Tensor]:
    """Torch's Adam on half the squared residual."""
    y = torch.zeros_like(right).requires_grad_()
    optimizer = torch.optim.Adam([y], lr=rate)
    seen = []
    for step in range(1, looks[-1] + 1):
        with torch.no_grad():
            y.grad = operator.product(operator.product(y) - right)
        optimizer.step()
        if step in looks:
            seen.append(y.detach().clone())
    return seen


# -- The measurement on one molecule -----------------------------------------------------------------------------------


def measured(config: MoleculeGradientsConfig, molecule: Molecule) -> MoleculeResults:
    """All measurements at the molecule."""
    optimum = made(config, molecule)
    point = _point(optimum)
    exact = optimum.estimate(Implicit(linear_solver=Dense()))
    assert exact.status == Status.CONVERGED.name, exact.status
    gradient = exact.gradient
    eigenvalue, vector = softest(optimum, gradient)
    damping = config.damping * eigenvalue
    adjoint, seconds = {}, {}
    for name, problem in (("overlap", optimum.problem), ("raw", optimum.problem.own_coordinates())):
        adjoint[name], seconds[name] = solved(optimum, problem, config.descent_steps, config.repeats)
    generator = torch.Generator().manual_seed(config.seed)
    return MoleculeResults(
        point=point,
        difference=difference(optimum, gradient, config.directions, config.step, generator),
        nudged=nudged(optimum, gradient, config.nudges),
        automatic=automatic(optimum, gradient),
        loosened=loosened(optimum, gradient, config.loss_nudges, config.loose),
        beyond=beyond(optimum, gradient, point.least, config.beyond, config.most_steps),
        damped=damped(optimum, gradient, config.loss_nudges),
        softest=eigenvalue,
        damping=damping,
        softened=softened(optimum, gradient, eigenvalue, vector, damping, config),
        adjoint=adjoint,
        product_seconds=seconds,
        assembled=molecule.size,
    )


def _point(optimum: Optimum) -> Point:
    n = optimum.molecule.size
    fine = curvature(optimum.problem, optimum.value, subspace=n)
    raw = curvature(optimum.problem.own_coordinates(), optimum.value, subspace=n)
    return Point(
        size=n,
        points=len(optimum.molecule.quadrature),
        loss=optimum.per_electron,
        saddles=optimum.saddles,
        steps=optimum.steps,
        least=float(fine.least),
        largest=float(fine.largest),
        raw_least=float(raw.least),
        raw_largest=float(raw.largest),
    )


class MeasureRunner:
    """Runs the measurement. Nothing is trained, apart from the functional if its settings ask for it."""

    def check(self, config: MoleculeGradientsConfig) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`: the molecule must be available."""
        check(config)

    def train(self, config: MoleculeGradientsConfig, run: Run, console: Console) -> bool:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        with threads(1):
            run.write_json("results.json", measured(config, load(config)))
        return True

    def evaluate(self, config: MoleculeGradientsConfig, run: Run, console: Console) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`: measures again."""
        with threads(1):
            run.write_json("evaluation.json", measured(config, load(config)))


RUNNER = MeasureRunner()
