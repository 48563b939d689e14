"""A recipe of a few milliseconds a step, and a command line that knows it: ``python tiny.py train tiny``."""

from __future__ import annotations

import math
import os
import signal
import sys
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from torchimplicit.nn import Equilibrium, VariationalDropout
from torchimplicit.recipes import registry
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization
from torchimplicit.recipes.runtime.task import InOrder, Metric, Rows, ShuffledSteps, Task, gradient, loader, solver
from torchimplicit.recipes.runtime.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Noise in two classes."""

    optimization: Optimization = field(default_factory=lambda: Optimization(steps=12, batch_size=8, validate_every=4))
    equilibria: Equilibria = field(default_factory=lambda: Equilibria(jacobian_weight=0.1, jacobian_probability=0.5))
    machine: Machine = field(default_factory=lambda: Machine(device="cpu"))
    dropout: float = 0.2
    """Share that is dropped."""
    poison: int = 0
    """The step whose loss is NaN; 0: none."""
    kill: int = 0
    """The step at which the process kills itself; 0: none."""
    terminate: int = 0
    """The step at which the last process is sent SIGTERM; 0: none."""


class Cell(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.dropout = VariationalDropout(dropout)
        with torch.no_grad():
            self.linear.weight.mul_(0.5)

    def forward(self, z, x):
        return torch.tanh(self.dropout(self.linear(z)) + x)


class TinyTask(Task):
    metric = Metric("accuracy", "%", "max")

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        self.equilibrium = Equilibrium(
            Cell(config.dropout),
            solver=solver(config.equilibria),
            gradient=gradient(config.equilibria),
            rowwise=True,
        )
        self.head = nn.Linear(6, 2)
        made = torch.Generator().manual_seed(0)
        x = torch.randn(60, 6, generator=made)
        y = (x[:, 0] * x[:, 1] > 0).long()
        self.splits = {"training": (x[:40], y[:40]), "validation": (x[40:50], y[40:50]), "test": (x[50:], y[50:])}
        self.calls = 0

    def training_batches(self, steps, shard):
        data = Rows(*self.splits["training"])
        chosen = self.config.optimization
        return loader(data, ShuffledSteps(len(data), chosen.batch_size, chosen.seed, steps, shard))

    def held_out_batches(self, split, shard):
        data = Rows(*self.splits[split])
        return loader(data, InOrder(len(data), 4, shard))

    def scores(self, x):
        return self.head(self.equilibrium(x))

    def loss(self, batch):
        x, y = batch
        loss = functional.cross_entropy(self.scores(x), y)
        self.calls += 1
        step = int(os.environ.get("TINY_DONE", "0")) + self.calls
        if step == self.config.kill and not os.environ.get("TINY_SPARE"):
            os.kill(os.getpid(), signal.SIGKILL)
        last = os.environ.get("SLURM_PROCID", "0") == str(int(os.environ.get("SLURM_NTASKS", "1")) - 1)
        if step == self.config.terminate and last and not os.environ.get("TINY_SPARE"):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss * math.nan if step == self.config.poison and last else loss

    def score(self, batch):
        x, y = batch
        scores = self.scores(x)
        loss = functional.cross_entropy(scores, y, reduction="sum")
        return torch.stack([(scores.argmax(1) == y).sum(), loss, torch.tensor(len(y))])

    def figures(self, sums):
        right, loss, count = sums
        return {"accuracy": right / count, "loss": loss / count}

    def describe(self):
        return "Noise."


def tiny() -> TinyConfig:
    return TinyConfig()


RUNNER = Trainer(TinyTask)


def register() -> None:
    """Make the command line know the recipe."""
    for name in ("tiny", "torchimplicit.recipes.tiny"):
        sys.modules.setdefault(name, sys.modules[__name__])
    registry.RECIPES["tiny"] = registry.Entry("tiny", "tiny", "RUNNER", "Noise.")


if __name__ == "__main__":
    from torchimplicit import cli

    register()
    sys.exit(cli.main())
