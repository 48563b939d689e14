"""A classifier of images whose equilibrium is cheap to evaluate, and stays a contraction by construction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.gradients import Gradient
from torchimplicit.nn import Equilibrium, spectral_norm
from torchimplicit.solvers import Solver


@dataclass(frozen=True, kw_only=True)
class EquilibriumClassifierConfig:
    """Sizes.

    Attributes:
        image_channels, image_size: of the square images.
        classes: how many.
        channels: of the state; of a dense one, its size.
        stride: of the convolution that puts the images in, after which the state is ``image_size / stride`` high and
            wide; ``None``: everything is dense.
        bound: on the spectral norm of the weight between states. tanh does not expand, so that a dense map below 1
            contracts for every weight that training may find; of a convolution it is the kernel's norm as a matrix.
        mean, deviation: of the pixels, which are standardized by them.
    """

    image_channels: int = 1
    image_size: int = 8
    classes: int = 10
    channels: int = 100
    stride: int | None = None
    bound: float = 0.8
    mean: float = 0.3
    deviation: float = 0.38

    def __post_init__(self) -> None:
        if self.stride is not None and self.image_size % self.stride:
            raise ValueError(
                f"EquilibriumClassifierConfig: images of {self.image_size} pixels have no whole number of strides of "
                f"{self.stride}; take a stride that divides the size"
            )


class TanhCell(nn.Module):
    """:math:`z^+=\\tanh(Wz+u)`, with :math:`\\lVert W\\rVert\\le b`; W is a matrix, or a 3×3 convolution.

    Args:
        channels: of the state.
        convolutional: which of the two.
        bound: b.
    """

    def __init__(self, channels: int, convolutional: bool, bound: float):
        super().__init__()
        mixing = (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            if convolutional
            else nn.Linear(channels, channels, bias=False)
        )
        self.mixing = spectral_norm(mixing, bound=bound)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        """One application of the map."""
        return torch.tanh(self.mixing(z) + u)


class EquilibriumClassifier(nn.Module):
    """Pixels in [0, 1] to the scores of the classes, :math:`V z^*` with :math:`z^*=\\tanh(Wz^*+Ux+b)`.

    The model of adversarial examples by joint inference: :meth:`map` gives the map as a function of state and pixels,
    for :class:`~torchimplicit.JointInference`.

    Args:
        config: the sizes.
        solver, gradient: of the equilibrium; ``None``: the layer's defaults.
    """

    def __init__(
        self, config: EquilibriumClassifierConfig, *, solver: Solver | None = None, gradient: Gradient | None = None
    ):
        super().__init__()
        self.config = config
        pixels = config.image_channels * config.image_size**2
        self.injection: nn.Module
        if config.stride is None:
            self.injection = nn.Sequential(nn.Flatten(), nn.Linear(pixels, config.channels))
            size = 1
        else:
            kernel = config.stride + 1 + config.stride % 2  # odd, and wider than the stride
            self.injection = nn.Conv2d(
                config.image_channels, config.channels, kernel, stride=config.stride, padding=kernel // 2
            )
            size = (config.image_size // config.stride) ** 2
        cell = TanhCell(config.channels, config.stride is not None, config.bound)
        self.equilibrium = Equilibrium(cell, solver=solver, gradient=gradient, rowwise=True)
        self.readout = nn.Linear(config.channels * size, config.classes)

    def inject(self, images: Tensor) -> Tensor:
        """What the images put into every iteration, like the state."""
        return self.injection((images - self.config.mean) / self.config.deviation)

    def read(self, z: Tensor) -> Tensor:
        """The scores of a state."""
        return self.readout(z.flatten(1))

    def map(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The map ``f(z, images)``, its bounded weight computed once, here."""
        mix = self.mixed()
        return lambda z, images: torch.tanh(mix(z) + self.inject(images))

    def mixed(self) -> Callable[[Tensor], Tensor]:
        """The product with W alone, the weight computed once, here."""
        cell = self.equilibrium.cell
        assert isinstance(cell, TanhCell)
        weight = cell.mixing.weight
        if self.config.stride is None:
            return lambda z: functional.linear(z, weight)
        return lambda z: functional.conv2d(z, weight, padding=1)

    def start(self, images: Tensor) -> Tensor:
        """The state of zeros."""
        config = self.config
        side = () if config.stride is None else (config.image_size // config.stride,) * 2
        return images.new_zeros(len(images), config.channels, *side)

    def forward(self, images: Tensor, z0: Tensor | None = None) -> Tensor:
        """``[batch, image_channels, size, size]`` to scores ``[batch, classes]``; ``z0``: where the solve begins."""
        return self.read(self.equilibrium(self.inject(images), z0=z0))
