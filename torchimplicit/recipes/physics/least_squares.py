"""The residuals of an equation as one vector, with its exact Jacobian in the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from torchimplicit.models.physics_informed import Field
from torchimplicit.recipes.physics.statement import Order, Stated
from torchimplicit.recipes.runtime.optimize import Array


class Solved(nn.Module):
    """The trained model: a field, and the equation's unknown parameters.

    Attributes:
        field: the function.
        unknown: numbers by name.
    """

    def __init__(self, field: Field, unknown: Mapping[str, float]):
        super().__init__()
        self.field = field
        self.unknown = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(float(value), dtype=torch.float64)) for name, value in unknown.items()}
        )

    def found(self) -> dict[str, float]:
        """The current parameters."""
        return {name: float(value.detach()) for name, value in self.unknown.items()}


class LeastSquares:
    """Half the sum of squares of weighted residuals: the loss ``sum_c weight_c mean(residual_c²)``, halved.

    All points are evaluated together, with all the derivatives that any condition asks for. The Jacobian's rows are
    gradients of single points: every point gets weights of its own, and one backward pass for each term of a residual
    gives the rows of all points.

    Attributes:
        evaluations, jacobians: how many there were.
        rejected: evaluations whose equilibria were not all found; their residuals are infinite.
    """

    def __init__(self, model: Solved, conditions: Sequence[Stated]):
        self.model = model
        self.conditions = conditions
        self.parameters = dict(model.named_parameters())
        self.evaluations = self.jacobians = self.rejected = 0
        self.points = torch.cat([condition.points for condition in conditions])
        self.orders = tuple(dict.fromkeys(order for condition in conditions for order in condition.orders))

    @property
    def weights(self) -> Array:
        """The field's weights and the unknown parameters as one vector."""
        return torch.cat([p.detach().reshape(-1) for p in self.parameters.values()]).numpy().copy()

    def set_weights(self, vector: Array) -> None:
        """Put a vector into the model."""
        with torch.no_grad():
            for p, part in zip(self.parameters.values(), self._parts(torch.as_tensor(vector)), strict=True):
                p.copy_(part)

    def residuals(self, vector: Array) -> Array:
        """All residuals, each times the square root of its weight over their number."""
        self.evaluations += 1
        self.set_weights(vector)
        with torch.no_grad():
            values = torch.cat([residual.reshape(-1) for residual in self._residuals(None)]).numpy()
        if self._settled():
            return values
        self.rejected += 1
        return np.full_like(values, np.inf)

    def jacobian(self, vector: Array) -> Array:
        """``[residuals, weights]``."""
        self.jacobians += 1
        self.set_weights(vector)
        count = len(self.points)
        copies = [p.detach().expand(count, *p.shape).clone().requires_grad_() for p in self.parameters.values()]
        residuals = self._residuals(dict(zip(self.parameters, copies, strict=True)))
        width = max(residual.shape[1] for residual in residuals)
        rows = []
        for term in range(width):
            total = torch.stack([r[:, term].sum() for r in residuals if r.shape[1] > term]).sum()
            grads = torch.autograd.grad(total, copies, retain_graph=term + 1 < width, materialize_grads=True)
            rows.append(torch.cat([g.reshape(count, -1) for g in grads], dim=1))
        blocks, start = [], 0
        for residual in residuals:
            number, terms = residual.shape
            blocks += [torch.stack([row[start : start + number] for row in rows[:terms]], dim=1).flatten(0, 1)]
            start += number
        return torch.cat(blocks).numpy()

    def loss(self) -> Tensor:
        """The loss at the model's present weights, for autograd."""
        self.evaluations += 1
        return 0.5 * torch.stack([residual.square().sum() for residual in self._residuals(None)]).sum()

    def loss_and_gradient(self, vector: Array) -> tuple[float, Array]:
        """The loss and its gradient at some weights."""
        self.set_weights(vector)
        loss = self.loss()
        grads = torch.autograd.grad(loss, list(self.parameters.values()), materialize_grads=True)
        if not self._settled():
            self.rejected += 1
        return float(loss.detach()), torch.cat([g.reshape(-1) for g in grads]).numpy()

    def _settled(self) -> bool:
        converged = self.model.field.converged
        return converged is None or bool(converged.all())

    def _residuals(self, weights: dict[str, Tensor] | None) -> list[Tensor]:
        """``[points, terms]`` of each condition."""
        if weights is None:
            given_weights, unknown = None, dict(self.model.unknown.items())
        else:
            given_weights = dict(_below("field.", weights.items()))
            unknown = dict(_below("unknown.", weights.items()))
        fields = self.model.field.derivatives(self.points, self.orders, given_weights)
        residuals, start = [], 0
        for condition in self.conditions:
            there = slice(start, start + len(condition.points))

            def derivative(output: int, order: Order, there: slice = there) -> Tensor:
                return fields[order][there, output]

            of_points = {name: value[there] if value.ndim else value for name, value in unknown.items()}
            residual = condition(derivative, of_points)
            residuals.append(residual * (condition.weight / len(residual)) ** 0.5)
            start = there.stop
        return residuals

    def _parts(self, whole: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self.parameters.values()]
        return [part.reshape(p.shape) for part, p in zip(whole.split(sizes), self.parameters.values(), strict=True)]


def _below(prefix: str, named: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), value) for name, value in named if name.startswith(prefix))
