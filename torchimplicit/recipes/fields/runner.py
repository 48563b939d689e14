"""The runner of every recipe that fits a field: training, and then a look at the best weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from torchimplicit.recipes.fields.settings import check_fit
from torchimplicit.recipes.fields.task import FieldTask
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.fitting import load_weights
from torchimplicit.recipes.runtime.run import Run, device, threads
from torchimplicit.recipes.runtime.trainer import Results, Trainer


class FieldRunner:
    """Trains as :class:`~torchimplicit.recipes.runtime.trainer.Trainer` does, then shows the fit.

    Args:
        build: makes the task from the config.
        show: ``(config, task, results, run)``: writes what there is to see and to hear into the run's directory; the
            task has the weights of the best validation, on the device that the config asks for.
        ready: as for the trainer; settings that do not go together are refused before it.
        export: ``(config, task, sizes, run)``: writes the field at the sizes that a person typed, and says where.
    """

    def __init__(
        self,
        build: Callable[[Any], FieldTask],
        show: Callable[[Any, Any, Results, Run], None],
        ready: Callable[[Any], None] | None = None,
        export: Callable[[Any, Any, tuple[int, ...], Run], Path] | None = None,
    ):
        self._trainer = Trainer(build, self._ready)
        self._own = ready
        self._show = show
        self._export = export

    def check(self, config: Any) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        self._trainer.check(config)

    def train(self, config: Any, run: Run, console: Console) -> bool:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        if not self._trainer.train(config, run, console):
            return False
        self._look(config, run, console)
        return True

    def evaluate(self, config: Any, run: Run, console: Console) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`: the fit is shown again too."""
        self._trainer.evaluate(config, run, console)
        try:
            self._look(config, run, console)
        except OSError as error:
            raise UserError(f"{run} has no results yet ({error}); go on with: torchimplicit resume {run}") from None

    def export(self, config: Any, sizes: tuple[int, ...], run: Run, console: Console) -> Path:
        """See :class:`~torchimplicit.recipes.runtime.run.Exporter`."""
        if self._export is None:
            raise UserError(f"{run} cannot be sampled at another size")
        if any(size < 1 for size in sizes):
            raise UserError(f"--export-size {' '.join(map(str, sizes))} must be positive")
        self.check(config)
        with threads(config.machine.threads), console.status("Sampling the field"):
            return self._export(config, self.task(config, run), sizes, run)

    def task(self, config: Any, run: Run) -> FieldTask:
        """The task with the weights of the run's best validation."""
        module = self._trainer.module(config)
        load_weights(module, run.best)
        task = module.task.to(device(config.machine.device, config.machine.devices))
        assert isinstance(task, FieldTask)
        return task.eval()

    def _look(self, config: Any, run: Run, console: Console) -> None:
        with threads(config.machine.threads), console.status("Sampling the field"):
            self._show(config, self.task(config, run), Results.of(run), run)

    def _ready(self, config: Any) -> None:
        check_fit(config)
        if config.machine.precision != "32":
            raise UserError(f"--precision {config.machine.precision} would round the coordinates; fields need 32")
        if self._own is not None:
            self._own(config)
