"""Random shifts and mirror images of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.recipes.runtime.task import generator

MARGIN = 4
"""Pixels by which an image is shifted at most."""


def augmented(images: Tensor, chance: torch.Generator) -> Tensor:
    """Each image ``[batch, channels, height, width]`` shifted, with black beyond its edge, and mirrored or not."""
    batch, _, height, width = images.shape
    padded = functional.pad(images, (MARGIN,) * 4)
    down, right = (torch.randint(2 * MARGIN + 1, (batch, 1), generator=chance) for _ in range(2))
    across = torch.arange(width).expand(batch, width)
    across = torch.where(torch.rand(batch, 1, generator=chance) < 0.5, across, width - 1 - across) + right
    along = torch.arange(height) + down
    samples = torch.arange(batch)[:, None, None]
    return padded[samples, :, along[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)


class Augmented:
    """Batches of images and labels, augmented as the seed, the step and the process say."""

    def __init__(self, batches: Iterable[Any], steps: range, seed: int, rank: int):
        self.batches, self.steps, self.seed, self.rank = batches, steps, seed, rank

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (images, labels) in zip(self.steps, self.batches, strict=True):
            yield augmented(images, generator(self.seed, step, self.rank, -4)), labels
