"""Lightning's trainer as the recipes use it: logs, checkpoints, progress, and a clean stop on Ctrl-C."""

from __future__ import annotations

import logging
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from torchimplicit.recipes.runtime import files, launch
from torchimplicit.recipes.runtime.errors import DamagedFileError, UserError
from torchimplicit.recipes.runtime.execution import note_signal, stopped_by
from torchimplicit.recipes.runtime.files import say_once
from torchimplicit.recipes.runtime.log import rows
from torchimplicit.recipes.runtime.run import NOTED_EVERY, Run

# -- Lightning's trainer as the recipes use it: logs, a checkpoint an epoch, a clean stop on Ctrl-C --------------------


class SaveEveryEpoch(Checkpoint):
    """One checkpoint, replaced at the end of every epoch, from which a resumed run continues.

    Being a ``Checkpoint``, it is called after the module's own hook.
    """

    def __init__(self, run: Run):
        self.run = run

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.should_stop or trainer.interrupted:  # the epoch is not whole
            return
        for logger in trainer.loggers:  # what the checkpoint knows, the logs on disk know too
            logger.save()
        draft = self.run.checkpoint.with_suffix(".draft")
        trainer.save_checkpoint(draft)
        if not trainer.is_global_zero:
            return
        if getattr(pl_module, "at_best", False):  # first: the last checkpoint says which is the best
            with files.replacing(self.run.best) as copy:
                shutil.copyfile(draft, copy)
        self.run.advance(draft)


class SealedCheckpoints(CheckpointIO):
    """Lightning's checkpoints with checksums; see :mod:`.files`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See :func:`.files.save`."""
        files.save(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See :func:`.files.load`."""
        return dict(files.load(Path(path)))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete the file."""
        Path(path).unlink(missing_ok=True)


class StopOnSignals(Callback):
    """SIGTERM ends training after the step in progress, and so does Ctrl-C in processes spawned for this training.

    Lightning by itself would leave the step with ``SystemExit``. It restores the handler when training ends. If there
    are several processes, all stop after the same step; otherwise one would wait for the others for ever.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # Lightning's are there by then
        if threading.current_thread() is threading.main_thread():
            stop = _Stop(trainer)
            signal.signal(signal.SIGINT, stop)
            signal.signal(signal.SIGTERM, stop)

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        if trainer.world_size > 1:
            trainer.should_stop = trainer.strategy.reduce_boolean_decision(bool(stopped_by()), all=False)


@contextmanager
def stop_on_interrupt(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C ends training after the step in progress; a second one ends it at once.

    Lightning by itself would leave through ``sys.exit(1)`` with Ctrl-C ignored from then on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, _Stop(trainer))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Stop:
    """Handles Ctrl-C and SIGTERM while a trainer runs. A SIGTERM may follow a Ctrl-C that a parent passes on."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.interrupted = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        note_signal(number)
        if number == signal.SIGINT:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
        if self.trainer.world_size == 1:
            self.trainer.should_stop = True


def fit(
    module: LightningModule,
    run: Run,
    *,
    epochs: int,
    device: torch.device,
    train: DataLoader[Any] | None = None,
    devices: int = 1,
    precision: Any = "32-true",
    clip_norm: float | None = None,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train from the run's last checkpoint, if there is one.

    There is no ``max_steps`` here, for with one Lightning does not resume at an epoch's beginning (2.6). A module that
    is to stop within an epoch returns -1 from ``on_train_batch_start``. Several devices are processes that torchrun or
    srun has started or, without them, that this one spawns; what these leave is in the checkpoint and the logs, and
    not in ``module``.

    Args:
        train: the batches of every epoch; ``None``: the module's own, asked for anew in every epoch.

    Raises:
        UserError: if the checkpoint does not fit.
    """
    launched = launch.environment()
    with quiet_lightning():
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=devices // launch.nodes(),
            num_nodes=launch.nodes(),
            strategy="ddp" if launched is not None else "ddp_spawn" if devices > 1 else "auto",
            precision=precision,
            gradient_clip_val=clip_norm,
            max_epochs=epochs,
            logger=list(loggers),
            callbacks=[*callbacks, SaveEveryEpoch(run), StopOnSignals()],
            plugins=[SealedCheckpoints(), launched or LightningEnvironment()],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            reload_dataloaders_every_n_epochs=0 if train is not None else 1,
        )
        resumed = whole(run.checkpoint) if run.checkpoint.is_file() else None
        try:
            with stop_on_interrupt(trainer):
                trainer.fit(module, train, ckpt_path=resumed, weights_only=True)
        except SystemExit:  # Lightning's answer to a KeyboardInterrupt raised within a step
            if not trainer.interrupted:
                raise
        except (KeyError, RuntimeError) as error:
            if resumed is None or trainer.global_step:
                raise
            raise UserError(f"{resumed} does not fit this run's settings ({error}); train again") from None


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's notices on hardware, loader workers and its own commercial services."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def load_weights(module: LightningModule, checkpoint: Path) -> None:
    """Load the weights, and whatever else the module keeps in its checkpoint.

    Raises:
        UserError: if there is no checkpoint, or it does not fit.
    """
    read = read_checkpoint(checkpoint)
    try:
        module.load_state_dict(read["state_dict"])
        module.on_load_checkpoint(read)
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{checkpoint} does not fit this run's settings ({reason}); train again") from None


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Read a run's checkpoint without running any code in it. If the last one is damaged, read the one before.

    Raises:
        UserError: if there is no checkpoint, or it cannot be read.
    """
    checkpoint = whole(checkpoint)
    try:
        return dict(files.load(checkpoint))
    except (TypeError, ValueError):
        raise DamagedFileError(f"{checkpoint} is not a checkpoint of a run; train again") from None


def whole(checkpoint: Path) -> Path:
    """The verified checkpoint; if the last one is damaged, the run's newest intact one, with a note.

    Raises:
        UserError: if there is no checkpoint, or none that is whole.
    """
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} does not exist: the run ended before its first epoch; 'resume' it first")
    try:
        files.verify(checkpoint)
        return checkpoint
    except DamagedFileError as error:
        others = [checkpoint.with_name(name) for name in ("previous.ckpt", "best.ckpt")]
        others = [one for one in others if one.is_file()] if checkpoint.name == "last.ckpt" else []
        for other in sorted(others, key=lambda one: one.stat().st_mtime_ns, reverse=True):
            with suppress(DamagedFileError):
                files.verify(other)
                files.say_once(f"{error}; going on from the one before, {other}")
                return other
        raise DamagedFileError(f"{error}, and there is no earlier one to go on from; train again") from None


# -- Training progress for people: a bar with the time left, or a line an epoch where there is no terminal -------------


class Counted(Protocol):
    """Interface of a module trained under :class:`ShowProgress`."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps done."""

    @property
    def total_steps(self) -> int:
        """Total number of optimizer steps."""

    def status(self) -> str:
        """A short progress message."""


class ShowProgress(Callback):
    """Counts training batches on the console and in the run's ``progress.json``, for outside observers.

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


# -- The logs of a run: a CSV file, and TensorBoard's beside it --------------------------------------------------------


def loggers(run: Run, steps: int, tensorboard: bool, every: int = 1) -> list[Logger]:
    """The run's loggers, for training that continues after ``steps`` steps; log entries of later steps are dropped."""
    kept = [row for row in rows(run.metrics) if row["step"] <= steps]
    if (there := sum("loss" in row for row in kept)) < steps // every:
        say_once(f"{run.metrics} has {there} of the {steps} steps that were done; figures and curves lack the others")
    with quiet_lightning():  # that its logger begins an empty file is known: the rows are kept here
        table = CSVLogger(run.path, name=None, version="logs")
        _ = table.experiment
    for row in kept:
        table.log_metrics(dict(row), int(row["step"]))
    chosen: list[Logger] = [table]
    if tensorboard:
        chosen.append(TensorBoardLogger(run.path, name=None, version="logs", purge_step=steps + 1))
    return chosen
