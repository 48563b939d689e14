"""The CSV log: one row a step, and the validation figures in the row of the step that they follow."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from torchimplicit.recipes.digits.config import EstimatorName
from torchimplicit.recipes.digits.history import Track
from torchimplicit.recipes.digits.task import DigitsTask


class LogTracks(Callback):
    """Writes the history to the trainer's logger. A resumed run writes what the checkpoint knows first."""

    def __init__(self) -> None:
        self._logged = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, DigitsTask)
        assert trainer.logger is not None
        for step in range(self._logged + 1, module.steps_done + 1):
            trainer.logger.log_metrics(row(module.tracks, step), step)
        self._logged = module.steps_done


def row(tracks: dict[EstimatorName, Track], step: int) -> dict[str, float]:
    """The figures of one step (counted from 1), for every estimator."""
    figures: dict[str, float] = {}
    for name, track in tracks.items():
        taken = track.steps[step - 1]
        figures[f"{name}/loss"] = taken.loss
        figures[f"{name}/seconds"] = taken.seconds
        figures[f"{name}/forward_evaluations"] = taken.forward
        figures[f"{name}/backward_evaluations"] = taken.backward
        for validation in track.validations:
            if validation.step == step:
                figures[f"{name}/validation_accuracy"] = validation.accuracy
                figures[f"{name}/validation_loss"] = validation.loss
    return figures
