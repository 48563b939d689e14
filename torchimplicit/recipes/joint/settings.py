"""The settings of the recipes of joint inference."""

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

# -- The settings of the recipes ---------------------------------------------------------------------------------------


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


# -- The settings: of one training, of what is measured at its weights, and of the table -------------------------------


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


def adversarial_digits() -> AdversarialConfig:
    """A dense model on the bundled digits: half a minute on one core."""
    return AdversarialConfig(
        data="digits",
        optimization=Optimization(steps=150, batch_size=128, learning_rate=1e-2, validate_every=30),
    )


def adversarial_mnist() -> AdversarialConfig:
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

    training: AdversarialConfig = field(default_factory=adversarial_digits)

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


# -- The settings: of one training, of what is measured at its weights, and of the table -------------------------------


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
