"""A recipe that trains, and then measures something at the weights that it has come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from torchimplicit.recipes.machine import threads
from torchimplicit.recipes.recipe import Runner
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.tables import Table
from torchimplicit.recipes.training.runner import Trainer


@dataclass(frozen=True, kw_only=True)
class Measuring(Runner):
    """Trains as another recipe does, and measures; evaluating it measures again.

    Attributes:
        trainer: of the other recipe.
        training: its settings, out of this recipe's.
        measure: ``(config, run) -> figures``, which go into the run's directory as JSON.
        show: the figures as a table.
        name: of the file in the run's directory.
        doing: what the screen says meanwhile.
    """

    trainer: Trainer
    training: Callable[[Any], Any]
    measure: Callable[[Any, Run], Any]
    show: Callable[[Any], Table]
    name: str
    doing: str = "Measuring"

    def check(self, config: Any) -> None:
        """See :class:`~torchimplicit.recipes.recipe.Runner`."""
        self.trainer.check(self.training(config))

    def train(self, config: Any, run: Run, console: Console) -> bool:
        """See :class:`~torchimplicit.recipes.recipe.Runner`."""
        if not self.trainer.train(self.training(config), run, console):
            return False
        self._measure(config, run, console, self.name)
        return True

    def evaluate(self, config: Any, run: Run, console: Console) -> None:
        """See :class:`~torchimplicit.recipes.recipe.Runner`."""
        self._measure(config, run, console, "evaluation.json")

    def _measure(self, config: Any, run: Run, console: Console, name: str) -> None:
        with console.status(self.doing), threads(self.training(config).machine.threads):
            found = self.measure(config, run)
        run.write_json(name, found)
        console.print(self.show(found).rich_rows())
