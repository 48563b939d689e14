"""The settings of the image recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, option, positive


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """A multiscale deep equilibrium model that classifies images."""

    data: Literal["digits", "mnist", "cifar10", "imagenet"]
    """Which images."""

    data_dir: Path | None = None
    """The folder that holds them. By default MNIST and CIFAR-10 are downloaded; the digits come with scikit-learn."""

    model: Literal["small", "tiny", "large", "imagenet"] = "small"
    """Its size."""

    dropout: float = 0.0
    """The share that variational dropout drops in each residual block."""

    downsamplings: int | None = None
    """How often the resolution is halved before the equilibrium; by default as usual for the model."""

    validation_images: int = 5000
    """Training images set apart to select the weights by."""

    train_images: int | None = None
    """How many of the other training images to use; by default all."""

    test_images: int | None = None
    """How many of the test images to use; by default all."""

    split_seed: int = 0
    """Which images are set apart."""

    augment: bool = False
    """Shift training images by up to 4 pixels and mirror them at random. ImageNet's are always cropped at random."""

    image_size: int = 224
    """Pixels to which ImageNet's images are cropped."""

    classes: int = 1000
    """How many classes ImageNet's folder must have."""

    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "validation_images", "train_images", "test_images", "image_size", "classes")
        not_negative(self, "split_seed", "downsamplings")
        if not 0 <= self.dropout < 1:
            raise UserError(f"{option('dropout')} must lie in [0, 1), and it is {self.dropout}")
        if self.augment and self.data == "imagenet":
            raise UserError(f"{option('augment')} is for small images; ImageNet's are always cropped at random")


def _phantom(steps: int, batch_size: int, validate_every: int) -> Optimization:
    """How phantom gradients were trained (Geng et al. 2021, appendix): SGD with momentum 0.9 and a cosine."""
    return Optimization(
        steps=steps,
        batch_size=batch_size,
        validate_every=validate_every,
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=1e-4,
    )


def digits() -> ImageConfig:
    """The small model on the bundled digits, some twenty seconds on one core."""
    return ImageConfig(
        data="digits",
        downsamplings=0,
        validation_images=300,
        optimization=_phantom(steps=120, batch_size=64, validate_every=40),
        equilibria=Equilibria(solver="broyden", solver_steps=18, gradient="unrolled-phantom"),
    )


def mnist() -> ImageConfig:
    """The small model on MNIST: minutes on one core."""
    return ImageConfig(
        data="mnist",
        downsamplings=2,
        optimization=_phantom(steps=1000, batch_size=128, validate_every=200),
        equilibria=Equilibria(solver="broyden", solver_steps=18, gradient="unrolled-phantom"),
    )


def cifar10() -> ImageConfig:
    """MDEQ-Tiny on CIFAR-10 with the settings of Geng et al. 2021, table 1: 50 epochs of the 45,000 images that are
    not set apart. The backward settings are those of its implicit rows."""
    return ImageConfig(
        data="cifar10",
        model="tiny",
        optimization=_phantom(steps=50 * 351, batch_size=128, validate_every=351),
        equilibria=Equilibria(
            solver="broyden", solver_steps=22, backward_steps=24, gradient="unrolled-phantom", phantom_damping=0.5
        ),
    )


def cifar10_large() -> ImageConfig:
    """MDEQ-Large on CIFAR-10, augmented, 220 epochs (Geng et al. 2021, table 3). The optimizer is that of MDEQ-Tiny:
    the one for the phantom gradient's row was not published."""
    return ImageConfig(
        data="cifar10",
        model="large",
        augment=True,
        optimization=_phantom(steps=220 * 351, batch_size=128, validate_every=351),
        equilibria=Equilibria(solver="broyden", solver_steps=18, backward_steps=20, gradient="unrolled-phantom"),
    )


def imagenet() -> ImageConfig:
    """MDEQ-Small on ImageNet, 100 epochs, with the phantom gradient A(5, 0.6) of Geng et al. 2021, table 3, and the
    optimizer of Bai et al. 2020."""
    return ImageConfig(
        data="imagenet",
        model="imagenet",
        validation_images=10_000,
        optimization=Optimization(
            steps=100 * 9930,
            batch_size=128,
            optimizer="sgd",
            learning_rate=0.05,
            weight_decay=5e-5,
            validate_every=2500,
        ),
        equilibria=Equilibria(
            solver="broyden", solver_steps=26, backward_steps=27, gradient="unrolled-phantom", phantom_damping=0.6
        ),
        machine=Machine(workers=8),
    )
