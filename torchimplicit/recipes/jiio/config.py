"""The settings of the recipes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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

DataName = Literal["digits", "mnist", "olivetti"]
Kind = Literal["mlp", "conv", "mdeq"]


@dataclass(frozen=True, kw_only=True)
class Images:
    """Which images."""

    data: DataName = "digits"
    """The digits come with scikit-learn; MNIST and the Olivetti faces (32×32) are downloaded without --data-dir."""

    data_dir: Path | None = None
    """The folder that holds them."""

    validation_images: int = 200
    """Training images set apart to select the weights by."""

    train_images: int | None = None
    """How many of the other training images to use; by default all."""

    test_images: int | None = None
    """How many of the test images to use; by default all."""

    split_seed: int = 0
    """Which images are set apart."""

    def __post_init__(self) -> None:
        positive(self, "validation_images", "train_images", "test_images")
        not_negative(self, "split_seed")
        if self.data == "digits" and self.data_dir is not None:
            raise UserError("the digits come with scikit-learn and are read from nowhere else: leave --data-dir away")


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The equilibrium between a latent and its image."""

    kind: Kind = "mlp"
    """Fully connected, convolutional at half the images' resolution, or at that and coarser ones (multiscale)."""

    latent: int = 16
    """Size of the latent."""

    width: int = 96
    """Of the fully connected equilibrium."""

    channels: int = 16
    """Of the convolutional ones."""

    scales: int = 2
    """How many resolutions the multiscale one has."""

    bound: float = 0.6
    """Of the spectral norm of the map's linear part in the state."""

    def __post_init__(self) -> None:
        positive(self, "latent", "width", "channels", "scales")
        if not 0 < self.bound < 1:
            raise UserError(f"{option('bound')} must lie between 0 and 1, and it is {self.bound}")


@dataclass(frozen=True, kw_only=True)
class Joint:
    """How latents are found."""

    joint_steps: int = 20
    """The most steps of a joint solve in training; --test-steps elsewhere."""

    test_steps: int = 60
    """The same for validation and testing."""

    joint_memory: int = 20
    """Of the joint solve's Anderson acceleration."""

    joint_regularization: float = 0.03
    """Of the same. The map is far from linear over the first steps, which a least-squares fit of their differences
    should not be led by to the last digit: with a little of it, fewer steps come to the same loss."""

    step_size: float = 10.0
    """α of the latent's steps, for a loss that is a mean over pixels."""

    joint_tolerance: float = 1e-3
    """Relative, of the joint solve."""

    prior: float = 1e-3
    """What the mean square of a latent adds to its loss."""

    def __post_init__(self) -> None:
        positive(self, "joint_steps", "test_steps", "joint_memory", "step_size", "joint_tolerance", "prior")
        not_negative(self, "joint_regularization")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """A generative model: an equilibrium decoder trained by joint inference, or a variational autoencoder with it.

    With --jacobian-weight, the penalty on the map's Jacobian is taken at a random iterate of the joint solve."""

    model: Literal["jiio", "vae"] = "jiio"
    """Decoder alone, or with an encoder."""

    images: Images = field(default_factory=Images)
    decoder: Decoder = field(default_factory=Decoder)
    joint: Joint = field(default_factory=Joint)

    kl_weight: float = 0.02
    """Of the variational autoencoder's divergence, over the number of pixels: twice the variance of a pixel."""

    encoder_width: int = 128
    """Of its encoder's hidden layer."""

    components: int = 10
    """Of the Gaussian mixture fitted on the training images' latents."""

    density_images: int = 4000
    """How many training images the mixture is fitted on, the first ones: the latent of each must be found."""

    samples: int = 1000
    """Images generated for the Fréchet distance."""

    curves: bool = False
    """Also measure the loss against the time of joint and of nested inference, at the trained weights."""

    curve_images: int = 64
    """Test images in that measurement, one batch."""

    curve_repeats: int = 5
    """Of that measurement, of which the median time is taken."""

    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "kl_weight", "encoder_width", "components", "density_images", "samples")
        positive(self, "curve_images", "curve_repeats")
        if self.components > self.density_images:
            raise UserError(f"--components {self.components} is more than --density-images {self.density_images}")
        if self.curves and self.model != "jiio":
            raise UserError("--curves measures joint inference, which --model vae has not")


@dataclass(frozen=True, kw_only=True)
class InverseConfig:
    """An inverse problem: the latent is fitted to a corrupted image, and its image should be like the clean one.

    The decoder is trained for that, and the weight of the latent's prior, where the gradient sees it."""

    corruption: Literal["denoising", "inpainting"] = "denoising"
    """Gaussian noise on every pixel, or a missing square."""

    noise: float = 0.3
    """Standard deviation of the noise, of pixels between 0 and 1."""

    missing: float = 0.5
    """Side of the missing square, as a share of the image's."""

    through: Literal["exact", "first-order", "generative"] = "exact"
    """How the outer loss is differentiated: with how the latent moves with the weights, or with the latent held
    fixed. generative: the decoder is trained to reconstruct clean images and never sees a corrupted one."""

    prior_rate: float = 10.0
    """How many times faster than the other weights the logarithm of the prior's weight is learned, from --prior on."""

    images: Images = field(default_factory=Images)
    decoder: Decoder = field(default_factory=Decoder)
    joint: Joint = field(default_factory=Joint)
    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "noise", "prior_rate")
        fraction(self, "missing")


def _equilibria() -> Equilibria:
    return Equilibria(solver="anderson", solver_steps=60, tolerance=1e-4, backward_tolerance=1e-2, backward_steps=30)


def generation_digits() -> GenerationConfig:
    """The bundled digits: a minute or two on one core."""
    return GenerationConfig(
        optimization=Optimization(steps=400, batch_size=64, learning_rate=3e-3, validate_every=100),
        equilibria=_equilibria(),
    )


def generation_mnist() -> GenerationConfig:
    """MNIST."""
    return replace(
        generation_digits(),
        images=Images(data="mnist", validation_images=500, test_images=1000),
        decoder=Decoder(kind="conv", latent=32, channels=16),
        optimization=Optimization(steps=1500, batch_size=64, learning_rate=3e-3, validate_every=300),
    )


def generation_olivetti() -> GenerationConfig:
    """The Olivetti faces."""
    return replace(
        generation_digits(),
        images=Images(data="olivetti", validation_images=40),
        decoder=Decoder(kind="conv", latent=32, channels=16),
        optimization=Optimization(steps=600, batch_size=32, learning_rate=3e-3, validate_every=150),
    )


def inverse_digits() -> InverseConfig:
    """The bundled digits: a minute or two on one core."""
    return InverseConfig(
        # a weaker prior leaves latents that the corrupted image hardly determines, and joint solves far from converged
        joint=Joint(joint_steps=25, prior=0.03),
        optimization=Optimization(steps=160, batch_size=32, learning_rate=3e-3, validate_every=40),
        equilibria=_equilibria(),
    )


def inverse_mnist() -> InverseConfig:
    """MNIST."""
    wider = generation_mnist()
    return replace(inverse_digits(), images=wider.images, decoder=wider.decoder)


def inverse_olivetti() -> InverseConfig:
    """The Olivetti faces."""
    wider = generation_olivetti()
    return replace(
        inverse_digits(), images=wider.images, decoder=wider.decoder, noise=0.1, optimization=wider.optimization
    )
