"""Linear measurement operators on images ``[batch, channels, height, width]``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.recipes.runtime.errors import UserError

OperatorName = Literal["blur", "downsample", "mask", "radon"]

USUAL: dict[OperatorName, float] = {"blur": 2.0, "downsample": 4.0, "mask": 0.25, "radon": 30.0}
"""Default size of each operator."""


class Operator(ABC):
    """A linear map of images, differentiable."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """The measurements, ``[batch, ...]``."""

    @abstractmethod
    def __str__(self) -> str:
        """A description for display."""


@final
@dataclass(frozen=True)
class Blur(Operator):
    """Convolution with a Gaussian whose standard deviation is given in pixels; images are mirrored at the border."""

    deviation: float

    def __call__(self, images: Tensor) -> Tensor:
        reach = min(math.ceil(3 * self.deviation), *(side - 1 for side in images.shape[-2:]))
        place = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
        kernel = torch.exp(-0.5 * (place / self.deviation).square())
        kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1)
        wide = functional.pad(images, (reach,) * 4, mode="reflect")
        once = functional.conv2d(wide, kernel[:, :, None], groups=images.shape[1])
        return functional.conv2d(once, kernel[..., None], groups=images.shape[1])

    def __str__(self) -> str:
        return f"blurred by a Gaussian of {self.deviation:g} pixels"


@final
@dataclass(frozen=True)
class Downsample(Operator):
    """Mean over squares with this side in pixels; incomplete squares at the border are averaged as they are."""

    factor: int

    def __call__(self, images: Tensor) -> Tensor:
        return functional.avg_pool2d(images, self.factor, ceil_mode=True, count_include_pad=False)

    def __str__(self) -> str:
        return f"averaged over squares of {self.factor} pixels"


@final
class Known(Operator):
    """The known pixels, in all channels.

    Args:
        known: bool ``[height, width]``.
    """

    def __init__(self, known: Tensor):
        self.known = known

    @classmethod
    def drawn(cls, share: float, height: int, width: int, seed: int = 0) -> Known:
        """A random share of the pixels, at least one."""
        order = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))
        known = torch.zeros(height * width, dtype=torch.bool)
        known[order[: max(1, round(share * height * width))]] = True
        return cls(known.view(height, width))

    def __call__(self, images: Tensor) -> Tensor:
        return images[..., self.known.to(images.device)]

    def __str__(self) -> str:
        return f"{100 * float(self.known.double().mean()):.0f} % of the pixels"


@final
@dataclass(frozen=True)
class Radon(Operator):
    """Line integrals along parallel beams at a number of angles spread evenly over half a turn (computed tomography).
    The image is zero outside; the unit of length is the image's longer side."""

    views: int

    def __call__(self, images: Tensor) -> Tensor:
        batch, channels, *sides = images.shape
        side = max(sides)
        spread = [(side - n) // 2 for n in sides]
        square = functional.pad(
            images, (spread[1], side - sides[1] - spread[1], spread[0], side - sides[0] - spread[0])
        )
        angle = torch.arange(self.views, dtype=images.dtype, device=images.device) * (math.pi / self.views)
        zero = torch.zeros_like(angle)
        turn = torch.stack(
            (torch.stack((angle.cos(), -angle.sin(), zero), -1), torch.stack((angle.sin(), angle.cos(), zero), -1)), 1
        )
        grid = functional.affine_grid(turn, [self.views, 1, side, side], align_corners=False)
        flat = square.reshape(1, batch * channels, side, side).expand(self.views, -1, -1, -1)
        turned = functional.grid_sample(flat, grid, align_corners=False)
        return turned.mean(2).view(self.views, batch, channels, side).permute(1, 2, 0, 3)

    def __str__(self) -> str:
        return f"line integrals at {self.views} angles"


@final
class Matrix(Operator):
    """A matrix ``[measurements, channels * height * width]`` applied to each flattened image."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix

    def __call__(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        if self.matrix.ndim != 2 or self.matrix.shape[1] != flat.shape[1]:
            raise UserError(
                f"the operator's matrix is {list(self.matrix.shape)}, and an image has {flat.shape[1]} numbers "
                f"({list(images.shape[1:])}): a matrix [measurements, {flat.shape[1]}] is needed"
            )
        return flat @ self.matrix.to(flat).mT

    def __str__(self) -> str:
        return f"a matrix of {len(self.matrix)} measurements"


def made(name: OperatorName, size: float | None, height: int, width: int, seed: int = 0) -> Operator:
    """The operator of this name.

    Args:
        name: its name.
        size: standard deviation of the blur in pixels, factor of downsampling, share of known pixels of a mask, or
            number of angles of the Radon transform; ``None``: :data:`USUAL`.
        height, width: height and width of the picture.
        seed: seed of the mask.

    Raises:
        UserError: a size that makes no sense.
    """
    size = USUAL[name] if size is None else size
    if not 0 < size < float("inf"):
        raise UserError(f"--operator-size {size} must be positive")
    if name == "mask":
        if size > 1:
            raise UserError(f"--operator-size {size:g} is the share of pixels that are known, and at most 1")
        return Known.drawn(size, height, width, seed)
    if name == "blur":
        return Blur(size)
    if size != int(size):
        raise UserError(f"--operator-size {size:g} must be a whole number for --operator {name}")
    if name == "downsample":
        if size > min(height, width):
            raise UserError(f"--operator-size {size:g} leaves nothing of {width} × {height} pixels")
        return Downsample(int(size))
    return Radon(int(size))


WEIGHTS = (1e-4, 1e-3, 1e-2, 1e-1)


@torch.no_grad()
def smoothed(operator: Callable[[Tensor], Tensor], measured: Tensor, like: Tensor, weight: float) -> Tensor:
    """Tikhonov's solution with squared differences of neighbours, by conjugate gradients: a baseline for fields.

    Args:
        operator: linear.
        measured: what it gave, ``[1, ...]``.
        like: an image of the shape that is wanted, ``[1, channels, height, width]``.
        weight: weight of the differences, beside the measurements of their own size.
    """
    zero = torch.zeros_like(like)
    pull = torch.func.vjp(operator, zero)[1]

    def normal(image: Tensor) -> Tensor:
        """The gradient of the energy without the measurements."""
        out = pull(operator(image))[0]
        down, right = image.diff(dim=-2), image.diff(dim=-1)
        out[..., 1:, :] += weight * down
        out[..., :-1, :] -= weight * down
        out[..., 1:] += weight * right
        out[..., :-1] -= weight * right
        return out

    image, rest = zero, pull(measured)[0]
    way, size = rest, rest.square().sum()
    least = 1e-8 * size
    for _ in range(200):
        if size <= least:
            break
        product = normal(way)
        share = size / (way * product).sum()
        image, rest = image + share * way, rest - share * product
        size, before = rest.square().sum(), size
        way = rest + size / before * way
    return image
