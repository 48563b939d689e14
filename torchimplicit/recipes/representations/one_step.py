"""What the one-step estimate makes of a loss that holds slopes: wrong, and here to show how wrong.

The library refuses it (:func:`torchimplicit.recipes.representations.fit.check_slopes`). A cell applied once more
at its detached fixed point has a first derivative in the weights that is an estimate. As a function of the coordinates
its slope leaves out that the fixed point moves with them, and the loss sees that slope.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from torchimplicit.models import ImplicitRepresentation
from torchimplicit.recipes.representations.cost import Fit, costs_of_fits
from torchimplicit.recipes.representations.fit import FieldRunner, FieldTask
from torchimplicit.recipes.representations.shape import RUNNER as SHAPES
from torchimplicit.recipes.representations.shape import DistanceLoss, ShapeConfig, build, export, show
from torchimplicit.recipes.representations.shape import ready as shape_ready
from torchimplicit.recipes.representations.shapes import ShapesCostConfig
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.step_cost import StepCost, step_table
from torchimplicit.recipes.runtime.trainer import Measuring


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


TRAINER = FieldRunner(build_one_step, show, shape_ready, export)


@dataclass(frozen=True)
class Direction:
    """The one-step estimate beside the exact gradient in all weights, at the same weights.

    Attributes:
        cosine, norm: of the whole loss, and the ratio of the norms.
        values: the cosine for the loss of values alone.
        slopes: that for the loss of slopes alone.
    """

    cosine: float
    norm: float
    values: float
    slopes: float


@dataclass(frozen=True)
class ShapesCost:
    """What was measured.

    Attributes:
        costs: of a step, by the fits' names.
        begun: by the name of every implicit fit of a distance: the directions at its initial weights.
        trained: the same after the steps of the measurement.
    """

    costs: dict[str, StepCost]
    begun: dict[str, Direction]
    trained: dict[str, Direction]


def measured(config: ShapesCostConfig, run: Run | None = None) -> ShapesCost:
    """All fits, in turn."""
    named = list(zip(config.names, config.fits, config.one_step, strict=True))
    fits = {name: Fit(name, one, build_one_step if estimate else build) for name, one, estimate in named}
    exact = {n: one for n, one, estimate in named if one.task == "sdf" and one.representation.implicit and not estimate}
    begun = {name: direction(fits[name], one) for name, one in exact.items()}
    directions: dict[str, Direction] = {}
    costs = costs_of_fits(
        list(fits.values()),
        config,
        lambda: directions.update({name: direction(fits[name], one) for name, one in exact.items()}),
    )
    return ShapesCost(costs, begun, directions)


def direction(subject: Fit, config: ShapeConfig) -> Direction:
    """The estimate's at the subject's present weights."""
    other = build_one_step(config).to(subject.where).train()
    assert isinstance(other.model, OneStepRepresentation)
    other.model.whole.load_state_dict(subject.task.model.state_dict())
    weights = subject.task.criterion
    assert isinstance(weights, DistanceLoss)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, criterion in (
        ("whole", weights),
        ("values", replace(weights, normal=0.0, eikonal=0.0)),
        ("slopes", replace(weights, distance=0.0)),
    ):
        subject.task.criterion = other.criterion = criterion
        found[name] = (_gradient(other, subject.batch), _gradient(subject.task, subject.batch))
    subject.task.criterion = weights
    cosine = {name: float(torch.cosine_similarity(one, true, dim=0)) for name, (one, true) in found.items()}
    one, true = found["whole"]
    return Direction(cosine["whole"], float(one.norm() / true.norm()), cosine["values"], cosine["slopes"])


def _gradient(task: Any, batch: Tensor) -> Tensor:
    weights = list(task.parameters())
    grads = torch.autograd.grad(task.loss(batch), weights, allow_unused=True)
    pairs = zip(weights, grads, strict=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in pairs]).double()


def ready(config: ShapesCostConfig) -> None:
    """Raise where one of the fits cannot be run."""
    for one in config.fits:
        SHAPES.check(one)


COSTS = Measuring(measure=measured, ready=ready, name="costs.json", show=lambda found: step_table(found.costs))
