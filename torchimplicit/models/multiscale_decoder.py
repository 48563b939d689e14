"""A decoder whose state holds feature maps of several resolutions, each of which sees all others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.gradients import Gradient
from torchimplicit.models.decoders import Cut, EquilibriumDecoder
from torchimplicit.nn import spectral_norm
from torchimplicit.solvers import Solver
from torchimplicit.validation import at_least

KERNEL = 3


class MultiscaleDecoderCell(nn.Module):
    """``z_i⁺ = tanh(conv_i(z_i) + Σ_j F_ij z_j + U_i x + b_i)``: the fusion of MDEQ (Bai et al. 2020, arXiv 2006.08656,
    section 3) with one convolution a scale, the latent injected into every one.

    :math:`F_{ij}` is a pointwise convolution after average pooling to a coarser scale, or before nearest-neighbour
    upsampling to a finer one; pooling by :math:`k` has a spectral norm of :math:`1/k`, upsampling of :math:`k`. Each of
    the blocks has one of at most ``bound`` over the number of scales, so that the whole linear part's is at most
    ``bound``: below 1 the map contracts for every latent.

    Args:
        latent: size of ``x``.
        channels: channels of the feature maps, at every scale.
        size: side of the finest feature map, or its height and width, divisible by ``2 ** (scales - 1)``; each further
            map has half the resolution of the one before.
        scales: number of feature maps.
        bound: upper bound of the linear part's spectral norm.

    Shapes: ``z`` a list of ``[batch, channels, height / 2**i, width / 2**i]``, ``x`` ``[batch, latent]``; the result is
    like ``z``.
    """

    def __init__(self, latent: int, channels: int, size: int | tuple[int, int], scales: int = 2, bound: float = 0.6):
        super().__init__()
        at_least("MultiscaleDecoderCell", "scales", scales, 1)
        sides = (size, size) if isinstance(size, int) else size
        if any(side % 2 ** (scales - 1) for side in sides):
            raise ValueError(
                f"{scales} scales halve the size {scales - 1} times, and {size} is not divisible by "
                f"{2 ** (scales - 1)}: take fewer scales, or pad the images"
            )
        self.shapes = [(channels, sides[0] // 2**i, sides[1] // 2**i) for i in range(scales)]
        share = bound / scales
        convolutions = [nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2) for _ in range(scales)]
        self.mix = nn.ModuleList([spectral_norm(conv, bound=share / KERNEL, only_above=True) for conv in convolutions])
        self.fuse = nn.ModuleDict()
        for i in range(scales):
            for j in range(scales):
                if i != j:
                    conv = nn.Conv2d(channels, channels, 1, bias=False)
                    self.fuse[f"{j}_{i}"] = spectral_norm(conv, bound=share * 2.0 ** (i - j), only_above=True)
        self.inject = nn.ModuleList([nn.Linear(latent, math.prod(shape), bias=False) for shape in self.shapes])

    def initial_state(self, x: Tensor) -> list[Tensor]:
        """Zeros."""
        return [x.new_zeros(len(x), *shape) for shape in self.shapes]

    def forward(self, z: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """One application of the map."""
        images = []
        for i, shape in enumerate(self.shapes):
            total = self.mix[i](z[i]) + self.inject[i](x).unflatten(1, shape)
            for j in range(len(self.shapes)):
                if j < i:
                    total = total + self.fuse[f"{j}_{i}"](functional.avg_pool2d(z[j], 2 ** (i - j)))
                elif j > i:
                    finer = self.fuse[f"{j}_{i}"](z[j])
                    total = total + functional.interpolate(finer, scale_factor=2 ** (j - i))
            images.append(total.tanh())
        return images


class MultiscaleHead(nn.Module):
    """Reads one image from all scales, at twice the resolution of the finest.

    Args:
        image_channels: channels of the image.
        channels, scales: channels and number of the state's feature maps.

    Shapes: as the cell's state; the image ``[batch, image_channels, 2 * height, 2 * width]``.
    """

    def __init__(self, image_channels: int, channels: int, scales: int):
        super().__init__()
        self.read = nn.Sequential(
            nn.Conv2d(scales * channels, 4 * image_channels, KERNEL, padding=KERNEL // 2), nn.PixelShuffle(2)
        )

    def forward(self, z: Sequence[Tensor]) -> Tensor:
        """The image."""
        finest = z[0].shape[-2:]
        return self.read(torch.cat([z[0], *(functional.interpolate(part, size=finest) for part in z[1:])], dim=1))


def multiscale_decoder(
    pixels: tuple[int, int, int],
    *,
    latent: int = 32,
    channels: int = 16,
    scales: int = 2,
    bound: float = 0.6,
    solver: Solver | None = None,
    gradient: Gradient | None = None,
) -> EquilibriumDecoder:
    """A multiscale decoder to images ``[channels, height, width]``.

    The finest scale has half their resolution, rounded up to a size that the scales divide; the image is cropped."""
    image_channels, height, across = pixels
    unit = 2 ** (scales - 1)
    finest = (unit * -(-height // (2 * unit)), unit * -(-across // (2 * unit)))
    cell = MultiscaleDecoderCell(latent, channels, finest, scales, bound)
    head: nn.Module = MultiscaleHead(image_channels, channels, scales)
    if (height, across) != (2 * finest[0], 2 * finest[1]):
        head = nn.Sequential(head, Cut(height, across))
    return EquilibriumDecoder(cell, head, latent, solver=solver, gradient=gradient)
