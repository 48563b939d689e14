"""The training task: its samples, the gradient estimators of its equilibria, and their cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from torchimplicit.gradients import (
    AdaptivePhantom,
    Gradient,
    Implicit,
    NeumannPhantom,
    OneStep,
    Reversible,
    UnbiasedNeumann,
    Unrolled,
    UnrolledPhantom,
)
from torchimplicit.linear import GMRES
from torchimplicit.nn import Equilibrium
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import clock
from torchimplicit.recipes.runtime.settings import Equilibria, EstimatorName
from torchimplicit.solution import Solution, fell_short
from torchimplicit.solvers import Anderson, Broyden, FixedPointIteration, ReversibleIteration, Solver

# -- What a recipe trains ----------------------------------------------------------------------------------------------


Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Metric:
    """The figure by which a training is judged.

    Attributes:
        name: as in the figures of :meth:`Task.figures`.
        unit: for people; empty for none. With ``"%"`` the figure is a share, shown times 100.
        best: whether more is better, or less.
    """

    name: str
    unit: str
    best: Literal["max", "min"]

    def better(self, one: float, other: float) -> bool:
        """Return whether ``one`` beats ``other``; NaN beats nothing."""
        return one > other if self.best == "max" else one < other

    def text(self, value: float) -> str:
        """Format a value for display."""
        return f"{100 * value:.2f} %" if self.unit == "%" else f"{value:.4g} {self.unit}".rstrip()


SHARES = ("accuracy", "top5", "test_accuracy", "f1", "solved", "places")
"""Figures that are shares, shown in percent."""


def told(figures: Mapping[str, float], metric: Metric) -> dict[str, str]:
    """A split's figures for display: the metric first, then other scores, the loss last."""
    others = sorted((name for name in figures if name != metric.name), key=lambda name: name == "loss")
    written = {
        name: f"{100 * figures[name]:.2f} %" if name in SHARES else f"{figures[name]:.4g}"
        for name in (metric.name, *others)
    }
    return {**written, metric.name: metric.text(figures[metric.name])}


@dataclass(frozen=True)
class Shard:
    """This process's share of every batch: samples ``rank``, ``rank + world``, ..."""

    rank: int = 0
    world: int = 1


class Task(nn.Module, ABC):
    """A model, its data, loss and score, made from the config alone, identically in every process.

    Every :class:`~torchimplicit.nn.Equilibrium` within is trained with the solver and the gradient that the recipe's
    settings name: :meth:`__init__` gives them to the model.

    Attributes:
        metric: on the validation split it selects the weights that are tested.
    """

    metric: Metric

    def __init__(self) -> None:
        super().__init__()
        self.listeners: list[Callable[[Solution], None]] = []

    @property
    def weights(self) -> int:
        """Count the parameters."""
        return sum(p.numel() for p in self.parameters())

    def solved(self, solution: Solution) -> None:
        """Register a solve that no layer makes, so that its evaluations are counted."""
        for listener in self.listeners:
            listener(solution)

    @abstractmethod
    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        """The batches of these optimizer steps, one each; a batch depends only on the step and the seed."""

    @abstractmethod
    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        """The batches of a whole split, in order."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """The loss of a step: a scalar, averaged over the batch."""

    @abstractmethod
    def score(self, batch: Any) -> Tensor:
        """Sums ``[k]`` (float64) from which :meth:`figures` computes the figures of a split."""

    @abstractmethod
    def figures(self, sums: list[float]) -> dict[str, float]:
        """The figures of a split, from its sums; among them the metric, and usually ``loss``."""

    def cut(self, batch: Any, count: int) -> list[Any]:
        """Split a batch into parts, if it is a tuple of tensors with the samples in dim 0.

        Raises:
            UserError: it is something else.
        """
        if not (isinstance(batch, tuple | list) and all(isinstance(part, Tensor) for part in batch)):
            raise UserError("--accumulate: the batches of this recipe cannot be cut; take a smaller --batch-size")
        return list(zip(*(part.chunk(count) for part in batch), strict=True))

    def begin(self) -> None:
        """Called before a pass over a split and before every segment of training: reset anything carried from batch to
        batch."""

    def describe(self) -> str:
        """The data, in one sentence for display."""
        return ""

    def beside_weights(self) -> dict[str, Any]:
        """JSON files of the run, by name, without which the weights cannot be used if the data are gone."""
        return {}


# -- Which samples a step sees: a function of the step and the seed, so that training can begin at any step ------------


class ShuffledSteps(Sampler[list[int]]):
    """Batches drawn without replacement: every pass over the data is a permutation, cut into whole batches.

    Args:
        size: how many samples there are.
        batch_size: samples per batch over all processes; at most ``size``.
        seed: seed of the permutations.
        steps: the steps to give batches for.
        shard: this process's share.
        whole: whether a smaller batch ends a pass; otherwise what does not fill one is left out.
    """

    def __init__(self, size: int, batch_size: int, seed: int, steps: range, shard: Shard, whole: bool = False):
        self.size, self.seed, self.steps, self.shard = size, seed, steps, shard
        self.batch_size = min(size, batch_size)
        self.per_pass = -(-size // self.batch_size) if whole else size // self.batch_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        order: tuple[int, list[int]] | None = None
        for step in self.steps:
            turn, place = divmod(step, self.per_pass)
            if order is None or order[0] != turn:
                order = turn, permutation(self.size, self.seed, turn)
            batch = order[1][place * self.batch_size : (place + 1) * self.batch_size]
            yield batch[self.shard.rank :: self.shard.world]


class InOrder(Sampler[list[int]]):
    """All samples once, in order, in batches."""

    def __init__(self, size: int, batch_size: int, shard: Shard):
        self.own = range(shard.rank, size, shard.world)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.own) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.own), self.batch_size):
            yield list(self.own[start : start + self.batch_size])


def permutation(size: int, seed: int, turn: int) -> list[int]:
    """The order of one pass."""
    return torch.randperm(size, generator=generator(seed, turn)).tolist()


def generator(seed: int, *place: int) -> torch.Generator:
    """A generator for one place in training, such as a step; generators of different places and seeds are unrelated."""
    mixed = 0xCBF29CE484222325
    for part in (seed, *place):  # FNV-1a over whole integers, then the generator's own scrambling
        mixed = ((mixed ^ (part + 1)) * 0x100000001B3) & (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


class Rows(Dataset[Any]):
    """Tensors with the samples in dim 0; a batch is the tuple of their rows."""

    def __init__(self, *tensors: Tensor):
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(t[index] for t in self.tensors)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        chosen = torch.as_tensor(indices)
        return tuple(t[chosen] for t in self.tensors)


def loader(
    data: Dataset[Any], batches: Sampler[list[int]], *, workers: int = 0, collate: Any = None, seed: int = 0
) -> DataLoader[Any]:
    """A loader of these batches; :class:`Rows` need no collation, otherwise ``None`` means torch's default."""
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_is if isinstance(data, Rows) else collate,
        generator=generator(seed, -2),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


def _as_is(batch: Any) -> Any:
    return batch


class _Kept(Sampler[Any]):
    """The batches of another sampler, which can be replaced: the workers of a loader keep running with other
    batches."""

    def __init__(self, sampler: Sampler[Any]):
        self.own = sampler

    def __len__(self) -> int:
        return len(self.own)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.own)


class Batches:
    """A fixed number of batches, generated anew for every pass.

    Args:
        count: how many.
        made: gives them.
    """

    def __init__(self, count: int, batches: Callable[[], Iterator[Any]]):
        self.count, self.made = count, batches

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return self.made()


class SampledTask(Task):
    """A task with a data set of samples: shuffled for training, in order otherwise.

    Attributes:
        config: the recipe's.
        sets: the samples of ``training``, ``validation`` and ``test``.
        held_out_batch: samples at a time of a held-out set; ``None``: as many as in training.
        collate: see :func:`loader`.
    """

    config: Any
    sets: Mapping[str, Any]
    held_out_batch: int | None = 250
    collate: Any = None

    @property
    def counts(self) -> str:
        """The number of samples in each set, for display."""
        return ", ".join(f"{len(part)} {name}" for name, part in self.sets.items())

    def order(self, steps: range, shard: Shard) -> Sampler[Any]:
        """The samples of each step."""
        chosen = self.config.optimization
        size = len(self.sets["training"])
        return ShuffledSteps(size, chosen.batch_size, chosen.seed, steps, shard, chosen.whole_passes)

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        return self._loaded(self.sets["training"], self.order(steps, shard))

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        size = self.held_out_batch or self.config.optimization.batch_size
        return self._loaded(self.sets[split], InOrder(len(self.sets[split]), size, shard))

    def _loaded(self, data: Any, batches: Sampler[Any], collate: Any = None) -> Iterable[Any]:
        workers, seed = self.config.machine.workers, self.config.optimization.seed
        kept: dict[Any, tuple[_Kept, DataLoader[Any]]] = self.__dict__.setdefault("_loaders", {})
        key = id(data), collate
        if workers and key in kept:
            kept[key][0].own = batches
            return kept[key][1]
        order = _Kept(batches)
        loaded = loader(data, order, workers=workers, collate=collate or self.collate, seed=seed)
        if workers:
            kept[key] = order, loaded
        return loaded


# -- Solvers and gradient estimators by the names that the command line uses -------------------------------------------


@dataclass(frozen=True)
class Estimator:
    """A gradient estimator.

    Attributes:
        label: short label to display.
        make: the estimator for the settings.
    """

    label: Callable[[Equilibria], str]
    make: Callable[[Equilibria], Gradient]


ESTIMATORS: dict[EstimatorName, Estimator] = {
    "implicit": Estimator(
        lambda at: "implicit",
        lambda at: Implicit(linear_solver=GMRES(rtol=at.backward_tolerance, max_steps=at.backward_steps)),
    ),
    "unrolled-phantom": Estimator(
        lambda at: f"UPG({at.phantom_steps}, {at.phantom_damping:g})",
        lambda at: UnrolledPhantom(steps=at.phantom_steps, damping=at.phantom_damping),
    ),
    "neumann-phantom": Estimator(
        lambda at: f"NPG({at.phantom_steps}, {at.phantom_damping:g})",
        lambda at: NeumannPhantom(steps=at.phantom_steps, damping=at.phantom_damping),
    ),
    "adaptive-phantom": Estimator(
        lambda at: f"adaptive phantom({at.backward_tolerance:g})",
        lambda at: AdaptivePhantom(tolerance=at.backward_tolerance, max_steps=at.backward_steps),
    ),
    "unbiased-neumann": Estimator(
        lambda at: f"unbiased({at.phantom_steps}, {at.phantom_damping:g})",
        lambda at: UnbiasedNeumann(steps=at.phantom_steps, damping=at.phantom_damping),
    ),
    "one-step": Estimator(lambda at: "one step", lambda at: OneStep()),
    "unrolled": Estimator(lambda at: "unrolled", lambda at: Unrolled()),
    "reversible": Estimator(lambda at: "reversible", lambda at: Reversible()),
}


def gradient(settings: Equilibria) -> Gradient:
    """The estimator that the settings name."""
    return ESTIMATORS[settings.gradient].make(settings)


def label(settings: Equilibria) -> str:
    """The estimator's name with its settings."""
    return ESTIMATORS[settings.gradient].label(settings)


def solver(settings: Equilibria) -> Solver:
    """The solver that the settings name."""
    kinds: dict[str, type[Anderson | Broyden | FixedPointIteration | ReversibleIteration]] = {
        "anderson": Anderson,
        "broyden": Broyden,
        "fixed-point": FixedPointIteration,
        "reversible": ReversibleIteration,
    }
    return kinds[settings.solver](rtol=settings.tolerance, max_steps=settings.solver_steps)


# -- What a step costs: evaluations, by watching the equilibria, and seconds -------------------------------------------


class Costs:
    """Counts every solve of some layers, and those that a task reports, until it is closed.

    Args:
        layers: watched.
        task: whose other solves count too.
    """

    def __init__(self, layers: Sequence[Equilibrium], task: Task | None = None):
        self._solutions: list[Solution] = []
        self._first = layers[0] if layers else None
        self._calls = self._told = 0
        self._handles = [layer.register_solution_hook(self._see) for layer in layers]
        self._task = task
        if task is not None:
            task.listeners.append(self._hear)

    @property
    def solves(self) -> int:
        """Number of calls of the first layer, one per batch if a batch calls the model once; without layers, the number
        of registered solves."""
        return self._calls or self._told

    def _see(self, layer: Equilibrium, solution: Solution) -> None:
        self._calls += layer is self._first
        self._keep(solution)

    def _hear(self, solution: Solution) -> None:
        self._told += 1
        self._keep(solution)

    def _keep(self, solution: Solution) -> None:
        # the record is shared with the solution, and is filled in by the backward pass
        self._solutions.append(solution.figures())

    def figures(self) -> dict[str, float]:
        """Evaluations of the cells in whole-batch equivalents, forward and backward, over all layers; the share of
        unconverged samples; the largest relative residual, and that of the adjoint if known."""
        adjoints = [solution.adjoint for solution in self._solutions]
        status = [solution.status.reshape(-1) for solution in self._solutions]
        residual = [solution.residual.reshape(-1) for solution in self._solutions]
        known = [adjoint.residual for adjoint in adjoints if adjoint is not None and adjoint.residual.isfinite().all()]
        return {
            **({"backward_residual": float(torch.cat(known).max())} if known else {}),
            "forward_evaluations": sum(solution.evaluations for solution in self._solutions),
            "backward_evaluations": sum(adjoint.evaluations for adjoint in adjoints if adjoint is not None),
            "unconverged": float(fell_short(torch.cat(status)).double().mean()) if status else 0.0,
            "residual": float(torch.cat(residual).nan_to_num(nan=torch.inf).max()) if residual else 0.0,
        }

    def close(self) -> None:
        """Stop watching, and release what was recorded."""
        for handle in self._handles:
            handle.remove()
        if self._task is not None:
            self._task.listeners.remove(self._hear)
            self._task = None
        self._solutions = []


class Stopwatch:
    """Seconds of the parts of a step; the device is synchronized before each reading."""

    def __init__(self) -> None:
        self._began = self._last = 0.0
        self._laps: dict[str, float] = {}

    def start(self, device: torch.device) -> None:
        """Start a step."""
        self._laps = {}
        self._began = self._last = clock(device, wall=True)()

    def skip(self, device: torch.device) -> None:
        """Discard the time since the last reading."""
        self._last = clock(device, wall=True)()

    @contextmanager
    def pause(self, device: torch.device) -> Iterator[None]:
        """Exclude the time within from the step and its parts."""
        began = clock(device, wall=True)()
        yield
        spent = clock(device, wall=True)() - began
        self._began += spent
        self._last += spent

    def lap(self, name: str, device: torch.device) -> None:
        """End a part."""
        now = clock(device, wall=True)()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def stop(self, device: torch.device) -> dict[str, float]:
        """The parts, and ``seconds`` for the whole step."""
        return {"seconds": clock(device, wall=True)() - self._began, **self._laps}
