"""The settings of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torchimplicit.recipes.jiio.config import DataName
from torchimplicit.recipes.options import positive
from torchimplicit.recipes.runtime.table import Plan


@dataclass(frozen=True, kw_only=True)
class JiioInverseConfig:
    """Denoising and inpainting, trained with the exact gradient, with the first-order one, and on clean images."""

    plan: Plan = field(default_factory=Plan)

    data: DataName = "digits"
    """Which images."""

    data_dir: Path | None = None
    """The folder that holds MNIST or the Olivetti faces; without it they are downloaded."""

    steps: int | None = None
    """Optimizer steps of every model; by default those of the recipe."""

    def __post_init__(self) -> None:
        positive(self, "steps")


def default() -> JiioInverseConfig:
    """The table."""
    return JiioInverseConfig()
