"""The settings of the table, and of what it measures beside its runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.fields.shape.config import ShapeConfig
from torchimplicit.recipes.fields.shape.config import shape as one_shape
from torchimplicit.recipes.options import positive
from torchimplicit.recipes.runtime.table import Plan
from torchimplicit.recipes.training.settings import Machine


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """Three filters, implicit and explicit: occupancy, and signed distances with exact and one-step gradients."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=2, together=40))

    shape: Literal["knot", "gyroid"] = "knot"
    """What is fitted."""

    mesh_file: Path | None = None
    """A mesh of your own in its place: OBJ, PLY, STL or OFF."""

    width: int | None = None
    """By default 64, and the paper's 256."""

    steps: int | None = None
    """Of occupancy; by default 250, and the paper's 10000."""

    sdf_steps: int | None = None
    """Of the signed distance; by default 120, and 10000 at the paper's scale."""

    samples: int | None = None
    """Points to train on; by default 40 000, and 500 000 at the paper's scale, with 50 000 a step."""

    rows: tuple[str, ...] = ()
    """Only these, such as occupancy-siren-implicit, sdf-siren-one-step, sdf-gabor-explicit and cost; by default all."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    def __post_init__(self) -> None:
        positive(self, "width", "steps", "sdf_steps", "samples")


@dataclass(frozen=True, kw_only=True)
class ShapesCostConfig:
    """Measures steps of several fits in turn, and gradients of distances beside exact ones."""

    names: tuple[str, ...] = ()
    """What the fits are called."""

    fits: tuple[ShapeConfig, ...] = ()
    """The fits, in the same order."""

    one_step: tuple[bool, ...] = ()
    """Which of them are trained by the one-step estimate."""

    warm_steps: int = 10
    """Steps of training before the measurement."""

    rounds: int = 5
    """How often each has its turn, of one step."""

    def __post_init__(self) -> None:
        positive(self, "warm_steps", "rounds")


def default() -> ShapesConfig:
    """On a CPU: a knot by models of width 64."""
    return ShapesConfig()


def costs() -> ShapesCostConfig:
    """Of nothing: the table fills it in."""
    return ShapesCostConfig()


def one_step() -> ShapeConfig:
    """Of a distance, to be trained by the one-step estimate."""
    return replace(one_shape(), task="sdf")
