"""The settings of the recipes that fit pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.fields.settings import Representation, full_batch, truncated
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, positive

LARGEST = 2048
LONGEST_EXPORT = 16 * LARGEST


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """A field fitted to a picture."""

    file: Path | None = None
    """Your own picture: PNG, JPEG, TIFF and others."""

    picture: str = "camera"
    """Where --file is not given: a picture of scikit-image (astronaut, camera, chelsea, coffee, moon, page, ...), or a
    text that is drawn (text-0 to text-3)."""

    size: int = 128
    """Pixels of the longest side; a larger picture is reduced to it."""

    held_out: Literal["none", "grid", "random"] = "none"
    """none: all pixels are fitted. grid, random: a quarter is fitted, one is for validation and one for the test: every
    other pixel of every other row, or pixels drawn at random."""

    split_seed: int = 0
    """Which pixels are drawn."""

    export_size: int | None = None
    """Also sample the field so large, in pixels of the longest side: into export.png."""

    representation: Representation = field(default_factory=Representation)
    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "size", "export_size")
        not_negative(self, "split_seed")
        if self.size > LARGEST:
            raise UserError(f"--size {self.size} is more than {LARGEST}; a field of so many pixels is not practical")
        if self.export_size is not None and self.export_size > LONGEST_EXPORT:
            raise UserError(f"--export-size {self.export_size} is more than {LONGEST_EXPORT}")


def image() -> PictureConfig:
    """A picture of 128 pixels, a few minutes on one core. The paper's: --size 512 --width 256 --steps 5000."""
    return PictureConfig(optimization=full_batch(600, 100), equilibria=truncated())


def generalization() -> PictureConfig:
    """A quarter of a picture's pixels, a minute on one core. The paper's: --size 512 --width 256 --steps 2000."""
    return PictureConfig(held_out="grid", optimization=full_batch(600, 50), equilibria=truncated())
