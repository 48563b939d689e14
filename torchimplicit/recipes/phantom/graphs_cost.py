"""What a step of each estimator costs, at the same weights and on the same batch, in turn."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.console import Console

from torchimplicit.nn import Equilibrium
from torchimplicit.recipes.phantom.graphs import TRAINER, estimator
from torchimplicit.recipes.phantom.graphs_table import CostConfig, differentiated, rows
from torchimplicit.recipes.runtime.fitting import load_weights
from torchimplicit.recipes.runtime.run import Run, device, threads
from torchimplicit.recipes.runtime.task import Costs, Shard, Stopwatch


@dataclass(frozen=True)
class StepCost:
    """Medians over the repeats, of the forward and the backward pass: seconds, and evaluations over all layers."""

    forward_seconds: float
    backward_seconds: float
    forward: float
    backward: float


class CostRunner:
    """Trains one fold with the exact gradient, and measures at its best weights."""

    def check(self, config: CostConfig) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        TRAINER.check(config.training)

    def train(self, config: CostConfig, run: Run, console: Console) -> bool:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        if not TRAINER.train(config.training, run, console):
            return False
        run.write_json("costs.json", measured(config, run))
        return True

    def evaluate(self, config: CostConfig, run: Run, console: Console) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        found = measured(config, run)
        run.write_json("evaluation.json", found)
        for name, cost in found.items():
            console.print(f"{name}: {cost}", highlight=False)


RUNNER = CostRunner()


def measured(config: CostConfig, run: Run) -> dict[str, StepCost]:
    """The costs, by the estimators' names."""
    module = TRAINER.module(config.training)
    load_weights(module, run.best)
    where = device(config.training.machine.device)
    task = module.task.to(where).train()
    layers = [layer for layer in task.modules() if isinstance(layer, Equilibrium)]
    estimators = {
        name: estimator(differentiated(config.training.equilibria, damping)) for name, damping in rows(config).items()
    }
    (batch,) = task.training_batches(range(1), Shard())
    batch = batch.to(where)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in estimators}
    with threads(config.training.machine.threads):
        for repeat in range(config.repeats + 1):
            for name, gradient in estimators.items():
                for layer in layers:
                    layer.gradient = gradient
                laps = _step(task, batch, layers, where)
                if repeat:  # the first warms up
                    found[name].append(laps)
    return {
        name: StepCost(**{key: median(one[key] for one in laps) for key in laps[0]}) for name, laps in found.items()
    }


def _step(task: Any, batch: Any, layers: list[Equilibrium], where: torch.device) -> dict[str, float]:
    task.zero_grad()
    costs, watch = Costs(layers), Stopwatch()
    watch.start(where)
    loss = task.loss(batch)
    watch.lap("forward_seconds", where)
    loss.backward()
    watch.lap("backward_seconds", where)
    seconds, figures = watch.stop(where), costs.figures()
    costs.close()
    return {
        "forward_seconds": seconds["forward_seconds"],
        "backward_seconds": seconds["backward_seconds"],
        "forward": figures["forward_evaluations"],
        "backward": figures["backward_evaluations"],
    }
