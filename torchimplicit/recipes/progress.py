"""Training progress for people: a bar with the time left, or a line an epoch where there is no terminal."""

from __future__ import annotations

import time
from typing import Any, Protocol

from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from torchimplicit.recipes.run import Run

NOTED_EVERY = 2.0
"""Seconds between two notes on disk."""


class Counted(Protocol):
    """What a module that trains under :class:`ShowProgress` must tell."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps."""

    @property
    def total_steps(self) -> int:
        """How many it will be."""

    def status(self) -> str:
        """How training goes, in a few words."""


class ShowProgress(Callback):
    """Counts training batches, on the console and in the run's ``progress.json``, for whoever watches from outside.

    Args:
        console: where to show it; ``None``: the standard output of the process that trains.
        run: where to note it.
    """

    def __init__(self, console: Console | None, run: Run):
        self.console, self.run = console, run
        self._bar: Progress | None = None
        self._began = time.monotonic()
        self._noted = 0.0
        self._first = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self.console = self.console or Console()
        self._began, self._first = time.monotonic(), pl_module.steps_done
        if not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("[bold]Training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps •"),
            TimeElapsedColumn(),
            TextColumn("• left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            expand=True,
        )
        self._bar.add_task("training", total=pl_module.total_steps, completed=self._first, status="")
        self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=pl_module.steps_done, status=pl_module.status())
        if trainer.is_global_zero and time.monotonic() - self._noted > NOTED_EVERY:
            self._note(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._note(pl_module)
        if self._bar is None and self.console is not None:
            done, total = pl_module.steps_done, pl_module.total_steps
            spent = time.monotonic() - self._began
            left = spent / max(1, done - self._first) * (total - done)
            self.console.print(
                f"step {done}/{total}  {spent:.0f} s, about {left:.0f} s left  {pl_module.status()}", highlight=False
            )

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _note(self, module: Counted) -> None:
        self._noted = time.monotonic()
        self.run.write_json(
            "progress.json", {"done": module.steps_done, "total": module.total_steps, "status": module.status()}
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
