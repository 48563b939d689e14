"""Training on an inverse problem, and pictures of what it restores."""

from __future__ import annotations

import warnings

import matplotlib
import torch
from rich.console import Console
from torch import Tensor

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.recipes.fitting import load_weights
from torchimplicit.recipes.jiio.config import InverseConfig
from torchimplicit.recipes.jiio.inverse import TRAINER, Restoration
from torchimplicit.recipes.jiio.pictures import grid
from torchimplicit.recipes.jiio.runner import PICTURES, SHOWN
from torchimplicit.recipes.machine import threads
from torchimplicit.recipes.plotting import FIGURE
from torchimplicit.recipes.run import Run


class InverseRunner:
    """See :class:`~torchimplicit.recipes.recipe.Runner`."""

    def check(self, config: InverseConfig) -> None:
        """See :class:`~torchimplicit.recipes.recipe.Runner`."""
        TRAINER.check(config)

    def train(self, config: InverseConfig, run: Run, console: Console) -> bool:
        """See :class:`~torchimplicit.recipes.recipe.Runner`."""
        if not TRAINER.train(config, run, console):
            return False
        self._show(config, run)
        return True

    def evaluate(self, config: InverseConfig, run: Run, console: Console) -> None:
        """See :class:`~torchimplicit.recipes.recipe.Runner`."""
        TRAINER.evaluate(config, run, console)
        self._show(config, run)

    def _show(self, config: InverseConfig, run: Run) -> None:
        module = TRAINER.module(config)
        load_weights(module, run.best)
        task = module.task.cpu().eval()
        assert isinstance(task, Restoration)
        with threads(config.machine.threads), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            rows = restored(task)
        torch.save({name: [row.half() for row in shown] for name, shown in rows.items()}, run.path / PICTURES)
        with matplotlib.rc_context(FIGURE):
            grid(rows).savefig(run.path / "pictures.png", dpi=150)


RUNNER = InverseRunner()


def restored(task: Restoration) -> dict[str, list[Tensor]]:
    """A few test images: clean, corrupted and restored."""
    clean = task.data.test.images[:SHOWN]
    wanted, seen = (part[:SHOWN] for part in task.held_out["test"])
    made, _ = task.restored(wanted, seen)
    return {"clean, corrupted and restored test images": [clean, wanted, made]}
