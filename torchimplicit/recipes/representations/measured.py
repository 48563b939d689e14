"""Fields fitted to linear measurements or to slopes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, cast, final

import torch
from torch import Tensor

from torchimplicit.recipes.operators import WEIGHTS, Operator, smoothed
from torchimplicit.recipes.representations.fit import (
    FieldSettings,
    FieldTask,
    Grid,
    Parts,
    SignalToNoise,
    decibels,
    values_at,
)
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.task import Batches, Shard, Split

Target = Literal["values", "gradient", "laplacian"]

HELD_BACK = 20
"""One in this many measurements is held out to select the weights."""


@final
@dataclass(frozen=True, kw_only=True)
class Measurement(Operator):
    """Finite differences on the grid in the field's coordinates, to which a field given by its slopes is compared.

    Attributes:
        target: the gradient's two parts, or the Laplacian.
        spacing: spacing of the grid, down and right.
    """

    target: Target
    spacing: tuple[float, float]

    def __call__(self, images: Tensor) -> Tensor:
        down, right = torch.gradient(images, spacing=list(self.spacing), dim=(-2, -1))
        if self.target == "gradient":
            return torch.stack((down, right), dim=-1)
        inner = images[..., 1:-1, 1:-1]
        vertical = (images[..., 2:, 1:-1] - 2 * inner + images[..., :-2, 1:-1]) / self.spacing[0] ** 2
        across = (images[..., 1:-1, 2:] - 2 * inner + images[..., 1:-1, :-2]) / self.spacing[1] ** 2
        return vertical + across

    def __str__(self) -> str:
        return "its gradient" if self.target == "gradient" else "its Laplacian, and its values at the border"


class MeasuredTask(FieldTask):
    """A field fitted to the noisy image of a picture under ``operator``.

    The picture itself is seen by the test alone: the weights are selected by measurements that are held back.

    Args:
        config: the recipe's.
        grid: the picture, ``[height, width, channels]``.
        operator: linear, on images ``[1, channels, height, width]``; of a :class:`Measurement` the slopes are those of
            the field itself.
        noise: its deviation, as a share of that of what is measured.
        seed: random seed of the noise and of the held-out measurements.
        frequencies, about: as for :class:`~torchimplicit.recipes.representations.fit.FieldTask`.

    Attributes:
        operator: it.
        measured: what the field is to give.
    """

    def __init__(
        self,
        config: FieldSettings,
        grid: Grid,
        operator: Operator,
        frequencies: float,
        *,
        noise: float = 0.0,
        seed: int = 0,
        about: str = "",
    ):
        count = len(grid)
        pixels = torch.arange(count)
        slopes = isinstance(operator, Measurement)
        super().__init__(
            config,
            grid,
            Parts(pixels, pixels + count, pixels),
            frequencies,
            about=f"{about} Known: {operator}.",
            slopes=slopes,
        )
        if config.optimization.batch_size < count or (self.chunk < count and not slopes):
            raise UserError(
                f"what is measured depends on all {count} pixels at once: give a larger --memory-mb and --batch-size, "
                "or a smaller --size"
            )
        self.operator = operator
        with torch.no_grad():
            whole = operator(self.truth()).double()
        generator = torch.Generator().manual_seed(seed)
        self.spread = float(whole.std())
        dirt = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
        self.register_buffer("measured", (whole + noise * self.spread * dirt).float(), persistent=False)
        held = torch.rand(whole.shape, generator=generator) < 1 / HELD_BACK
        self.register_buffer("held", held, persistent=False)

    measured: Tensor
    held: Tensor

    def truth(self) -> Tensor:
        """The picture, ``[1, channels, height, width]``."""
        grid = self.points
        assert isinstance(grid, Grid)
        values = grid.at(torch.arange(len(grid)))[1]
        return values.T.reshape(1, -1, *grid.sizes)

    def image(self, values: Tensor) -> Tensor:
        """Values at all pixels, as an image."""
        assert isinstance(self.points, Grid)
        return values.T.reshape(1, -1, *self.points.sizes)

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Tensor]:
        if shard.world > 1:
            raise UserError("what is measured depends on all pixels, which one process has: take --devices 1")
        return super().training_batches(steps, shard)

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Tensor]:
        if split == "test":
            return super().held_out_batches(split, shard)
        return Batches(1, lambda: iter([self.parts.validation]))

    def _misfit(self, places: Tensor) -> Tensor:
        if isinstance(self.operator, Measurement):
            return self._slopes_misfit(places)
        x, _ = self.points.at(places)
        measured = self.operator(self.image(values_at(self.model, x, places)))
        error = (measured - self.measured).square()
        return torch.where(self.held, 0, error).sum() / (~self.held).sum() / self.spread**2

    def _slopes_misfit(self, places: Tensor) -> Tensor:
        """The error of the field's own slopes. None are held out, since differences of neighbours determine each
        other."""
        assert isinstance(self.operator, Measurement)
        x, y = self.points.at(places)
        x = x.requires_grad_()
        values = values_at(self.model, x, places)
        slopes = torch.stack([_gradient(one, x) for one in values.unbind(1)], 1)
        assert isinstance(self.points, Grid)
        height, width = self.points.sizes
        if self.operator.target == "gradient":
            wanted = self.measured[0].flatten(1, 2)[:, places].transpose(0, 1)
            return (slopes - wanted).square().mean() / self.spread**2
        second = torch.stack(
            [sum(_gradient(one[:, i], x)[:, i] for i in (0, 1)) for one in slopes.unbind(1)],  # type: ignore[misc]
            1,
        )
        row, column = places // width, places % width
        inside = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)
        wanted = self.measured[0][:, (row - 1).clamp(0, height - 3), (column - 1).clamp(0, width - 3)].T
        error = torch.where(inside[:, None], second - wanted, 0).square().mean() / self.spread**2
        border = torch.where(inside[:, None], 0, values - y).square().mean()
        return error + len(places) / (2 * (height + width)) * border

    def score(self, batch: Tensor) -> Tensor:
        count = len(self.points)
        if int(batch[0]) < count:
            if isinstance(self.operator, Measurement) and self.operator.target == "gradient":
                return self._shifted(batch)
            return super().score(batch)
        values = self.all_values()
        measured = self.operator(self.image(values))
        error = (measured - self.measured).double().square()
        if not isinstance(self.operator, Measurement):
            error = error[self.held]
        peak = float(self.measured.max() - self.measured.min()) / (self.points.high - self.points.low)
        return torch.stack([error.sum() / peak**2, error.new_tensor(float(error.numel()))])

    def _shifted(self, batch: Tensor) -> Tensor:
        """Without the mean, which the gradient does not determine."""
        values, truth = self.all_values(), self.truth()[0].flatten(1).T
        shift = (truth - values).mean(0)
        assert isinstance(self.scoring, SignalToNoise)
        return self.scoring.sums(values[batch] + shift, truth[batch])

    @torch.no_grad()
    def all_values(self) -> Tensor:
        """The field at all pixels, ``[pixels, channels]``."""
        parts = torch.arange(len(self.points), device=self.measured.device).split(self.chunk)
        return torch.cat([self.model(self.points.at(part)[0]) for part in parts])

    def baseline(self) -> float:
        """The PSNR of Tikhonov's solution with the best weight for this picture, an advantage, as it is chosen by the
        true picture."""
        scores: list[float] = []
        truth = self.truth()
        operator = cast(Callable[[Tensor], Tensor], self.operator)
        for weight in WEIGHTS:
            image = smoothed(operator, self.measured, torch.zeros_like(truth), weight).clamp(-1, 1)
            if isinstance(self.operator, Measurement) and self.operator.target == "gradient":
                image = image + (truth - image).mean((2, 3), keepdim=True)
            scores.append(decibels(float((image - truth).square().mean()), 2.0))
        return max(scores)


def _gradient(values: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), x, create_graph=True)[0]
