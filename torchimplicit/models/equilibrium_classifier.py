"""A classifier of images whose map is cheap to evaluate and is a contraction by construction."""

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
    """The sizes of an :class:`EquilibriumClassifier`.

    Attributes:
        image_channels, image_size: channels and side of the square images.
        classes: number of classes.
        channels: channels of a convolutional state, or the size of a dense one.
        stride: stride of the convolution that injects the images; the state is ``image_size / stride`` high and wide.
            ``None``: all maps are dense.
        bound: upper bound of the recurrent weight's spectral norm. tanh does not expand, so that a dense map with a
            bound below 1 contracts at any weights. For a convolution it bounds the norm of the kernel as a matrix.
        mean, deviation: mean and standard deviation of the pixels, by which they are standardized.
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
        channels: size of the state, or channels of a convolutional one.
        convolutional: whether W is a 3×3 convolution.
        bound: b, the bound of the spectral norm.
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
    """Class scores :math:`V z^*` of pixels in [0, 1], with the equilibrium :math:`z^*=\\tanh(Wz^*+Ux+b)`.

    The model of adversarial examples by joint inference: :meth:`map` gives the map as a function of state and pixels,
    for :class:`~torchimplicit.JointInference`.

    Args:
        config: the sizes.
        solver, gradient: solver and gradient estimator of the equilibrium layer; ``None``: its defaults.
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
        """The injection of the images, a tensor like the state that every iteration adds."""
        return self.injection((images - self.config.mean) / self.config.deviation)

    def read(self, z: Tensor) -> Tensor:
        """The scores of a state."""
        return self.readout(z.flatten(1))

    def map(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The map ``f(z, images)``. Its normalized weight is computed once, in this call."""
        mix = self.mixed()
        return lambda z, images: torch.tanh(mix(z) + self.inject(images))

    def mixed(self) -> Callable[[Tensor], Tensor]:
        """The product with W alone. The normalized weight is computed once, in this call."""
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
        """Class scores ``[batch, classes]`` of images ``[batch, image_channels, size, size]``; the solve starts at
        ``z0``."""
        return self.read(self.equilibrium(self.inject(images), z0=z0))
