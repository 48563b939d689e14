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

Adversary = Literal["none", "pgd", "jiio"]

CLEAN = "clean"
"""What images are called that no attack has changed."""


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """An equilibrium classifier trained on images that are changed, within a ball, so as to be hard for it."""

    data: Literal["digits", "mnist"]
    """Which images."""

    data_dir: Path | None = None
    """The folder that holds them. By default MNIST is downloaded; the digits come with scikit-learn."""

    adversary: Adversary = "jiio"
    """What changes the training images: nothing, projected gradient ascent through the equilibrium, or JIIO."""

    attack_gradient: Literal["resolve", "envelope"] = "resolve"
    """With JIIO, the weights' gradient: at an exact solve for the changed image (warm-started), by --gradient; or by
    the envelope theorem, from the state and the adjoint that JIIO ends with, at no further cost."""

    radius: float = 0.5
    """Of the ball around each image, in the 2-norm of its pixels in [0, 1]."""

    attack_steps: int = 20
    """Steps of the attack in training: of JIIO, evaluations; of pgd, equilibria and their gradients."""

    attack_step_size: float = 0.8
    """A step of the attack, as a share of the radius."""

    channels: int = 100
    """Of the state; of the digits' dense model, its size."""

    bound: float = 0.8
    """On the spectral norm of the weight between states."""

    validation_images: int = 300
    """Training images set apart to select the weights by."""

    train_images: int | None = None
    """How many of the other training images to use; by default all."""

    test_images: int | None = None
    """How many of the test images to use; by default all."""

    split_seed: int = 0
    """Which images are set apart."""

    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "radius", "attack_steps", "attack_step_size", "channels")
        positive(self, "validation_images", "train_images", "test_images")
        not_negative(self, "split_seed")
        fraction(self, "bound")
        if self.attack_gradient == "envelope" and self.adversary != "jiio":
            raise UserError(
                f"{option('attack_gradient')} envelope needs the adjoint that JIIO finds, and {option('adversary')} "
                f"is {self.adversary}"
            )
        if self.adversary != "none" and self.equilibria.gradient == "unrolled":
            raise UserError(
                f"{option('gradient')} unrolled would differentiate a solve that begins at its solution, as it does "
                "after an attack, and takes hardly a step: take implicit, or a phantom gradient"
            )


def digits() -> AdversarialConfig:
    """A dense model on the bundled digits: half a minute on one core."""
    return AdversarialConfig(
        data="digits",
        optimization=Optimization(steps=150, batch_size=128, learning_rate=1e-2, validate_every=30),
    )


def mnist() -> AdversarialConfig:
    """A convolutional model on MNIST: some minutes on one core."""
    return AdversarialConfig(
        data="mnist",
        radius=1.0,
        channels=24,
        validation_images=1000,
        test_images=1000,
        optimization=Optimization(steps=300, batch_size=64, learning_rate=5e-3, validate_every=100),
    )


@dataclass(frozen=True, kw_only=True)
class AttacksConfig:
    """Trains a classifier, then attacks it at the best weights by everything there is, in turn."""

    training: AdversarialConfig = field(default_factory=digits)

    pgd_steps: tuple[int, ...] = (2, 3, 5, 10, 20)
    """Of projected gradient ascent."""

    jiio_steps: tuple[int, ...] = (10, 20, 40, 80)
    """Of JIIO."""

    step_sizes: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Shares of the radius, of which each attack has the best: that of most cross-entropy on validation images."""

    tolerances: tuple[float, ...] = (1e-1, 1e-2)
    """Of PGD's solves; it has the loosest that costs no more than --tolerated of the cross-entropy."""

    tolerated: float = 0.01
    """See --tolerances."""

    tuning_images: int = 200
    """Validation images on which step sizes and tolerances are chosen."""

    attacked_images: int = 360
    """Test images that are attacked."""

    repeats: int = 3
    """How often each attack is timed."""

    def __post_init__(self) -> None:
        positive(self, "tuning_images", "attacked_images", "repeats", "tolerated")
        for name in ("pgd_steps", "jiio_steps", "step_sizes", "tolerances"):
            if not getattr(self, name) or not min(getattr(self, name)) > 0:
                raise UserError(f"{option(name)} must be one or more positive numbers")

    def strongest(self, kind: str) -> str:
        """The name of the longest attack of a kind."""
        return f"{kind}-{max(self.pgd_steps if kind == 'PGD' else self.jiio_steps)}"


def attacks() -> AttacksConfig:
    """On the bundled digits."""
    return AttacksConfig()
