"""What there is to see of a picture's fit."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from torchimplicit.recipes.fields.images.config import LONGEST_EXPORT, PictureConfig
from torchimplicit.recipes.fields.images.pictures import quantized, save
from torchimplicit.recipes.fields.points import Grid
from torchimplicit.recipes.fields.report import write_page
from torchimplicit.recipes.fields.task import FieldTask, decibels
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.trainer import Results


def show(config: PictureConfig, task: FieldTask, results: Results, run: Run) -> None:
    """Write the reconstruction, the error map, the export where one is asked for, and the page."""
    grid = task.points
    assert isinstance(grid, Grid)
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    _, truth = grid.at(torch.arange(len(grid)))
    truth = truth.reshape(*grid.sizes, -1).cpu()
    values = task.on_grid(grid.sizes)
    pictures = [
        (folder / "original.png", "The picture."),
        (folder / "reconstruction.png", "The field at its pixels."),
        (
            folder / "error.png",
            "The error's size, averaged over the channels: dark is none, bright a quarter of the range.",
        ),
    ]
    save(quantized(truth), pictures[0][0])
    save(quantized(values), pictures[1][0])
    save(error_map(values, truth), pictures[2][0])
    notes = [f"Over all pixels: {decibels(float((values.clamp(-1, 1) - truth).square().mean()), 2.0):.2f} dB."]
    if config.held_out == "none":
        notes.append("All pixels were fitted: the validation and the test are on the same ones.")
    else:
        pictures.append((folder / "given.png", "The pixels that were fitted; the others are white."))
        save(_given(task, truth), pictures[-1][0])
    if config.export_size is not None:
        height, width = export_sizes(grid.sizes, config.export_size)
        written = export(config, task, (height, width), run)
        pictures.append((written, f"The field at {width} × {height} points (export.png)."))
    write_page("A picture as a field", task, results, run, pictures, notes)


def export(config: PictureConfig, task: FieldTask, sizes: tuple[int, ...], run: Run) -> Path:
    """Write ``export.png``: the field so many pixels high and wide, or so long on the longer side."""
    grid = task.points
    assert isinstance(grid, Grid)
    if len(sizes) not in (1, 2):
        raise UserError("--export-size takes the longest side's pixels, or a height and a width")
    if len(sizes) == 1:
        sizes = export_sizes((grid.sizes[0], grid.sizes[1]), sizes[0])
    if max(sizes) > LONGEST_EXPORT:
        raise UserError(f"--export-size {max(sizes)} is more than {LONGEST_EXPORT}")
    path = run.product("export.png")
    save(task.on_grid(sizes, quantized), path)
    return path


def export_sizes(sizes: tuple[int, ...], longest: int) -> tuple[int, int]:
    """Height and width in the same proportion, the longer of the two as told."""
    height, width = sizes
    ratio = longest / max(sizes)
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def error_map(values: Tensor, truth: Tensor) -> Tensor:
    """The absolute error, from 0 to a quarter of the range, in colours: uint8 ``[height, width, 3]``."""
    size = ((values.clamp(-1, 1) - truth).abs().mean(-1) / 0.5).clamp(0, 1)
    colours = matplotlib.colormaps["magma"](size.numpy())[:, :, :3]
    return torch.from_numpy((colours * 255).round()).to(torch.uint8)


def _given(task: FieldTask, truth: Tensor) -> Tensor:
    shown = torch.ones_like(truth).flatten(0, 1)
    known = task.parts.training
    shown[known] = truth.flatten(0, 1)[known]
    return quantized(shown.reshape(truth.shape))
