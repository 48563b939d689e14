"""Measures every gradient estimator at one molecule's minimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from torchimplicit._solve import solve
from torchimplicit.diagnostics import curvature
from torchimplicit.gradients import DampedImplicit, Gradient, Implicit
from torchimplicit.linear import Dense, HessianMemory, ReferenceHessian
from torchimplicit.models.orbital_free import Molecule
from torchimplicit.models.orbital_free.second import hessian
from torchimplicit.problems import Minimum
from torchimplicit.recipes.density.adjoint_solvers import solved
from torchimplicit.recipes.density.case import quiet
from torchimplicit.recipes.density.chemistry import Geometry, distorted, named
from torchimplicit.recipes.density.gradient_figures import (
    FELT,
    Beyond,
    Damped,
    Difference,
    Loosened,
    MoleculeGradientsConfig,
    MoleculeResults,
    Nudged,
    Point,
    Softened,
)
from torchimplicit.recipes.density.integrals import need_pyscf
from torchimplicit.recipes.density.optimum import Optimum, flat, made
from torchimplicit.recipes.density.prepare import prepared
from torchimplicit.recipes.density.settings import ChemistrySettings
from torchimplicit.recipes.density.storage import file_name
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import cache_folder
from torchimplicit.recipes.runtime.run import Run, threads
from torchimplicit.solution import Solution, Status
from torchimplicit.solvers import LBFGS

# -- Finite differences of the loss along random directions in all parameters ------------------------------------------


TIGHTER = 1e-2
"""Tolerance of the minimizations for finite differences, relative to the others'. Where the loss is small, as H2's is,
those would leave an error of 3e-6 in differences whose own is 1e-8."""


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
            return float(optimum.loss(optimum.minimize(optimum.value, TIGHTER * optimum.tolerance).value))

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


# -- Equilibrium propagation: its nudge, the tolerance of its minimizations, and beyond the least eigenvalue -----------


def nudged(optimum: Optimum, exact: Tensor, nudges: Sequence[float]) -> list[Nudged]:
    """Both forms of propagation for every nudge."""
    rows = []
    for nudge in sorted(nudges, reverse=True):
        one, two = (optimum.estimate(optimum.propagation(nudge, symmetric=symmetric)) for symmetric in (False, True))
        rows.append(Nudged(nudge, one.error(exact), two.error(exact), one.status, two.status))
    return rows


def automatic(optimum: Optimum, exact: Tensor) -> dict[str, float]:
    """The errors at the nudge that the estimator chooses."""
    return {
        name: optimum.estimate(optimum.propagation(None, symmetric=symmetric)).error(exact)
        for name, symmetric in (("one_sided", False), ("symmetric", True))
    }


def loosened(optimum: Optimum, exact: Tensor, nudges: Sequence[float], tolerances: Sequence[float]) -> list[Loosened]:
    """Propagation with the whole loss, written out: the energy plus the loss times its weight is minimized from the
    minimum, and the energy's derivative in the parameters is subtracted. All three minimizations have one tolerance."""
    rows = []
    for tolerance in sorted(tolerances, reverse=True):
        middle = optimum.minimize(optimum.molecule.guess, tolerance).value.detach()
        for nudge in sorted(nudges, reverse=True):
            solver = optimum.solver(tolerance)
            above, below = (_minimized(optimum, w, middle, solver).value.detach() for w in (nudge, -nudge))
            one = (_slope(optimum, above) - _slope(optimum, middle)) / nudge
            two = (_slope(optimum, above) - _slope(optimum, below)) / (2 * nudge)
            rows.append(Loosened(nudge, tolerance, _error(one, exact), _error(two, exact)))
    return rows


def beyond(optimum: Optimum, exact: Tensor, least: float, shares: Sequence[float], most_steps: int) -> list[Beyond]:
    """The symmetric difference with the whole loss. Its negative side subtracts the weight from the Hessian."""
    rows = []
    distance = optimum.cotangent.norm()
    solver = replace(optimum.solver(), max_steps=most_steps)
    for share in sorted(shares):
        weight = share * least
        ends = [_minimized(optimum, signed, optimum.value, solver) for signed in (weight, -weight)]
        above, below = (end.value.detach() for end in ends)
        estimate = (_slope(optimum, above) - _slope(optimum, below)) / (2 * weight)
        moved = max(float((optimum.metric.root[0] @ (p - optimum.value)).norm() / distance) for p in (above, below))
        worst = max(Status(int(end.status)) for end in ends)
        rows.append(Beyond(share, _error(estimate, exact), moved, worst.name))
    return rows


def damped(optimum: Optimum, exact: Tensor, weights: Sequence[float]) -> list[Damped]:
    """The two gradients that should agree."""
    rows = []
    for weight in sorted(weights, reverse=True):
        # the estimator's nudge is relative to the cotangent's length, and its spring is the nudge over that length
        nudge = weight * float(optimum.cotangent.norm())
        one = optimum.estimate(optimum.propagation(nudge, symmetric=False, curved=True)).gradient
        two = optimum.estimate(DampedImplicit(damping=weight, linear_solver=Dense()))
        rows.append(Damped(weight, float((one - two.gradient).norm() / two.gradient.norm()), two.error(exact)))
    return rows


def _minimized(optimum: Optimum, weight: float, start: Tensor, solver: LBFGS) -> Solution:
    """The minimum of the energy plus the loss times a weight."""
    energy = optimum.problem.energy
    problem = replace(optimum.problem, energy=lambda p: energy(p) + weight * optimum.loss(p))
    with quiet():
        return solve(problem, start, solver=solver, throw=False)


def _error(estimate: Tensor, exact: Tensor) -> float:
    return float((estimate - exact).norm() / exact.norm())


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
    rows = []
    for factor in sorted(config.softness, reverse=True):
        problem = _moved(optimum, vector, (1 - factor) * eigenvalue)
        norm, cosine, status = {}, {}, {}
        reference = _reference(optimum, vector, (1 - factor) * eigenvalue)
        for name, estimator in _estimators(optimum, damping, reference, config.most_steps).items():
            estimate = optimum.estimate(estimator, problem)
            norm[name] = float(estimate.gradient.norm() / exact.norm())
            cosine[name], status[name] = estimate.cosine(exact), estimate.status
        rows.append(Softened(factor * eigenvalue, norm, cosine, status))
    return rows


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


# -- The runner; see :class:`torchimplicit.recipes.runtime.run.Runner` -------------------------------------------------


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
    there = prepared([geometry], settings, folder)
    if there.failures:
        raise UserError(f"{geometry.name}: {there.failures[0].reason}")
    return there.molecules[0]


def _asked(config: MoleculeGradientsConfig) -> tuple[Geometry, ChemistrySettings, Path]:
    """The molecule, how it is computed, and its folder."""
    geometry = named(config.molecule)
    if config.sigma > 0:
        geometry = distorted(geometry, config.sigma, config.seed, 0)
    return geometry, ChemistrySettings(grid=config.grid), config.data_dir or cache_folder("molecules")


def train(config: MoleculeGradientsConfig, run: Run, console: Console) -> bool:
    """Measure."""
    with threads(1):
        run.write_json("results.json", measured(config, load(config)))
    return True


def evaluate(config: MoleculeGradientsConfig, run: Run, console: Console) -> None:
    """Measure again."""
    with threads(1):
        run.write_json("evaluation.json", measured(config, load(config)))
