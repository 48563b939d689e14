"""The recipes that fit pictures."""

from __future__ import annotations

from functools import lru_cache

import torch

from torchimplicit.recipes.fields.images.config import PictureConfig
from torchimplicit.recipes.fields.images.pictures import Picture, bundled, read_file
from torchimplicit.recipes.fields.images.show import export, show
from torchimplicit.recipes.fields.points import Grid, every_other
from torchimplicit.recipes.fields.runner import FieldRunner
from torchimplicit.recipes.fields.task import FieldTask, Parts
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.task import generator


def frequencies(config: PictureConfig, longest: int) -> float:
    """The scale of the frequencies: the paper's 256 for a picture of 512 pixels, and 128 where a quarter of them is
    known, and in proportion for others."""
    return longest / (2 if config.held_out == "none" else 4)


def build(config: PictureConfig) -> FieldTask:
    """The task."""
    found = picture(config)
    grid = Grid(found.pixels)
    height, width, channels = found.pixels.shape
    kind = "grey" if channels == 1 else "colour"
    about = f"{found.name}: {width} × {height} pixels in {kind}" + "".join(f", {note}" for note in found.notes) + "."
    return FieldTask(config, grid, parts(config, grid), frequencies(config, max(height, width)), about=about)


def parts(config: PictureConfig, grid: Grid) -> Parts:
    """Which pixels are for what."""
    if config.held_out == "none":
        return Parts.same(grid)
    if config.held_out == "grid":
        return Parts(*(every_other(grid.sizes, offset) for offset in ((0, 0), (0, 1), (1, 1))))
    order = torch.randperm(len(grid), generator=generator(config.split_seed, -7))
    quarter = len(grid) // 4
    return Parts(*(order[i * quarter : (i + 1) * quarter].sort().values for i in range(3)))


def picture(config: PictureConfig) -> Picture:
    """What is fitted."""
    return _read(config.file, config.picture, config.size)


@lru_cache(maxsize=1)
def _read(file: object, name: str, size: int) -> Picture:
    """Kept, for it is asked for when the settings are checked, when the model is made and when the fit is shown."""
    if file is not None:
        from pathlib import Path

        return read_file(Path(str(file)), size)
    return bundled(name, size)


def ready(config: PictureConfig) -> None:
    """Raise where the picture cannot be read, or holds too few pixels for its splits."""
    found = picture(config)
    if config.held_out != "none" and found.pixels.shape[0] * found.pixels.shape[1] < 256:
        raise UserError(f"{found.name} has too few pixels to hold some out; use --held-out none")


RUNNER = FieldRunner(build, show, ready, export)
