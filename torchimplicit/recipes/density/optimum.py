"""A molecule's density at the minimum of a functional, and the gradient of a loss there by any estimator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchimplicit._solve import flat_system, solve
from torchimplicit.diagnostics import curvature
from torchimplicit.gradients import EquilibriumPropagation, Gradient
from torchimplicit.linear import LinearOperator, ReferenceHessian
from torchimplicit.models.orbital_free import Molecule, OrbitalFree, OrbitalFreeConfig, fit_linear
from torchimplicit.problems import Minimum
from torchimplicit.recipes.density.case import Case, quiet
from torchimplicit.recipes.density.gradient_figures import (
    LEARNING_RATE,
    SPREAD,
    WEIZSAECKER,
    MoleculeGradientsConfig,
)
from torchimplicit.recipes.density.settings import OrbitalFreeTraining
from torchimplicit.solution import Report, Solution, Status
from torchimplicit.solvers import LBFGS

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
        self.metric = molecule.metric
        self.problem = functional.problem(molecule, self.metric)
        self.reference = ReferenceHessian().init()
        self.saddles = 0
        solution = self.minimize(molecule.guess)
        for _ in range(TRIES):
            if float(curvature(self.problem, solution.value, subspace=molecule.size).least) > 0:
                break
            self.saddles += 1
            solution = self.minimize(self.beside(solution.value.detach()))
        self.value, self.steps = solution.value.detach(), int(solution.steps)

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
        """Half the squared distance to the Kohn-Sham density; a scalar."""
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
            solution = solve(problem or self.problem, self.value, solver=_STANDING, gradient=estimator, throw=False)
            grads = torch.autograd.grad(self.loss(solution.value), self.parameters, allow_unused=True)
        assert solution.adjoint is not None
        return Estimate(flat(grads, self.parameters), solution.adjoint)

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


def made(config: MoleculeGradientsConfig, molecule: Molecule) -> Optimum:
    """The functional, with its linear term fitted and, if asked for, trained; and its minimum.

    The network is drawn after the fit: fitted around it, the linear term alone may put the minimum at the reference,
    where the loss has no gradient to compare.
    """
    functional = OrbitalFree(OrbitalFreeConfig(weizsaecker=WEIZSAECKER[config.state]))
    fit_linear(functional, [molecule], [molecule.metric])
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
        _train(functional, molecule, config.training_steps)
    return Optimum(molecule, functional, config.tolerance)


def _train(functional: OrbitalFree, molecule: Molecule, steps: int) -> None:
    """Adam on the loss per electron, with the exact gradient, warm-started."""
    case, settings = Case.of(molecule), OrbitalFreeTraining(inner_tolerance=1e-7)
    optimizer = torch.optim.Adam(functional.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        case.loss(case.solved(functional, settings).value).backward()
        optimizer.step()
