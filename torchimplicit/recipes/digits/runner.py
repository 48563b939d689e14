"""What the command line calls: see :class:`torchimplicit.recipes.runtime.run.Runner`."""

from __future__ import annotations

from rich.console import Console

from torchimplicit.recipes.digits.config import DigitsConfig
from torchimplicit.recipes.digits.evaluate import evaluate as measure_again
from torchimplicit.recipes.digits.train import train as train_all
from torchimplicit.recipes.runtime.run import Run, device, threads


def check(config: DigitsConfig) -> None:
    """A GPU that is asked for must be there."""
    device(config.device)


def train(config: DigitsConfig, run: Run, console: Console) -> bool:
    """Train, and write ``results.json``, ``figures/`` and ``index.html``."""
    with threads(config.threads):
        return train_all(config, run, console)


def evaluate(config: DigitsConfig, run: Run, console: Console) -> None:
    """Measure every classifier on the validation split again."""
    with threads(config.threads):
        measure_again(config, run, console)
