"""Lightning's trainer as the recipes use it: logs, a checkpoint an epoch, a clean stop on Ctrl-C."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.run import Run


class SaveEveryEpoch(Checkpoint):
    """One checkpoint, replaced at the end of every whole epoch: where a resumed run begins.

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
        if getattr(pl_module, "at_best", False):
            copy = draft.with_suffix(".best-draft")
            shutil.copyfile(draft, copy)
            os.replace(copy, self.run.best)
        os.replace(draft, self.run.checkpoint)


class StopOnSignals(Callback):
    """SIGTERM ends training after the step in progress, and so does Ctrl-C in processes spawned for this training.

    Lightning by itself would leave the step with ``SystemExit``. It restores the handler when training ends.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            stop = _Stop(trainer)
            signal.signal(signal.SIGINT, stop)
            signal.signal(signal.SIGTERM, stop)


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
    """What Ctrl-C and SIGTERM do while a trainer trains. SIGTERM may come with a Ctrl-C that a parent passes on."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.interrupted = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
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
    is to stop within an epoch returns -1 from ``on_train_batch_start``. Several devices are processes that this one
    spawns; what they leave is in the checkpoint and the logs, and not in ``module``.

    Args:
        train: the batches of every epoch; ``None``: the module's own, asked for anew in every epoch.

    Raises:
        UserError: if the checkpoint does not fit.
    """
    with quiet_lightning():
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=devices,
            strategy="ddp_spawn" if devices > 1 else "auto",
            precision=precision,
            gradient_clip_val=clip_norm,
            max_epochs=epochs,
            logger=list(loggers),
            callbacks=[*callbacks, SaveEveryEpoch(run), StopOnSignals()],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            reload_dataloaders_every_n_epochs=0 if train is not None else 1,
        )
        resumed = run.checkpoint if run.checkpoint.is_file() else None
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
    """The weights, and whatever else the module keeps in its checkpoint.

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
    """What Lightning has written, without running any code that the file may hold.

    Raises:
        UserError: if there is no checkpoint, or it cannot be read.
    """
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} does not exist: the run ended before its first epoch; 'resume' it first")
    try:
        return dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    except (RuntimeError, EOFError, ValueError, OSError, TypeError, UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{checkpoint} cannot be read ({reason}); train again") from None
