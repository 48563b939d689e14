"""Training progress for people: a bar with the time left, or a line an epoch where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ShowProgress(Callback):
    """Counts training batches.

    Args:
        console: where to show it.
        total: how many batches the whole training has.
        done: how many are done already, asked when training starts.
        status: a short text on how it goes, asked after every batch.
    """

    def __init__(self, console: Console, total: int, done: Callable[[], int], status: Callable[[], str]):
        self.console, self.total, self.done, self.status = console, total, done, status
        self._bar: Progress | None = None
        self._began = time.monotonic()
        self._first = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._first = time.monotonic(), self.done()
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
        self._bar.add_task("training", total=self.total, completed=self._first, status="")
        self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done(), status=self.status())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is None:
            done = self.done()
            spent = time.monotonic() - self._began
            left = spent / max(1, done - self._first) * (self.total - done)
            self.console.print(
                f"step {done}/{self.total}  {spent:.0f} s, about {left:.0f} s left  {self.status()}", highlight=False
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
