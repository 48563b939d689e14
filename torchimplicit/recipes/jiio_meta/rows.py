"""The rows of the table, and their runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torchimplicit.recipes.jiio_meta.config import AdaptationsConfig, MetaTableConfig, omniglot, sinusoid
from torchimplicit.recipes.runtime.table import Job

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "jiio": ("JIIO, exact", {"adaptation": "jiio"}),
    "first-order": ("JIIO, first order", {"adaptation": "jiio-first-order"}),
    "unrolled": ("JIIO, through 5 steps", {"adaptation": "jiio-unrolled", "adaptation_steps": 5}),
    "descent": ("descent, through 5 steps", {"adaptation": "descent", "adaptation_steps": 5}),
}
"""How the model was trained: a label, and the settings."""

UNROLLED = ROWS["unrolled"][1]["adaptation_steps"]

FEW = (3, 4, 5, 6, 8, 10, 25)
"""Steps of JIIO that are measured at weights trained through few."""

LONGER = {"unrolled": 3}
"""Times as many optimizer steps: one costs between a third and a half of what it costs to differentiate through
descent, so that training takes about as long."""


def adapted(config: MetaTableConfig, problem: str, row: str, seed: int) -> AdaptationsConfig:
    """One run's settings."""
    base = sinusoid() if problem == "sinusoid" else replace(omniglot(), data_dir=config.data_dir)
    optimization = replace(base.optimization, seed=seed)
    if config.steps is not None:
        optimization = replace(
            optimization, steps=config.steps, validate_every=min(config.steps, optimization.validate_every)
        )
    factor = LONGER.get(row, 1)
    optimization = replace(
        optimization, steps=factor * optimization.steps, validate_every=factor * optimization.validate_every
    )
    if config.plan.scale == "paper":
        optimization = replace(optimization, steps=50 * optimization.steps)
    training = replace(base, **ROWS[row][1], optimization=optimization, machine=config.machine)
    usual = AdaptationsConfig(training=training)
    return replace(usual, jiio_steps=FEW) if row == "unrolled" else usual


def jobs(config: MetaTableConfig) -> list[Job]:
    """Every way of training, of one seed after the other."""
    return [
        Job(named(problem, row, seed), "jiio-meta-adaptations", adapted(config, problem, row, seed))
        for problem in config.problems
        for seed in config.plan.all_seeds
        for row in ROWS
    ]


def named(problem: str, row: str, seed: int) -> str:
    """The name of a run."""
    return f"{problem}-{row}-seed{seed}"


def native(config: MetaTableConfig, problem: str, row: str) -> str:
    """The adaptation that a model was trained with."""
    training = adapted(config, problem, row, 0).training
    return f"{'descent' if training.adaptation == 'descent' else 'JIIO'}-{training.adaptation_steps}"
