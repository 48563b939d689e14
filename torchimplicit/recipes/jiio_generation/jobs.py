"""The runs of the table."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torchimplicit.recipes.jiio.config import (
    GenerationConfig,
    generation_digits,
    generation_mnist,
    generation_olivetti,
)
from torchimplicit.recipes.jiio_generation.config import JiioGenerationConfig
from torchimplicit.recipes.runtime.table import Job
from torchimplicit.recipes.training.settings import Machine

Model = Literal["jiio", "vae", "wide"]
MODELS: tuple[Model, ...] = ("jiio", "vae", "wide")
SIZES: tuple[Model, ...] = ("jiio", "wide")
"""Those whose inference is timed."""

LONGER = 8
"""Times as many steps for the autoencoder, whose steps have no joint solve in them: about the same time in all."""

WIDER = 3
"""Times the width of a fully connected decoder; a convolutional one gets twice the channels."""

DEFAULTS = {"digits": generation_digits, "mnist": generation_mnist, "olivetti": generation_olivetti}


def jobs(config: JiioGenerationConfig) -> list[Job]:
    """Seed by seed."""
    return [
        Job(f"{model}-{seed}", f"jiio-generation-{config.data}", one(config, model, seed))
        for seed in config.plan.all_seeds
        for model in MODELS
    ]


def one(config: JiioGenerationConfig, model: Model, seed: int) -> GenerationConfig:
    """One model."""
    usual = DEFAULTS[config.data]()
    optimization = replace(usual.optimization, seed=seed)
    decoder = usual.decoder if config.kind is None else replace(usual.decoder, kind=config.kind)
    if config.steps is not None:
        optimization = replace(optimization, steps=config.steps, validate_every=max(1, config.steps // 4))
    if model == "vae":
        steps, every = LONGER * optimization.steps, LONGER * optimization.validate_every
        optimization = replace(optimization, steps=steps, validate_every=every)
    if model == "wide":
        decoder = replace(decoder, width=WIDER * decoder.width, channels=2 * decoder.channels)
        # at the narrow one's rate it becomes so steep that the joint solves diverge
        optimization = replace(optimization, learning_rate=optimization.learning_rate / WIDER)
    return replace(
        usual,
        model="vae" if model == "vae" else "jiio",
        decoder=decoder,
        images=replace(usual.images, data_dir=config.data_dir),
        curves=model in SIZES,
        curve_repeats=config.repeats,
        optimization=optimization,
        machine=Machine(device="cpu", tensorboard=False),
    )
