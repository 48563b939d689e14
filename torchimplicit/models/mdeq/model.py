"""The classifier around the equilibrium."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from torchimplicit.gradients import Gradient
from torchimplicit.models.mdeq.cell import MDEQCell
from torchimplicit.models.mdeq.config import MDEQConfig
from torchimplicit.models.mdeq.head import ClassificationHead
from torchimplicit.models.mdeq.published import published_names
from torchimplicit.nn import Equilibrium
from torchimplicit.solvers import Solver


@final
class MDEQ(nn.Module):
    """A multiscale deep equilibrium classifier (Bai, Koltun and Kolter 2020, arXiv 2006.08656).

    Args:
        config: its sizes, such as :func:`mdeq_tiny` gives.
        solver, gradient: solver and gradient estimator of the equilibrium layer; ``None``: its defaults.

    Attributes:
        stem: images to the injection ``[batch, channels[0], height, width]``.
        equilibrium: the :class:`~torchimplicit.nn.Equilibrium` layer; its ``cell`` is a :class:`MDEQCell`.
        head: the state to scores.
    """

    def __init__(self, config: MDEQConfig, solver: Solver | None = None, gradient: Gradient | None = None) -> None:
        super().__init__()
        self.config = config
        self.stem = _stem(config)
        self.equilibrium = Equilibrium(MDEQCell(config), solver=solver, gradient=gradient, rowwise=True)
        self.head = ClassificationHead(config)

    def forward(self, images: Tensor) -> Tensor:
        """``[batch, image_channels, height, width]`` to ``[batch, classes]``."""
        return self.head(self.equilibrium(self.stem(images)))

    def published_names(self) -> dict[str, str]:
        """From the beginnings of names in checkpoints of locuslab's ``mdeq`` and ``deq`` repositories and of TorchDEQ's
        zoo to the names here, for :func:`torchimplicit.nn.convert_state_dict`."""
        return published_names(self.config)


def _stem(config: MDEQConfig) -> nn.Sequential:
    """Two 3×3 convolutions at least, one for each halving, and a 1×1 one unless the model is the simplest."""
    width = config.channels[0]
    steps: list[nn.Module] = []
    for step in range(max(2, config.downsamplings)):
        source = width if step else config.image_channels
        stride = 2 if step < config.downsamplings else 1
        steps += _activated(nn.Conv2d(source, width, 3, stride=stride, padding=1, bias=False))
    if config.downsamplings or len(config.channels) > 2:
        steps += _activated(nn.Conv2d(width, width, 1, bias=False))
    return nn.Sequential(*steps)


def _activated(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()]
