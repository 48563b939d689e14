"""Steady Darcy flow by a neural operator, an equilibrium or an explicit counterpart, on generated flows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from torchimplicit.models.neural_operator import NeuralOperator
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, positive
from torchimplicit.recipes.runtime.task import Metric, Rows, SampledTask, gradient, solver
from torchimplicit.recipes.runtime.trainer import Trainer

ModelName = Literal["equilibrium", "tied", "explicit"]

TRAINING = Optimization(
    steps=1500, batch_size=16, learning_rate=3e-3, validate_every=150, clip_norm=1.0, schedule="cosine"
)


@dataclass(frozen=True, kw_only=True)
class OperatorConfig:
    """Learn the steady state of Darcy flow: from the permeability to the pressure."""

    optimization: Optimization = TRAINING
    equilibria: Equilibria = field(default_factory=lambda: Equilibria(gradient="unrolled-phantom"))
    machine: Machine = field(default_factory=Machine)

    model: ModelName = "equilibrium"
    """equilibrium: a Fourier layer at its equilibrium. Otherwise the same layer applied --depth times, or --depth
    different layers."""

    width: int = 20
    """Channels. An explicit model of depth 4 has as many weights as an equilibrium of twice its width."""

    modes: int = 8
    """Frequencies per axis."""

    depth: int = 4
    """Layers of the explicit models."""

    grid: int = 31
    """Interior grid points per side."""

    contrast: float = 1.0
    """Standard deviation of the permeability's logarithm."""

    training_flows: int = 400
    """Number of flows for training."""

    held_out_flows: int = 100
    """Number of flows for validation, and the same number for the test."""

    data_seed: int = 0
    """Random seed of the flows."""

    def __post_init__(self) -> None:
        positive(self, "width", "modes", "depth", "grid", "contrast", "training_flows", "held_out_flows")
        not_negative(self, "data_seed")
        if 2 * self.modes > self.grid + self.grid // 4:
            raise UserError(f"--grid {self.grid} has no --modes {self.modes}: take fewer, or a finer grid")


def darcy() -> OperatorConfig:
    """Darcy flow on grids of 31 points."""
    return OperatorConfig()


# -- Flows -------------------------------------------------------------------------------------------------------------


WAVES = 24
"""Cosines per axis in a random field."""


def permeabilities(count: int, grid: int, contrast: float, seed: int) -> Tensor:
    """``exp(contrast · g)`` at all points of the square, the boundary included, ``[count, grid + 2, grid + 2]``
    (float64).

    g is Gaussian with covariance :math:`(-\\Delta+9)^{-2}` and zero slope across the boundary (Li et al. 2021), brought
    to deviation one; it is a sum of cosines, the same function on every grid.
    """
    chance = torch.Generator().manual_seed(seed)
    k = torch.arange(WAVES, dtype=torch.float64)
    size = 1 / (torch.pi**2 * (k[:, None] ** 2 + k**2) + 9)
    x = torch.linspace(0, 1, grid + 2, dtype=torch.float64)
    cosines = torch.cos(torch.pi * k[:, None] * x) * torch.where(k[:, None] == 0, 1.0, 2**0.5)
    drawn = torch.randn(count, WAVES, WAVES, dtype=torch.float64, generator=chance)
    waves: Tensor = torch.einsum("bkl,ki,lj->bij", drawn * size, cosines, cosines)
    return torch.exp(contrast * waves / size.square().sum().sqrt())


def pressure(a: Tensor) -> Tensor:
    """The steady state of :math:`-\\nabla\\cdot(a\\nabla u)=1`, zero on the boundary, at the inner points.

    Finite volumes on five points, with harmonic means of a between two of them; solved directly.

    Args:
        a: ``[n + 2, n + 2]``, float64.
    """
    from scipy.sparse import csc_matrix
    from scipy.sparse.linalg import spsolve

    n = len(a) - 2
    coefficients = a.numpy()
    index = np.arange(n * n).reshape(n, n)
    diagonal = np.zeros((n, n))
    rows, columns, values = [], [], []
    for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
        other = np.roll(coefficients, -step, axis)
        share = (2 * coefficients * other / (coefficients + other))[1:-1, 1:-1] * (n + 1) ** 2
        diagonal += share
        there = np.roll(index, -step, axis)
        edge = [slice(None), slice(None)]
        edge[axis] = slice(0, -1) if step == 1 else slice(1, None)
        rows.append(index[tuple(edge)].ravel())
        columns.append(there[tuple(edge)].ravel())
        values.append(-share[tuple(edge)].ravel())
    rows, columns = [*rows, index.ravel()], [*columns, index.ravel()]
    entries = np.concatenate([*values, diagonal.ravel()])
    matrix = csc_matrix((entries, (np.concatenate(rows), np.concatenate(columns))), shape=(n * n, n * n))
    return torch.from_numpy(spsolve(matrix, np.ones(n * n)).reshape(n, n))


@lru_cache(maxsize=4)
def flows(count: int, grid: int, contrast: float, seed: int) -> tuple[Tensor, Tensor]:
    """The logarithm of the permeability and the pressure, ``[count, 1, grid, grid]`` each (float32)."""
    a = permeabilities(count, grid, contrast, seed)
    u = torch.stack([pressure(one) for one in a])
    return a.log()[:, None, 1:-1, 1:-1].float(), u[:, None].float()


# -- the model, and what is asked of it --------------------------------------------------------------------------------


class OperatorTask(SampledTask):
    """Judged by the relative root-mean-square error of a flow, averaged over flows, also on a grid twice as fine."""

    metric = Metric("error", "", "min")
    held_out_batch = 50

    def __init__(self, config: OperatorConfig):
        super().__init__()
        self.config = config
        counts = {"training": config.training_flows, "validation": config.held_out_flows, "test": config.held_out_flows}
        by_split = {
            name: flows(count, config.grid, config.contrast, 3 * config.data_seed + place)
            for place, (name, count) in enumerate(counts.items())
        }
        self.sets = {name: Rows(*one) for name, one in by_split.items()}
        u = by_split["training"][1]
        self.scale = float(u.std())
        self.model = NeuralOperator(
            config.model,
            width=config.width,
            modes=config.modes,
            depth=config.depth,
            solver=solver(config.equilibria),
            gradient=gradient(config.equilibria),
        )

    def errors(self, batch: Any) -> Tensor:
        """Relative errors, ``[batch]``."""
        a, u = batch
        gap = self.scale * self.model(a) - u
        return gap.flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1)

    def loss(self, batch: Any) -> Tensor:
        return self.errors(batch).mean()

    def score(self, batch: Any) -> Tensor:
        errors = self.errors(batch).double()
        return torch.stack([errors.sum(), errors.new_tensor(float(len(errors)))])

    def figures(self, sums: list[float]) -> dict[str, float]:
        total, count = sums
        return {"error": total / count}

    def describe(self) -> str:
        flows = f"{self.counts} flows on {self.config.grid}² points"
        return f"Darcy flow: {flows}; {self.config.model}, {self.weights} weights."


RUNNER = Trainer(OperatorTask)
