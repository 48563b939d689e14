"""The runs of the table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torchimplicit.recipes.jiio.config import InverseConfig, inverse_digits, inverse_mnist, inverse_olivetti
from torchimplicit.recipes.jiio_inverse.config import JiioInverseConfig
from torchimplicit.recipes.runtime.table import Job
from torchimplicit.recipes.training.settings import Machine

Corruption = Literal["denoising", "inpainting"]
Through = Literal["exact", "first-order", "generative"]
CORRUPTIONS: tuple[Corruption, ...] = ("denoising", "inpainting")


@dataclass(frozen=True)
class Row:
    """How a decoder is trained.

    Attributes:
        label: for people.
        through: which gradient.
        prior: the weight of the latent's prior to begin with, over the recipe's.
    """

    label: str
    through: Through
    prior: float = 1.0


ROWS = {
    "exact": Row("exact", "exact"),
    "first-order": Row("first-order", "first-order"),
    "exact-weak": Row("exact, from a third of the prior", "exact", 1 / 3),
    "first-order-weak": Row("first-order, with a third of the prior", "first-order", 1 / 3),
    "generative": Row("none: clean images alone", "generative"),
}
"""By the second part of the names of their runs."""

DEFAULTS = {"digits": inverse_digits, "mnist": inverse_mnist, "olivetti": inverse_olivetti}


def jobs(config: JiioInverseConfig) -> list[Job]:
    """Seeds outermost, rows innermost, so that what slows the machine for a while slows all of them."""
    return [
        Job(f"{corruption}-{name}-{seed}", f"jiio-inverse-{config.data}", one(config, corruption, row, seed))
        for seed in config.plan.all_seeds
        for corruption in CORRUPTIONS
        for name, row in ROWS.items()
    ]


def one(config: JiioInverseConfig, corruption: Corruption, row: Row, seed: int) -> InverseConfig:
    """One model."""
    usual = DEFAULTS[config.data]()
    optimization = replace(usual.optimization, seed=seed)
    if config.steps is not None:
        optimization = replace(optimization, steps=config.steps, validate_every=max(1, config.steps // 3))
    return replace(
        usual,
        corruption=corruption,
        through=row.through,
        joint=replace(usual.joint, prior=row.prior * usual.joint.prior),
        images=replace(usual.images, data_dir=config.data_dir),
        optimization=optimization,
        machine=Machine(device="cpu", tensorboard=False),
    )
