"""Meta-learning by joint inference: a context that adapts to a task; the recipe and its table."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit._solve import solve
from torchimplicit.gradients import Gradient, Implicit, Unrolled
from torchimplicit.linear import GMRES
from torchimplicit.models import ContextEquilibrium, ContextEquilibriumConfig
from torchimplicit.problems import JointInference
from torchimplicit.recipes.joint.decoder import refuse_published
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import Download, cache_folder, fetch, inside
from torchimplicit.recipes.runtime.page import axes, style
from torchimplicit.recipes.runtime.run import Run, device, quietly
from torchimplicit.recipes.runtime.settings import (
    Equilibria,
    Machine,
    Optimization,
    fraction,
    not_negative,
    numbers,
    option,
    positive,
)
from torchimplicit.recipes.runtime.step_cost import timed_in_turn
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, Table, TitledTable
from torchimplicit.recipes.runtime.task import (
    Batches,
    InOrder,
    Metric,
    Rows,
    Shard,
    Split,
    Task,
    generator,
    gradient,
    loader,
    solver,
)
from torchimplicit.recipes.runtime.trainer import Measuring, Trainer
from torchimplicit.solution import Solution
from torchimplicit.solvers import Broyden, FixedPointIteration

# -- settings ----------------------------------------------------------------------------------------------------------


Adaptation = Literal["jiio", "jiio-first-order", "jiio-unrolled", "descent"]


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """An equilibrium model whose context adapts to a few samples of a task, trained so that it predicts others well."""

    data: Literal["sinusoid", "omniglot"]
    """sinusoid: regression of sine waves, made on the spot. omniglot: telling new characters apart from a few drawings
    of each."""

    data_dir: Path | None = None
    """Folder with Omniglot's images_background_small1.zip. Default: download it."""

    adaptation: Adaptation = "jiio"
    """How the context is found and the weights are differentiated: JIIO with its exact gradient; JIIO with the context
    held fixed; JIIO differentiated through each of its few steps; or gradient descent through the equilibrium,
    differentiated through every step as in MAML."""

    adaptation_solver: Literal["broyden", "plain"] = "broyden"
    """Solver of JIIO. broyden: Broyden's method, which stops once a task's context is found. plain: plain iteration;
    jiio-unrolled always takes it."""

    adaptation_steps: int | None = None
    """Largest number of steps of the adaptation: evaluations of JIIO, or solves with a gradient of descent. Default:
    100, as published, for jiio and jiio-first-order, whose gradients are those of a context that has been found; 5 for
    jiio-unrolled and descent, which differentiate through every step."""

    adaptation_step_size: float = 0.3
    """Step size of the context along its gradient."""

    penalty: float = 0.1
    """Weight of the context's square in the loss that it minimizes. Without it there may be no best context, and with a
    small one it takes hundreds of steps to find."""

    adjoint_steps: int = 12
    """Largest number of steps of JIIO's exact adjoint (GMRES)."""

    adjoint_tolerance: float = 0.1
    """Relative tolerance of JIIO's exact adjoint."""

    state_size: int = 40
    """Size of a sample's equilibrium."""

    context_size: int = 5
    """Size of a task's context."""

    bound: float = 0.7
    """Bound on the spectral norm of the state's weight matrix."""

    ways: int = 5
    """Characters in a task (Omniglot)."""

    shots: int = 10
    """Samples to adapt to: per sine wave, or per character."""

    queries: int = 10
    """Samples to predict: per sine wave, or per character."""

    held_out_tasks: int = 200
    """Number of tasks for validation, and the same number for the test."""

    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "adaptation_steps", "adaptation_step_size", "adjoint_steps", "adjoint_tolerance")
        positive(self, "state_size", "context_size", "ways", "shots", "queries", "held_out_tasks")
        not_negative(self, "penalty")
        fraction(self, "bound")
        if self.data == "omniglot" and self.shots + self.queries > 20:
            raise UserError(
                f"Omniglot has 20 drawings of each character, and {option('shots')} {self.shots} and "
                f"{option('queries')} {self.queries} are {self.shots + self.queries}"
            )
        if self.data == "sinusoid" and self.data_dir is not None:
            raise UserError("sine waves are generated, not read: omit --data-dir")

    @property
    def finds(self) -> bool:
        """True if the adaptation goes on until it has found the context, and is not differentiated step by step."""
        return self.adaptation in ("jiio", "jiio-first-order")

    @property
    def plain(self) -> bool:
        """True if JIIO iterates plainly."""
        return not self.finds or self.adaptation_solver == "plain"

    @property
    def most_steps(self) -> int:
        """Most steps of the adaptation."""
        return self.adaptation_steps or (100 if self.finds else 5)


_EQUILIBRIA = Equilibria(tolerance=1e-2, backward_tolerance=1e-2)


def sinusoid() -> MetaConfig:
    """Ten points of a sine wave: half a minute on one core."""
    return MetaConfig(
        data="sinusoid",
        optimization=Optimization(steps=120, batch_size=32, learning_rate=1e-2, clip_norm=1.0, validate_every=30),
        equilibria=_EQUILIBRIA,
    )


PLAIN: dict[str, Any] = {"adaptation_solver": "plain", "adaptation_steps": 25}
"""A few plain steps, which do not find the context."""


def omniglot() -> MetaConfig:
    """Five new characters, one drawing of each: minutes on one core. The context is not found: one drawing of each
    character determines it so little that what finds it, a penalty of 0.01, adapts less and learned more slowly."""
    return MetaConfig(
        data="omniglot",
        **PLAIN,
        adaptation_step_size=5.0,
        penalty=1e-3,
        state_size=100,
        context_size=50,
        shots=1,
        queries=5,
        held_out_tasks=100,
        optimization=Optimization(steps=200, batch_size=8, learning_rate=5e-3, clip_norm=1.0, validate_every=50),
        equilibria=_EQUILIBRIA,
    )


@dataclass(frozen=True, kw_only=True)
class AdaptationsConfig:
    """Trains a model, then adapts it at the best weights by JIIO and by descent with varying numbers of steps, in
    turn."""

    training: MetaConfig = field(default_factory=sinusoid)

    jiio_steps: tuple[int, ...] = (5, 10, 25, 50, 100)
    """Numbers of JIIO steps to compare."""

    descent_steps: tuple[int, ...] = (1, 2, 5, 10, 20)
    """Numbers of gradient-descent steps to compare."""

    step_sizes: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Step sizes to try. Each adaptation uses the one with the least error on validation tasks."""

    adapted_tasks: int = 100
    """Number of test tasks, all adapted at once, and of validation tasks."""

    repeats: int = 5
    """Number of times each adaptation is timed."""

    def __post_init__(self) -> None:
        positive(self, "adapted_tasks", "repeats")
        numbers(self, "jiio_steps", "descent_steps", "step_sizes")


def adaptations() -> AdaptationsConfig:
    """Adaptations on sine waves."""
    return AdaptationsConfig()


# -- Adapting a context to tasks: by joint inference, and by gradient descent through the equilibrium ------------------


DAMPING = (0.8, 0.6, 1.0)
"""Damping of state, adjoint and context, as published."""


class Adapted(NamedTuple):
    """The result of an adaptation: contexts ``[tasks, context]``, and the number of evaluations of the map plus
    products with its Jacobian over the support's states, in whole-batch equivalents."""

    context: Tensor
    evaluations: float


def errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each task's error ``[tasks]``: mean squared error for values, mean cross-entropy for labels."""
    if targets.is_floating_point():
        return (outputs - targets).square().flatten(1).mean(1)
    losses = functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


@dataclass(frozen=True, kw_only=True)
class Joint:
    """JIIO: one fixed-point iteration for the context and the states of all support samples of a task, which form one
    sample of the batch.

    Args:
        steps: the most.
        step_size: step size of the context along its gradient.
        penalty: weight of the context's square.
        gradient: gradient of the weights, in the context; ``None``: the context is a constant to them (first order).
        tolerance: relative, of the joint residual.
        plain: solve by plain iteration; otherwise by Broyden's method. Along contexts that the support hardly
            determines, plain iteration takes as many steps as the loss is badly conditioned.
        seen: called with the solution of the solve.
    """

    steps: int
    step_size: float
    penalty: float
    gradient: Gradient | None = None
    tolerance: float = 1e-3
    plain: bool = False
    seen: Callable[[Solution], None] | None = None

    def __call__(self, model: ContextEquilibrium, features: Tensor, targets: Tensor) -> Adapted:
        """Adapt to the support's features ``[tasks, samples, state]`` and targets."""
        problem = self.problem(model)
        start = (torch.zeros_like(features), model.contexts(features))
        chosen: dict[str, Any] = {"rtol": self.tolerance, "max_steps": self.steps}
        solver = FixedPointIteration(**chosen) if self.plain else Broyden(memory=40, **chosen)
        if self.gradient is None:
            with torch.no_grad():
                solution = solve(problem, start, features, targets, solver=solver, throw=False)
        else:
            solution = solve(problem, start, features, targets, solver=solver, gradient=self.gradient, throw=False)
        if self.seen is not None:
            self.seen(solution)
        return Adapted(solution.value.x, 2 * solution.evaluations)

    def problem(self, model: ContextEquilibrium) -> JointInference:
        """The problem of the context with the least error; its arguments are features and targets."""
        f = model.map()

        def loss(z: Tensor, context: Tensor, features: Tensor, targets: Tensor) -> Tensor:
            return errors(model.read(z, context), targets) + self.penalty * context.square().sum(1)

        return JointInference(
            lambda z, context, features, targets: f(z, context, features),
            loss,
            self.step_size,
            rowwise=True,
            damping=DAMPING,
        )


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Gradient descent on the context; each equilibrium is solved from the last one.

    Args:
        steps, step_size, penalty: as for :class:`Joint`.
        differentiable: whether the weights' gradient runs through every step, as in MAML and CAVIA (Finn et al. 2017,
            Zintgraf et al. 2019); otherwise it stops at the context.
    """

    steps: int
    step_size: float
    penalty: float
    differentiable: bool = False

    def __call__(self, model: ContextEquilibrium, features: Tensor, targets: Tensor) -> Adapted:
        """Adapt to the support's features ``[tasks, samples, state]`` and targets."""
        if not self.differentiable:
            features = features.detach()
        evaluations, z = 0.0, None
        with torch.enable_grad():
            context = model.contexts(features).requires_grad_()
            for _ in range(self.steps):
                outputs = model(features, context, z)
                loss = (errors(outputs, targets) + self.penalty * context.square().sum(1)).sum()
                (slope,) = torch.autograd.grad(loss, context, create_graph=self.differentiable)
                solution = model.equilibrium.solution
                assert solution is not None
                assert solution.adjoint is not None
                z = solution.value
                evaluations += solution.evaluations + solution.adjoint.evaluations
                context = context - self.step_size * slope
                if not self.differentiable:
                    context = context.detach().requires_grad_()
        return Adapted(context if self.differentiable else context.detach(), evaluations)


Adapt = Callable[[ContextEquilibrium, Tensor, Tensor], Adapted]


def exact(steps: int, tolerance: float) -> Gradient:
    """The exact gradient of JIIO's context, with a loosely solved adjoint: along contexts that hardly affect the loss
    the joint map is nearly the identity, and more steps would magnify the solve's error there."""
    return Implicit(linear_solver=GMRES(rtol=tolerance, max_steps=steps))


# -- Sine waves of random amplitude and phase (Finn et al. 2017, section 5.1) ------------------------------------------


def draw_waves(count: int, shots: int, queries: int, generator: torch.Generator) -> Tasks:
    """Waves :math:`a\\sin(s+\\varphi)` with a in [0.1, 5] and φ in [0, π], seen at points in [-5, 5]."""
    amplitude = 0.1 + 4.9 * torch.rand(count, 1, 1, generator=generator)
    phase = math.pi * torch.rand(count, 1, 1, generator=generator)
    points = 10 * torch.rand(count, shots + queries, 1, generator=generator) - 5
    values = amplitude * torch.sin(points + phase)
    return Tasks(points[:, :shots], values[:, :shots], points[:, shots:], values[:, shots:])


# -- omniglot ----------------------------------------------------------------------------------------------------------
#
# Omniglot's small background set: 136 characters of five alphabets, each drawn by 20 people (Lake et al. 2015).


FILE = Download(
    name="images_background_small1.zip",
    url="https://raw.githubusercontent.com/brendenlake/omniglot/master/python/images_background_small1.zip",
    sha256="f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
)
SIZE = 28
DRAWINGS = 20
LARGEST_DRAWING = 1 << 20
HELD_OUT = 24
"""Characters reserved for validation, and the same number for the test."""


def load(folder: Path | None) -> dict[str, Tensor]:
    """The characters of each split, uint8 ``[characters, 20, 1, 28, 28]``, ink being 255.

    No split was published for this set: characters are drawn for validation and test, always the same.

    Raises:
        UserError: the file is missing or another.
    """
    if folder is not None and not (folder / FILE.name).is_file():
        raise UserError(f"{folder} has no {FILE.name}: --data-dir must be the folder that holds it")
    path = fetch(FILE, cache_folder("omniglot")) if folder is None else folder / FILE.name
    characters = _read(path)
    order = torch.randperm(len(characters), generator=torch.Generator().manual_seed(0))
    if len(characters) < 3 * HELD_OUT:
        raise UserError(f"{path} has {len(characters)} characters, and {3 * HELD_OUT} are the fewest to be split")
    parts = order.split([HELD_OUT, HELD_OUT, len(characters) - 2 * HELD_OUT])
    return {name: characters[part] for name, part in zip(("validation", "test", "training"), parts, strict=True)}


def turned(characters: Tensor) -> Tensor:
    """Each character rotated by 0, 90, 180 and 270 degrees, as new characters to learn from."""
    return torch.cat([characters.rot90(turns, (-2, -1)) for turns in range(4)])


def draw_characters(
    characters: Tensor, count: int, ways: int, shots: int, queries: int, generator: torch.Generator
) -> Tasks:
    """Tasks of ``ways`` characters in random order, the drawings of each in support and query without overlap."""
    chosen = torch.rand(count, len(characters), generator=generator).topk(ways, dim=1).indices
    drawn = torch.rand(count, ways, DRAWINGS, generator=generator).topk(shots + queries, dim=2).indices
    images = characters[chosen[:, :, None], drawn].float() / 255  # [tasks, ways, drawings, 1, 28, 28]
    labels = torch.arange(ways).expand(count, ways)[:, :, None].expand(count, ways, shots + queries)
    parts = []
    for part in (slice(shots), slice(shots, None)):
        parts += [images[:, :, part].flatten(1, 2), labels[:, :, part].flatten(1, 2)]
    return Tasks(*parts)


def _read(path: Path) -> Tensor:
    drawings: dict[str, list[Tensor]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                inside(path, name)
                if name.endswith(".png"):
                    if archive.getinfo(name).file_size > LARGEST_DRAWING:
                        raise ValueError(f"{name} has more than {LARGEST_DRAWING} bytes")
                    image = Image.open(io.BytesIO(archive.read(name))).convert("L")
                    ink = 255 - torch.from_numpy(np.array(image.resize((SIZE, SIZE), Image.Resampling.BOX)))
                    drawings.setdefault(name.rsplit("/", 1)[0], []).append(ink)
    except UserError:
        raise
    except Exception as error:  # a damaged archive, or a damaged image in it, raises nearly everything
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from None
    wrong = [name for name, images in drawings.items() if len(images) != DRAWINGS]
    if wrong or not drawings:
        raise UserError(f"{path} is not Omniglot's: {wrong[0] if wrong else 'it'} has not {DRAWINGS} drawings")
    return torch.stack([torch.stack(images)[:, None] for images in drawings.values()])


# -- Tasks: what a context is adapted by, and what it must be right on -------------------------------------------------


class Tasks(NamedTuple):
    """A batch of tasks.

    Attributes:
        support, query: samples ``[tasks, samples, ...]``.
        support_targets, query_targets: values ``[tasks, samples, 1]``, or labels ``[tasks, samples]`` (int64).
    """

    support: Tensor
    support_targets: Tensor
    query: Tensor
    query_targets: Tensor


# -- Meta-learning, for the framework that trains ----------------------------------------------------------------------


HELD_OUT_BATCH = 50
PLACES = {"validation": -10, "test": -11}
"""Seeds of the held-out tasks, the same for every training seed."""


class MetaLearning(Task):
    """A model that adapts, and its tasks."""

    def __init__(self, config: MetaConfig):
        super().__init__()
        self.config = config
        self.metric = Metric("error", "", "min") if config.data == "sinusoid" else Metric("accuracy", "%", "max")
        self.characters: dict[str, Tensor] = {}
        if config.data == "omniglot":
            self.characters = dict(_characters(config.data_dir))
            self.characters["training"] = turned(self.characters["training"])
        self.model = ContextEquilibrium(
            _encoder(config),
            ContextEquilibriumConfig(
                state=config.state_size,
                context=config.context_size,
                outputs=1 if config.data == "sinusoid" else config.ways,
                bound=config.bound,
            ),
            solver=solver(config.equilibria),
            gradient=gradient(config.equilibria),
        )

    def draw(self, split: str, count: int, source: torch.Generator) -> Tasks:
        """Random tasks of a split."""
        config = self.config
        if config.data == "sinusoid":
            return draw_waves(count, config.shots, config.queries, source)
        return draw_characters(self.characters[split], count, config.ways, config.shots, config.queries, source)

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        chosen = self.config.optimization

        def drawn() -> Iterator[tuple[Tensor, ...]]:
            for step in steps:
                tasks = self.draw("training", chosen.batch_size, generator(chosen.seed, step, -5))
                yield tuple(part[shard.rank :: shard.world] for part in tasks)

        return Batches(len(steps), drawn)

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        tasks = Rows(*self.held_out(split, self.config.held_out_tasks))
        return loader(tasks, InOrder(len(tasks), HELD_OUT_BATCH, shard))

    def held_out(self, split: str, count: int) -> Tasks:
        """The first tasks of a split, always the same."""
        return self.draw(split, count, generator(0, PLACES[split]))

    def adapt(self, learning: bool) -> Adapt:
        """The recipe's adaptation, with or without the weights' gradient."""
        config = self.config
        shared: Any = {
            "steps": config.most_steps,
            "step_size": config.adaptation_step_size,
            "penalty": config.penalty,
        }
        if config.adaptation == "descent":
            return Descent(**shared, differentiable=learning)
        first_order = config.adaptation == "jiio-first-order" or not learning
        through: Gradient | None = None
        unrolled = config.adaptation == "jiio-unrolled"
        if not first_order:
            through = Unrolled() if unrolled else exact(config.adjoint_steps, config.adjoint_tolerance)
        return Joint(**shared, gradient=through, plain=config.plain, seen=self.solved)

    def loss(self, batch: Any) -> Tensor:
        """The error on the queries, with the context adapted to the support."""
        tasks = Tasks(*batch)
        features = self.model.encode(tasks.support)
        context = self.adapt(learning=True)(self.model, features, tasks.support_targets).context
        return errors(self.model(self.model.encode(tasks.query), context), tasks.query_targets).mean()

    def score(self, batch: Any) -> Tensor:
        """Sums over the tasks of error and accuracy on the queries; and the number of tasks."""
        with torch.inference_mode(False), torch.no_grad():
            tasks = Tasks(*(part.clone() for part in batch))
            error, accuracy = judged(self.model, self.adapt(learning=False), tasks)
            return torch.stack([error.sum(), accuracy.sum(), error.new_tensor(float(len(error)))])

    def figures(self, sums: list[float]) -> dict[str, float]:
        """Mean error, and accuracy if there are classes."""
        error, accuracy, count = sums
        figures = {"error": error / count, "loss": error / count}
        return figures if self.config.data == "sinusoid" else {**figures, "accuracy": accuracy / count}

    def describe(self) -> str:
        """The tasks and the model."""
        config = self.config
        kind = f"{config.ways} characters" if config.data == "omniglot" else "a sine wave"
        return (
            f"{config.data}: tasks of {kind}, {config.shots} samples each; {self.weights} parameters, a context of "
            f"{config.context_size} adapted by {config.adaptation}."
        )


def judged(model: ContextEquilibrium, adapt: Adapt, tasks: Tasks) -> tuple[Tensor, Tensor]:
    """Error and accuracy on the queries ``[tasks]`` (float64), at an exact solve from zero."""
    context = adapt(model, model.encode(tasks.support), tasks.support_targets).context.detach()
    with torch.no_grad():
        outputs = model(model.encode(tasks.query), context)
    error = errors(outputs, tasks.query_targets).double()
    if tasks.query_targets.is_floating_point():
        return error, torch.zeros_like(error)
    return error, (outputs.argmax(-1) == tasks.query_targets).double().mean(1)


def ready(config: MetaConfig) -> None:
    """Raise where the data is missing or wrong."""
    if config.data == "omniglot":
        _characters(config.data_dir)


@lru_cache(maxsize=1)
def _characters(folder: Path | None) -> dict[str, Tensor]:
    return load(folder)


def _encoder(config: MetaConfig) -> nn.Module:
    size = config.state_size
    if config.data == "sinusoid":
        return nn.Sequential(nn.Linear(1, size), nn.Tanh(), nn.Linear(size, size))
    layers: list[nn.Module] = []
    for channels in (1, 32, 32):
        layers += [nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, size))


RUNNER = Trainer(MetaLearning, ready)


# -- How well a trained model adapts, and how fast, by JIIO and by descent ---------------------------------------------


@dataclass(frozen=True)
class Quality:
    """One adaptation, measured on the test tasks.

    Attributes:
        error, accuracy: on the queries, at an exact solve with the adapted context.
        seconds: CPU seconds of the process for all tasks at once, from the support's features to the contexts; on a
            GPU, wall seconds. The median of several times, all adaptations in turn.
        evaluations: evaluations of the map plus products with its Jacobian, in whole-batch equivalents.
        step_size: chosen on validation tasks.
    """

    error: float
    accuracy: float
    seconds: float
    evaluations: float
    step_size: float


def measured(config: AdaptationsConfig, run: Run) -> dict[str, Quality]:
    """Every adaptation at the run's best weights, with its step size tuned on validation tasks."""
    task: MetaLearning = RUNNER.best(config.training, run)
    where, model = device(config.training.machine.device), task.model

    def moved(split: str) -> Tasks:
        return Tasks(*(part.to(where) for part in task.held_out(split, config.adapted_tasks)))

    with quietly(), torch.no_grad():
        chosen = _tuned(config, task, moved("validation"))
        tasks = moved("test")
        features = model.encode(tasks.support)
        cases = {name: partial(adapt, model, features, tasks.support_targets) for name, adapt in chosen.items()}
        measurements = {}
        for name, (seconds, adapted) in timed_in_turn(cases, config.repeats, where).items():
            error, accuracy = judged(model, chosen[name], tasks)
            figures = float(error.mean()), float(accuracy.mean()), seconds, adapted.evaluations
            measurements[name] = Quality(*figures, chosen[name].step_size)
    return measurements


def _tuned(config: AdaptationsConfig, task: MetaLearning, tasks: Tasks) -> dict[str, Joint | Descent]:
    """Every adaptation with the step size of least error, by name."""
    default = config.training.adaptation_step_size

    def best(adapt: Any) -> Any:
        tries = [replace(adapt, step_size=default * share) for share in config.step_sizes]
        errors = [float(judged(task.model, one, tasks)[0].mean()) for one in tries]
        finite = [error if error == error else float("inf") for error in errors]
        return tries[finite.index(min(finite))]

    penalty, plain = config.training.penalty, config.training.plain
    return {
        **{
            f"JIIO-{n}": best(Joint(steps=n, step_size=default, penalty=penalty, plain=plain))
            for n in config.jiio_steps
        },
        **{f"descent-{n}": best(Descent(steps=n, step_size=default, penalty=penalty)) for n in config.descent_steps},
    }


def qualities(by_name: dict[str, Quality]) -> Table:
    """Table of the adaptations."""
    return table.sheet("", by_name, [
        Cell("Adaptation", lambda name: name),
        Cell("Error", lambda name: f"{by_name[name].error:.3f}"),
        Cell("Accuracy", lambda name: f"{100 * by_name[name].accuracy:.1f}", "%"),
        Cell("Time", lambda name: f"{1e3 * by_name[name].seconds:.0f}", "ms"),
        Cell("Evaluations", lambda name: f"{by_name[name].evaluations:.0f}"),
        Cell("Step", lambda name: f"{by_name[name].step_size:g}"),
    ]).table  # fmt: skip


ADAPTATIONS = Measuring(
    first=RUNNER,
    training=lambda config: config.training,
    measure=measured,
    show=qualities,
    name="adaptations.json",
    doing="Adapting",
)


# -- The table ---------------------------------------------------------------------------------------------------------


TITLES = {"sinusoid": "Sine waves", "omniglot": "Omniglot, 5-way 1-shot"}
UNITS = {"sinusoid": "mean squared error", "omniglot": "cross-entropy"}

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "found": ("JIIO, exact, of contexts that are found", {"adaptation": "jiio"}),
    "jiio": ("JIIO, exact, after 25 plain steps", {"adaptation": "jiio", **PLAIN}),
    "first-order": ("JIIO, first order, after 25 plain steps", {"adaptation": "jiio-first-order", **PLAIN}),
    "unrolled": ("JIIO, through 5 steps", {"adaptation": "jiio-unrolled", "adaptation_steps": 5}),
    "descent": ("descent, through 5 steps", {"adaptation": "descent", "adaptation_steps": 5}),
}
"""The training methods: a label and the settings of each."""

FEW_STEPS: dict[str, Any] = {"adaptation_step_size": 1.0, "penalty": 0.01}
"""Settings for sine waves of the rows that take a few steps: long ones, and a small penalty."""

FOUND: dict[str, Any] = {
    "adaptation_solver": "broyden",
    "adaptation_steps": None,
    "adaptation_step_size": 2.0,
    "penalty": 0.01,
}
"""Settings for Omniglot of the row whose contexts are found."""

UNROLLED = ROWS["unrolled"][1]["adaptation_steps"]

FEW = (3, 4, 5, 6, 8, 10, 25)
"""Numbers of JIIO steps measured at weights that were trained through few steps."""

LONGER = {"unrolled": 3}
"""Factor on the optimizer steps. A step costs between a third and a half of differentiating through descent, so
training takes about as long."""


@dataclass(frozen=True, kw_only=True)
class MetaTableConfig:
    """Contexts found by JIIO, with exact and first-order gradients, and by gradient descent."""

    plan: Plan = field(default_factory=Plan)

    problems: tuple[Literal["sinusoid", "omniglot"], ...] = ("sinusoid", "omniglot")
    """Problems to run."""

    data_dir: Path | None = None
    """Folder with Omniglot's images_background_small1.zip. Default: download it."""

    steps: int | None = None
    """Optimizer steps of each training. Default: the recipe's."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    def __post_init__(self) -> None:
        positive(self, "steps")
        refuse_published(self.plan.scale, "all of Omniglot and a context of 400, and these recipes read a part of it")


def adapted(config: MetaTableConfig, problem: str, row: str, seed: int) -> AdaptationsConfig:
    """One run's settings."""
    base = sinusoid() if problem == "sinusoid" else replace(omniglot(), data_dir=config.data_dir)
    optimization = base.optimization.of(seed, config.steps, LONGER.get(row, 1))
    own = {("sinusoid", False): FEW_STEPS, ("omniglot", True): FOUND}.get((problem, row == "found"), {})
    training = replace(base, **{**ROWS[row][1], **own}, optimization=optimization, machine=config.machine)
    usual = AdaptationsConfig(training=training)
    return replace(usual, jiio_steps=FEW) if row == "unrolled" else usual


def native(config: MetaTableConfig, problem: str, row: str) -> str:
    """The adaptation that a model was trained with."""
    training = adapted(config, problem, row, 0).training
    return f"{'descent' if training.adaptation == 'descent' else 'JIIO'}-{training.most_steps}"


def jobs(config: MetaTableConfig) -> list[Job]:
    """All jobs: every way of training, seed by seed."""
    every = [(p, row, seed) for p in config.problems for seed in config.plan.all_seeds for row in ROWS]
    return [
        Job(
            f"{problem}-{row}-seed{seed}",
            "jiio-meta-adaptations",
            adapted(config, problem, row, seed),
            {"row": row, "problem": problem, "seed": seed},
        )
        for problem, row, seed in every
    ]


def figures(config: MetaTableConfig, run: Run) -> dict[str, Any] | None:
    """Return the figures of a run whose adaptations are measured."""
    adaptations, trained = (table.read(name)(config, run) for name in ("adaptations.json", "results.json"))
    if adaptations is None or trained is None:
        return None
    return {"adaptations": adaptations, **{name: trained[name] for name in ("validations", "test", "seconds", "costs")}}


def of(runs: Runs, row: str, name: str, what: str) -> list[float]:
    """A figure of an adaptation for the models of a row, for every seed."""
    return runs.of(row, f"adaptations.{name}.{what}")


def adaptations_of(runs: Runs, row: str) -> Mapping[str, Any]:
    """The adaptations of the first seed, by name."""
    return next((line["adaptations"] for line in runs.where(row=row)), {})


def fastest(runs: Runs, row: str, kind: str, goal: float) -> tuple[str, float, float] | None:
    """The fastest adaptation of a kind that reaches the target error: its name, error and seconds."""
    reached = [
        (name, error, fmean(of(runs, row, name, "seconds")))
        for name in adaptations_of(runs, row)
        if name.startswith(kind) and (error := fmean(of(runs, row, name, "error"))) <= goal
    ]
    return min(reached, key=lambda one: one[2], default=None)


def there(config: MetaTableConfig, runs: Runs) -> dict[str, Runs]:
    """The problems that have runs, each with its own."""
    return {problem: lines for problem in config.problems if (lines := runs.where(problem=problem))}


def sheets(config: MetaTableConfig, runs: Runs) -> Iterator[TitledTable]:
    """Tables for each problem: training, and the adaptations of every model."""
    for problem, lines in there(config, runs).items():
        yield trainings(config, problem, lines)
        for row in ROWS:
            if adaptations_of(lines, row):
                yield adapting(problem, lines, row)


def trainings(config: MetaTableConfig, problem: str, runs: Runs) -> TitledTable:
    """Tabulate each way of training, adapted as in training."""

    def told(what: str, digits: int, scale: float = 1.0) -> Any:
        return lambda row: table.spread(of(runs, row, native(config, problem, row), what), digits, scale)

    cells = [
        Cell[str]("Trained by", lambda row: f"{ROWS[row][0]} ({native(config, problem, row)})"),
        Cell("Error", told("error", 3), "",
             f"Test {UNITS[problem]} on the queries, adapted as in training: mean ± standard deviation over seeds."),
        Cell("Accuracy", told("accuracy", 1, 100), "%", "Test accuracy on the queries, adapted as in training."),
        Cell("Adaptation", told("seconds", 0, 1e3), "ms", "CPU time of adapting to all test tasks at once."),
        Cell("A training step", runs.told("costs.seconds", 0, 1e3), "ms",
             "Median wall time of a training step. Other programs ran on the machine, so that it is rough."),
        Cell("Training steps", lambda row: str(adapted(config, problem, row, 0).training.optimization.steps), "",
             "Optimizer steps."),
    ]  # fmt: skip
    shown = (cell for cell in cells if problem == "omniglot" or cell.title != "Accuracy")
    return table.sheet(
        f"{TITLES[problem]}: models by the way they were trained", [row for row in ROWS if runs.where(row=row)], shown
    )


def adapting(problem: str, runs: Runs, row: str) -> TitledTable:
    """The adaptations of a row's models."""
    first = adaptations_of(runs, row)

    def told(what: str, digits: int, scale: float = 1.0) -> Any:
        return lambda name: table.spread(of(runs, row, name, what), digits, scale)

    cells = [
        Cell[str]("Adaptation", lambda name: name),
        Cell("Error", told("error", 3), "",
             f"Test {UNITS[problem]} on the queries: mean ± standard deviation over the seeds."),
        Cell("Accuracy", told("accuracy", 1, 100), "%", "Test accuracy on the queries."),
        Cell("Time", told("seconds", 0, 1e3), "ms",
             "CPU time of adapting to all test tasks at once: median of repeats that alternate between adaptations."),
        Cell("Evaluations", lambda name: f"{fmean(of(runs, row, name, 'evaluations')):.0f}", "",
             "Evaluations of the map plus products with its Jacobian, in whole-batch equivalents."),
        Cell("Step size", lambda name: f"{first[name]['step_size']:g}", "",
             "Step size that was chosen on the validation tasks, for the first seed."),
    ]  # fmt: skip
    title = f"{TITLES[problem]}: adaptation of the model trained by {ROWS[row][0]}"
    return table.sheet(title, first, (c for c in cells if problem == "omniglot" or c.title != "Accuracy"))


def claims(config: MetaTableConfig, runs: Runs) -> Iterator[Claim]:
    """Error against time, and exact against first-order gradients, for each problem."""
    for problem, lines in there(config, runs).items():
        yield from claims_of(config, problem, lines)


def claims_of(config: MetaTableConfig, problem: str, runs: Runs) -> Iterator[Claim]:
    """The claims on one problem."""
    rows, title = {line["row"] for line in runs}, TITLES[problem]
    natives = {row: native(config, problem, row) for row in ROWS}

    def reached(one: tuple[str, float, float]) -> str:
        return f"{one[0]} has {one[1]:.3f} after {1e3 * one[2]:.0f} ms"

    for row in ("found", "jiio", "first-order", "unrolled"):
        if not {row, "descent"} <= rows:
            continue
        rival = natives["descent"]
        goal, seconds = (fmean(of(runs, "descent", rival, what)) for what in ("error", "seconds"))
        time = fastest(runs, row, "JIIO", goal)
        if time is None:
            names = {name for line in runs.where(row=row) for name in line["adaptations"] if "JIIO" in name}
            words = f"JIIO has at best {min(fmean(of(runs, row, name, 'error')) for name in names):.3f}"
        else:
            words = f"{reached(time)} and is {seconds / time[2]:.1f} times as fast"
        yield Claim(
            f"{title}: JIIO, at weights trained by {ROWS[row][0]}, reaches the error of {rival}, at weights trained by "
            "it, at least 3 times as fast",
            f"{reached((rival, goal, seconds))}; {words}",
            time is not None and seconds / time[2] >= 3,
        )
    for row in ("found", "jiio", "unrolled"):
        if row not in rows:
            continue
        goal = fmean(of(runs, row, natives[row], "error"))
        time, other = (fastest(runs, row, kind, 1.02 * goal) for kind in ("JIIO", "descent"))
        assert time is not None
        ratio = None if other is None else other[2] / time[2]
        words = "descent does not reach it" if other is None else f"{reached(other)}, {ratio:.1f} times as long"
        yield Claim(
            f"{title}: at the same weights, trained by {ROWS[row][0]}, JIIO reaches its error at least 3 times as fast "
            "as descent",
            f"{reached(time)}; {words}",
            ratio is None or ratio >= 3,
        )
    if {"jiio", "first-order"} <= rows:
        exact, cheap = (of(runs, row, natives[row], "error") for row in ("jiio", "first-order"))
        yield Claim(
            f"{title}: training with the exact gradient ends at a lower error than training with the first-order one",
            f"{table.spread(exact, 3)} with the exact gradient, {table.spread(cheap, 3)} with the first-order one",
            fmean(exact) < fmean(cheap),
        )


def protocol(config: MetaTableConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    parts = []
    for problem in there(config, runs):
        one = adapted(config, problem, "jiio", 0).training
        parts.append(
            f"{TITLES[problem]}: a task has {one.shots} support and {one.queries} query samples"
            f"{' per character' if problem == 'omniglot' else ''}; states have {one.state_size} entries and the "
            f"context has {one.context_size}; training takes {one.optimization.steps} steps of Adam on "
            f"{one.optimization.batch_size} tasks, with step size {one.adaptation_step_size:g} and penalty "
            f"{one.penalty:g}."
        )
        if runs.where(problem=problem, row="found"):
            own = adapted(config, problem, "found", 0).training
            parts.append(
                f"Contexts that are found take at most {own.most_steps} steps of Broyden's method, with step size "
                f"{own.adaptation_step_size:g} and penalty {own.penalty:g}."
            )
    kind = adapted(config, config.problems[0], "jiio", 0)
    return (
        "The context c of a model z = tanh(Wz + γ(c) u + β(c)) adapts to the support of a task, and the model is "
        f"tested on the queries, with {config.plan.seeds} seeds. JIIO takes {kind.training.adaptation_steps} steps in "
        "training and descent takes 5. JIIO that is differentiated through its steps, as descent is, takes "
        f"{UNROLLED}, and trains for {LONGER['unrolled']} times as many optimizer steps. {' '.join(parts)} Adaptations "
        f"are measured on {kind.adapted_tasks} test tasks at once, at the weights of the best validation, in "
        "evaluation mode; step sizes are chosen on as many validation tasks. Each adaptation is timed "
        f"{kind.repeats} times, in alternation with the others. Descent begins every solve at the previous state, with "
        "a tolerance of 1e-2."
    )


def notes(config: MetaTableConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    yield from table.missing(jobs(config), runs, "Runs that are missing or did not finish")
    yield (
        "A task is one sample of the batch: its state holds the states of all its support samples, which share the "
        "context."
    )
    yield (
        "The outer loss, on the queries, is not the inner one, so that the envelope theorem does not apply: the exact "
        "gradient solves the adjoint of the joint map by truncated GMRES with Hessian-vector products. The first-order "
        "gradient holds the context fixed, as the published code does."
    )
    yield (
        "The problem is not convex and, with a small penalty, badly conditioned: 25 plain steps do not find the "
        "context whose gradient the adjoint gives. With a larger penalty Broyden's method finds that of sine waves "
        "in 20 to 50 evaluations; Anderson's method stops at stationary points of higher loss."
    )
    yield (
        "The models are small, the tasks few and training takes minutes: compare rows with each other only, as "
        "accuracies stay far below published ones. Omniglot's small background set has 136 characters, 24 of which "
        "form the test."
    )
    yield (
        "Descent is trained through its few steps and so learns weights at which these suffice, which makes it a "
        "strong rival. The exact gradient is that of a context that has been found, which takes more than a few steps. "
        "JIIO that is trained through its few steps also learns weights at which they suffice, and needs no adjoint "
        "solve."
    )


def drawings(config: MetaTableConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """Error against time."""
    problems = there(config, runs)
    if not problems:
        return
    figure, panels = axes(len(problems), width=5.6, height=3.9)
    for panel, (problem, lines) in zip(panels, problems.items(), strict=True):
        index = 0
        for row, (label, _) in ROWS.items():
            kinds = ("JIIO", "descent") if row == "jiio" else ("descent",) if row == "descent" else ("JIIO",)
            for kind in kinds if lines.where(row=row) else ():
                names = [name for name in adaptations_of(lines, row) if name.startswith(kind)]
                times = [1e3 * fmean(of(lines, row, name, "seconds")) for name in names]
                values = [fmean(of(lines, row, name, "error")) for name in names]
                panel.plot(times, values, label=f"{kind}; trained by {label}", **style(index))
                index += 1
        panel.set(xlabel="CPU time of the adaptation, ms", ylabel=UNITS[problem], title=TITLES[problem])
        if problem == "sinusoid":
            panel.set_yscale("log")
        panel.legend(fontsize=7.5)
    yield CaptionedFigure(
        "error",
        figure,
        "Error on the queries of all test tasks against the time of adapting to them. Along a line the number of steps "
        "grows, each with the step size chosen for it; all figures are means over the seeds.",
    )


TABLE = table.published(
    globals(),
    title="Meta-learning by joint inference",
    source="Gurumurthy, Bai, Manchester, Kolter 2021, Joint inference and input optimization in equilibrium "
    "networks: meta-learning on Omniglot, 5-way 1-shot, published as 2.5 to 3 times faster than descent.",
)
