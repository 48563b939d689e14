"""What a field of a shape is trained by, and what it is judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.recipes.runtime.task import Metric


def cross_entropy(field: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Of the field as the logit of being inside."""
    return functional.binary_cross_entropy_with_logits(field(x)[:, 0], y[:, 0])


@final
@dataclass(frozen=True, kw_only=True)
class DistanceLoss:
    """Means over the points: the error of the distance, and of the slope on the surface and its length everywhere
    (the eikonal term of Gropp et al. 2020, *Implicit geometric regularization*).

    With ``surface_only`` no distance is given but zero on the surface, and values near zero are unlikely elsewhere
    (Sitzmann et al. 2020, *Implicit neural representations with periodic activation functions*, eq. 6).

    Attributes:
        distance, normal, eikonal: weights of the three terms.
        surface_only: see above.
        sharpness: of the last one: :math:`\\exp(-s|f|)`.
    """

    distance: float
    normal: float
    eikonal: float
    surface_only: bool = False
    sharpness: float = 100.0

    def __call__(self, field: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """See :data:`~torchimplicit.recipes.fields.task.Criterion`; y: :class:`.points.ShapePoints`."""
        with torch.enable_grad():
            x = x.requires_grad_()
            value = field(x)[:, 0]
            (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        on = y[:, 0] == 0
        length = (slope.square().sum(1) + 1e-12).sqrt()
        normal = torch.where(on, 1 - (slope * y[:, 1:4]).sum(1) / length, 0)
        if self.surface_only:
            miss = torch.where(on, value.abs(), 0) + torch.where(on, 0, (-self.sharpness * value.abs()).exp() / 30)
        else:
            miss = (value - y[:, 0]).abs()
        return (self.distance * miss + self.normal * normal + self.eikonal * (length - 1).square()).mean()


@final
@dataclass(frozen=True)
class Overlap:
    """The intersection over the union of the insides, of the points anywhere and of those near the surface.

    Attributes:
        distance: whether the field is a distance, negative inside; otherwise a logit, positive inside.
    """

    distance: bool

    @property
    def metric(self) -> Metric:
        """See :class:`~torchimplicit.recipes.fields.task.Scoring`."""
        return Metric("IoU", "%", "max")

    def sums(self, values: Tensor, y: Tensor) -> Tensor:
        """Both sets' intersections and unions, the misfit, and how many points there are."""
        value, truth = values[:, 0], y[:, 0]
        near = y[:, -1] > 0.5
        if self.distance:
            own, real = value < 0, truth < 0
            misfit = (value - truth).abs().double().sum()
        else:
            own, real = value > 0, truth > 0.5
            misfit = functional.binary_cross_entropy_with_logits(value, truth, reduction="none").double().sum()
        both, either = own & real, own | real
        counts = [(both & ~near).sum(), (either & ~near).sum(), (both & near).sum(), (either & near).sum()]
        return torch.stack([*(n.double() for n in counts), misfit, misfit.new_tensor(float(len(y)))])

    def figures(self, sums: list[float]) -> dict[str, float]:
        """The two shares, and the mean cross-entropy, or absolute error of the distance, as ``loss``."""
        both, either, both_near, either_near, misfit, count = sums
        return {
            "IoU": both / max(either, 1.0),
            "IoU near": both_near / max(either_near, 1.0),
            "loss": misfit / count,
        }
