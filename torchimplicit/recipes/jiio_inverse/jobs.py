"""The runs of the table."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torchimplicit.recipes.jiio.config import InverseConfig, inverse_digits, inverse_mnist, inverse_olivetti
from torchimplicit.recipes.jiio_inverse.config import JiioInverseConfig
from torchimplicit.recipes.reproduce.jobs import Job
from torchimplicit.recipes.training.settings import Machine

Corruption = Literal["denoising", "inpainting"]
Through = Literal["exact", "first-order", "generative"]
CORRUPTIONS: tuple[Corruption, ...] = ("denoising", "inpainting")
GRADIENTS: tuple[Through, ...] = ("exact", "first-order", "generative")
DEFAULTS = {"digits": inverse_digits, "mnist": inverse_mnist, "olivetti": inverse_olivetti}


def jobs(config: JiioInverseConfig) -> list[Job]:
    """Seeds outermost, gradients innermost, so that what slows the machine for a while slows all of them."""
    return [
        Job(f"{corruption}-{through}-{seed}", f"jiio-inverse-{config.data}", one(config, corruption, through, seed))
        for seed in config.plan.all_seeds
        for corruption in CORRUPTIONS
        for through in GRADIENTS
    ]


def one(config: JiioInverseConfig, corruption: Corruption, through: Through, seed: int) -> InverseConfig:
    """One model."""
    usual = DEFAULTS[config.data]()
    optimization = replace(usual.optimization, seed=seed)
    if config.steps is not None:
        optimization = replace(optimization, steps=config.steps, validate_every=max(1, config.steps // 3))
    return replace(
        usual,
        corruption=corruption,
        through=through,
        images=replace(usual.images, data_dir=config.data_dir),
        optimization=optimization,
        machine=Machine(device="cpu", tensorboard=False),
    )
