"""The residuals of an equation as one vector, with its exact Jacobian in the weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchimplicit.models.physics_informed import Field
from torchimplicit.recipes.physics.equations import Condition

Array = NDArray[np.float64]


class LeastSquares:
    """Half the sum of squares of weighted residuals: the loss ``sum_c weight_c mean(residual_c²)``, halved.

    The Jacobian's rows are gradients of single points. They are had together: every point gets weights of its own, and
    one backward pass for each term of the residual gives all its rows, with three to five linear solves a point.

    Attributes:
        evaluations, jacobians: how many there were.
    """

    def __init__(self, field: Field, conditions: Sequence[Condition]):
        self.field = field
        self.conditions = conditions
        self.parameters = dict(field.named_parameters())
        self.evaluations = self.jacobians = 0

    @property
    def weights(self) -> Array:
        """The field's weights as one vector."""
        return torch.cat([p.detach().reshape(-1) for p in self.parameters.values()]).numpy().copy()

    def set_weights(self, vector: Array) -> None:
        """Put a vector into the field."""
        with torch.no_grad():
            for p, part in zip(self.parameters.values(), self._parts(torch.as_tensor(vector)), strict=True):
                p.copy_(part)

    def residuals(self, vector: Array) -> Array:
        """All residuals, each times the root of its weight over their number."""
        self.evaluations += 1
        self.set_weights(vector)
        with torch.no_grad():
            parts = [self._residual(condition, None).reshape(-1) for condition in self.conditions]
        return torch.cat(parts).numpy()

    def jacobian(self, vector: Array) -> Array:
        """``[residuals, weights]``."""
        self.jacobians += 1
        whole = torch.as_tensor(vector)
        blocks = []
        for condition in self.conditions:
            count = len(condition.points)
            own = [part.expand(count, *part.shape).clone().requires_grad_() for part in self._parts(whole)]
            residual = self._residual(condition, dict(zip(self.parameters, own, strict=True)))
            rows = []
            for term in residual.unbind(1):
                grads = torch.autograd.grad(term.sum(), own, retain_graph=True, allow_unused=True)
                rows.append(
                    torch.cat(
                        [
                            (torch.zeros_like(w) if g is None else g).reshape(count, -1)
                            for g, w in zip(grads, own, strict=True)
                        ],
                        dim=1,
                    )
                )
            blocks.append(torch.stack(rows, dim=1).reshape(-1, len(whole)))
        return torch.cat(blocks).numpy()

    def loss(self) -> Tensor:
        """The loss at the field's present weights, for autograd."""
        self.evaluations += 1
        parts = [self._residual(condition, None).square().sum() for condition in self.conditions]
        return 0.5 * torch.stack(parts).sum()

    def loss_and_gradient(self, vector: Array) -> tuple[float, Array]:
        """Both, at some weights."""
        self.set_weights(vector)
        loss = self.loss()
        grads = torch.autograd.grad(loss, list(self.parameters.values()))
        return float(loss.detach()), torch.cat([g.reshape(-1) for g in grads]).numpy()

    def _residual(self, condition: Condition, weights: dict[str, Tensor] | None) -> Tensor:
        fields = self.field.derivatives(condition.points, condition.orders, weights)
        residual = condition.residual(condition.points, fields)
        return residual * (condition.weight / len(residual)) ** 0.5

    def _parts(self, whole: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self.parameters.values()]
        return [part.reshape(p.shape) for part, p in zip(whole.split(sizes), self.parameters.values(), strict=True)]
