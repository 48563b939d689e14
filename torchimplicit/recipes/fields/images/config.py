"""The settings of the recipes that fit pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.fields.settings import Representation
from torchimplicit.recipes.options import not_negative, positive
from torchimplicit.recipes.training.settings import Equilibria, Machine, Optimization

LARGEST = 2048


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
        if self.export_size is not None and self.export_size > 16 * LARGEST:
            raise UserError(f"--export-size {self.export_size} is more than {16 * LARGEST}")


def truncated(terms: int = 2) -> Equilibria:
    """How amortized equilibria are trained (Huang et al. 2021): one evaluation a step from the last state, and the
    Neumann series after ``terms`` of its terms; 2 are one product with the Jacobian."""
    return Equilibria(
        solver="anderson",
        solver_steps=60,
        tolerance=1e-3,
        gradient="neumann-phantom",
        phantom_steps=terms,
        phantom_damping=1.0,
        backward_tolerance=1e-3,
        backward_steps=60,
    )


def full_batch(steps: int, validate_every: int, learning_rate: float = 1e-3) -> Optimization:
    """All points in every step, by Adam at a constant rate, as the paper trains."""
    return Optimization(
        steps=steps,
        batch_size=1 << 22,
        optimizer="adam",
        learning_rate=learning_rate,
        schedule="constant",
        validate_every=validate_every,
    )


def image() -> PictureConfig:
    """A picture of 128 pixels, a few minutes on one core. The paper's: --size 512 --width 256 --steps 5000."""
    return PictureConfig(optimization=full_batch(600, 100), equilibria=truncated())


def generalization() -> PictureConfig:
    """A quarter of a picture's pixels, a minute on one core. The paper's: --size 512 --width 256 --steps 2000."""
    return PictureConfig(held_out="grid", optimization=full_batch(600, 50), equilibria=truncated())
