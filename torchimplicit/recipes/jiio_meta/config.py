"""The settings: of one training, of what is measured at its weights, and of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import (
    Equilibria,
    Machine,
    Optimization,
    fraction,
    not_negative,
    option,
    positive,
)

Adaptation = Literal["jiio", "jiio-first-order", "jiio-unrolled", "descent"]


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """An equilibrium model whose context adapts to a task on a few samples, trained so that others come out right."""

    data: Literal["sinusoid", "omniglot"]
    """Regression of sine waves, made on the spot; or new characters told apart by one drawing of each."""

    data_dir: Path | None = None
    """The folder with Omniglot's images_background_small1.zip; by default it is downloaded."""

    adaptation: Adaptation = "jiio"
    """How the context is found and the weights' gradient is taken: JIIO, exactly; JIIO, the context held fixed; JIIO,
    differentiated through each of its steps, be they ever so few; or gradient descent through the equilibrium, likewise
    differentiated through every step (as MAML does)."""

    adaptation_steps: int = 25
    """Of JIIO, evaluations; of descent, equilibria and their gradients."""

    adaptation_step_size: float = 1.0
    """Of the context along its gradient."""

    penalty: float = 0.01
    """Of the context's square, added to the loss that it is adapted by: without it none need be the best."""

    adjoint_steps: int = 12
    """The most steps of JIIO's exact adjoint (GMRES)."""

    adjoint_tolerance: float = 0.1
    """Of the same, relative."""

    state_size: int = 40
    """Of a sample's equilibrium."""

    context_size: int = 5
    """Of a task's context."""

    bound: float = 0.7
    """On the spectral norm of the weight between states."""

    ways: int = 5
    """Characters of a task."""

    shots: int = 10
    """Samples to adapt by: of a sine wave, or of each character."""

    queries: int = 10
    """Samples to be right on, likewise."""

    held_out_tasks: int = 200
    """Of the validation and of the test, each."""

    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "adaptation_steps", "adaptation_step_size", "adjoint_steps", "adjoint_tolerance")
        positive(self, "state_size", "context_size", "ways", "shots", "queries", "held_out_tasks")
        not_negative(self, "penalty")
        fraction(self, "bound")
        if self.data == "omniglot" and self.shots + self.queries > 20:
            raise UserError(
                f"Omniglot has 20 drawings of each character, and {option('shots')} {self.shots} and "
                f"{option('queries')} {self.queries} are {self.shots + self.queries}"
            )
        if self.data == "sinusoid" and self.data_dir is not None:
            raise UserError("sine waves are made on the spot and read from nowhere: leave --data-dir away")


_EQUILIBRIA = Equilibria(tolerance=1e-2, backward_tolerance=1e-2)


def sinusoid() -> MetaConfig:
    """Ten points of a sine wave: half a minute on one core."""
    return MetaConfig(
        data="sinusoid",
        optimization=Optimization(steps=120, batch_size=32, learning_rate=1e-2, clip_norm=1.0, validate_every=30),
        equilibria=_EQUILIBRIA,
    )


def omniglot() -> MetaConfig:
    """Five new characters, one drawing of each: minutes on one core."""
    return MetaConfig(
        data="omniglot",
        adaptation_step_size=5.0,
        penalty=1e-3,
        state_size=100,
        context_size=50,
        shots=1,
        queries=5,
        held_out_tasks=100,
        optimization=Optimization(steps=200, batch_size=8, learning_rate=5e-3, clip_norm=1.0, validate_every=50),
        equilibria=_EQUILIBRIA,
    )


@dataclass(frozen=True, kw_only=True)
class AdaptationsConfig:
    """Trains a model, then adapts it at the best weights by JIIO and by descent, with more and fewer steps, in turn."""

    training: MetaConfig = field(default_factory=sinusoid)

    jiio_steps: tuple[int, ...] = (5, 10, 25, 50)
    """Of JIIO."""

    descent_steps: tuple[int, ...] = (1, 2, 5, 10, 20)
    """Of gradient descent."""

    step_sizes: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Of which each has the best: that of the least error on validation tasks."""

    adapted_tasks: int = 100
    """Test tasks, all at once; and as many of validation."""

    repeats: int = 5
    """How often each is timed."""

    def __post_init__(self) -> None:
        positive(self, "adapted_tasks", "repeats")
        for name in ("jiio_steps", "descent_steps", "step_sizes"):
            if not getattr(self, name) or not min(getattr(self, name)) > 0:
                raise UserError(f"{option(name)} must be one or more positive numbers")


def adaptations() -> AdaptationsConfig:
    """On sine waves."""
    return AdaptationsConfig()
