"""The recipe that fits a video."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from torchimplicit.recipes.fields.memory import chunk_points
from torchimplicit.recipes.fields.points import Grid
from torchimplicit.recipes.fields.runner import FieldRunner
from torchimplicit.recipes.fields.task import FieldTask, Parts
from torchimplicit.recipes.fields.video.clips import Clip, clip_of
from torchimplicit.recipes.fields.video.config import VideoConfig
from torchimplicit.recipes.fields.video.show import export, show
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.trainer import Results


def build(config: VideoConfig) -> FieldTask:
    """The task: cells are cubes, of a pixel's side and a frame's length. The scale of the frequencies is
    that of pictures: half the longest side."""
    found = clip(config)
    grid = Grid(found.pixels)
    frames, height, width, channels = found.pixels.shape
    kind = "grey" if channels == 1 else "colour"
    about = (
        f"{found.name}: {frames} frames of {width} × {height} pixels in {kind}"
        + "".join(f", {note}" for note in found.notes)
        + "."
    )
    return FieldTask(config, grid, Parts.same(grid), max(height, width) / 2, about=about)


def clip(config: VideoConfig) -> Clip:
    """What is fitted."""
    return _read(config.file, config.clip, config.first, config.every, config.frames, config.size)


@lru_cache(maxsize=1)
def _read(*chosen: Any) -> Clip:
    """Kept, for it is asked for when the settings are checked, when the model is made and when the fit is shown."""
    file, name, first, every, frames, size = chosen
    return clip_of(VideoConfig(file=file, clip=name, first=first, every=every, frames=frames, size=size))


def ready(config: VideoConfig) -> None:
    """Raise where the video cannot be read, or its states have no room."""
    chunk_points(config, clip(config).pixels[..., 0].numel())


def _show(config: VideoConfig, task: FieldTask, results: Results, run: Run) -> None:
    show(config, clip(config), task, results, run)


def _export(config: VideoConfig, task: FieldTask, sizes: tuple[int, ...], run: Run) -> Path:
    return export(clip(config), task, sizes, run)


RUNNER = FieldRunner(build, _show, ready, _export)
