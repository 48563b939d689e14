"""How the residual falls as the solver goes on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.models import ConvDEQClassifier
from torchimplicit.problems import FixedPoint
from torchimplicit.solve import solve
from torchimplicit.solvers import Anderson, FixedPointIteration, Solver

LENGTH = 40
"""Iterations shown."""

SOLVERS: dict[str, Solver] = {
    "Anderson": Anderson(rtol=1e-6, max_steps=LENGTH, keep_trajectory=True),
    "plain iteration": FixedPointIteration(rtol=1e-6, max_steps=LENGTH, keep_trajectory=True),
}


@dataclass(frozen=True)
class Profile:
    """Relative residuals ``‖f(z) − z‖ / ‖f(z)‖`` by iteration, over the samples of one batch.

    Attributes:
        solver: whose iterates.
        median, low, high: the median, the 10 % and the 90 % quantile.
    """

    solver: str
    median: list[float]
    low: list[float]
    high: list[float]


@torch.no_grad()
def profiles(classifier: ConvDEQClassifier, images: Tensor) -> list[Profile]:
    """One profile for each solver, at the classifier's weights."""
    x = classifier.stem(images)
    cell = classifier.equilibrium.cell
    found = []
    for name, solver in SOLVERS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            solution = solve(FixedPoint(cell), torch.zeros_like(x), x, solver=solver, throw=False)
        rows = torch.stack([_relative_residual(cell, z, x) for z in solution.trajectory])
        low, median, high = torch.quantile(rows.double(), rows.new_tensor([0.1, 0.5, 0.9]).double(), dim=1)
        found.append(Profile(name, median.tolist(), low.tolist(), high.tolist()))
    return found


def _relative_residual(cell: torch.nn.Module, z: Tensor, x: Tensor) -> Tensor:
    image = cell(z, x)
    return (image - z).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)
