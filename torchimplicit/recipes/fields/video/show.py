"""What there is to see of a video's fit."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from torchimplicit.recipes.fields.images.pictures import quantized
from torchimplicit.recipes.fields.images.show import error_map, export_sizes
from torchimplicit.recipes.fields.report import write_page
from torchimplicit.recipes.fields.task import FieldTask, decibels
from torchimplicit.recipes.fields.video.clips import Clip
from torchimplicit.recipes.fields.video.config import VideoConfig, check_export
from torchimplicit.recipes.fields.video.figures import over_frames, strip
from torchimplicit.recipes.fields.video.writing import can_write_mp4, save
from torchimplicit.recipes.runtime.page import save_figure
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.trainer import Results


def show(config: VideoConfig, clip: Clip, task: FieldTask, results: Results, run: Run) -> None:
    """Write the reconstruction, both videos beside the error, the frames, the export where one is asked for, and the
    page."""
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    fitted: list[Tensor] = []
    misfits: list[Tensor] = []
    errors: list[float] = []
    for number, values in enumerate(sampled_frames(task, tuple(clip.pixels.shape[:3]))):
        truth = clip.pixels[number].float() / 127.5 - 1
        errors.append(float((values.clamp(-1, 1) - truth).double().square().mean()))
        misfits.append(error_map(values, truth))
        fitted.append(quantized(values))
    several = (
        torch.cat([one.expand(-1, -1, 3) for one in (clip.pixels[i], fitted[i], misfits[i])], 1)
        for i in range(len(fitted))
    )
    save(several, clip.rate, folder / "comparison.gif")
    save(iter(fitted), clip.rate, run.product("reconstruction.gif"))
    if can_write_mp4():
        save(iter(fitted), clip.rate, run.product("reconstruction.mp4"))
    of_frames = [decibels(error, 2.0) for error in errors]
    drawn = strip({"video": list(clip.pixels), "field": fitted, "error": misfits})
    save_figure(drawn, folder / "frames.png", 110)
    save_figure(over_frames(of_frames), folder / "frames-psnr.png", 110)
    shown = [
        (
            folder / "comparison.gif",
            "The video, the field, and the error's size: dark is none, bright a quarter of the "
            "range. A GIF has 256 colours; the figures are those of the field itself.",
        ),
        (folder / "frames.png", "Frames of the video, the field at its pixels, and the error's size."),
        (folder / "frames-psnr.png", "The PSNR of every frame."),
    ]
    notes = [
        f"Over all pixels: {decibels(fmean(errors), 2.0):.2f} dB; from {min(of_frames):.2f} dB (frame "
        f"{of_frames.index(min(of_frames))}) to {max(of_frames):.2f} dB (frame {of_frames.index(max(of_frames))}). All "
        "pixels were fitted: the validation and the test are on the same ones."
    ]
    if config.export_size:
        written = export(clip, task, config.export_size, run)
        notes.append(f"The field sampled at another size is in {written.name}.")
    write_page("A video as a field", task, results, run, shown, notes)


def export(clip: Clip, task: FieldTask, sizes: tuple[int, ...], run: Run) -> Path:
    """Write ``export.mp4``, or ``export.gif`` without PyAV: the field at so many frames, so high and wide."""
    check_export(sizes)
    frames, height, width = clip.pixels.shape[:3]
    if len(sizes) == 1:
        height, width = export_sizes((height, width), sizes[0])
    elif len(sizes) == 2:
        height, width = sizes
    else:
        frames, height, width = sizes
    path = run.product("export.mp4" if can_write_mp4() else "export.gif")
    made = (quantized(values) for values in sampled_frames(task, (frames, height, width)))
    save(made, clip.rate * frames / len(clip.pixels), path)
    return path


def sampled_frames(task: FieldTask, sizes: tuple[int, ...]) -> Iterator[Tensor]:
    """The field on a grid, a frame ``[height, width, channels]`` at a time."""
    pixels = prod(sizes[1:])
    for number in range(sizes[0]):
        yield task.cells(sizes, range(number * pixels, (number + 1) * pixels)).reshape(*sizes[1:], -1)
