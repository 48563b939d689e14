"""The training objective of a density functional: the residuals, the loss and the gradient of all molecules."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchimplicit.models.orbital_free import Molecule, OrbitalFree
from torchimplicit.models.orbital_free.on_grid import SHARED
from torchimplicit.models.orbital_free.second import mixed
from torchimplicit.recipes.density.case import Case
from torchimplicit.recipes.density.penalties import floor_residual, penalty
from torchimplicit.recipes.density.settings import OrbitalFreeTraining
from torchimplicit.recipes.density.weights import Weights
from torchimplicit.recipes.runtime.optimize import Array
from torchimplicit.recipes.runtime.run import threads
from torchimplicit.regularizers import fixed_point_correction
from torchimplicit.solution import Solution, chosen_iterates

# -- Some of the molecules, as one process holds them -----------------------------------------------------------------


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
        self.generator = torch.Generator().manual_seed(config.seed)
        self.work = Work()
        self.tell: Callable[[str], None] = lambda status: None

    def residuals(self, vector: Array) -> Array:
        """Residuals of all molecules of the share. All are infinite if a density is not found; then no others are
        sought."""
        self._begin(vector)
        residuals = []
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
            residuals.append(self._filled(case, torch.cat(parts)) / self.total**0.5)
        return torch.cat(residuals).numpy()

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
                lacking, at = floor_residual(self.config, case, self.functional, p, matrix)
                (along,) = torch.autograd.grad(lacking, at, retain_graph=True)
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
        loss = loss + penalty(self.config, case, self.functional, solution.value, self.generator)
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
        self._weights = Weights(functional, molecules, constants=config.energy_weight > 0)
        count = min(config.processes, len(molecules))
        loads: list[list[int]] = [[] for _ in range(count)]
        cost = [molecule.size**2 * len(molecule.quadrature) for molecule in molecules]
        for place in sorted(range(len(molecules)), key=lambda k: -cost[k]):
            min(loads, key=lambda load: sum(cost[k] for k in load)).append(place)
        split = [[molecules[k] for k in sorted(load)] for load in loads]
        self._share = Share(functional, _cases(split[0], config), self._weights, config, len(molecules))
        self._others = [_Worker(functional, share, molecules, config) for share in split[1:]]

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
        residuals = np.concatenate([*self._all("residuals", vector), self._decay(vector)])
        self.rejected += not np.isfinite(residuals).all()
        return np.asarray(residuals if np.isfinite(residuals).all() else np.full_like(residuals, np.inf))

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
        answers = [getattr(self._share, what)(vector)]
        works = [self._share.work]
        for other in self._others:
            answer, work = other.answer()
            answers.append(answer)
            works.append(work)
        self.work = Work(*(sum(values) for values in zip(*(vars(work).values() for work in works), strict=True)))
        return answers


def _cases(molecules: Sequence[Molecule], config: OrbitalFreeTraining) -> list[Case]:
    return [Case.of(molecule, config.tail_weight) for molecule in molecules]


class _Worker:
    """A worker process with its share of the molecules."""

    def __init__(
        self,
        functional: OrbitalFree,
        molecules: Sequence[Molecule],
        every: Sequence[Molecule],
        config: OrbitalFreeTraining,
    ):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, functional, molecules, every, config), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, what: str, vector: Array) -> None:
        self._pipe.send((what, vector))

    def answer(self) -> tuple[Any, Work]:
        try:
            answer, work = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a process that shares the molecules has ended; its error is above") from None
        return answer, work

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.terminate()


def _serve(
    pipe: Connection,
    functional: OrbitalFree,
    molecules: Sequence[Molecule],
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
    weights = Weights(functional, every, constants=config.energy_weight > 0)
    share = Share(functional, _cases(molecules, config), weights, config, len(every))
    with threads(config.threads):
        while True:
            try:
                what, vector = pipe.recv()
            except (EOFError, OSError):
                return
            pipe.send((getattr(share, what)(vector), share.work))
