"""The settings of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.options import positive
from torchimplicit.recipes.runtime.table import Plan
from torchimplicit.recipes.training.settings import Machine


@dataclass(frozen=True, kw_only=True)
class PhantomAblationConfig:
    """An MDEQ trained by implicit and by phantom gradients."""

    plan: Plan = field(default_factory=Plan)

    data: Literal["mnist", "cifar10", "digits"] | None = None
    """Which images; by default MNIST on a CPU, and CIFAR-10 at the paper's scale."""

    data_dir: Path | None = None
    """The folder that holds them; by default they are downloaded."""

    steps: int | None = None
    """Optimizer steps of a run; by default 100, or the paper's 50 epochs."""

    rows: tuple[str, ...] = ()
    """Only these, such as implicit, upg-5, sweep-9-0.5 and cost; by default all."""

    sweep_seeds: int = 1
    """Runs of every further point of the sweep over k and λ."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    @property
    def images(self) -> Literal["mnist", "cifar10", "digits"]:
        """``data``, with its default filled in."""
        return self.data or ("cifar10" if self.plan.scale == "paper" else "mnist")

    def __post_init__(self) -> None:
        positive(self, "steps", "sweep_seeds")


def default() -> PhantomAblationConfig:
    """On a CPU: the small model on 9,000 images of MNIST."""
    return PhantomAblationConfig()
