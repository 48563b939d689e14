"""The settings of the two recipes of the precision of gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torchimplicit.recipes.phantom.image_settings import ImageConfig
from torchimplicit.recipes.phantom.image_settings import digits as bundled
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import not_negative, option, positive

LABELS = {
    "npg-1-1": "one step",
    "npg-2-0.5": "NPG(2, 0.5)",
    "npg-5-0.5": "NPG(5, 0.5)",
    "npg-9-0.5": "NPG(9, 0.5)",
    "npg-5-1": "NPG(5, 1)",
    "upg-5-0.5": "UPG(5, 0.5)",
    "adaptive-0.3": "adaptive, residual 0.3",
    "adaptive-0.1": "adaptive, residual 0.1",
    "unbiased-5-0.5": "unbiased(5, 0.5), p = 0.9",
}
"""What is compared with the exact gradient along training, for people, by the name in the log."""


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


def layer() -> LayerConfig:
    """The recipe of Fig. 1."""
    return LayerConfig()


def training() -> ImageConfig:
    """The recipe of Fig. 2, on the bundled digits."""
    return looking(bundled(), 10)


def looking(config: ImageConfig, every: int) -> ImageConfig:
    """With the gradient looked at so often."""
    return replace(config, machine=replace(config.machine, monitor_every=every))
