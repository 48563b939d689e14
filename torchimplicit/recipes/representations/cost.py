"""Costs of training steps of several fits: time measured in turn, evaluations and peak memory; and their sheets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Any

import torch
from torch.optim import Adam

from torchimplicit.gradients import Implicit
from torchimplicit.linear import GMRES
from torchimplicit.models import ImplicitRepresentation
from torchimplicit.recipes.representations import audio, image, video
from torchimplicit.recipes.representations.audio import SoundConfig
from torchimplicit.recipes.representations.fit import FieldSettings, FieldTask
from torchimplicit.recipes.representations.image import PictureConfig
from torchimplicit.recipes.representations.video import VideoConfig
from torchimplicit.recipes.runtime.run import Run, device
from torchimplicit.recipes.runtime.settings import Machine, positive
from torchimplicit.recipes.runtime.step_cost import (
    StepCost,
    beside,
    flat_gradient,
    in_turn,
    one_step,
    peak_bytes,
    step_table,
)
from torchimplicit.recipes.runtime.table import Cell, Runs, mean
from torchimplicit.recipes.runtime.task import Shard
from torchimplicit.recipes.runtime.trainer import Measuring
from torchimplicit.solvers import Anderson

COST = "cost"
"""Name of the table's job that measures the steps of its fits, and of its row."""


@dataclass(frozen=True, kw_only=True)
class FieldCostConfig:
    """Measures steps of several fits in turn, after some training."""

    names: tuple[str, ...] = ()
    """Names of the fits."""

    fits: tuple[PictureConfig, ...] = ()
    """Fits of pictures, in the order of --names."""

    sounds: tuple[SoundConfig, ...] = ()
    """Fits of sounds, after the pictures."""

    videos: tuple[VideoConfig, ...] = ()
    """Fits of videos, after the sounds."""

    warm_steps: int = 40
    """Training steps before the measurement."""

    rounds: int = 12
    """Number of turns of each fit."""

    steps_a_turn: int = 3
    """Steps per turn."""

    def __post_init__(self) -> None:
        positive(self, "warm_steps", "rounds", "steps_a_turn")

    @property
    def all(self) -> tuple[PictureConfig | SoundConfig | VideoConfig, ...]:
        """All fits."""
        return (*self.fits, *self.sounds, *self.videos)

    @property
    def machine(self) -> Machine:
        """The machine of the first fit."""
        return self.all[0].machine


def default() -> FieldCostConfig:
    """Return settings without fits: the tables fill them in."""
    return FieldCostConfig()


def recipe(config: PictureConfig | SoundConfig | VideoConfig) -> Any:
    """The module that fits this kind of signal."""
    return {SoundConfig: audio, VideoConfig: video, PictureConfig: image}[type(config)]


def ready(config: FieldCostConfig) -> None:
    """Raise if one of the fits cannot be run."""
    for one in config.all:
        recipe(one).RUNNER.check(one)


def measured(config: FieldCostConfig, run: Run | None = None) -> dict[str, StepCost]:
    """Measure all fits in turn."""
    fits = zip(config.names, config.all, strict=True)
    return costs_of_fits([Fit(name, one, recipe(one).build) for name, one in fits], config)


def costs_of_fits(fits: Sequence[Fit], config: Any, then: Callable[[], object] = lambda: None) -> dict[str, StepCost]:
    """Train all of them a little, measure steps of one after another, and call ``then``."""
    for fit in fits:
        for _ in range(config.warm_steps):
            fit.step()
    costs = in_turn({fit.name: fit.step for fit in fits}, config.rounds, getattr(config, "steps_a_turn", 1))
    then()
    return {fit.name: fit.completed(costs[fit.name]) for fit in fits}


class Fit:
    """One fit in training, with its initial weights.

    Args:
        name: name of the fit.
        config: config of the fit's recipe.
        build: makes its task.
    """

    def __init__(self, name: str, config: FieldSettings, build: Callable[[Any], FieldTask]):
        self.name, self.where = name, device(config.machine.device)
        torch.manual_seed(config.optimization.seed)
        self.task: FieldTask = build(config).to(self.where).train()
        self.optimizer = Adam(self.task.parameters(), lr=config.optimization.learning_rate)
        (self.batch,) = (batch.to(self.where) for batch in self.task.training_batches(range(1), Shard()))

    def step(self) -> StepCost:
        """Train a step."""
        return one_step(self.task, lambda: self.task.loss(self.batch), self.where, self.optimizer)

    def completed(self, cost: StepCost) -> StepCost:
        """The cost with the memory of one more step, the parameters, and the accuracy of the gradient."""
        return replace(
            cost,
            megabytes=peak_bytes(self.step, self.where) / 2**20,
            parameters=sum(p.numel() for p in self.task.parameters()),
            **self._beside_exact(),
        )

    def _beside_exact(self) -> dict[str, float]:
        """Compare the gradient with the exact one, for the same weights and state; an explicit model has nothing to
        compare."""
        model = self.task.model
        if not isinstance(model, ImplicitRepresentation):
            return {"cosine": nan, "norm": nan}
        layer, gradients = model.equilibrium, []
        usual = layer.solver, layer.gradient, layer.warm_start
        for tight in (False, True):
            if tight:
                layer.solver, layer.warm_start = Anderson(rtol=1e-5, max_steps=200), None
                layer.gradient = Implicit(linear_solver=GMRES(rtol=1e-5, max_steps=200))
            self.task.zero_grad()
            self.task.loss(self.batch).backward()
            gradients.append(flat_gradient(self.task))
        layer.solver, layer.gradient, layer.warm_start = usual
        self.task.zero_grad()
        return beside(*gradients)


# -- What the tables of fits say of their runs -------------------------------------------------------------------------


def seconds_of(runs: Runs, *rows: Any) -> list[float | None]:
    """Seconds of a step of the rows' fits, if measured."""
    return [runs.named(COST).get(row.name, {}).get("seconds") for row in rows]


def parameters(runs: Runs) -> Cell[Any]:
    """The column of model sizes."""
    return Cell("Parameters", runs.first("parameters"))


def trained(runs: Runs) -> Cell[Any]:
    """The column of training times."""
    note = "Wall time until the best validation, mean over the runs; the machine was shared."
    return Cell("Training", lambda row: mean(runs.where(row=row).at_best("seconds"), ".1f"), "s", note)


RUNNER = Measuring(measure=measured, ready=ready, name="costs.json", show=step_table)
