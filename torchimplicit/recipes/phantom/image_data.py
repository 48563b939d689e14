"""Data sets of images: splits, augmentation, and lookup by settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.recipes.phantom.image_files import READERS, Labelled, parted
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import not_negative, positive
from torchimplicit.recipes.runtime.task import Rows, generator

# -- Labelled images, and how some of them are set apart ---------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """A data set in memory.

    Attributes:
        train, validation: disjoint parts of the images that were published for training.
        test: the images that were published for testing, or set apart for it.
        mean, deviation: mean and deviation of each channel over the published training images, of pixels in [0, 1].
    """

    train: Labelled
    validation: Labelled
    test: Labelled
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def sets(self) -> dict[str, Rows]:
        """The images with their labels, by the names of the splits."""
        return {"training": Rows(*self.train), "validation": Rows(*self.validation), "test": Rows(*self.test)}


def standardized(images: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """Convert uint8 ``[batch, channels, height, width]`` to float32 and standardize each channel."""
    scale, shift = (torch.tensor(v, device=images.device)[:, None, None] for v in (deviation, mean))
    return (images.float() / 255 - shift) / scale


# -- Random shifts and mirror images of a batch ------------------------------------------------------------------------


MARGIN = 4
"""Largest shift of an image, in pixels."""


def augmented(images: Tensor, chance: torch.Generator) -> Tensor:
    """Shift each image ``[batch, channels, height, width]`` (black beyond its edge) and mirror it, at random."""
    batch, _, height, width = images.shape
    padded = functional.pad(images, (MARGIN,) * 4)
    down, right = (torch.randint(2 * MARGIN + 1, (batch, 1), generator=chance) for _ in range(2))
    across = torch.arange(width).expand(batch, width)
    across = torch.where(torch.rand(batch, 1, generator=chance) < 0.5, across, width - 1 - across) + right
    along = torch.arange(height) + down
    samples = torch.arange(batch)[:, None, None]
    return padded[samples, :, along[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)


class Augmented(Rows):
    """Images and labels. Batches are requested as ``(step, index)`` pairs; the augmentation depends only on the seed,
    the step and the rank, whichever process reads them."""

    def __init__(self, *tensors: Tensor, seed: int, rank: int):
        super().__init__(*tensors)
        self.seed, self.rank = seed, rank

    def __getitems__(self, keys: Sequence[Any]) -> tuple[Tensor, ...]:
        images, *others = super().__getitems__([index for _, index in keys])
        return augmented(images, generator(self.seed, keys[0][0], self.rank, -4)), *others


# -- The data sets that fit into memory, by name -----------------------------------------------------------------------


DataSet = Literal["digits", "mnist", "cifar10", "olivetti"]


@dataclass(frozen=True)
class Kind:
    """Facts about a data set that are known before it is read.

    Attributes:
        channels: number of channels of the images.
        size: their height and width in pixels.
        classes: how many labels there are.
        mean, deviation: mean and deviation of each channel over the published training images, of pixels in [0, 1].
    """

    channels: int
    size: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    classes: int = 10


IMAGES: dict[str, Kind] = {
    "digits": Kind(1, 8, (0.3052,), (0.3761,)),
    "mnist": Kind(1, 28, (0.1307,), (0.3081,)),
    "cifar10": Kind(3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "olivetti": Kind(1, 32, (0.5195,), (0.1596,), 40),
}


def load(
    name: DataSet,
    data_dir: Path | None = None,
    *,
    validation: int,
    train: int | None = None,
    test: int | None = None,
    split_seed: int = 0,
) -> Splits:
    """A data set, with a stratified validation split taken from the published training images.

    The test images are the published ones; none of them is ever in another split.

    Args:
        name: its name.
        data_dir: the folder that holds it; ``None``: downloaded into the cache. The digits come with scikit-learn.
        validation: how many images to set apart.
        train, test: how many to keep of the others; ``None``: all.
        split_seed: random seed of the split.

    Raises:
        UserError: the folder or a file is missing or of the wrong kind, or has too few images.
    """
    assert name in get_args(DataSet), name
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"{data_dir} is not a folder: --data-dir must be the folder that holds {name}")
    kind = IMAGES[name]
    published, tested = READERS[name](data_dir)
    where = f"the training part of {name}" + (f" in {data_dir}" if data_dir is not None else "")
    for part, images in ((where, published), (where.replace("training", "test"), tested)):
        _check(images, kind, part)
    names = where, where.replace("training", "test")
    return Splits(*parted(published, tested, validation, train, test, split_seed, names), kind.mean, kind.deviation)


def _check(images: Labelled, kind: Kind, where: str) -> None:
    shape, wanted = tuple(images.images.shape[1:]), (kind.channels, kind.size, kind.size)
    if shape != wanted:
        raise UserError(
            f"{where} has images of {_text(shape)}, and they must be {_text(wanted)} (channels×height×width)"
        )
    if not len(images.labels):
        raise UserError(f"{where} has no images")
    if int(images.labels.max()) >= kind.classes:
        raise UserError(f"{where} has the label {int(images.labels.max())}, and there are {kind.classes} classes")


def _text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The images of a data set that are used."""

    data_dir: Path | None = None
    """Folder of the data. Default: download it. The digits come with scikit-learn."""

    validation_images: int = 5000
    """Training images set aside to select the weights."""

    train_images: int | None = None
    """Number of the remaining training images to use. Default: all."""

    test_images: int | None = None
    """Number of test images to use. Default: all."""

    split_seed: int = 0
    """Random seed of the choice of validation images."""

    def __post_init__(self) -> None:
        positive(self, "validation_images", "train_images", "test_images")
        not_negative(self, "split_seed")


def selected(name: DataSet, config: Selection) -> Splits:
    """The part of a data set that the settings select. Cached, as both the check and the model need it."""
    numbers = config.validation_images, config.train_images, config.test_images, config.split_seed
    return _kept(name, config.data_dir, *numbers)


@lru_cache(maxsize=1)
def _kept(
    name: DataSet, folder: Path | None, validation: int, train: int | None, test: int | None, seed: int
) -> Splits:
    return load(name, folder, validation=validation, train=train, test=test, split_seed=seed)
