"""A field and the signal that it is fitted to, for the framework that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import log10, prod, sqrt
from typing import Protocol, final

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.models import ImplicitRepresentation
from torchimplicit.recipes.fields.memory import accumulated, chunk_points
from torchimplicit.recipes.fields.model import SAMPLED_AT_ONCE, representation, sampled, values_at
from torchimplicit.recipes.fields.points import Points, centres
from torchimplicit.recipes.fields.settings import FieldSettings
from torchimplicit.recipes.runtime.task import Metric, Shard, Split, Task, generator

Criterion = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
"""What is lowered: of the field as a function of coordinates, the points' coordinates, and the signal's values there; a
mean over the points. It may differentiate the field, if the settings pass :func:`.settings.check_slopes`."""


def mean_squared_error(field: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The usual criterion."""
    return functional.mse_loss(field(x), y)


class Scoring(Protocol):
    """What a fit is judged by on points that are held out."""

    @property
    def metric(self) -> Metric:
        """By which the weights are selected; one of the figures."""

    def sums(self, values: Tensor, y: Tensor) -> Tensor:
        """Sums ``[k]`` (float64) over points, of the field's values and the signal's, each ``[points, ...]``."""

    def figures(self, sums: list[float]) -> dict[str, float]:
        """The figures of all points, from their sums."""


@final
@dataclass(frozen=True, kw_only=True)
class SignalToNoise:
    """The peak signal-to-noise ratio of values cut to the signal's range, from ``low`` to ``high``; and the plain one,
    where the signal's power is given: the mean of its squares."""

    low: float
    high: float
    power: float | None = None

    @property
    def metric(self) -> Metric:
        """See :class:`Scoring`."""
        return Metric("PSNR", "dB", "max")

    def sums(self, values: Tensor, y: Tensor) -> Tensor:
        """The sum of the squared errors, and how many there are."""
        error = (values.clamp(self.low, self.high) - y).double().square()
        return torch.stack([error.sum(), error.new_tensor(float(error.numel()))])

    def figures(self, sums: list[float]) -> dict[str, float]:
        """The ratio, and the mean squared error as ``loss``."""
        loss = sums[0] / sums[1]
        found = {"PSNR": decibels(loss, self.high - self.low)}
        if self.power is not None:
            found["SNR"] = decibels(loss, sqrt(self.power))
        return {**found, "loss": loss}


@dataclass(frozen=True)
class Parts:
    """Which points are for what: int64 ``[count]`` each."""

    training: Tensor
    validation: Tensor
    test: Tensor

    @staticmethod
    def same(points: Points) -> Parts:
        """All points for everything: where a fit is wanted, and nothing is held out."""
        every = torch.arange(len(points))
        return Parts(every, every, every)


class FieldTask(Task):
    """A representation fitted to a signal's points.

    A step has all training points, in order, or ``batch_size`` of them, without replacement.

    Args:
        config: the recipe's.
        points, parts: the signal.
        frequencies: the scale of the frequencies where the settings leave it to the recipe.
        criterion: by default the mean squared error.
        about: the signal, in one sentence for people.
        scoring: what is measured on the held-out points; by default the signal-to-noise ratio.
        slopes: whether the criterion differentiates the field, which takes more memory.

    Attributes:
        model: the representation.
        points: the signal.
    """

    training_points: Tensor

    def __init__(
        self,
        config: FieldSettings,
        points: Points,
        parts: Parts,
        frequencies: float,
        criterion: Criterion = mean_squared_error,
        about: str = "",
        scoring: Scoring | None = None,
        slopes: bool = False,
    ):
        super().__init__()
        self.config = config
        self.points = points
        self.parts = parts
        self.criterion = criterion
        self.scoring = SignalToNoise(low=points.low, high=points.high) if scoring is None else scoring
        self.metric = self.scoring.metric
        self._about = about
        batch, count = config.optimization.batch_size, len(parts.training)
        self.chunk = chunk_points(config, count, slopes)
        self.register_buffer("training_points", parts.training, persistent=False)
        whole = batch >= count and self.chunk >= count
        self.model = representation(
            config, points.inputs, points.outputs, points.corner, frequencies, None if whole else count
        )

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Tensor]:
        """See :class:`~torchimplicit.recipes.runtime.task.Task`: a batch is places among the training points."""
        chosen = self.config.optimization
        return _Batches(len(self.parts.training), chosen.batch_size, chosen.seed, steps, shard)

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Tensor]:
        """See :class:`~torchimplicit.recipes.runtime.task.Task`."""
        part = self.parts.validation if split == "validation" else self.parts.test
        return _Chunks(part[shard.rank :: shard.world], min(self.chunk, SAMPLED_AT_ONCE))

    def loss(self, batch: Tensor) -> Tensor:
        """The criterion over the points."""
        return accumulated(self._misfit, batch, self.chunk, list(self.model.parameters()))

    def _misfit(self, places: Tensor) -> Tensor:
        x, y = self.points.at(self.training_points[places])
        return self.criterion(lambda x: values_at(self.model, x, places), x, y)

    def score(self, batch: Tensor) -> Tensor:
        """See :class:`Scoring`."""
        x, y = self.points.at(batch)
        return self.scoring.sums(self.model(x), y)

    def figures(self, sums: list[float]) -> dict[str, float]:
        """See :class:`Scoring`."""
        return self.scoring.figures(sums)

    def begin(self) -> None:
        """Forget the states of the last segment: a resumed run would not have them."""
        if isinstance(self.model, ImplicitRepresentation) and self.model.equilibrium.warm_start is not None:
            self.model.equilibrium.warm_start.reset()

    def describe(self) -> str:
        """The signal and the model."""
        chosen, count = self.config.representation, len(self.parts.training)
        name = {"siren": "SIREN", "fourier": "Fourier MFN", "gabor": "Gabor MFN"}[chosen.filter]
        parameters = sum(p.numel() for p in self.model.parameters())
        batch = min(self.config.optimization.batch_size, count)
        chunks = -(-batch // self.chunk)
        return (
            f"{self._about} {'Implicit' if chosen.implicit else 'Explicit'} {name}, {chosen.depth} × {chosen.width}, "
            f"{parameters} parameters, {batch} of {count} points a step"
            + (f", in {chunks} chunks for --memory-mb {chosen.memory_mb}." if chunks > 1 else ".")
        ).strip()

    def on_grid(self, sizes: Sequence[int], into: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The field on a grid of any size over the signal's domain: ``[*sizes, outputs]``, on the CPU.

        Args:
            sizes: of the grid.
            into: what is made of the values of some points, such as bytes, before the next are sampled.
        """
        return self.cells(sizes, range(prod(sizes)), into).reshape(*sizes, -1)

    def cells(self, sizes: Sequence[int], part: range, into: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The field at some cells of such a grid, numbered in order: ``[len(part), outputs]``."""
        size = min(self.chunk, SAMPLED_AT_ONCE)
        index = (torch.arange(i, min(i + size, part.stop)) for i in range(part.start, part.stop, size))
        return sampled(self.model, (centres(one, sizes, self.points.corner) for one in index), into)


def decibels(error: float, peak: float) -> float:
    """The peak signal-to-noise ratio of a mean squared error."""
    return 10 * log10(peak * peak / max(error, 1e-20))


class _Chunks:
    """Points in order, so many at a time: a tuple of tensors would be as many loaders to Lightning."""

    def __init__(self, index: Tensor, size: int):
        self.parts = index.split(size)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.parts)


class _Batches:
    """The places of each step: all of them in order, or a part of a permutation that lasts a whole pass."""

    def __init__(self, count: int, batch_size: int, seed: int, steps: range, shard: Shard):
        self.count, self.seed, self.steps, self.shard = count, seed, steps, shard
        self.batch_size = min(count, batch_size)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Tensor]:
        rank, world = self.shard.rank, self.shard.world
        if self.batch_size == self.count:
            whole = torch.arange(self.count)[rank::world]
            yield from (whole for _ in self.steps)
            return
        per_pass = self.count // self.batch_size
        order: tuple[int, Tensor] | None = None
        for step in self.steps:
            turn, place = divmod(step, per_pass)
            if order is None or order[0] != turn:
                order = turn, torch.randperm(self.count, generator=generator(self.seed, turn))
            yield order[1][place * self.batch_size : (place + 1) * self.batch_size][rank::world]
