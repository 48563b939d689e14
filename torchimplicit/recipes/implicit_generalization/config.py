"""The settings of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.options import positive
from torchimplicit.recipes.runtime.table import Plan
from torchimplicit.recipes.training.settings import Machine


@dataclass(frozen=True, kw_only=True)
class GeneralizationConfig:
    """Three filters, implicit and explicit, in three sizes, on natural pictures and on pictures of text."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=2, together=12))

    natural: tuple[str, ...] = ("camera", "astronaut")
    """Pictures of scikit-image."""

    texts: tuple[str, ...] = ("text-0", "text-1")
    """Pictures of text: drawn (text-0 to text-3), or scikit-image's page and text."""

    data_dir: Path | None = None
    """A folder of picture files to take in place of the natural ones."""

    size: int | None = None
    """Pixels of the longest side; by default 64, and the paper's 512 at its scale."""

    width: int | None = None
    """w; by default 64, and the paper's 256."""

    steps: int | None = None
    """By default 400, and the paper's 2000."""

    rows: tuple[str, ...] = ()
    """Only these, such as fourier-implicit-1L, gabor-explicit-4L, siren-implicit-1L-full and cost; by default all."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    def __post_init__(self) -> None:
        positive(self, "size", "width", "steps")
        if not self.natural and not self.texts and self.data_dir is None:
            raise UserError("--natural and --texts are both empty; name a picture")


def default() -> GeneralizationConfig:
    """On a CPU: four pictures of 64 pixels, models of width 64 and 128."""
    return GeneralizationConfig()
