"""The measurement on one molecule."""

from __future__ import annotations

import torch
from rich.console import Console

from torchimplicit.diagnostics import curvature
from torchimplicit.gradients import Implicit
from torchimplicit.linear import Dense
from torchimplicit.models.orbital_free import Molecule
from torchimplicit.recipes.machine import threads
from torchimplicit.recipes.ofdft_gradients import nudges
from torchimplicit.recipes.ofdft_gradients.adjoint import solved
from torchimplicit.recipes.ofdft_gradients.case import Case, check, load, made
from torchimplicit.recipes.ofdft_gradients.config import MoleculeGradientsConfig
from torchimplicit.recipes.ofdft_gradients.differences import difference
from torchimplicit.recipes.ofdft_gradients.results import MoleculeResults, Point
from torchimplicit.recipes.ofdft_gradients.softening import softened, softest
from torchimplicit.recipes.run import Run
from torchimplicit.solution import Status


def measured(config: MoleculeGradientsConfig, molecule: Molecule) -> MoleculeResults:
    """Everything, at the molecule."""
    case = made(config, molecule)
    point = _point(case)
    exact = case.estimate(Implicit(linear_solver=Dense()))
    assert exact.status == Status.CONVERGED.name, exact.status
    gradient = exact.gradient
    eigenvalue, vector = softest(case, gradient)
    damping = config.damping * eigenvalue
    adjoint, seconds = {}, {}
    for name, problem in (("overlap", case.problem), ("raw", case.problem.own_coordinates())):
        adjoint[name], seconds[name] = solved(case, problem, config.descent_steps, config.repeats)
    generator = torch.Generator().manual_seed(config.seed)
    return MoleculeResults(
        point=point,
        difference=difference(case, gradient, config.directions, config.step, generator),
        nudged=nudges.nudged(case, gradient, config.nudges),
        automatic=nudges.automatic(case, gradient),
        loosened=nudges.loosened(case, gradient, config.loss_nudges, config.loose),
        beyond=nudges.beyond(case, gradient, point.least, config.beyond, config.most_steps),
        damped=nudges.damped(case, gradient, config.loss_nudges),
        softest=eigenvalue,
        damping=damping,
        softened=softened(case, gradient, eigenvalue, vector, damping, config),
        adjoint=adjoint,
        product_seconds=seconds,
        assembled=molecule.size,
    )


def _point(case: Case) -> Point:
    n = case.molecule.size
    fine = curvature(case.problem, case.value, subspace=n)
    raw = curvature(case.problem.own_coordinates(), case.value, subspace=n)
    return Point(
        size=n,
        points=len(case.molecule.quadrature),
        loss=case.per_electron,
        saddles=case.saddles,
        steps=case.steps,
        least=float(fine.least),
        largest=float(fine.largest),
        raw_least=float(raw.least),
        raw_largest=float(raw.largest),
    )


class MeasureRunner:
    """Measures; there is nothing to train beyond what the settings ask of the functional."""

    def check(self, config: MoleculeGradientsConfig) -> None:
        """See :class:`~torchimplicit.recipes.recipe.Runner`: the molecule must be to be had."""
        check(config)

    def train(self, config: MoleculeGradientsConfig, run: Run, console: Console) -> bool:
        """See :class:`~torchimplicit.recipes.recipe.Runner`."""
        with threads(1):
            run.write_json("results.json", measured(config, load(config)))
        return True

    def evaluate(self, config: MoleculeGradientsConfig, run: Run, console: Console) -> None:
        """See :class:`~torchimplicit.recipes.recipe.Runner`: measures again."""
        with threads(1):
            run.write_json("evaluation.json", measured(config, load(config)))


RUNNER = MeasureRunner()
