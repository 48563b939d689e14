"""The rows of the table, and their runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torchimplicit.recipes.jiio_adversarial.config import AdversarialTableConfig, AttacksConfig, digits, mnist
from torchimplicit.recipes.runtime.table import Job

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "clean": ("clean images", {"adversary": "none"}),
    "pgd": ("PGD-10", {"adversary": "pgd", "attack_steps": 10, "attack_step_size": 0.3}),
    "jiio": ("JIIO-20", {"adversary": "jiio"}),
    "envelope": ("JIIO-20, envelope", {"adversary": "jiio", "attack_gradient": "envelope"}),
}
"""What is trained on: a label, and the settings."""

PUBLISHED = {"pgd": (99.18, 96.53, 95.74), "jiio": (99.32, 95.74, 96.63)}
"""Gurumurthy et al. 2021, Table 5, MNIST: clean, attacked by PGD, attacked by JIIO, in percent."""


def attacked(config: AdversarialTableConfig, row: str, seed: int) -> AttacksConfig:
    """One run's settings."""
    base = digits() if config.data == "digits" else mnist()
    optimization = replace(base.optimization, seed=seed)
    if config.steps is not None:
        optimization = replace(
            optimization, steps=config.steps, validate_every=min(config.steps, optimization.validate_every)
        )
    if config.plan.scale == "paper":
        base = replace(base, train_images=None, test_images=None)
        optimization = replace(optimization, steps=20 * optimization.steps)
    training = replace(
        base, **ROWS[row][1], data_dir=config.data_dir, optimization=optimization, machine=config.machine
    )
    return AttacksConfig(training=training)


def jobs(config: AdversarialTableConfig) -> list[Job]:
    """Every way of training, of one seed after the other."""
    return [
        Job(f"{row}-seed{seed}", "jiio-adversarial-attacks", attacked(config, row, seed))
        for seed in config.plan.all_seeds
        for row in ROWS
    ]
