"""The images of the recipes, as numbers between 0 and 1."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from torchimplicit.recipes.images.data import KINDS, load
from torchimplicit.recipes.images.split import Labelled
from torchimplicit.recipes.jiio.config import Images
from torchimplicit.recipes.runtime.task import Split


class Part(NamedTuple):
    """Images ``[n, channels, height, width]`` in [0, 1], and their labels ``[n]``."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """The splits."""

    training: Part
    validation: Part
    test: Part

    def split(self, name: Split) -> Part:
        """A held-out one."""
        return self.validation if name == "validation" else self.test

    @property
    def pixels(self) -> tuple[int, int, int]:
        """Of an image: channels, height, width."""
        _, channels, height, width = self.training.images.shape
        return channels, height, width


@lru_cache(maxsize=2)
def read(images: Images) -> Data:
    """The images that the settings ask for. Kept, for they are asked for more than once.

    Raises:
        UserError: they are missing or of the wrong kind.
    """
    found = load(
        images.data,
        images.data_dir,
        validation=images.validation_images,
        train=images.train_images,
        test=images.test_images,
        split_seed=images.split_seed,
    )
    return Data(_scaled(found.train), _scaled(found.validation), _scaled(found.test))


def classes(images: Images) -> int:
    """How many labels there are."""
    return KINDS[images.data].classes


def _scaled(part: Labelled) -> Part:
    return Part(part.images.float() / 255, part.labels)
