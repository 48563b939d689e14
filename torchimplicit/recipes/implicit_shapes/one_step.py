"""What the one-step estimate makes of a loss that holds slopes: wrong, and here to show how wrong.

The library refuses it (:func:`torchimplicit.recipes.fields.settings.check_slopes`). A cell applied once more at its
detached fixed point has a first derivative in the weights that is an estimate. As a function of the coordinates its
slope leaves out that the fixed point moves with them, and the loss sees that slope.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from torchimplicit.models import ImplicitRepresentation
from torchimplicit.recipes.fields.runner import FieldRunner
from torchimplicit.recipes.fields.shape.config import ShapeConfig
from torchimplicit.recipes.fields.shape.show import export, show
from torchimplicit.recipes.fields.shape.task import build, ready
from torchimplicit.recipes.fields.task import FieldTask


@final
class OneStepRepresentation(nn.Module):
    """In training, one application of the cell at the detached fixed point; in eval mode the representation itself.

    Args:
        whole: the representation.
    """

    def __init__(self, whole: ImplicitRepresentation):
        super().__init__()
        self.whole = whole
        whole.equilibrium.warm_start = None  # states are remembered by the layer's own gradient only

    def forward(self, x: Tensor) -> Tensor:
        """``[points, inputs]`` to ``[points, outputs]``."""
        if not self.training:
            return self.whole(x)
        given = [one(x) for one in self.whole.filters]
        with torch.no_grad():
            state = self.whole.equilibrium(given)
        return self.whole.head(self.whole.equilibrium.cell(state, given))


def build_one_step(config: ShapeConfig) -> FieldTask:
    """The task of a config, with the same initial weights."""
    task = build(config)
    assert isinstance(task.model, ImplicitRepresentation)
    task.model = OneStepRepresentation(task.model)
    return task


RUNNER = FieldRunner(build_one_step, show, ready, export)
