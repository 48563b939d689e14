"""The settings of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torchimplicit.recipes.jiio.config import DataName, Kind
from torchimplicit.recipes.options import positive
from torchimplicit.recipes.runtime.table import Plan


@dataclass(frozen=True, kw_only=True)
class JiioGenerationConfig:
    """Decoders trained by joint inference, beside autoencoders; loss against time, beside nested optimization."""

    plan: Plan = field(default_factory=Plan)

    data: DataName = "digits"
    """Which images."""

    data_dir: Path | None = None
    """The folder that holds MNIST or the Olivetti faces; without it they are downloaded."""

    kind: Kind | None = None
    """Of every decoder; by default that of the recipe for these images."""

    steps: int | None = None
    """Optimizer steps of every model; by default those of the recipe."""

    repeats: int = 5
    """Of the measurement of time."""

    def __post_init__(self) -> None:
        positive(self, "steps", "repeats")


def default() -> JiioGenerationConfig:
    """The table."""
    return JiioGenerationConfig()
