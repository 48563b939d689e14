"""A small convolutional equilibrium classifier of scikit-learn's 8×8 digits: ``demo`` and ``digits``.

One config serves both. It trains one classifier for each gradient estimator, side by side: from the same initial
weights, on the same batches in the same order, each step of one beside the same step of the others, so that whatever
else the machine does slows all alike. The training is in :mod:`.demo_task`, the page in :mod:`.demo_page`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Literal

from torchimplicit.gradients import Gradient, Implicit, NeumannPhantom, OneStep, UnrolledPhantom
from torchimplicit.linear import GMRES
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Environment, Run, device, threads
from torchimplicit.recipes.runtime.settings import fraction, not_negative, positive
from torchimplicit.recipes.runtime.table import NONE, Cell, Table, sheet

if TYPE_CHECKING:
    from rich.console import Console

# -- settings ----------------------------------------------------------------------------------------------------------

EstimatorName = Literal["implicit", "unrolled-phantom", "neumann-phantom", "one-step"]

GROUPS = 4
"""Groups of the model's group normalization."""


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """Train a small convolutional equilibrium classifier on scikit-learn's 8×8 digits (bundled, nothing is downloaded).

    Several estimators train side by side, from the same initial weights and on the same batches.
    """

    estimators: tuple[EstimatorName, ...] = ("implicit",)
    """Gradient estimators of the equilibrium. One classifier is trained for each."""

    phantom_steps: int = 5
    """Phantom gradients: k, the number of unrolled steps or of terms of the Neumann series."""

    phantom_damping: float = 0.5
    """Phantom gradients: damping λ, in (0, 1]."""

    epochs: int = 12
    """Passes over the training split."""

    max_steps: int | None = None
    """Stop after this many optimizer steps, even within an epoch."""

    batch_size: int = 32
    """Images per step."""

    learning_rate: float = 2e-3
    """Peak learning rate of AdamW. Linear warm-up over the first tenth of the steps, then cosine decay to zero."""

    weight_decay: float = 1e-4
    """Weight decay of AdamW."""

    channels: int = 16
    """Channels of the equilibrium state, a multiple of 4."""

    tolerance: float = 1e-3
    """Relative tolerance of the forward solve (Anderson) and of the exact gradient's linear solve (GMRES)."""

    solver_steps: int = 40
    """Largest number of steps of either solve."""

    audit_every: int = 0
    """Optimizer steps between two comparisons of the estimate with the exact gradient, outside the timed step; 0 for
    never."""

    seed: int = 0
    """Random seed of the initial weights and the order of batches."""

    split_seed: int = 0
    """Random seed of the split into training and validation images (80 % and 20 %, stratified)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto uses a GPU if there is one."""

    threads: int = 1
    """CPU threads; 0 leaves the number to PyTorch. The default is one: the model is small, so more threads gain little
    on an idle machine and lose much on a busy one."""

    def __post_init__(self) -> None:
        if not self.estimators or len(set(self.estimators)) < len(self.estimators):
            raise UserError("--estimators must name at least one estimator, and none twice")
        positive(
            self, "phantom_steps", "epochs", "max_steps", "batch_size", "learning_rate", "tolerance", "solver_steps"
        )
        not_negative(self, "weight_decay", "audit_every", "seed", "split_seed", "threads")
        fraction(self, "phantom_damping")
        if self.channels < GROUPS or self.channels % GROUPS:
            raise UserError(f"--channels must be a multiple of {GROUPS}, and it is {self.channels}")
        if self.batch_size > 1000:
            raise UserError(f"--batch-size must be at most 1000 (of 1437 training images), and it is {self.batch_size}")


def demo() -> DigitsConfig:
    """Exact and phantom gradients side by side; the estimates are compared with the exact gradient during training."""
    return DigitsConfig(estimators=("implicit", "unrolled-phantom", "neumann-phantom"), epochs=6, audit_every=33)


def digits() -> DigitsConfig:
    """One estimator, trained longer, without audits."""
    return DigitsConfig()


# -- The gradient estimators that the recipe compares, by name ---------------------------------------------------------


@dataclass(frozen=True)
class Estimator:
    """A gradient estimator as tables and figures show it.

    Attributes:
        label: label to display.
        make: the estimator for a config.
        explanation: one sentence for a newcomer.
    """

    label: str
    make: Callable[[DigitsConfig], Gradient]
    explanation: str


ESTIMATORS: dict[EstimatorName, Estimator] = {
    "implicit": Estimator(
        "Implicit (exact)",
        lambda config: Implicit(linear_solver=GMRES(rtol=config.tolerance, max_steps=config.solver_steps)),
        "solves the linear system (I − Jᵀ)g = u by GMRES, so its only error is the solver's tolerance.",
    ),
    "unrolled-phantom": Estimator(
        "Unrolled phantom",
        lambda config: UnrolledPhantom(steps=config.phantom_steps, damping=config.phantom_damping),
        "takes a few more damped steps of the cell from the equilibrium and backpropagates through those only.",
    ),
    "neumann-phantom": Estimator(
        "Neumann phantom",
        lambda config: NeumannPhantom(steps=config.phantom_steps, damping=config.phantom_damping),
        "adds up the first few terms of the series of (I − Jᵀ)⁻¹ at the equilibrium, in constant memory.",
    ),
    "one-step": Estimator(
        "One step",
        lambda config: OneStep(),
        "replaces (I − Jᵀ)⁻¹ by the identity: one vector–Jacobian product, whatever the Jacobian is.",
    ),
}


# -- What is measured while a classifier trains. It travels in the checkpoint, so a resumed run has all of it ----------


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        loss: cross-entropy of the step's minibatch, before the update (nats).
        seconds: forward, backward and update, and nothing else.
        forward, backward: evaluations of the cell in the forward pass, and products with its Jacobian in the backward
            pass, as :class:`~torchimplicit.solution.Report` counts them.
        unconverged: share of the samples whose forward solve did not reach its tolerance.
    """

    loss: float
    seconds: float
    forward: float
    backward: float
    unconverged: float


@dataclass(frozen=True)
class Audit:
    """The estimate compared with the exact gradient, for the same weights and minibatch.

    Attributes:
        step: optimizer steps done.
        cosine: between the two gradients in all parameters up to the equilibrium (stem and cell).
        norm_ratio: length of the estimate over that of the exact gradient.
        adjoint_residual: ``‖u − (I − Jᵀ)g‖ / ‖u‖`` of the estimate's adjoint vector g, root mean square over samples.
        exact_residual: the same of the exact gradient: how exact it is.
        spectral_radius: spectral radius of J at the equilibrium, median over the samples.
        spectral_radius_max: the largest.
    """

    step: int
    cosine: float
    norm_ratio: float
    adjoint_residual: float
    exact_residual: float
    spectral_radius: float
    spectral_radius_max: float


@dataclass(frozen=True)
class Validation:
    """Results on the validation split after a number of steps.

    Attributes:
        step: optimizer steps done.
        accuracy: share of the images that are classified right.
        loss: mean cross-entropy (nats).
    """

    step: int
    accuracy: float
    loss: float


@dataclass
class Track:
    """The history of one estimator's training."""

    steps: list[Step] = field(default_factory=list)
    audits: list[Audit] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)


# -- A run's results: what ``results.json`` holds, and the table that sums them up -------------------------------------


@dataclass(frozen=True)
class Profile:
    """Relative residuals ``‖f(z) − z‖ / ‖f(z)‖`` by iteration, over the samples of one batch.

    Attributes:
        solver: whose iterates.
        median, low, high: the median, the 10 % and the 90 % quantile.
    """

    solver: str
    median: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Summary:
    """One estimator's figures; NaN (null in JSON) where there are none.

    Attributes:
        steps: optimizer steps taken.
        validation_accuracy: after the last of them, as a share.
        training_loss: mean over the last epoch's worth of steps (nats).
        seconds_a_step: median over all steps.
        training_seconds: all steps together.
        forward_evaluations, backward_evaluations: of the cell and of products with its Jacobian, a step, means over
            all steps.
        unconverged: share of the samples whose forward solve missed its tolerance, over all steps.
        adjoint_residual, cosine: medians over the audits.
        cosine_least: over the audits.
        spectral_radius: at the last audit, median over the samples.
    """

    steps: int
    validation_accuracy: float
    training_loss: float
    seconds_a_step: float
    training_seconds: float
    forward_evaluations: float
    backward_evaluations: float
    unconverged: float
    adjoint_residual: float
    cosine: float
    cosine_least: float
    spectral_radius: float


@dataclass(frozen=True)
class EstimatorResult:
    """All results of one estimator."""

    label: str
    summary: Summary
    profiles: list[Profile]
    track: Track


@dataclass(frozen=True)
class Results:
    """All results of a run.

    Attributes:
        state: ``complete`` or ``interrupted``.
        planned_steps: optimizer steps of each classifier.
        training_images, validation_images: how many.
        parameters: number of parameters of one classifier.
        wall_seconds: from start to results, audits and validation included; of the last sitting, if resumed.
    """

    state: str
    planned_steps: int
    training_images: int
    validation_images: int
    parameters: int
    wall_seconds: float
    config: DigitsConfig
    environment: Environment
    estimators: dict[EstimatorName, EstimatorResult]


def summarize(track: Track, epoch: int) -> Summary:
    """The summary of one track; ``epoch`` is the number of steps per epoch."""
    steps, audits = track.steps, track.audits

    def over(statistic: Callable[[list[float]], float], of: Sequence[Any], name: str) -> float:
        return statistic([getattr(one, name) for one in of]) if of else math.nan

    return Summary(
        steps=len(steps),
        validation_accuracy=track.validations[-1].accuracy if track.validations else math.nan,
        training_loss=over(fmean, steps[-epoch:], "loss"),
        seconds_a_step=over(median, steps, "seconds"),
        training_seconds=sum(step.seconds for step in steps),
        forward_evaluations=over(fmean, steps, "forward"),
        backward_evaluations=over(fmean, steps, "backward"),
        unconverged=over(fmean, steps, "unconverged"),
        adjoint_residual=over(median, audits, "adjoint_residual"),
        cosine=over(median, audits, "cosine"),
        cosine_least=over(min, audits, "cosine"),
        spectral_radius=audits[-1].spectral_radius if audits else math.nan,
    )


def summary_table(estimators: dict[EstimatorName, EstimatorResult]) -> Table:
    """A row per estimator, without columns that no estimator has."""

    def cell(title: str, figure: str, form: str, unit: str, note: str, scale: float = 1.0) -> list[Cell[Any]]:
        values = {name: scale * getattr(result.summary, figure) for name, result in estimators.items()}
        texts = {name: NONE if math.isnan(value) else format(value, form) for name, value in values.items()}
        return [Cell(title, lambda name: texts[name], unit, note)] if {*texts.values()} != {NONE} else []

    return sheet("", estimators, [
        Cell("Estimator", lambda name: estimators[name].label),
        *cell("Validation accuracy", "validation_accuracy", ".1f", "%",
              "images classified right among those never trained on, after the last step", 100),
        *cell("Time a step", "seconds_a_step", ".1f", "ms",
              "median over all steps of forward, backward and update; audits are not counted", 1000),
        *cell("Forward evaluations", "forward_evaluations", ".1f", "a step",
              "evaluations of the cell until every sample has its equilibrium (mean)"),
        *cell("Backward evaluations", "backward_evaluations", ".1f", "a step",
              "products with the cell's transposed Jacobian (mean)"),
        *cell("Adjoint residual", "adjoint_residual", ".1e", "relative",
              "‖u − (I − Jᵀ)g‖ / ‖u‖: by how much the adjoint vector g that the estimator uses misses the equation "
              "that the exact one solves (median over the audits)"),
        *cell("Cosine to exact", "cosine", ".4f", "",
              "of the angle between estimate and exact gradient; 1 is the same direction (median)"),
        *cell("Spectral radius of J", "spectral_radius", ".2f", "",
              "at the equilibrium, at the last audit; the closer to 1, the slower plain iteration and the longer the "
              "memory that a truncated gradient cuts off"),
    ]).table  # fmt: skip


# -- What the command line calls: see :class:`torchimplicit.recipes.runtime.run.Runner` --------------------------------


PROFILED = 128
"""Number of validation images whose solves are shown iteration by iteration."""


def check(config: DigitsConfig) -> None:
    """A requested GPU must be available."""
    device(config.device)


def train(config: DigitsConfig, run: Run, console: Console) -> bool:
    """Train, and write ``results.json``, ``figures/`` and ``index.html``."""
    from lightning.pytorch.loggers import CSVLogger

    from torchimplicit.recipes.phantom.demo_page import write
    from torchimplicit.recipes.phantom.demo_task import DigitsTask, LogTracks, batches, load, profiles
    from torchimplicit.recipes.runtime.fitting import ShowProgress, fit

    with threads(config.threads):
        began, where = time.perf_counter(), device(config.device)
        training, validation = load(config.split_seed)
        loader = batches(training, config.batch_size, config.seed)
        planned = min(config.epochs * len(loader), config.max_steps or math.inf)
        task = DigitsTask(config, int(planned), validation)
        names = ", ".join(ESTIMATORS[name].label for name in config.estimators)
        console.print(
            f"Training on {len(training.labels)} digits, validating on {len(validation.labels)} others: "
            f"{task.total_steps} steps with {names}, on {where.type.upper()}. Ctrl-C stops and keeps what is done.",
            highlight=False,
        )
        fit(
            task,
            run,
            train=loader,
            device=where,
            epochs=math.ceil(task.total_steps / len(loader)),
            loggers=[CSVLogger(run.path, name=None, version="logs")],
            callbacks=[ShowProgress(console, run), LogTracks()],
        )
        finished = task.steps_done >= task.total_steps
        with console.status("Measuring and drawing the results"):
            task.to(where)
            task.validate()
            images = validation.images[:PROFILED].to(where)
            parts = {
                name: (ESTIMATORS[name].label, summarize(track, len(loader)), profiles(task.classifier(name), images))
                for name, track in task.tracks.items()
            }
            results = Results(
                state="complete" if finished else "interrupted",
                planned_steps=task.total_steps,
                training_images=len(training.labels),
                validation_images=len(validation.labels),
                parameters=sum(p.numel() for p in task.classifier(config.estimators[0]).parameters()),
                wall_seconds=time.perf_counter() - began,
                config=config,
                environment=Environment.of(where),
                estimators={name: EstimatorResult(*one, task.tracks[name]) for name, one in parts.items()},
            )
            run.write_json("results.json", results)
            write(results, run)
        console.print(summary_table(results.estimators).rich())
    return finished


def evaluate(config: DigitsConfig, run: Run, console: Console) -> None:
    """Measure every classifier on the validation split again."""
    from torchimplicit.recipes.phantom.demo_task import DigitsTask, load, validate
    from torchimplicit.recipes.runtime.fitting import load_weights

    _, validation = load(config.split_seed)
    with threads(config.threads), console.status("Evaluating"):
        task = DigitsTask(config, total_steps=1, validation=validation)
        load_weights(task, run.checkpoint)
        task.to(device(config.device))
        validations = {name: validate(task.classifier(name), validation) for name in config.estimators}
    run.write_json("evaluation.json", {"steps": task.steps_done, "estimators": validations})
    console.print(f"After {task.steps_done} steps, on {len(validation.labels)} validation images:", highlight=False)
    measured = sheet("", validations, [
        Cell("Estimator", lambda name: ESTIMATORS[name].label),
        Cell("Validation accuracy", lambda name: f"{100 * validations[name].accuracy:.1f}", "%"),
        Cell("Validation loss", lambda name: f"{validations[name].loss:.4f}", "nats"),
        Cell("Forward evaluations", lambda name: f"{validations[name].evaluations:.1f}"),
        Cell("Converged", lambda name: f"{100 * validations[name].converged:.0f}", "%"),
        Cell("Largest residual", lambda name: f"{validations[name].residual:.1e}", "relative"),
    ])  # fmt: skip
    console.print(measured.table.rich())
