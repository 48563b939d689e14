"""Lightning's trainer as the recipes use it: one device, a CSV log, a checkpoint an epoch, a clean stop on Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.run import Run


class SaveEveryEpoch(Checkpoint):
    """One checkpoint, replaced at the end of every whole epoch: where a resumed run begins.

    Being a ``Checkpoint``, it is called after the module's own hook.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.should_stop or trainer.interrupted:  # the epoch is not whole
            return
        draft = self.path.with_suffix(".draft")
        trainer.save_checkpoint(draft)
        os.replace(draft, self.path)


def fit(
    module: LightningModule,
    train: DataLoader,
    run: Run,
    *,
    device: torch.device,
    epochs: int,
    callbacks: list[Callback],
) -> bool:
    """Train from the run's last checkpoint, if there is one.

    There is no ``max_steps`` here, for with one Lightning does not resume at an epoch's beginning (2.6). A module that
    is to stop within an epoch returns -1 from ``on_train_batch_start``.

    Returns:
        Whether training went to its end; ``False`` if it was interrupted.

    Raises:
        UserError: if the checkpoint does not fit.
    """
    with quiet_lightning():
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=epochs,
            logger=CSVLogger(run.path, name=None, version="logs"),
            callbacks=[*callbacks, SaveEveryEpoch(run.checkpoint)],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        resumed = run.checkpoint if run.checkpoint.is_file() else None
        with stop_on_interrupt(trainer) as stopped:
            try:
                trainer.fit(module, train, ckpt_path=resumed)
            except SystemExit:  # Lightning's answer to a KeyboardInterrupt raised within a step
                if not trainer.interrupted:
                    raise
                stopped.set()
            except (KeyError, RuntimeError) as error:
                if resumed is None or trainer.global_step:
                    raise
                raise UserError(f"{resumed} does not fit this run's settings ({error}); train again") from None
    return not stopped.is_set()


@contextmanager
def stop_on_interrupt(trainer: Trainer) -> Iterator[threading.Event]:
    """The first Ctrl-C ends training after the step in progress; a second one ends it at once.

    Lightning by itself would leave through ``sys.exit(1)`` with Ctrl-C ignored from then on.
    """
    stopped = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        trainer.should_stop = True

    main = threading.current_thread() is threading.main_thread()
    if main:
        signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


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
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} does not exist: the run ended before its first epoch; 'resume' it first")
    try:
        read: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
        module.load_state_dict(read["state_dict"])
        module.on_load_checkpoint(read)
    except (KeyError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{checkpoint} does not fit this run's settings ({reason}); train again") from None
