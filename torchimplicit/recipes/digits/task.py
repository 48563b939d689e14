"""The training itself: a Lightning module that trains one classifier for each estimator, side by side."""

from __future__ import annotations

import math
import warnings
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.models import ConvDEQClassifier
from torchimplicit.recipes.digits.audit import audit
from torchimplicit.recipes.digits.build import classifier, solver
from torchimplicit.recipes.digits.config import DigitsConfig, EstimatorName
from torchimplicit.recipes.digits.data import Split
from torchimplicit.recipes.digits.estimators import ESTIMATORS
from torchimplicit.recipes.digits.history import Step, Track, Validation
from torchimplicit.recipes.digits.validate import validate
from torchimplicit.recipes.runtime.run import clock
from torchimplicit.recipes.runtime.settings import from_plain, to_plain

Batch = tuple[Tensor, Tensor]


class DigitsTask(LightningModule):
    """One classifier, optimizer and schedule for each estimator; every training step steps them all.

    Who goes first changes from step to step.

    Args:
        config: the settings.
        total_steps: how many steps the schedule is made for.
        validation: the images to validate on after every epoch.
    """

    def __init__(self, config: DigitsConfig, total_steps: int, validation: Split):
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.total_steps = total_steps
        self.validation = validation
        self.classifiers = nn.ModuleDict({name: classifier(config, name) for name in config.estimators})
        self.tracks: dict[EstimatorName, Track] = {name: Track() for name in config.estimators}

    @property
    def steps_done(self) -> int:
        """Optimizer steps that every classifier has taken."""
        return min(len(track.steps) for track in self.tracks.values())

    def status(self) -> str:
        """How training goes, in a few words."""
        track = self.tracks[self.config.estimators[0]]
        if not track.steps:
            return ""
        text = f"loss {track.steps[-1].loss:.3f}"
        if track.validations:
            text += f", validation {100 * track.validations[-1].accuracy:.1f} %"
        return text

    def classifier(self, name: EstimatorName) -> ConvDEQClassifier:
        """The classifier trained with one estimator."""
        model = self.classifiers[name]
        assert isinstance(model, ConvDEQClassifier)
        return model

    def configure_optimizers(self) -> Any:
        optimizers = [
            AdamW(
                self.classifier(name).parameters(),
                lr=self.config.learning_rate,
                weight_decay=self.config.weight_decay,
            )
            for name in self.config.estimators
        ]
        return optimizers, [LambdaLR(optimizer, self._rate) for optimizer in optimizers]

    def _rate(self, step: int) -> float:
        """The share of the peak learning rate."""
        warm = max(1, self.total_steps // 10)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, self.total_steps - warm))))

    def on_train_batch_start(self, batch: Batch, index: int) -> int | None:
        return -1 if self.steps_done >= self.total_steps else None

    def training_step(self, batch: Batch, index: int) -> None:
        names = self.config.estimators
        optimizers = dict(zip(names, _listed(self.optimizers()), strict=True))
        schedulers = dict(zip(names, _listed(self.lr_schedulers()), strict=True))
        done = self.steps_done
        first = done % len(names)
        for name in names[first:] + names[:first]:
            if self._audit_due(done):
                self._audit(name, batch, done)
            self.tracks[name].steps.append(self._timed_step(name, batch, optimizers[name]))
            schedulers[name].step()

    def _timed_step(self, name: EstimatorName, batch: Batch, optimizer: Optimizer) -> Step:
        """One step of one classifier: forward, backward, update."""
        images, labels = batch
        model = self.classifier(name)
        with warnings.catch_warnings():
            # the share of samples that did not converge is recorded
            warnings.simplefilter("ignore", ConvergenceWarning)
            now = clock(self.device, wall=True)
            start = now()
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            self.manual_backward(loss)
            optimizer.step()
            seconds = now() - start
        solution = model.equilibrium.solution
        assert solution is not None
        adjoint = solution.adjoint
        assert adjoint is not None
        return Step(
            loss=float(loss.detach()),
            seconds=seconds,
            forward=solution.evaluations,
            backward=adjoint.evaluations,
            unconverged=1 - float(solution.converged.float().mean()),
        )

    def _audit_due(self, done: int) -> bool:
        every = self.config.audit_every
        return every > 0 and (done % every == 0 or done == self.total_steps - 1)

    def _audit(self, name: EstimatorName, batch: Batch, step: int) -> None:
        gradient = ESTIMATORS[name].make(self.config)
        self.tracks[name].audits.append(audit(self.classifier(name), *batch, solver(self.config), gradient, step))

    def on_train_epoch_end(self) -> None:
        if not self.trainer.should_stop:
            self.validate()

    def validate(self) -> None:
        """Validate every classifier that has trained since it was last validated."""
        for name, track in self.tracks.items():
            done = len(track.steps)
            if done and (not track.validations or track.validations[-1].step < done):
                found = validate(self.classifier(name), self.validation)
                track.validations.append(Validation(done, found.accuracy, found.loss))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tracks"] = to_plain(self.tracks)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tracks = {name: from_plain(Track, checkpoint["tracks"][name]) for name in self.config.estimators}


def _listed(one_or_many: Any) -> list[Any]:
    """Lightning gives a single optimizer bare, and several as a list."""
    return one_or_many if isinstance(one_or_many, list) else [one_or_many]
