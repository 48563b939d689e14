"""Trains gradient estimators side by side on handwritten digits, and measures them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler, TensorDataset

from torchimplicit._solve import solve
from torchimplicit.diagnostics import GradientProbe, probe_gradient, spectral_radius
from torchimplicit.diagnostics.compare import compared
from torchimplicit.gradients import Gradient, Implicit
from torchimplicit.linear import GMRES
from torchimplicit.models import ConvDEQClassifier
from torchimplicit.problems import FixedPoint
from torchimplicit.recipes.phantom.demo import (
    ESTIMATORS,
    GROUPS,
    Audit,
    DigitsConfig,
    EstimatorName,
    Profile,
    Step,
    Track,
    Validation,
)
from torchimplicit.recipes.runtime.run import clock, quietly
from torchimplicit.recipes.runtime.settings import from_plain, to_plain
from torchimplicit.solvers import Anderson, FixedPointIteration, Solver

# -- scikit-learn's bundled digits: 1797 real handwritten digits of 8×8 pixels -----------------------------------------


VALIDATION_SHARE = 0.2


class Split(NamedTuple):
    """Images ``[n, 1, 8, 8]`` in [0, 1] and labels ``[n]``."""

    images: Tensor
    labels: Tensor


def load(split_seed: int) -> tuple[Split, Split]:
    """The training and the validation split, stratified by class; no image is in both."""
    digits = load_digits()
    images = torch.as_tensor(digits.images / 16, dtype=torch.float32)[:, None]
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    train, validation = train_test_split(
        range(len(labels)), test_size=VALIDATION_SHARE, random_state=split_seed, stratify=digits.target
    )
    return Split(images[train], labels[train]), Split(images[validation], labels[validation])


class EpochShuffle(Sampler[int]):
    """A new order for every epoch that depends only on the seed and the epoch, so that a resumed run sees the same
    batches.

    Lightning calls :meth:`set_epoch`.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that determines the next order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


def batches(train: Split, batch_size: int, seed: int) -> DataLoader:
    """Shuffled training batches, all of one size."""
    shuffle = EpochShuffle(len(train.labels), seed)
    return DataLoader(TensorDataset(*train), batch_size=batch_size, sampler=shuffle, drop_last=True)


# -- The classifier that a config describes ----------------------------------------------------------------------------


def solver(config: DigitsConfig) -> Anderson:
    """Return the solver of the forward solves."""
    return Anderson(rtol=config.tolerance, max_steps=config.solver_steps)


def classifier(config: DigitsConfig, name: EstimatorName) -> ConvDEQClassifier:
    """The classifier with one estimator; the initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        gradient = ESTIMATORS[name].make(config)
        return ConvDEQClassifier(channels=config.channels, groups=GROUPS, solver=solver(config), gradient=gradient)


# -- The training itself: a Lightning module that trains one classifier for each estimator, side by side ---------------


Batch = tuple[Tensor, Tensor]


class DigitsTask(LightningModule):
    """One classifier, optimizer and schedule for each estimator; every training step updates them all.

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
        """A short progress message."""
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
        rate, decay = self.config.learning_rate, self.config.weight_decay
        models = [self.classifier(name) for name in self.config.estimators]
        optimizers = [AdamW(model.parameters(), lr=rate, weight_decay=decay) for model in models]
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
        done, every = self.steps_done, self.config.audit_every
        audited = every > 0 and (done % every == 0 or done == self.total_steps - 1)
        first = done % len(names)
        for name in names[first:] + names[:first]:
            if audited:
                gradient = ESTIMATORS[name].make(self.config)
                comparison = audit(self.classifier(name), *batch, solver(self.config), gradient, done)
                self.tracks[name].audits.append(comparison)
            self.tracks[name].steps.append(self._timed_step(name, batch, optimizers[name]))
            schedulers[name].step()

    def _timed_step(self, name: EstimatorName, batch: Batch, optimizer: Optimizer) -> Step:
        """One step of one classifier: forward, backward, update."""
        images, labels = batch
        model = self.classifier(name)
        with quietly():
            now = clock(self.device, wall=True)
            start = now()
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            self.manual_backward(loss)
            optimizer.step()
            seconds = now() - start
        solution = model.equilibrium.solution
        assert solution is not None
        assert solution.adjoint is not None
        unconverged = 1 - float(solution.converged.float().mean())
        return Step(float(loss.detach()), seconds, solution.evaluations, solution.adjoint.evaluations, unconverged)

    def on_train_epoch_end(self) -> None:
        if not self.trainer.should_stop:
            self.validate()

    def validate(self) -> None:
        """Validate every classifier that has trained since it was last validated."""
        for name, track in self.tracks.items():
            done = len(track.steps)
            if done and (not track.validations or track.validations[-1].step < done):
                validation = validate(self.classifier(name), self.validation)
                track.validations.append(Validation(done, validation.accuracy, validation.loss))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tracks"] = to_plain(self.tracks)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tracks = {name: from_plain(Track, checkpoint["tracks"][name]) for name in self.config.estimators}


def _listed(one_or_many: Any) -> list[Any]:
    """Make a list: Lightning returns a single optimizer bare and several as a list."""
    return one_or_many if isinstance(one_or_many, list) else [one_or_many]


# -- A classifier on images that it was not trained on -----------------------------------------------------------------


ROWS = 360
"""Number of images at a time: all of the default validation split."""


@dataclass(frozen=True)
class Validated:
    """Validation results.

    Attributes:
        accuracy: share of the images that are classified right.
        loss: mean cross-entropy (nats).
        evaluations: evaluations of the cell, mean over the images.
        residual: residual of the equilibria, the largest (relative).
        converged: share of the images whose solve reached its tolerance.
    """

    accuracy: float
    loss: float
    evaluations: float
    residual: float
    converged: float


@torch.no_grad()
def validate(classifier: ConvDEQClassifier, split: Split) -> Validated:
    """Classify a whole split."""
    device = next(classifier.parameters()).device
    was_training = classifier.training
    classifier.eval()
    rows: list[torch.Tensor] = []
    residual = 0.0
    with quietly():
        for pair in zip(split.images.split(ROWS), split.labels.split(ROWS), strict=True):
            images, labels = (part.to(device) for part in pair)
            scores = classifier(images)
            loss = functional.cross_entropy(scores, labels, reduction="none")
            solution = classifier.equilibrium.solution
            assert solution is not None
            right = scores.argmax(dim=1) == labels
            spent = torch.full_like(loss, solution.evaluations)
            rows.append(torch.stack([t.to(loss.dtype) for t in (right, loss, spent, solution.converged)]))
            residual = max(residual, float(solution.residual.max()))
    classifier.train(was_training)
    accuracy, mean_loss, evaluations, converged = torch.cat(rows, dim=1).double().mean(dim=1).tolist()
    return Validated(accuracy, mean_loss, evaluations, residual, converged)


# -- How good is an estimate? The exact gradient beside it, on the same minibatch and at the same weights --------------


EXACT_SOLVER = Anderson(memory=8, rtol=1e-6, max_steps=150)
EXACT_GRADIENT = Implicit(linear_solver=GMRES(rtol=1e-6, max_steps=150))
"""A tight tolerance for float32: an error of 1e-5 in a gradient changes its cosine by 5e-11."""


def audit(
    classifier: ConvDEQClassifier, images: Tensor, labels: Tensor, solver: Solver, gradient: Gradient, step: int
) -> Audit:
    """Compare ``gradient`` with the exact one. Touches no ``.grad`` and no weight."""
    with quietly():
        estimate, _, _ = probe(classifier, images, labels, solver, gradient)
        exact, x, z = probe(classifier, images, labels, EXACT_SOLVER, EXACT_GRADIENT)
        problem = FixedPoint(classifier.equilibrium.cell, rowwise=True)
        radius = spectral_radius(problem, z, x, subspace=16, restarts=2)
    comparison = compared(estimate, exact)
    residuals = comparison.adjoint_residual, comparison.exact_residual
    return Audit(
        step, comparison.cosine, comparison.norm_ratio, *residuals, float(radius.median()), float(radius.max())
    )


def probe(
    classifier: ConvDEQClassifier, images: Tensor, labels: Tensor, solver: Solver, gradient: Gradient
) -> tuple[GradientProbe, Tensor, Tensor]:
    """The loss's gradient in all parameters before the equilibrium, the injection, and the equilibrium."""
    cell = classifier.equilibrium.cell
    stem, weights = ([p for p in part.parameters() if p.requires_grad] for part in (classifier.stem, cell))
    problem = FixedPoint(cell, rowwise=True)
    x = classifier.stem(images)
    with torch.no_grad():
        z = solve(problem, torch.zeros_like(x), x, solver=solver).value

    def loss(z: Tensor) -> Tensor:
        return functional.cross_entropy(classifier.head(z), labels)

    estimate = probe_gradient(problem, z, x, gradient=gradient, cotangent=loss, wrt=(x, *weights))
    of_x, *of_cell = estimate.gradients
    of_stem = torch.autograd.grad(x, stem, of_x)
    return replace(estimate, gradients=(*of_stem, *of_cell)), x.detach(), z


# -- How the residual falls as the solver goes on ----------------------------------------------------------------------


LENGTH = 40
"""Number of iterations shown."""

SOLVERS: dict[str, Solver] = {
    "Anderson": Anderson(rtol=1e-6, max_steps=LENGTH, keep_trajectory=True),
    "plain iteration": FixedPointIteration(rtol=1e-6, max_steps=LENGTH, keep_trajectory=True),
}


@torch.no_grad()
def profiles(classifier: ConvDEQClassifier, images: Tensor) -> list[Profile]:
    """One profile for each solver, at the classifier's weights."""
    x = classifier.stem(images)
    cell = classifier.equilibrium.cell
    bands = []
    for name, solver in SOLVERS.items():
        with quietly():
            solution = solve(FixedPoint(cell), torch.zeros_like(x), x, solver=solver, throw=False)
        rows = torch.stack([_relative_residual(cell, z, x) for z in solution.trajectory])
        low, median, high = torch.quantile(rows.double(), rows.new_tensor([0.1, 0.5, 0.9]).double(), dim=1)
        bands.append(Profile(name, median.tolist(), low.tolist(), high.tolist()))
    return bands


def _relative_residual(cell: torch.nn.Module, z: Tensor, x: Tensor) -> Tensor:
    image = cell(z, x)
    return (image - z).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)


# -- The CSV log: one row a step, and the validation figures in the row of the step that they follow -------------------


class LogTracks(Callback):
    """Writes the history to the trainer's logger. A resumed run first writes what the checkpoint holds."""

    def __init__(self) -> None:
        self._logged = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        assert isinstance(pl_module, DigitsTask)
        assert trainer.logger is not None
        for step in range(self._logged + 1, pl_module.steps_done + 1):
            trainer.logger.log_metrics(row(pl_module.tracks, step), step)
        self._logged = pl_module.steps_done

    on_train_batch_start = on_train_end = on_train_start  # type: ignore[assignment]


def row(tracks: dict[EstimatorName, Track], step: int) -> dict[str, float]:
    """The figures of one step (counted from 1) for every estimator."""
    figures: dict[str, float] = {}
    for name, track in tracks.items():
        taken = track.steps[step - 1]
        columns = {"loss": taken.loss, "seconds": taken.seconds}
        columns |= {"forward_evaluations": taken.forward, "backward_evaluations": taken.backward}
        for validation in track.validations:
            if validation.step == step:
                columns |= {"validation_accuracy": validation.accuracy, "validation_loss": validation.loss}
        figures |= {f"{name}/{figure}": value for figure, value in columns.items()}
    return figures
