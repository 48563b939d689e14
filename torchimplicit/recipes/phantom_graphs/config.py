"""The settings of the table, and of its measurement of a step's cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.graphs.config import MoleculesConfig, cox2
from torchimplicit.recipes.options import positive
from torchimplicit.recipes.runtime.table import Plan

SetName = Literal["COX2", "PROTEINS"]


@dataclass(frozen=True, kw_only=True)
class PhantomGraphsConfig:
    """COX2 and PROTEINS with implicit and phantom gradients, every fold; directed chains with two starts."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=3, together=8))

    data_dir: Path | None = None
    """The folder with the TU sets' folders; without it torch-geometric downloads them."""

    sets: tuple[SetName, ...] = ("COX2", "PROTEINS")
    """Which sets."""

    folds: int = 10
    """Of the cross-validation, a run each; --seeds are those of the chains."""

    passes: int | None = None
    """Over the training part of a set; by default 60 of COX2 and 8 of PROTEINS, or the published 200."""

    lengths: tuple[int, ...] = (10, 20, 40, 60, 80, 100)
    """Of the chains."""

    dampings: tuple[float, ...] = (0.5, 0.8, 1.0)
    """λ of the phantom gradients, of 5 steps each."""

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise UserError(f"--folds must be at least 2, and it is {self.folds}")
        _check(self.dampings)
        positive(self, "passes")
        if any(length < 1 for length in self.lengths):
            raise UserError(f"--lengths must be positive, and they are {' '.join(map(str, self.lengths))}")


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Steps of all estimators, timed in turn at the same trained weights."""

    training: MoleculesConfig = field(default_factory=cox2)

    repeats: int = 15
    """Steps of each estimator, of which the medians are taken."""

    dampings: tuple[float, ...] = (0.5, 0.8, 1.0)
    """λ of the phantom gradients, of 5 steps each."""

    def __post_init__(self) -> None:
        positive(self, "repeats")
        _check(self.dampings)


def default() -> PhantomGraphsConfig:
    """The table."""
    return PhantomGraphsConfig()


def cost() -> CostConfig:
    """Its measurement of costs, on COX2."""
    return CostConfig()


def _check(dampings: tuple[float, ...]) -> None:
    if not all(0 < damping <= 1 for damping in dampings):
        raise UserError(f"--dampings must lie in (0, 1], and they are {' '.join(map(str, dampings))}")
