"""Initial states predicted from the inputs by a network."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchimplicit.regularizers.consistency import relative_distance
from torchimplicit.solution import Solution
from torchimplicit.state import detached


@final
class LearnedStart(nn.Module):
    """Predicts the start of an :class:`Equilibrium`'s solves from the layer's inputs, and learns from its solutions.

    Many steps of a solve only bring the state from zeros near the equilibrium; a small network can predict where that
    is (Bai, Koltun and Kolter 2022, "Neural deep equilibrium solvers")::

        layer = Equilibrium(cell, start=LearnedStart(network))
        loss = criterion(head(layer(x)), y) + layer.start.loss(layer.solution)

    The equilibrium does not depend on the start, so that the loss of the task has no gradient in the network: train it
    by :meth:`loss`, which has no gradient in the cell, nor in the inputs.

    Args:
        network: a module called with the layer's inputs, returning a state like the cell's.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"LearnedStart takes an nn.Module, called with the layer's inputs, not {network!r}")
        self.network = network
        self._prediction: Any = None

    def forward(self, *inputs: Any) -> Any:
        """The predicted state, detached, as the equilibrium does not depend on it."""
        prediction = self.network(*pytree.tree_map(detached, inputs))
        self._prediction = prediction if torch.is_grad_enabled() else None
        return detached(prediction)

    def loss(self, solution: Solution) -> Tensor:
        """The mean over the batch of :math:`\\lVert z_0-z^*\\rVert^2/\\lVert z^*\\rVert^2`, between the last prediction
        and the solution found from it.

        Args:
            solution: the solution of the same call, such as ``layer.solution``. Samples whose solution is not finite
                are left out.

        Returns:
            a scalar, differentiable once in the network's parameters.

        Raises:
            ValueError: nothing was predicted with gradients since the last loss, or the solution is of another batch.
        """
        prediction, self._prediction = self._prediction, None
        if prediction is None:
            raise ValueError(
                "LearnedStart.loss compares the last prediction with the solution found from it, but nothing was "
                "predicted with gradients since the last loss: call the layer first, outside torch.no_grad()"
            )
        return relative_distance(prediction, solution)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_prediction": None}
