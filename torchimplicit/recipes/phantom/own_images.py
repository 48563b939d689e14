"""Your own images, one folder per class, read into memory."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from torchimplicit.recipes.phantom.image_data import Selection, Splits
from torchimplicit.recipes.phantom.image_files import Labelled, parted, set_apart
from torchimplicit.recipes.runtime.errors import UserError

ENDINGS = {".jpeg", ".jpg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
MOST_BYTES = 1 << 32
"""Largest size of all images together, in bytes. For more, images-imagenet reads images one by one."""

TEST_SHARE = 0.2
"""Share of the images used for the test, if their folders do not set any aside."""

Colours = Literal["colour", "grey"]


def names_of(folder: Path) -> tuple[list[str], Path, Path | None]:
    """The class names in order, the folder of training images, and that of test images, if any.

    Raises:
        UserError: there are not two classes, or those of the two folders differ.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: --data-dir must hold a folder for each class, or train and test with such"
        )
    train = folder / "train" if (folder / "train").is_dir() else folder
    test = next((folder / name for name in ("test", "val") if train != folder and (folder / name).is_dir()), None)
    names = _classes(train)
    if len(names) < 2:
        there = ", ".join(sorted(path.name for path in train.iterdir())[:5]) or "nothing"
        raise UserError(f"{train} must hold a folder for each of two classes or more, and it holds {there}")
    if test is not None and _classes(test) != names:
        odd = sorted(set(names) ^ set(_classes(test)))
        raise UserError(f"{train} and {test} differ in their classes: {', '.join(odd[:5])}")
    return names, train, test


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@lru_cache(maxsize=1)
def load(selection: Selection, size: int, colours: Colours) -> Splits:
    """The splits, with all images resized to one size: the largest centred square of each, scaled.

    Args:
        selection: the folder, and how many images.
        size: pixels of a side.
        colours: three channels, or one.

    Raises:
        UserError: a folder or an image is missing or damaged, or there are too few or too many.
    """
    assert selection.data_dir is not None
    names, train, test = names_of(selection.data_dir)
    published = _read(train, names, size, colours)
    where = str(train)
    if test is None:
        count = max(1, round(TEST_SHARE * len(published.labels)))
        chosen, rest = set_apart(published.labels, count, selection.split_seed, where)
        tested, published = published.take(chosen), published.take(rest)
    else:
        tested = _read(test, names, size, colours)
    numbers = selection.validation_images, selection.train_images, selection.test_images, selection.split_seed
    parts = parted(published, tested, *numbers, (where, str(test or f"the test part of {train}")))
    mean, deviation = _moments(parts[0].images)
    return Splits(*parts, mean, deviation)


def _read(folder: Path, names: list[str], size: int, colours: Colours) -> Labelled:
    from PIL import Image, UnidentifiedImageError

    from torchimplicit.recipes.phantom.imagenet import middle

    files = [[p for p in sorted((folder / name).rglob("*")) if p.suffix.lower() in ENDINGS] for name in names]
    for name, paths in zip(names, files, strict=True):
        if not paths:
            raise UserError(f"{folder / name} holds no images ({', '.join(sorted(ENDINGS))})")
    channels, count = (3 if colours == "colour" else 1), sum(map(len, files))
    if count * channels * size**2 > MOST_BYTES:
        raise UserError(
            f"{folder} holds {count} images, which at {size} pixels take more than {MOST_BYTES >> 30} GB: take fewer "
            "pixels, or images-imagenet, which reads them one by one from train/<class> and val/<class>"
        )
    images = torch.empty(count, channels, size, size, dtype=torch.uint8)
    for place, path in enumerate(path for paths in files for path in paths):
        try:
            with Image.open(path) as opened:
                image = middle(opened.convert("RGB" if channels == 3 else "L"), size)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} is no image, or is cut short ({error})") from None
        images[place] = torch.from_numpy(np.array(image)).reshape(size, size, channels).permute(2, 0, 1)
    labels = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([len(paths) for paths in files]))
    return Labelled(images, labels)


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, for pixels in [0, 1]."""
    channels = images.transpose(0, 1).flatten(1)
    mean = torch.stack([one.double().mean() for one in channels]) / 255
    spread = torch.stack([one.double().std() for one in channels]) / 255
    return tuple(mean.tolist()), tuple(spread.clamp_min(1e-3).tolist())
