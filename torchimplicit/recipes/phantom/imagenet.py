"""ImageNet (ILSVRC 2012) from one folder per class, read image by image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from torchimplicit.recipes.phantom.image_files import parted
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.task import generator

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 1000
_ENDINGS = {".jpeg", ".jpg", ".png"}


@dataclass(frozen=True)
class Listing:
    """The images found.

    Attributes:
        paths: paths of the files.
        labels: ``[n]`` (int64).
    """

    paths: tuple[Path, ...]
    labels: Tensor

    def take(self, indices: Tensor) -> Listing:
        """The entries with these indices."""
        return Listing(tuple(self.paths[i] for i in indices.tolist()), self.labels[indices])


def load(
    folder: Path | None,
    *,
    validation: int,
    train: int | None = None,
    test: int | None = None,
    split_seed: int = 0,
    classes: int = CLASSES,
) -> tuple[Listing, Listing, Listing]:
    """The training, validation and test images. The test uses ``val``, whose labels are public; validation images are a
    stratified part of ``train``.

    Args:
        folder: holds ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``.
        validation: how many training images to set apart.
        train, test: how many to keep of the others; ``None``: all.
        split_seed: random seed of the split.
        classes: how many there must be.

    Raises:
        UserError: a folder is missing or empty, or classes differ.
    """
    folder, names = check(folder, classes)
    published, tested = (_listing(folder / part, names) for part in ("train", "val"))
    return parted(published, tested, validation, train, test, split_seed, (str(folder / "train"), str(folder / "val")))


def check(folder: Path | None, classes: int) -> tuple[Path, list[str]]:
    """The folder, and the names of its classes in order, after checking that they exist.

    Raises:
        UserError: see :func:`load`.
    """
    if folder is None:
        raise UserError(
            "ImageNet may not be downloaded without an account: fetch ILSVRC 2012 from image-net.org, sort it into "
            "train/<class> and val/<class>, and give the folder with --data-dir"
        )
    names, others = (_class_names(folder / part) for part in ("train", "val"))
    if names != others:
        odd = sorted(set(names) ^ set(others))
        raise UserError(f"{folder / 'train'} and {folder / 'val'} differ in their classes: {', '.join(odd[:5])}")
    if len(names) != classes:
        raise UserError(f"{folder / 'train'} has {len(names)} classes, and there must be {classes}")
    return folder, names


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: --data-dir must hold train/<class>/*.JPEG and val/<class>/*.JPEG")
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _listing(folder: Path, names: list[str]) -> Listing:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        files = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in _ENDINGS)
        if not files:
            raise UserError(f"{folder / name} has no images (*.JPEG)")
        paths += files
        labels += [label] * len(files)
    return Listing(tuple(paths), torch.tensor(labels))


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Images of one size, ``[3, size, size]`` (uint8), with their labels.

    Args:
        listing: the listing.
        size: in pixels.
        seed: ``None``: the centre of each image. Otherwise a random part, flipped or not, that depends on the seed,
            the image and the turn; items are then asked for as ``(turn, index)``.
    """

    def __init__(self, listing: Listing, size: int = 224, seed: int | None = None):
        self.listing, self.size, self.seed = listing, size, seed

    def __len__(self) -> int:
        return len(self.listing.paths)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        turn, index = key if isinstance(key, tuple) else (0, key)
        path = self.listing.paths[index]
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} is no image, or is cut short ({error})") from None
        if self.seed is None:
            image = centre(image, self.size)
        else:
            image = random_part(image, self.size, generator(self.seed, turn, index))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), self.listing.labels[index]


def middle(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square of the image, scaled."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def centre(image: Image.Image, size: int) -> Image.Image:
    """The centre of the image after its shorter side is scaled to 8/7 of ``size`` (256 for 224)."""
    side = min(image.size) * 7 / 8
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def random_part(image: Image.Image, size: int, generator: torch.Generator) -> Image.Image:
    """A random crop of 8 to 100 % of the area with aspect ratio 3/4 to 4/3, flipped or not (Szegedy et al. 2015,
    section 6)."""
    width, height = image.size
    box: tuple[float, float, float, float] | None = None
    for _ in range(10):
        draws = torch.rand(4, generator=generator).tolist()
        area = width * height * (0.08 + 0.92 * draws[0])
        ratio = math.exp(math.log(4 / 3) * (2 * draws[1] - 1))
        wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if wide <= width and high <= height:
            left, top = draws[2] * (width - wide), draws[3] * (height - high)
            box = (left, top, left + wide, top + high)
            break
    if box is None:  # very long images: the largest part of an allowed ratio
        wide, high = min(width, height * 4 / 3), min(height, width * 4 / 3)
        left, top = (width - wide) / 2, (height - high) / 2
        box = (left, top, left + wide, top + high)
    part = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    flip = float(torch.rand(1, generator=generator)) < 0.5
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part
