"""Labelled images, and how some of them are set apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchimplicit.recipes.runtime.errors import UserError


class Labelled(NamedTuple):
    """Images ``[n, channels, height, width]`` (uint8) and their labels ``[n]`` (int64)."""

    images: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> Labelled:
        """Those of these indices."""
        return Labelled(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Splits:
    """A data set in memory.

    Attributes:
        train, validation: disjoint parts of the images that were published for training.
        test: the images that were published for testing, or set apart for it.
        mean, deviation: of each channel over the published training images, of pixels in [0, 1].
    """

    train: Labelled
    validation: Labelled
    test: Labelled
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def standardized(self, images: Tensor) -> Tensor:
        """uint8 ``[batch, channels, ...]`` to float32 of mean zero and deviation one."""
        return standardized(images, self.mean, self.deviation)


def standardized(images: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """uint8 ``[batch, channels, height, width]`` to float32, less the mean, over the deviation, channel by channel."""
    scale, shift = (torch.tensor(v, device=images.device)[:, None, None] for v in (deviation, mean))
    return (images.float() / 255 - shift) / scale


def set_apart(labels: Tensor, count: int, seed: int, what: str) -> tuple[Tensor, Tensor]:
    """The indices of ``count`` samples, every class with its share of them, and of all others; both in random order.

    Args:
        labels: ``[n]``.
        count: how many.
        seed: which; the first of two counts are the same for both.
        what: names the samples in the error.

    Raises:
        UserError: there are not so many.
    """
    if count > len(labels):
        raise UserError(f"{count} images were asked for, and {what} has {len(labels)}; ask for fewer")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    # By class, keeping the random order within; then each sample's place in its class as a share of the class.
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    _, sizes = torch.unique_consecutive(labels[by_class], return_counts=True)
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    place = torch.arange(len(labels)) - starts
    share = (place.double() + 0.5) / torch.repeat_interleave(sizes, sizes)
    chosen = by_class[torch.argsort(share, stable=True)]
    return chosen[:count], chosen[count:]
