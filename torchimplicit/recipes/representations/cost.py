"""What training steps of several fits cost: seconds measured in turn, evaluations, and memory at its peak."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.profiler import ProfilerActivity, profile

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.gradients import Implicit
from torchimplicit.linear import GMRES
from torchimplicit.models import ImplicitRepresentation
from torchimplicit.nn import Equilibrium
from torchimplicit.recipes.representations import audio as audio_task
from torchimplicit.recipes.representations import image as image_task
from torchimplicit.recipes.representations import video as video_task
from torchimplicit.recipes.representations.fit import FieldTask
from torchimplicit.recipes.representations.settings import FieldSettings, PictureConfig, SoundConfig, VideoConfig
from torchimplicit.recipes.runtime.run import Run, clock, device, threads
from torchimplicit.recipes.runtime.settings import from_plain, positive
from torchimplicit.recipes.runtime.table import Column, Sheet, Table
from torchimplicit.recipes.runtime.task import Costs, Shard
from torchimplicit.solvers import Anderson


@dataclass(frozen=True, kw_only=True)
class FieldCostConfig:
    """Measures steps of several fits in turn, after some of training."""

    names: tuple[str, ...] = ()
    """What they are called."""

    fits: tuple[PictureConfig, ...] = ()
    """Fits of pictures, in the same order."""

    sounds: tuple[SoundConfig, ...] = ()
    """Then fits of sounds."""

    videos: tuple[VideoConfig, ...] = ()
    """Then fits of videos."""

    warm_steps: int = 40
    """Steps of training before the measurement."""

    rounds: int = 12
    """How often each has its turn."""

    steps_a_turn: int = 3
    """Steps in a turn."""

    def __post_init__(self) -> None:
        positive(self, "warm_steps", "rounds", "steps_a_turn")

    @property
    def all(self) -> tuple[PictureConfig | SoundConfig | VideoConfig, ...]:
        """All fits."""
        return (*self.fits, *self.sounds, *self.videos)


def default() -> FieldCostConfig:
    """Of nothing: the tables fill it in."""
    return FieldCostConfig()


@dataclass(frozen=True)
class FieldCost:
    """A training step.

    Attributes:
        seconds, forward_seconds, backward_seconds: medians: of the whole step with the update, and of its parts; CPU
            seconds of the process, wall seconds on a GPU.
        forward, backward: mean evaluations of the cell, and products with its Jacobian.
        megabytes: memory at its peak in a step, over what was held before it.
        parameters: of the model.
        cosine, norm: of the gradient beside the exact one at the same weights; NaN for an explicit model.
    """

    seconds: float
    forward_seconds: float
    backward_seconds: float
    forward: float
    backward: float
    megabytes: float
    parameters: int
    cosine: float
    norm: float


def peak_bytes(step: Callable[[], object], where: torch.device) -> int:
    """The memory at its peak while ``step`` runs, over what was held before it."""
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        step()
        return torch.cuda.max_memory_allocated(where) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    assert watched.profiler is not None
    held, most = 0, 0
    events: list[Any] = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


class FieldCostRunner:
    """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""

    def check(self, config: FieldCostConfig) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        for one in config.all:
            _recipe(one).RUNNER.check(one)

    def train(self, config: FieldCostConfig, run: Run, console: Console) -> bool:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        self._measure(config, run, console, "costs.json")
        return True

    def evaluate(self, config: FieldCostConfig, run: Run, console: Console) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        self._measure(config, run, console, "evaluation.json")

    def _measure(self, config: FieldCostConfig, run: Run, console: Console, name: str) -> None:
        found = measured(config)
        run.write_json(name, found)
        console.print(table(found).rich_rows())


RUNNER = FieldCostRunner()


def _recipe(config: PictureConfig | SoundConfig | VideoConfig) -> Any:
    """The module that fits such a signal."""
    if isinstance(config, SoundConfig):
        return audio_task
    return video_task if isinstance(config, VideoConfig) else image_task


def read(run: Run) -> dict[str, FieldCost]:
    """What a run has measured; nothing, if it has not."""
    if not (run.path / "costs.json").is_file():
        return {}
    return {name: from_plain(FieldCost, plain) for name, plain in run.read_json("costs.json").items()}


def measured(config: FieldCostConfig) -> dict[str, FieldCost]:
    """All fits, in turn."""
    with warnings.catch_warnings(), threads(config.all[0].machine.threads):
        warnings.simplefilter("ignore", ConvergenceWarning)
        subjects = [Subject(name, one, _recipe(one).build) for name, one in zip(config.names, config.all, strict=True)]
        in_turn(subjects, config.warm_steps, config.rounds, config.steps_a_turn)
        return {subject.name: subject.cost() for subject in subjects}


def in_turn(subjects: Sequence[Subject], warm_steps: int, rounds: int, steps_a_turn: int) -> None:
    """Train all of them a little, and then measure steps of one after the other."""
    for subject in subjects:
        for _ in range(warm_steps):
            subject.step()
        subject.seen = []
    for _ in range(rounds):
        for subject in subjects:
            for _ in range(steps_a_turn):
                subject.step()


@dataclass
class _Step:
    forward_seconds: float
    backward_seconds: float
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)


class Subject:
    """One fit in training, with its initial weights.

    Args:
        name: of the fit.
        config: of the fit's recipe.
        build: makes its task.
    """

    def __init__(self, name: str, config: FieldSettings, build: Callable[[Any], FieldTask]):
        self.name = name
        self.where = device(config.machine.device)
        torch.manual_seed(config.optimization.seed)
        self.task: FieldTask = build(config).to(self.where).train()
        self.optimizer: Optimizer = Adam(self.task.parameters(), lr=config.optimization.learning_rate)
        (self.batch,) = (batch.to(self.where) for batch in self.task.training_batches(range(1), Shard()))
        self.layers = [one for one in self.task.modules() if isinstance(one, Equilibrium)]
        self.now = clock(self.where)
        self.seen: list[_Step] = []

    def step(self) -> None:
        """Train a step, and note what it cost."""
        watch = Costs(self.layers)
        self.optimizer.zero_grad()
        times = [self.now()]
        loss = self.task.loss(self.batch)
        times.append(self.now())
        loss.backward()
        times.append(self.now())
        self.optimizer.step()
        times.append(self.now())
        self.seen.append(_Step(times[1] - times[0], times[2] - times[1], times[3] - times[0], watch.figures()))
        watch.close()

    def cost(self) -> FieldCost:
        """What the steps came to, and the memory of one more."""
        cosine, norm = self._beside_exact()
        return FieldCost(
            seconds=median(one.seconds for one in self.seen),
            forward_seconds=median(one.forward_seconds for one in self.seen),
            backward_seconds=median(one.backward_seconds for one in self.seen),
            forward=fmean(one.figures["forward_evaluations"] for one in self.seen),
            backward=fmean(one.figures["backward_evaluations"] for one in self.seen),
            megabytes=peak_bytes(self.step, self.where) / 2**20,
            parameters=sum(p.numel() for p in self.task.parameters()),
            cosine=cosine,
            norm=norm,
        )

    def gradient(self) -> Tensor:
        """Of the loss of the batch in all weights that it has, one after the other."""
        self.optimizer.zero_grad()
        self.task.loss(self.batch).backward()
        found = [p.grad.flatten() for p in self.task.parameters() if p.grad is not None]
        return torch.cat(found).double()

    def _beside_exact(self) -> tuple[float, float]:
        """Cosine and ratio of norms to the exact gradient, at the same weights and the same state."""
        model = self.task.model
        if not isinstance(model, ImplicitRepresentation):
            return float("nan"), float("nan")
        layer = model.equilibrium
        own = self.gradient()
        usual = layer.solver, layer.gradient, layer.warm_start
        layer.solver, layer.warm_start = Anderson(rtol=1e-5, max_steps=200), None
        layer.gradient = Implicit(linear_solver=GMRES(rtol=1e-5, max_steps=200))
        exact = self.gradient()
        layer.solver, layer.gradient, layer.warm_start = usual
        self.optimizer.zero_grad()
        cosine = torch.nn.functional.cosine_similarity(own, exact, dim=0)
        return float(cosine), float(own.norm() / exact.norm())


COLUMNS = (
    Column(
        "Step", "ms", "Forward, backward and update: CPU time of the process (wall time on a GPU), medians, in turn."
    ),
    Column("Forward", "ms", "The same."),
    Column("Backward", "ms", "The same."),
    Column("Evaluations", "", "Of the cell in the forward pass of a step."),
    Column("Products", "", "With the cell's Jacobian in the backward pass."),
    Column("Peak", "MB", "Memory at its peak in a step, over what was held before it."),
)


def table(found: dict[str, FieldCost], names: Sequence[str] | None = None) -> Table:
    """For people."""
    rows = [[name, *cells(found[name])] for name in names or found]
    return Table([Column("Model"), *COLUMNS], rows)


def cells(cost: FieldCost) -> list[str]:
    """A row of :data:`COLUMNS`."""
    return [
        f"{1e3 * cost.seconds:.2f}",
        f"{1e3 * cost.forward_seconds:.2f}",
        f"{1e3 * cost.backward_seconds:.2f}",
        f"{cost.forward:.1f}",
        f"{cost.backward:.1f}",
        f"{cost.megabytes:.1f}",
    ]


def step_sheet(found: Mapping[str, Any], names: Mapping[str, str]) -> list[Sheet]:
    """What a step costs, as a record holds it, of the models that are named; none where it was not measured."""
    rows = [[label, *cells(from_plain(FieldCost, found[name]))] for name, label in names.items() if name in found]
    return [Sheet("A training step", Table([Column("Model"), *COLUMNS], rows))] if rows else []
