"""The training objective of a density functional."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchimplicit._solve import solve
from torchimplicit.constraints import project, unit_normal
from torchimplicit.coordinates import Metric
from torchimplicit.gradients import DampedImplicit, EquilibriumPropagation, Gradient, Implicit
from torchimplicit.linear import MINRES, HessianMemory, ReferenceHessian
from torchimplicit.models.orbital_free import Molecule, OrbitalFree
from torchimplicit.models.orbital_free.on_grid import SHARED
from torchimplicit.models.orbital_free.pairs import entries
from torchimplicit.models.orbital_free.second import hessian, mixed
from torchimplicit.problems import Minimum
from torchimplicit.recipes.density.settings import OrbitalFreeTraining
from torchimplicit.recipes.runtime.optimize import Array
from torchimplicit.recipes.runtime.run import threads
from torchimplicit.regularizers import fixed_point_correction
from torchimplicit.solution import Solution, chosen_iterates
from torchimplicit.solvers import LBFGS, GradientDescent, Solver

# -- One molecule in training: what is kept of it from step to step ----------------------------------------------------


PATIENCE = 15
"""Steps of L-BFGS after which the kept Hessian is recomputed."""

TAIL = 1e-3
"""Density in electrons per cubic bohr below which errors weigh no more than at this density."""


@dataclass
class Case:
    """A molecule with its metric, the kept Hessian that preconditions, and the density found last.

    Attributes:
        weighing: see :meth:`away`, ``[n, n]``.
        density: coefficients ``[n]`` to begin the next minimization at.
        fresh: whether the kept Hessian still serves.
    """

    molecule: Molecule
    metric: Metric
    weighing: Tensor
    hessian: HessianMemory = field(default_factory=lambda: ReferenceHessian().init())
    density: Tensor = field(init=False)
    fresh: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.density = self.molecule.guess

    @classmethod
    def of(cls, molecule: Molecule, tail_weight: float = 0.0) -> Case:
        """A case with the metric of the basis' overlap.

        Args:
            tail_weight: :math:`\\kappa` of :meth:`away`.
        """
        matrix = molecule.overlap
        if tail_weight:
            share = molecule.quadrature / (molecule.density(molecule.reference).clamp_min(0) + TAIL)
            matrix = matrix + tail_weight * molecule.basis.products(share[None, None])
        weighing = torch.linalg.cholesky(matrix / molecule.electrons).mT
        return cls(molecule, molecule.metric, weighing)

    def problem(self, functional: OrbitalFree) -> Minimum:
        """The density of least energy."""
        return functional.problem(self.molecule, self.metric)

    def solved(self, functional: OrbitalFree, config: OrbitalFreeTraining, *, cold: bool = False) -> Solution:
        """The density of least energy, starting from the last one found or (``cold``) from the superposition of atoms
        with a fresh Hessian. With several minima, the start decides which one is found.

        The solution carries the config's gradient. It is remembered where it is converged.
        """
        start = self.molecule.guess if cold else self.density
        if cold or not self.fresh:
            self.refresh(functional, start)
        solution = solve(
            self.problem(functional),
            start,
            solver=self.solver(config),
            gradient=self.gradient(config),
            throw=False,
        )
        if bool(solution.converged):
            if not cold:
                self.density = solution.value.detach()
            self.fresh = int(solution.steps) <= PATIENCE
        return solution

    def refresh(self, functional: OrbitalFree, p: Tensor) -> None:
        """Keep the Hessian at ``p``, in the metric's coordinates and on the plane of the constraint."""
        self.hessian.keep(self.curvature(functional, p)[None])
        self.fresh = True

    def curvature(self, functional: OrbitalFree, p: Tensor) -> Tensor:
        """:math:`PHP` at ``p``, ``[n, n]``, in the metric's coordinates, assembled.

        Along the constraint's normal it has the mean of its eigenvalues in place of zero, so that its inverse and its
        extreme eigenvalues are those on the plane.
        """
        inner, normal = self.plane
        matrix = project(project(inner @ hessian(functional, p, self.molecule) @ inner, normal).T, normal)
        mean = matrix.diagonal().sum() / max(1, len(matrix) - 1)
        return matrix + mean * normal.T @ normal

    @cached_property
    def plane(self) -> tuple[Tensor, Tensor]:
        """:math:`S^{-1/2}`, ``[n, n]``, and the constraint's unit normal in the metric's coordinates, ``[1, n]``."""
        weight = self.metric.covector(self.molecule.weight[None])
        return self.metric.inverse[0].to(weight), unit_normal(weight, self.molecule.electrons.reshape(1, 1))[0]

    def solver(self, config: OrbitalFreeTraining) -> Solver:
        """The solver of the config."""
        bounds: dict[str, Any] = {"rtol": 0.0, "atol": config.inner_tolerance, "max_steps": config.inner_steps}
        bounds["keep_trajectory"] = config.correction > 0
        if config.inner == "descent":
            return GradientDescent(step_size=config.inner_rate, momentum=0.9, **bounds)
        return LBFGS(preconditioner=self.hessian, **bounds)

    def gradient(self, config: OrbitalFreeTraining) -> Gradient:
        """The gradient estimator of the config."""
        linear = MINRES(rtol=1e-8, preconditioner=self.hessian)
        if config.gradient == "implicit":
            return Implicit(linear_solver=linear)
        if config.gradient == "damped":
            return DampedImplicit(linear_solver=linear)
        one_sided = config.gradient == "eqprop-one-sided"
        inner = LBFGS(preconditioner=self.hessian, rtol=0.0, atol=config.inner_tolerance, max_steps=config.inner_steps)
        return EquilibriumPropagation(nudge=config.nudge, symmetric=not one_sided, curved=one_sided, solver=inner)

    def away(self, p: Tensor) -> Tensor:
        """``[n]``: half its square is what training lowers for this molecule,
        :math:`\\int(\\rho-\\rho_{gs})^2(1+\\kappa/(\\rho_{gs}+\\delta))/(2N)`."""
        return self.weighing @ (p - self.molecule.reference)

    def loss(self, p: Tensor) -> Tensor:
        """:math:`L=\\int(\\rho-\\rho_{gs})^2/(2N)`."""
        difference = p - self.molecule.reference
        return 0.5 * difference @ (self.molecule.overlap @ difference) / self.molecule.electrons

    def l1(self, p: Tensor) -> Tensor:
        """:math:`\\int|\\rho-\\rho_{gs}|/N` on the grid."""
        difference = self.molecule.density(p - self.molecule.reference).abs()
        return self.molecule.quadrature @ difference / self.molecule.electrons


# -- The weights of a functional that the molecules at hand depend on, as one vector -----------------------------------


class Weights:
    """The trained weights: the network's, the coefficients of the s shells that occur and, if energies are trained,
    constants of the elements that occur.

    Attributes:
        network: bool ``[size]``: which are the network's.
    """

    def __init__(self, functional: OrbitalFree, molecules: Sequence[Molecule], constants: bool):
        self.functional = functional
        self._masks: dict[str, Tensor] = {}
        for name, p in functional.named_parameters():
            mask = torch.ones_like(p, dtype=torch.bool)
            if name == "reference":
                mask.zero_()
                for molecule in molecules:
                    scalar = molecule.angular == 0
                    mask[molecule.charges[molecule.atom][scalar], molecule.shell[scalar]] = True
            elif name == "pairs":
                mask = torch.zeros_like(p, dtype=torch.bool)
                for molecule in molecules:
                    mask.view(-1)[entries(molecule, functional.config.pairs)[1]] = True
            elif name == "constants":
                mask.zero_()
                if constants:
                    mask[torch.cat([m.charges for m in molecules])] = True
            self._masks[name] = mask
        self.network = torch.cat(
            [torch.full((int(mask.sum()),), name.startswith("factor")) for name, mask in self._masks.items()]
        )

    def get(self) -> Array:
        """The current weights."""
        parameters = dict(self.functional.named_parameters())
        return torch.cat([parameters[k].detach()[mask] for k, mask in self._masks.items()]).numpy().copy()

    def put(self, vector: Array) -> None:
        """Set the functional's weights."""
        with torch.no_grad():
            for p, part in zip(self.functional.parameters(), self._split(torch.as_tensor(vector)), strict=True):
                p.copy_(part)

    def gradient(self) -> Array:
        """The accumulated gradient, which is then cleared."""
        parts = []
        for p, mask in zip(self.functional.parameters(), self._masks.values(), strict=True):
            parts.append((torch.zeros_like(p) if p.grad is None else p.grad)[mask])
            p.grad = None
        return torch.cat(parts).numpy()

    @property
    def names(self) -> list[str]:
        """Names of the parameters."""
        return [name for name, mask in self._masks.items() if bool(mask.any())]

    def columns(self, found: dict[str, Tensor]) -> Tensor:
        """Derivatives ``[n, *parameter.shape]``, by the parameters' names, as ``[n, size]``."""
        return torch.cat([found[name][:, self._masks[name]] for name in self.names], dim=1)

    def _split(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([int(mask.sum()) for mask in self._masks.values()])
        named = dict(self.functional.named_parameters())
        return [
            torch.masked_scatter(named[name].detach(), mask, part) if len(part) else named[name].detach()
            for (name, mask), part in zip(self._masks.items(), parts, strict=True)
        ]


# -- Terms of the loss that hold the Hessian of the energy, at the density, in a good range ----------------------------


REFINEMENTS = 3
"""Steps of refinement that track the eigenvector of the least eigenvalue from one iteration to the next."""


class Penalties:
    """Penalties on the size of the Hessian along a random vector (the Jacobian regularization of Bai et al. 2021), and
    on a least eigenvalue below a floor, through its eigenvector, which is tracked during training."""

    def __init__(self, config: OrbitalFreeTraining):
        self.config = config
        self._generator = torch.Generator().manual_seed(config.seed)
        self._lowest: dict[int, Tensor] = {}

    def __call__(self, number: int, case: Case, functional: OrbitalFree, p: Tensor) -> Tensor:
        """A scalar that is differentiable in the functional's weights, the density ``p`` (``[n]``) held fixed.

        Args:
            number: number of the case, by which its eigenvector is remembered.
        """
        config, total = self.config, p.new_zeros(())
        if not config.hessian_weight and not config.floor_weight:
            return total
        curvature = Curvature(case, functional, p)
        if config.hessian_weight:
            v = torch.randn(len(p), generator=self._generator, dtype=p.dtype)
            total = total + config.hessian_weight * curvature(v).square().sum() / len(p)
        if config.floor_weight:
            known = number in self._lowest
            start = self._lowest[number] if known else torch.randn(len(p), generator=self._generator, dtype=p.dtype)
            lowest = self._lowest[number] = curvature.lowest(start, REFINEMENTS if known else 10 * REFINEMENTS)
            least = lowest @ curvature(lowest)
            total = total + config.floor_weight * (1 - least / config.floor).clamp_min(0).square()
        return total


def floor_residual(
    config: OrbitalFreeTraining, case: Case, functional: OrbitalFree, p: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """The residual whose half square is the penalty on a least eigenvalue, for optimizers of residuals.

    The eigenvector is that of the assembled Hessian, so that the residual is a function of the weights alone.

    Args:
        p: the density, ``[n]``.
        matrix: the case's ``curvature`` there.

    Returns:
        a scalar that is differentiable in the functional's weights, ``p`` held fixed; its derivative by ``p``, ``[n]``.
    """
    lowest = torch.linalg.eigh(matrix).eigenvectors[:, 0]
    curvature = Curvature(case, functional, p)
    least = lowest @ curvature(lowest)
    residual = (2 * config.floor_weight) ** 0.5 * (1 - least / config.floor).clamp_min(0)
    (along,) = torch.autograd.grad(residual, curvature.p, retain_graph=True)
    return residual, along


class Curvature:
    """Products with the projected Hessian in the metric's coordinates, differentiable in the weights."""

    def __init__(self, case: Case, functional: OrbitalFree, p: Tensor):
        self.inverse, self.normal = case.plane
        self.p = p.detach().clone().requires_grad_()
        energy = functional(self.p, case.molecule)
        (self.slope,) = torch.autograd.grad(energy, self.p, create_graph=True)

    def __call__(self, v: Tensor) -> Tensor:
        """The product with ``v`` (``[n]``), projected."""
        inner = self.inverse @ self._projected(v)
        (image,) = torch.autograd.grad(self.slope, self.p, inner, create_graph=True, retain_graph=True)
        return self._projected(self.inverse @ image)

    def lowest(self, v: Tensor, steps: int) -> Tensor:
        """A unit vector nearer to the eigenvector of the least eigenvalue than ``v``, by the locally optimal steps of
        Knyazev (2001): in the span of the vector, of its residual and of the step before."""
        v = self._projected(v)
        v = v / v.norm()
        before = torch.zeros_like(v)
        for _ in range(steps):
            image = self(v).detach()
            residual = self._projected(image - (v @ image) * v)
            if float(residual.norm()) < 1e-6 * float(image.norm()):
                break  # what is left is rounding, which may point along the normal, where the Hessian is nought
            directions = [v, residual / residual.norm()] + ([before] if bool(before.any()) else [])
            basis = torch.linalg.qr(torch.stack([self._projected(d) for d in directions], dim=1)).Q
            small = basis.T @ torch.stack([self(column).detach() for column in basis.T], dim=1)
            found = basis @ torch.linalg.eigh(0.5 * (small + small.T)).eigenvectors[:, 0]
            before = found - (found @ v) * v
            before = before / before.norm().clamp_min(1e-300)
            v = found / found.norm()
        return v

    def _projected(self, v: Tensor) -> Tensor:
        return project(v[None], self.normal)[0]


# -- The residuals, the loss and the gradient of some of the molecules -------------------------------------------------


@dataclass
class Work:
    """Work of an evaluation.

    Attributes:
        steps, evaluations: steps and evaluations of the minimizations, summed over molecules.
        adjoint: products of the adjoint solves, likewise.
        unconverged: minimizations that were not done.
    """

    steps: float = 0.0
    evaluations: float = 0.0
    adjoint: float = 0.0
    unconverged: int = 0


class Share:
    """Some of a training's molecules, as one process holds them.

    The loss is the mean over all ``total`` molecules of the half square of :meth:`Case.away` (with fixed-point
    correction, of the iterates too, by their weights), of half the squared error of the energy per electron times its
    weight, and of the penalties.

    Attributes:
        work: work of the last call.
        tell: is called with what is being done, several times in an evaluation.
    """

    def __init__(
        self,
        functional: OrbitalFree,
        cases: Sequence[Case],
        weights: Weights,
        config: OrbitalFreeTraining,
        total: int,
    ):
        self.functional, self.cases, self.weights = functional, cases, weights
        self.config, self.total = config, total
        self.penalties = Penalties(config)
        self.work = Work()
        self.tell: Callable[[str], None] = lambda status: None

    def residuals(self, vector: Array) -> Array:
        """Residuals of all molecules of the share. All are infinite if a density is not found; then no others are
        sought."""
        self._begin(vector)
        found = []
        for case in self.cases:
            with torch.no_grad():
                solution = self._solved(case)
                if not bool(solution.converged):
                    return np.full(sum(map(self._rows, self.cases)), np.inf)
                parts = [weight * case.away(p) for weight, p in self._points(solution)]
                if self.config.energy_weight:
                    parts.append(self._energy_error(case, solution.value).reshape(1))
            if self.config.floor_weight:
                matrix = case.curvature(self.functional, solution.value)
                lacking, _ = floor_residual(self.config, case, self.functional, solution.value, matrix)
                parts.append(lacking.detach().reshape(1))
            found.append(self._filled(case, torch.cat(parts)) / self.total**0.5)
        return torch.cat(found).numpy()

    def jacobian(self, vector: Array) -> Array:
        """``[residuals, weights]``, by the implicit function theorem with assembled second derivatives: in the metric's
        coordinates :math:`dq/d\\theta=-(PHP)^+PB`, at the density, and at the iterates of a fixed-point correction as
        if they were it."""
        self._begin(vector)
        rows = []
        for case in self.cases:
            solution = self._solved(case)
            p, parts = solution.value.detach(), []
            matrix = moved = p
            for weight, p in self._points(solution):  # the last is the solution
                self._doing("second derivatives", case)
                matrix = case.curvature(self.functional, p)
                moved = self._moved(case, p, matrix)
                parts.append(weight * case.weighing @ moved)
            if self.config.energy_weight:
                self.functional.zero_grad()
                self._energy_error(case, p).backward()
                parts.append(torch.as_tensor(self.weights.gradient())[None])
            if self.config.floor_weight:
                self.functional.zero_grad()
                lacking, along = floor_residual(self.config, case, self.functional, p, matrix)
                lacking.backward()
                parts.append(torch.as_tensor(self.weights.gradient())[None] + along @ moved)
            rows.append(self._filled(case, torch.cat(parts)))
        return (torch.cat(rows) / self.total**0.5).numpy()

    def loss_and_gradient(self, vector: Array) -> tuple[float, Array]:
        """This share's part of the loss and its gradient."""
        self._begin(vector)
        value = sum(self.step(number) for number in range(len(self.cases)))
        return value, self.weights.gradient()

    def step(self, number: int) -> float:
        """Run one molecule's part of the loss backward and return it."""
        case = self.cases[number]
        solution = self._solved(case)
        loss = self._density_loss(case, solution)
        if self.config.energy_weight:
            # at the minimum the energy's derivative through the density is nought (the envelope theorem)
            loss = loss + 0.5 * self._energy_error(case, solution.value.detach()).square()
        loss = loss + self.penalties(number, case, self.functional, solution.value.detach())
        self._doing("gradient", case)
        (loss / self.total).backward()
        if solution.adjoint is not None:
            self.work.adjoint += solution.adjoint.evaluations
        return float(loss.detach()) / self.total

    def _begin(self, vector: Array) -> None:
        self.weights.put(np.asarray(vector))
        self.work = Work()

    def _solved(self, case: Case) -> Solution:
        self._doing("minimization", case)
        solution = case.solved(self.functional, self.config, cold=self.config.cold)
        self.work.steps += float(solution.steps)
        self.work.evaluations += solution.evaluations
        self.work.unconverged += not bool(solution.converged)
        return solution

    def _doing(self, what: str, case: Case) -> None:
        self.tell(f"{what} of {case.molecule.name}, {self.cases.index(case) + 1} of {len(self.cases)}")

    def _moved(self, case: Case, p: Tensor, matrix: Tensor) -> Tensor:
        """``[n, weights]``: how the density of least energy moves with the weights, if ``p`` is it.

        Args:
            matrix: the case's ``curvature`` at ``p``.
        """
        inner, normal = case.plane
        slopes = inner @ self.weights.columns(mixed(self.functional, p, case.molecule, self.weights.names))
        slopes = slopes - normal.T @ (normal @ slopes)
        return -inner @ torch.linalg.solve(matrix, slopes)

    def _points(self, solution: Solution) -> list[tuple[float, Tensor]]:
        """The densities in the loss, the solution last, each with the root of its weight."""
        count = 1 + self.config.correction
        chosen = chosen_iterates(solution, count, random=self.config.correction_random) if count > 1 else []
        points = [solution.trajectory[k] for k in chosen] + [solution.value.detach()]
        return [(self.config.correction_gamma ** (0.5 * (len(points) - 1 - k)), p) for k, p in enumerate(points)]

    def _rows(self, case: Case) -> int:
        """Number of residuals of a molecule."""
        densities = (1 + self.config.correction) * case.molecule.size
        return densities + (self.config.energy_weight > 0) + (self.config.floor_weight > 0)

    def _filled(self, case: Case, rows: Tensor) -> Tensor:
        """Pad with zeros if there were fewer iterates than the correction uses."""
        missing = self._rows(case) - len(rows)
        return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows

    def _density_loss(self, case: Case, solution: Solution) -> Tensor:
        def half_square(p: Tensor) -> Tensor:
            return 0.5 * case.away(p).square().sum()

        if not self.config.correction:
            return half_square(solution.value)
        return fixed_point_correction(
            solution,
            half_square,
            count=1 + self.config.correction,
            gamma=self.config.correction_gamma,
            random=self.config.correction_random,
        )

    def _energy_error(self, case: Case, p: Tensor) -> Tensor:
        molecule: Molecule = case.molecule
        error: Tensor = (self.functional(p, molecule) - molecule.energy) / molecule.electrons
        return self.config.energy_weight**0.5 * error


# -- The loss of all molecules, by one process or several --------------------------------------------------------------


class DensityFit(AbstractContextManager["DensityFit"]):
    """An :class:`~torchimplicit.recipes.runtime.optimize.Objective` that sums the shares of the molecules and the
    weight decay.

    Molecules are independent problems of different size, so they are shared among processes, the largest first, each to
    the one that has least to do. To be used in a ``with`` statement, at whose end the processes end.

    Attributes:
        evaluations, jacobians, rejected: see there.
        work: work of the last call, over all molecules.
    """

    def __init__(self, functional: OrbitalFree, molecules: Sequence[Molecule], config: OrbitalFreeTraining):
        self.functional, self.config = functional, config
        self.evaluations = self.jacobians = self.rejected = 0
        self.work = Work()
        self._weights = _weights(functional, molecules, config)
        count = min(config.processes, len(molecules))
        loads: list[list[int]] = [[] for _ in range(count)]
        cost = [molecule.size**2 * len(molecule.quadrature) for molecule in molecules]
        for place in sorted(range(len(molecules)), key=lambda k: -cost[k]):
            min(loads, key=lambda load: sum(cost[k] for k in load)).append(place)
        split = [[molecules[k] for k in sorted(load)] for load in loads]
        self._share = made(functional, split[0], molecules, config)
        self._others = [_Worker(functional, own, molecules, config) for own in split[1:]]

    def __exit__(self, *exc: Any) -> None:
        for other in self._others:
            other.close()

    @property
    def model(self) -> OrbitalFree:
        """See :class:`~torchimplicit.recipes.runtime.optimize.Objective`."""
        return self.functional

    def told(self, tell: Callable[[str], None]) -> None:
        """Report progress within an evaluation, through this process's share."""
        self._share.tell = tell

    @property
    def weights(self) -> Array:
        """The weights that the molecules depend on."""
        return self._weights.get()

    def set_weights(self, vector: Array) -> None:
        """Put a vector into the functional."""
        self._weights.put(vector)

    def residuals(self, vector: Array) -> Array:
        """Residuals of all molecules and of the decay; infinite if a density is not found."""
        self.evaluations += 1
        found = np.concatenate([*self._all("residuals", vector), self._decay(vector)])
        self.rejected += not np.isfinite(found).all()
        return np.asarray(found if np.isfinite(found).all() else np.full_like(found, np.inf))

    def jacobian(self, vector: Array) -> Array:
        """``[residuals, weights]``."""
        self.jacobians += 1
        decay = self.config.decay**0.5 * np.eye(len(vector))[self._weights.network.numpy()]
        return np.concatenate([*self._all("jacobian", vector), decay])

    def loss_and_gradient(self, vector: Array) -> tuple[float, Array]:
        """The loss and its gradient; if a density is not found, at the best iterate."""
        self.evaluations += 1
        parts = self._all("loss_and_gradient", vector)
        self.rejected += self.work.unconverged > 0
        decay = self._decay(vector)
        value = sum(part[0] for part in parts) + 0.5 * float(decay @ decay)
        gradient = np.sum([part[1] for part in parts], axis=0)
        gradient[self._weights.network.numpy()] += self.config.decay**0.5 * decay
        return value, gradient

    def _decay(self, vector: Array) -> Array:
        return np.asarray(self.config.decay**0.5 * np.asarray(vector)[self._weights.network.numpy()])

    def _all(self, what: str, vector: Array) -> list[Any]:
        for other in self._others:
            other.ask(what, vector)
        found = [getattr(self._share, what)(vector)]
        works = [self._share.work]
        for other in self._others:
            answer, work = other.answer()
            found.append(answer)
            works.append(work)
        self.work = Work(*(sum(values) for values in zip(*(vars(work).values() for work in works), strict=True)))
        return found


def made(
    functional: OrbitalFree, own: Sequence[Molecule], every: Sequence[Molecule], config: OrbitalFreeTraining
) -> Share:
    """The share of some of the molecules."""
    cases = [Case.of(molecule, config.tail_weight) for molecule in own]
    return Share(functional, cases, _weights(functional, every, config), config, len(every))


def _weights(functional: OrbitalFree, molecules: Sequence[Molecule], config: OrbitalFreeTraining) -> Weights:
    return Weights(functional, molecules, constants=config.energy_weight > 0)


class _Worker:
    """A worker process with its share of the molecules."""

    def __init__(
        self, functional: OrbitalFree, own: Sequence[Molecule], every: Sequence[Molecule], config: OrbitalFreeTraining
    ):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, functional, own, every, config), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, what: str, vector: Array) -> None:
        self._pipe.send((what, vector))

    def answer(self) -> tuple[Any, Work]:
        try:
            found, work = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a process that shares the molecules has ended; its error is above") from None
        return found, work

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.terminate()


def _serve(
    pipe: Connection,
    functional: OrbitalFree,
    own: Sequence[Molecule],
    every: Sequence[Molecule],
    config: OrbitalFreeTraining,
) -> None:
    """Answer requests until the other end closes."""
    import signal
    import warnings

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the asking process' to handle
    SHARED.limit, SHARED.single = config.memory * 1e9 / config.processes, config.single
    warnings.simplefilter("ignore")
    torch.set_num_threads(max(1, config.threads))
    share = made(functional, own, every, config)
    with threads(config.threads):
        while True:
            try:
                what, vector = pipe.recv()
            except (EOFError, OSError):
                return
            pipe.send((getattr(share, what)(vector), share.work))
