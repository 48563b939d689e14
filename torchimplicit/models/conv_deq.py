"""A small convolutional deep-equilibrium classifier: the simplest useful member of the multiscale-DEQ family.

The cell is the residual block of multiscale deep equilibrium models (Bai, Koltun and Kolter 2020, arXiv 2006.08656,
section 4) at one resolution, with group normalization and weight normalization.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.gradients import Gradient
from torchimplicit.nn import Equilibrium, weight_norm
from torchimplicit.solvers import Solver


class ResidualCell(nn.Module):
    """The map whose fixed point is the features: ``z⁺ = N₃(relu(σz + N₂(x + κ·conv₂(relu(N₁(conv₁(z)))))))``.

    ``N`` is group normalization. It divides the scale of ``z`` out again, so that a small gain in the last one would
    not make the map contractive; the shares σ and κ that the state keeps beside the input do. The residual block has
    σ = κ = 1, which puts the Jacobian's spectral radius at the equilibrium above 0.9 from the start; at the defaults
    it starts near 0.6. Training moves it.

    Every sample is treated on its own, so that ``rowwise=True`` holds.

    Args:
        channels: channels of the state and of the input injection.
        groups: groups of the normalizations; must divide ``channels``.
        mixing: κ > 0, the weight of the convolutions beside the input.
        skip: σ >= 0, the weight of the state that skips the block.

    Shapes: ``z`` and ``x``: ``[batch, channels, height, width]``; the result is like ``z``.
    """

    def __init__(self, channels: int, groups: int = 4, mixing: float = 0.2, skip: float = 0.5):
        super().__init__()
        self.mixing, self.skip = mixing, skip
        self.conv1 = weight_norm(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        self.conv2 = weight_norm(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        self.norm1 = nn.GroupNorm(groups, channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.norm3 = nn.GroupNorm(groups, channels)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """One application of the map."""
        inner = functional.relu(self.norm1(self.conv1(z)))
        branch = self.norm2(x + self.mixing * self.conv2(inner))
        return self.norm3(functional.relu(self.skip * z + branch))


class ConvDEQClassifier(nn.Module):
    """Classifies images with a convolutional stem, an equilibrium layer, pooling and one linear map.

    Args:
        image_channels: channels of the images.
        classes: number of classes.
        channels: channels of the state.
        groups: groups of the normalizations; must divide ``channels``.
        mixing, skip: see :class:`ResidualCell`.
        solver, gradient: solver and gradient estimator of the equilibrium layer; ``None``: its defaults.

    Raises:
        ValueError: if ``groups`` does not divide ``channels``.
    """

    def __init__(
        self,
        *,
        image_channels: int = 1,
        classes: int = 10,
        channels: int = 24,
        groups: int = 4,
        mixing: float = 0.2,
        skip: float = 0.5,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ):
        super().__init__()
        if channels % groups:
            raise ValueError(
                f"ConvDEQClassifier: {channels} channels cannot be normalized in {groups} groups of one size; "
                f"take a multiple of {groups}"
            )
        self.stem = nn.Sequential(nn.Conv2d(image_channels, channels, 3, padding=1), nn.GroupNorm(groups, channels))
        cell = ResidualCell(channels, groups, mixing, skip)
        self.equilibrium = Equilibrium(cell, solver=solver, gradient=gradient, rowwise=True)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Class scores ``[batch, classes]`` of images ``[batch, image_channels, height, width]``."""
        return self.head(self.equilibrium(self.stem(images)))
