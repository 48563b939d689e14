"""The measurement on one molecule."""

from __future__ import annotations

import torch
from rich.console import Console

from torchimplicit.diagnostics import curvature
from torchimplicit.gradients import Implicit
from torchimplicit.linear import Dense
from torchimplicit.models.orbital_free import Molecule
from torchimplicit.recipes.ofdft_gradients import nudges
from torchimplicit.recipes.ofdft_gradients.adjoint import solved
from torchimplicit.recipes.ofdft_gradients.config import MoleculeGradientsConfig
from torchimplicit.recipes.ofdft_gradients.differences import difference
from torchimplicit.recipes.ofdft_gradients.optimum import Optimum, check, load, made
from torchimplicit.recipes.ofdft_gradients.results import MoleculeResults, Point
from torchimplicit.recipes.ofdft_gradients.softening import softened, softest
from torchimplicit.recipes.runtime.run import Run, threads
from torchimplicit.solution import Status


def measured(config: MoleculeGradientsConfig, molecule: Molecule) -> MoleculeResults:
    """Everything, at the molecule."""
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
        nudged=nudges.nudged(optimum, gradient, config.nudges),
        automatic=nudges.automatic(optimum, gradient),
        loosened=nudges.loosened(optimum, gradient, config.loss_nudges, config.loose),
        beyond=nudges.beyond(optimum, gradient, point.least, config.beyond, config.most_steps),
        damped=nudges.damped(optimum, gradient, config.loss_nudges),
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
    """Measures; there is nothing to train beyond what the settings ask of the functional."""

    def check(self, config: MoleculeGradientsConfig) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`: the molecule must be to be had."""
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
