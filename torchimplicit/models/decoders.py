"""Decoders whose latent is found by optimization: an equilibrium between a latent and what it generates.

A decoder-only generative model (Gurumurthy et al. 2021, arXiv 2111.13236, section 4.1) has no encoder: the latent of a
given image is the input of the equilibrium layer with the least reconstruction error,
:class:`~torchimplicit.JointInference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torchimplicit.constraints import Box, L2Ball
from torchimplicit.gradients import Gradient
from torchimplicit.nn import Equilibrium, per_solve, spectral_norm
from torchimplicit.problems import JointInference
from torchimplicit.problems.joint_inference import StepSize
from torchimplicit.solvers import Solver
from torchimplicit.validation import at_least


class DecoderCell(nn.Module):
    """``z⁺ = tanh(W z + U x + b)`` with :math:`\\lVert W\\rVert_2` at most ``bound``.

    Below 1 the map contracts for every latent. A joint solve stops before it has converged, and a map that is free to
    grow is then trained into one whose equilibria no solver finds.

    Args:
        latent: size of ``x``.
        width: size of ``z``.
        bound: upper bound of the spectral norm.

    Shapes: ``z`` ``[batch, width]``, ``x`` ``[batch, latent]``; the result is like ``z``.
    """

    def __init__(self, latent: int, width: int, bound: float = 0.6):
        super().__init__()
        self.mix = spectral_norm(nn.Linear(width, width), bound=bound, only_above=True)
        self.inject = nn.Linear(latent, width, bias=False)

    def initial_state(self, x: Tensor) -> Tensor:
        """Zeros."""
        return x.new_zeros(len(x), self.mix.out_features)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """One application of the map."""
        return (self.mix(z) + self.inject(x)).tanh()


class ConvDecoderCell(nn.Module):
    """``z⁺ = tanh(conv(z) + U x + b)`` on feature maps, ``U`` a full matrix from the latent to every pixel of them.

    The kernel, as a matrix, has a spectral norm of at most ``bound / kernel``, so that the convolution's is at most
    ``bound``.

    Args:
        latent: size of ``x``.
        channels: channels of ``z``.
        size: side of the feature maps, or their height and width.
        bound: upper bound of the convolution's spectral norm.
        kernel: side of the convolution's kernel, odd.

    Shapes: ``z`` ``[batch, channels, height, width]``, ``x`` ``[batch, latent]``; the result is like ``z``.
    """

    def __init__(self, latent: int, channels: int, size: int | tuple[int, int], bound: float = 0.6, kernel: int = 3):
        super().__init__()
        self.shape = (channels, *((size, size) if isinstance(size, int) else size))
        convolution = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.mix = spectral_norm(convolution, bound=bound / kernel, only_above=True)
        self.inject = nn.Linear(latent, math.prod(self.shape), bias=False)

    def initial_state(self, x: Tensor) -> Tensor:
        """Zeros."""
        return x.new_zeros(len(x), *self.shape)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """One application of the map."""
        return (self.mix(z) + self.inject(x).unflatten(1, self.shape)).tanh()


class EquilibriumDecoder(nn.Module):
    """Decodes latents ``[batch, latent]`` to images: the equilibrium of a cell, read by a head.

    Args:
        cell: called as ``cell(z, x)``, with a method ``initial_state(x)``; it must treat each sample on its own.
        head: a module from the equilibrium to the image.
        latent: size of the latent.
        solver, gradient: solver and gradient estimator of :meth:`forward`; see
            :class:`~torchimplicit.nn.Equilibrium`.
    """

    def __init__(
        self,
        cell: nn.Module,
        head: nn.Module,
        latent: int,
        *,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ):
        super().__init__()
        at_least("EquilibriumDecoder", "latent", latent, 1)
        self.latent = latent
        self.equilibrium = Equilibrium(cell, solver=solver, gradient=gradient, rowwise=True)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """The images of latents ``[batch, latent]``."""
        return self.head(self.equilibrium(x))

    def inference(
        self,
        loss: Callable[..., Tensor],
        step_size: StepSize,
        *,
        constraint: L2Ball | Box | None = None,
        damping: tuple[float, float, float] = (0.8, 0.6, 1.0),
    ) -> JointInference:
        """The problem that finds the latent with the least loss. Parametrized weights are computed once, in this call.

        Args:
            loss: ``loss(image, x, *args)`` gives one value per sample, ``[batch]``; ``args`` are those given to
                :func:`~torchimplicit.solve`.
            step_size, constraint, damping: see :class:`~torchimplicit.JointInference`.
        """
        cell = per_solve(self.equilibrium.cell)

        def function(z: Any, x: Tensor, *args: Any) -> Any:
            return cell(z, x)

        def read(z: Any, x: Tensor, *args: Any) -> Tensor:
            return loss(self.head(z), x, *args)

        return JointInference(function, read, step_size, constraint=constraint, damping=damping)

    def start(self, count: int) -> tuple[Any, Tensor]:
        """The start of a joint solve of ``count`` samples: the cell's initial state, and latents of zero."""
        weight = next(self.parameters())
        x = weight.new_zeros(count, self.latent)
        return self.equilibrium.cell.initial_state(x), x  # type: ignore[operator]


def mlp_decoder(
    pixels: tuple[int, int, int],
    *,
    latent: int = 16,
    width: int = 96,
    bound: float = 0.6,
    solver: Solver | None = None,
    gradient: Gradient | None = None,
) -> EquilibriumDecoder:
    """A fully connected decoder to images ``[channels, height, width]``."""
    head = nn.Sequential(nn.Linear(width, pixels[0] * pixels[1] * pixels[2]), nn.Unflatten(1, pixels))
    return EquilibriumDecoder(DecoderCell(latent, width, bound), head, latent, solver=solver, gradient=gradient)


def conv_decoder(
    pixels: tuple[int, int, int],
    *,
    latent: int = 32,
    channels: int = 16,
    bound: float = 0.6,
    solver: Solver | None = None,
    gradient: Gradient | None = None,
) -> EquilibriumDecoder:
    """A convolutional decoder to images ``[channels, height, width]``.

    The equilibrium has half their resolution, rounded up; the image is cropped."""
    image_channels, height, across = pixels
    head = nn.Sequential(nn.Conv2d(channels, 4 * image_channels, 3, padding=1), nn.PixelShuffle(2))
    if height % 2 or across % 2:
        head.append(Cut(height, across))
    cell = ConvDecoderCell(latent, channels, (-(-height // 2), -(-across // 2)), bound)
    return EquilibriumDecoder(cell, head, latent, solver=solver, gradient=gradient)


class Cut(nn.Module):
    """Crops images to their first ``height`` rows and ``width`` columns."""

    def __init__(self, height: int, width: int):
        super().__init__()
        self.height, self.width = height, width

    def forward(self, images: Tensor) -> Tensor:
        """``[batch, channels, height, width]``."""
        return images[..., : self.height, : self.width]
