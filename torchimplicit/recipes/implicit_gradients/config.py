"""The settings of the figure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.options import positive
from torchimplicit.recipes.runtime.table import Plan
from torchimplicit.recipes.training.settings import Machine


@dataclass(frozen=True, kw_only=True)
class GradientsConfig:
    """Three implicit representations, trained with T products in the backward pass, for several T."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=1, together=12))

    pictures: tuple[str, ...] = ("camera", "text-0")
    """Of scikit-image, or text that is drawn."""

    file: Path | None = None
    """A picture of your own in place of them."""

    products: tuple[int, ...] = (0, 1, 2, 4, 8)
    """The T to try: 0 is the one-step gradient, 1 the paper's choice; the converged adjoint comes besides."""

    size: int | None = None
    """Pixels of the longest side; by default 64, and the paper's 512 at its scale."""

    width: int | None = None
    """By default 64, and the paper's 256."""

    steps: int | None = None
    """By default 400, and the paper's 2000."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    def __post_init__(self) -> None:
        positive(self, "size", "width", "steps")
        if not self.pictures and self.file is None:
            raise UserError("--pictures is empty; name one")
        if not self.products or min(self.products) < 0 or len(set(self.products)) < len(self.products):
            raise UserError(f"--products must be different numbers from 0 on, and they are {self.products}")


def default() -> GradientsConfig:
    """On a CPU: two pictures of 64 pixels."""
    return GradientsConfig()
