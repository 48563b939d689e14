"""The settings of the recipe that fits a video."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.fields.settings import Representation, full_batch, truncated
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, positive

ClipName = Literal["shapes", "flight"]

LARGEST = 2048


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """A field fitted to a video."""

    file: Path | None = None
    """Your own video: a folder of pictures in the order of their names, an animated GIF, PNG or WebP, or, with
    'torchimplicit[video]', what FFmpeg reads (MP4, MOV, MKV, WebM, AVI)."""

    clip: ClipName = "shapes"
    """Where --file is not given: moving shapes, drawn on the spot, or a flight over a picture of scikit-image."""

    first: int = 0
    """The first frame of a file that is taken, counted from 0."""

    every: int = 1
    """Take every so many frames of a file."""

    frames: int | None = 12
    """At most so many; None takes all."""

    size: int = 48
    """Pixels of the longest side; larger frames are reduced to it."""

    export_size: tuple[int, ...] = ()
    """Also sample the field so finely: frames, height and width; or pixels of the longest side."""

    representation: Representation = field(default_factory=Representation)
    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "every", "frames", "size")
        not_negative(self, "first")
        if self.size > LARGEST:
            raise UserError(f"--size {self.size} is more than {LARGEST}; a field of so many pixels is not practical")
        if self.frames is not None and self.frames < 2:
            raise UserError("--frames 1 is a picture; fit it with implicit-image")
        if self.frames is None and self.file is None:
            raise UserError("--frames None takes all of a file, and there is none; add --file video.gif")
        check_export(self.export_size)


def check_export(sizes: tuple[int, ...]) -> None:
    """Raise where a size to export makes no sense."""
    if len(sizes) > 3:
        raise UserError("--export-size takes frames, height and width; or a height and a width; or the longest side")
    if any(not 1 <= size <= 4 * LARGEST for size in sizes):
        raise UserError(f"--export-size {' '.join(map(str, sizes))} must lie in [1, {4 * LARGEST}]")


def video() -> VideoConfig:
    """Twelve frames of 48 pixels, minutes on one core, and at most 65,536 points a step. The paper's: --size 512
    --frames None --width 1024 --steps 10000 --frequencies 128 --amortize off, for a GPU."""
    optimization = replace(full_batch(600, 100), batch_size=65536)
    return VideoConfig(optimization=optimization, equilibria=truncated())
