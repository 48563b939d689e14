"""The settings of the table and of its two recipes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.images.config import ImageConfig, cifar10, mnist
from torchimplicit.recipes.images.config import digits as bundled
from torchimplicit.recipes.options import not_negative, option, positive
from torchimplicit.recipes.runtime.table import Plan


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One random layer z = tanh(W z + U x + b), and the precision of every estimator on it."""

    weight: Literal["gaussian", "orthogonal"] = "gaussian"
    """W before it is scaled. All singular values of an orthogonal one are the same, which is the harder case."""

    norm: float = 0.9
    """The spectral norm of W, and so a bound on the map's Lipschitz constant."""

    size: int = 128
    """Numbers in a state."""

    samples: int = 64
    """Inputs."""

    spread: float = 0.3
    """Of the inputs: small ones leave tanh nearly linear, so that the bound on the Lipschitz constant is nearly met."""

    iterations: int = 100
    """Of the forward pass."""

    ks: tuple[int, ...] = (1, 2, 3, 5, 7, 10, 15, 20)
    """The steps of the phantom gradients."""

    lambdas: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0)
    """Their dampings."""

    errors: tuple[float, ...] = (0.5, 0.3, 0.1, 0.03, 0.01)
    """The relative errors asked of the adaptive phantom gradient."""

    draws: int = 400
    """Of the unbiased series."""

    seed: int = 0
    """Of the layer, its inputs and the draws."""

    def __post_init__(self) -> None:
        positive(self, "size", "samples", "spread", "iterations", "draws")
        not_negative(self, "seed")
        if not 0 < self.norm < 1:
            raise UserError(f"{option('norm')} must lie in (0, 1), or there is no fixed point; it is {self.norm}")
        for name in ("ks", "lambdas", "errors"):
            if not getattr(self, name) or not all(value > 0 for value in getattr(self, name)):
                raise UserError(f"{option(name)} must be positive numbers, one at least")
        if max(self.lambdas) > 1:
            raise UserError(f"{option('lambdas')} must be at most 1, and one is {max(self.lambdas)}")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Fig. 1 on random layers of two kinds, and Fig. 2 along trainings of an MDEQ by the exact gradient and by UPG."""

    data: Literal["digits", "mnist"] = "mnist"
    """The images of Fig. 2 at the CPU's scale; at the paper's they are CIFAR-10."""

    data_dir: Path | None = None
    """The folder that holds them. By default they are downloaded; the digits come with scikit-learn."""

    training_steps: int = 300
    """Of each training at the CPU's scale."""

    looks: int = 12
    """How often the gradient is looked at along a training."""

    plan: Plan = field(default_factory=Plan)

    def __post_init__(self) -> None:
        positive(self, "training_steps", "looks")
        if self.looks > self.training_steps:
            raise UserError(f"{option('looks')} is {self.looks}, more than {option('training_steps')}")


def default() -> PrecisionConfig:
    """The table."""
    return PrecisionConfig()


def layer() -> LayerConfig:
    """The recipe of Fig. 1."""
    return LayerConfig()


def training() -> ImageConfig:
    """The recipe of Fig. 2, on the bundled digits."""
    return _looking(bundled(), 10)


def trainings(config: PrecisionConfig, gradient: Literal["implicit", "unrolled-phantom"], seed: int) -> ImageConfig:
    """One training of the table."""
    if config.plan.scale == "paper":
        chosen = replace(cifar10(), data_dir=config.data_dir)
        optimization = replace(chosen.optimization, seed=seed)
    else:
        chosen = replace(mnist() if config.data == "mnist" else bundled(), data_dir=config.data_dir)
        if config.data == "mnist":
            chosen = replace(chosen, validation_images=1000, test_images=2000)
        steps = config.training_steps
        optimization = replace(
            chosen.optimization, seed=seed, steps=steps, batch_size=64, validate_every=max(1, steps // 3)
        )
    return _looking(
        replace(
            chosen,
            optimization=optimization,
            equilibria=replace(chosen.equilibria, gradient=gradient, backward_tolerance=1e-3, backward_steps=40),
        ),
        max(1, optimization.steps // config.looks),
    )


def _looking(config: ImageConfig, every: int) -> ImageConfig:
    return replace(config, machine=replace(config.machine, monitor_every=every))
