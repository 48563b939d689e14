"""Fits a function of coordinates to a signal, by an implicit representation or its explicit counterpart.

A recipe of this family brings three things: its settings, among them a :class:`.settings.Representation`; the signal,
as :class:`Points` with its splits; and what it shows of a fit. :class:`FieldTask` trains it, and :class:`FieldRunner`
lets it show the best weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import log10, prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, final

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn import functional

from torchimplicit.models import MFN, SIREN, ImplicitMFN, ImplicitRepresentation, ImplicitSIREN
from torchimplicit.models.representations import Norm
from torchimplicit.nn import WarmStart
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.page import Section, axes, document, media, saved, style, styled
from torchimplicit.recipes.runtime.run import Run, Runner, threads
from torchimplicit.recipes.runtime.settings import Equilibria, Optimization, Trained, positive
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Table, sheet, shown
from torchimplicit.recipes.runtime.task import Batches, Metric, Shard, Split, Task, generator, gradient, solver
from torchimplicit.recipes.runtime.trainer import Results, Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

# -- The settings that every fit of a field has ------------------------------------------------------------------------


FilterKind = Literal["siren", "fourier", "gabor"]
FILTERS: tuple[FilterKind, ...] = ("siren", "fourier", "gabor")

NAMES: dict[tuple[FilterKind, bool], str] = {
    ("siren", True): "iSIREN",
    ("siren", False): "SIREN",
    ("fourier", True): "Fourier-iMFN",
    ("fourier", False): "Fourier-MFN",
    ("gabor", True): "Gabor-iMFN",
    ("gabor", False): "Gabor-MFN",
}
"""Names of a filter's implicit representation and of its explicit counterpart."""


@dataclass(frozen=True, kw_only=True)
class Representation:
    """The fitted function, and the memory of a step."""

    filter: FilterKind = "fourier"
    """siren: SIREN or iSIREN. fourier, gabor: multiplicative filter networks, or their implicit form."""

    implicit: bool = True
    """Use the fixed point of the cell. Otherwise its explicit counterpart, which has as many parameters and applies the
    cell once."""

    width: int = 128
    """Width of the state and the layers."""

    depth: int = 1
    """Number of layers in the cell."""

    frequencies: float | None = None
    """Scale of the frequencies. Default: the recipe's, which grows with the signal's resolution."""

    norm: Literal["published", "none", "spectral", "weight", "frobenius"] = "published"
    """Constraint on the layers' weights. published: the spectral norm on implicit and explicit models of pictures, on
    implicit models only of shapes, and none for sound and video."""

    bound: float = 0.97
    """Largest spectral or Frobenius norm; larger weights are scaled down to it."""

    window_alpha: float = 3.0
    """Shape parameter of the Gabor filters' windows; larger values make them narrower."""

    first_alpha: float = 6.0
    """Shape parameter of the first filter's windows."""

    amortize: Literal["refresh", "solve", "off"] = "refresh"
    """How a training step finds the states. refresh: one evaluation from the last states. solve: a solve that starts
    from them. off: a solve from zero."""

    memory_mb: int = 1024
    """Memory for the states, filters and gradients of a training step, in megabytes. Points that do not fit are
    processed in chunks whose gradients are summed: the step stays the same."""

    def __post_init__(self) -> None:
        positive(self, "width", "depth", "frequencies", "bound", "window_alpha", "first_alpha", "memory_mb")


Held = Literal["both", "implicit", "neither"]
"""Models that the paper constrains by a spectral norm, for a kind of signal."""


class FieldSettings(Trained, Protocol):
    """Config of a recipe that fits a field."""

    @property
    def representation(self) -> Representation:
        """The representation that is fitted."""


def truncated(terms: int = 2) -> Equilibria:
    """Training of amortized equilibria (Huang et al. 2021): one evaluation per step from the last state, and the first
    ``terms`` terms of the Neumann series; 2 terms take one product with the Jacobian."""
    return Equilibria(
        solver="anderson",
        solver_steps=60,
        tolerance=1e-3,
        gradient="neumann-phantom",
        phantom_steps=terms,
        phantom_damping=1.0,
        backward_tolerance=1e-3,
        backward_steps=60,
    )


def full_batch(steps: int, validate_every: int, learning_rate: float = 1e-3) -> Optimization:
    """All points in every step, with Adam at a constant rate, as in the paper."""
    return Optimization(
        steps=steps,
        batch_size=1 << 22,
        optimizer="adam",
        learning_rate=learning_rate,
        schedule="constant",
        validate_every=validate_every,
    )


def check_fit(config: FieldSettings) -> None:
    """Raise if settings of several groups are incompatible."""
    chosen = config.representation
    if not chosen.implicit:
        return
    name = config.equilibria.gradient
    if chosen.amortize == "refresh" and name in ("unrolled-phantom", "unrolled"):
        raise UserError(
            f"--gradient {name} differentiates steps of a solve, and --amortize refresh takes none; use --amortize "
            "solve, or --gradient neumann-phantom"
        )
    if chosen.amortize != "off" and name == "unrolled":
        raise UserError("--gradient unrolled differentiates the steps of a solve from zero; add --amortize off")


def check_slopes(config: FieldSettings) -> None:
    """Raise if the settings cannot train a loss that contains derivatives of the field. Its gradient is a second
    derivative, which neither the adjoint's estimators nor states carried over from the last step support."""
    chosen = config.representation
    if not chosen.implicit:
        return
    if config.equilibria.gradient not in ("implicit", "unrolled"):
        raise UserError(
            f"--gradient {config.equilibria.gradient} has no exact second derivative, and the loss holds slopes of the "
            "field; use --gradient implicit"
        )
    if chosen.amortize == "refresh":
        raise UserError(
            "--amortize refresh has no second derivative, and the loss holds slopes of the field; use --amortize solve"
        )


# -- The representation that settings describe -------------------------------------------------------------------------


SAMPLED_AT_ONCE = 65536
"""Number of points evaluated together without gradients."""


def representation(
    config: FieldSettings,
    inputs: int,
    outputs: int,
    corner: Sequence[float],
    frequencies: float,
    samples: int | None = None,
    held: Held = "both",
) -> nn.Module:
    """The model.

    Args:
        config: the recipe's.
        inputs, outputs, corner: see :class:`~torchimplicit.recipes.representations.fit.Points`.
        frequencies: their scale where the settings leave it to the recipe.
        samples: how many points training numbers, where a step does not have them all, in order, at once.
        held: which models are bounded where the settings say: as published.
    """
    chosen = config.representation
    scale = chosen.frequencies or frequencies
    windows: dict[str, Any] = {"low": [-side for side in corner], "high": list(corner)}
    windows |= {"alpha": chosen.window_alpha, "first_alpha": chosen.first_alpha}
    norms: dict[str, Any] = {"norm": norm_of(chosen, held), "bound": chosen.bound}
    if not chosen.implicit:
        if chosen.filter == "siren":
            return SIREN(inputs, outputs, chosen.width, chosen.depth, scale, **norms)
        return MFN(inputs, outputs, chosen.width, chosen.depth, scale, chosen.filter, **windows, **norms)
    refresh = 1 if chosen.amortize == "refresh" else None
    start = chosen.amortize != "off" and WarmStart(samples, refresh=refresh)
    solved: dict[str, Any] = {"solver": solver(config.equilibria), "gradient": gradient(config.equilibria)}
    solved |= {"warm_start": start, **norms}
    if chosen.filter == "siren":
        return ImplicitSIREN(inputs, outputs, chosen.width, chosen.depth, scale, **solved)
    return ImplicitMFN(inputs, outputs, chosen.width, chosen.depth, scale, chosen.filter, **windows, **solved)


def norm_of(chosen: Representation, held: Held) -> Norm | None:
    """The norm that constrains the layers' weights."""
    if chosen.norm == "published":
        return "spectral" if held == "both" or (held == "implicit" and chosen.implicit) else None
    return None if chosen.norm == "none" else chosen.norm


def values_at(model: nn.Module, x: Tensor, index: Tensor | None = None) -> Tensor:
    """The model at coordinates; ``index`` identifies the points for a model that remembers each."""
    if index is not None and isinstance(model, ImplicitRepresentation):
        start = model.equilibrium.warm_start
        if start is not None and start.samples is not None:
            return model(x, index)
    return model(x)


@torch.no_grad()
def sampled(model: nn.Module, coordinates: Iterator[Tensor], into: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The model at chunks of coordinates, optionally passed through ``into``, concatenated on the CPU."""
    where = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts = []
    for x in coordinates:
        values = model(x.to(where)).cpu()
        parts.append(values if into is None else into(values))
    model.train(was_training)
    return torch.cat(parts)


# -- Steps of bounded memory: a mean over many points, differentiated chunk by chunk -----------------------------------


def chunk_points(config: FieldSettings, training: int, slopes: bool = False) -> int:
    """Number of points per chunk; ``training``: number of training points, ``slopes``: whether the loss contains the
    field's slopes.

    Raises:
        UserError: if the states alone, which amortized training remembers of every point, take more than there is.
    """
    chosen, batch = config.representation, config.optimization.batch_size
    bound = chosen.memory_mb * 2**20
    each = 4 * floats_a_point(config, slopes)
    fitting = bound // each
    if chosen.implicit and chosen.amortize != "off" and min(batch, fitting) < training:
        states = 4 * chosen.width * training
        fitting = (bound - states) // each
        if fitting < 1:
            raise UserError(
                f"the states of {training} points of width {chosen.width} take {states / 2**20:.0f} MB, and "
                f"--memory-mb is {chosen.memory_mb}; give more, or forget the states: --amortize off"
            )
    return max(1, fitting)


HELD = {"siren": 3, "fourier": 4, "gabor": 7}
"""Measured number of vectors of the model's width that a step holds for each filter and the layer after it."""


SLOPES = 2.2
"""Measured factor on that memory if the loss contains slopes, which are differentiated again."""


def floats_a_point(config: FieldSettings, slopes: bool = False) -> int:
    """Floats that a step holds per point at its peak: measured, including the first step's solve, and rounded up."""
    chosen, solve = config.representation, config.equilibria
    vectors = HELD[chosen.filter] * (chosen.depth + 1) + 2
    if chosen.implicit:
        solving = {"anderson": 40, "broyden": 2 * solve.solver_steps + 16, "fixed-point": 16}[solve.solver]
        backward = 4
        if solve.gradient == "implicit":
            backward = min(solve.backward_steps, 30) + 17  # GMRES's basis
        elif solve.gradient in ("unrolled-phantom", "unrolled"):
            steps = solve.phantom_steps if solve.gradient == "unrolled-phantom" else solve.solver_steps
            backward = 3 * chosen.depth * steps + 8
        vectors += max(solving, backward)
    return round(chosen.width * vectors * (SLOPES if slopes else 1))


def accumulated(value: Callable[[Tensor], Tensor], index: Tensor, chunk: int, weights: Sequence[Tensor]) -> Tensor:
    """The mean of ``value`` over the points ``index``, at most ``chunk`` of them at a time.

    ``value`` gives the mean over the points it is given. Where there are several chunks, the gradient in ``weights``
    is computed with the value, chunk by chunk, and handed on by the backward pass: the memory is that of one chunk, and
    the result is that of one pass, up to rounding. First derivatives only, and in ``weights`` only.
    """
    if len(index) <= chunk:
        return value(index)
    parts = index.split(chunk)
    if not torch.is_grad_enabled():
        return torch.stack([value(part) * (len(part) / len(index)) for part in parts]).sum()
    wanted = [w for w in weights if w.requires_grad]
    sums = [torch.zeros_like(w) for w in wanted]
    total: float | Tensor = 0.0
    for part in parts:
        share = value(part) * (len(part) / len(index))
        for held, grad in zip(sums, torch.autograd.grad(share, wanted, allow_unused=True), strict=True):
            if grad is not None:
                held += grad
        total = total + share.detach()
    return cast(Tensor, _Known.apply(total, sums, *wanted))


class _Known(Function):
    """A value whose gradient is already known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        return None, None, *(u * grad for grad in ctx.saved_tensors)


# -- Signals as points: coordinates, and the values there --------------------------------------------------------------


class Points(nn.Module, ABC):
    """A signal known at numbered points.

    Attributes:
        inputs, outputs: coordinates of a point, and values there.
        low, high: the values' range; their difference is the peak of the signal-to-noise ratio.
        corner: the coordinates run from ``-corner[i]`` to ``corner[i]``.
    """

    inputs: int
    outputs: int
    low: float = -1.0
    high: float = 1.0
    corner: tuple[float, ...]

    @abstractmethod
    def __len__(self) -> int:
        """The number of points."""

    @abstractmethod
    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates ``[points, inputs]`` and values ``[points, outputs]`` of the points ``index``."""


@final
class Grid(Points):
    """Values on a regular grid: an image, a sound or a video.

    Args:
        values: ``[size_1, ..., size_d, outputs]``, from ``low`` to ``high``; integers are of eight bits, from 0 to 255.
        corner: upper corner of the coordinates; by default the longest side runs from -1 to 1 and the cells are cubes.
    """

    values: Tensor

    def __init__(self, values: Tensor, corner: Sequence[float] | None = None):
        super().__init__()
        *sizes, self.outputs = values.shape
        self.sizes = tuple(sizes)
        self.inputs = len(sizes)
        self.corner = tuple(n / max(sizes) for n in sizes) if corner is None else tuple(corner)
        self.register_buffer("values", values.flatten(0, -2), persistent=False)

    def __len__(self) -> int:
        return len(self.values)

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(self.values.device)
        values = self.values[index]
        if values.dtype == torch.uint8:
            values = values.float() / 127.5 - 1
        return centres(index, self.sizes, self.corner, values.dtype), values


def centres(index: Tensor, sizes: Sequence[int], corner: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """The centres of the cells ``index`` of a grid, ``[points, len(sizes)]``: cell i of n is at
    ``((2i + 1) / n - 1) * corner``, so that grids of different sizes cover the same domain."""
    columns = []
    for size, side in zip(reversed(sizes), reversed(corner), strict=True):
        columns.append(((2 * (index % size) + 1).to(torch.float64) / size - 1) * side)
        index = index // size
    return torch.stack(columns[::-1], dim=1).to(dtype)


def every_other(sizes: Sequence[int], offset: Sequence[int]) -> Tensor:
    """The cells whose indices are ``offset`` modulo 2: one in ``2 ** len(sizes)``."""
    index = torch.arange(math.prod(sizes)).reshape(*sizes)
    return index[tuple(slice(start, None, 2) for start in offset)].flatten()


# -- A field and the signal that it is fitted to, for the framework that trains ----------------------------------------


Criterion = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
"""The loss: a mean over points of a function of the field, the points' coordinates and the signal's values there. It
may differentiate the field if the settings pass :func:`.settings.check_slopes`."""


def mean_squared_error(field: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The default criterion."""
    return functional.mse_loss(field(x), y)


class Scoring(Protocol):
    """The score of a fit on held-out points."""

    @property
    def metric(self) -> Metric:
        """The figure by which the weights are selected."""

    def sums(self, values: Tensor, y: Tensor) -> Tensor:
        """Sums ``[k]`` (float64) over points, from the field's values and the signal's, each ``[points, ...]``."""

    def figures(self, sums: list[float]) -> dict[str, float]:
        """The figures of all points, from their sums."""


@final
@dataclass(frozen=True, kw_only=True)
class SignalToNoise:
    """Peak signal-to-noise ratio of values clipped to the signal's range ``low`` to ``high``; also the plain ratio if
    the signal's power (mean square) is given."""

    low: float
    high: float
    power: float | None = None

    @property
    def metric(self) -> Metric:
        return Metric("PSNR", "dB", "max")

    def sums(self, values: Tensor, y: Tensor) -> Tensor:
        """The sum of squared errors, and their number."""
        error = (values.clamp(self.low, self.high) - y).double().square()
        return torch.stack([error.sum(), error.new_tensor(float(error.numel()))])

    def figures(self, sums: list[float]) -> dict[str, float]:
        """The ratio, and the mean squared error as ``loss``."""
        loss = sums[0] / sums[1]
        figures = {"PSNR": decibels(loss, self.high - self.low)}
        if self.power is not None:
            figures["SNR"] = decibels(loss, sqrt(self.power))
        return {**figures, "loss": loss}


@dataclass(frozen=True)
class Parts:
    """Indices of the training, validation and test points: int64 ``[count]`` each."""

    training: Tensor
    validation: Tensor
    test: Tensor

    @staticmethod
    def same(points: Points) -> Parts:
        """All points for every split, for fits without held-out points."""
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
        held: which models the paper bounds, for this kind of signal.

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
        held: Held = "both",
    ):
        super().__init__()
        self.config = config
        self.points = points
        self.parts = parts
        self.criterion = criterion
        self.scoring = SignalToNoise(low=points.low, high=points.high) if scoring is None else scoring
        self.metric = self.scoring.metric
        self._about = about
        norm = norm_of(config.representation, held)
        bounded = f" norms at most {config.representation.bound:g}" if norm != "weight" else " norm"
        self._norm = "free weights" if norm is None else f"{norm}{bounded}"
        batch, count = config.optimization.batch_size, len(parts.training)
        self.chunk = chunk_points(config, count, slopes)
        self.register_buffer("training_points", parts.training, persistent=False)
        whole = batch >= count and self.chunk >= count
        self.model = representation(
            config, points.inputs, points.outputs, points.corner, frequencies, None if whole else count, held
        )

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Tensor]:
        chosen = self.config.optimization
        count = len(self.parts.training)
        return Batches(len(steps), lambda: _places(count, min(count, chosen.batch_size), chosen.seed, steps, shard))

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Tensor]:
        part = self.parts.validation if split == "validation" else self.parts.test
        parts = part[shard.rank :: shard.world].split(min(self.chunk, SAMPLED_AT_ONCE))
        return Batches(len(parts), lambda: iter(parts))  # a tuple would be as many loaders to Lightning

    def loss(self, batch: Tensor) -> Tensor:
        """The criterion over the points."""
        return accumulated(self._misfit, batch, self.chunk, list(self.model.parameters()))

    def _misfit(self, places: Tensor) -> Tensor:
        x, y = self.points.at(self.training_points[places])
        return self.criterion(lambda x: values_at(self.model, x, places), x, y)

    def score(self, batch: Tensor) -> Tensor:
        x, y = self.points.at(batch)
        return self.scoring.sums(self.model(x), y)

    def figures(self, sums: list[float]) -> dict[str, float]:
        return self.scoring.figures(sums)

    def begin(self) -> None:
        """Forget the states of the last segment, which a resumed run would not have."""
        if isinstance(self.model, ImplicitRepresentation) and self.model.equilibrium.warm_start is not None:
            self.model.equilibrium.warm_start.reset()

    def describe(self) -> str:
        """The signal and the model."""
        chosen, count = self.config.representation, len(self.parts.training)
        name = {"siren": "SIREN", "fourier": "Fourier MFN", "gabor": "Gabor MFN"}[chosen.filter]
        batch = min(self.config.optimization.batch_size, count)
        chunks = -(-batch // self.chunk)
        return (
            f"{self._about} {'Implicit' if chosen.implicit else 'Explicit'} {name}, {chosen.depth} × {chosen.width}, "
            f"{self.weights} parameters, {self._norm}, {batch} of {count} points a step"
            + (f", in {chunks} chunks for --memory-mb {chosen.memory_mb}." if chunks > 1 else ".")
        ).strip()

    def on_grid(self, sizes: Sequence[int], into: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The field on a grid of any size over the signal's domain: ``[*sizes, outputs]``, on the CPU.

        Args:
            sizes: sizes of the grid.
            into: what is made of the values of some points, such as bytes, before the next are sampled.
        """
        return self.cells(sizes, range(prod(sizes)), into).reshape(*sizes, -1)

    def cells(self, sizes: Sequence[int], part: range, into: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The field at some cells of such a grid, numbered in order: ``[len(part), outputs]``."""
        size = min(self.chunk, SAMPLED_AT_ONCE)
        index = (torch.arange(i, min(i + size, part.stop)) for i in range(part.start, part.stop, size))
        return sampled(self.model, (centres(one, sizes, self.points.corner) for one in index), into)


def noted(about: str, notes: Sequence[str]) -> str:
    """One sentence about a signal and how it was preprocessed."""
    return ", ".join((about, *notes)) + "."


def decibels(error: float, peak: float) -> float:
    """The peak signal-to-noise ratio for a mean squared error."""
    return 10 * log10(peak * peak / max(error, 1e-20))


def _places(count: int, batch_size: int, seed: int, steps: range, shard: Shard) -> Iterator[Tensor]:
    """The point indices of each step: all in order, or a part of a permutation that lasts a whole pass."""
    order, last = torch.arange(count), None
    for step in steps:
        turn, place = divmod(step, count // batch_size)
        if batch_size < count and turn != last:
            order, last = torch.randperm(count, generator=generator(seed, turn)), turn
        start = place * batch_size
        yield order[start : start + batch_size][shard.rank :: shard.world]


# -- What every fit of a field shows: its curve, and a page with its pictures and figures ------------------------------


def curve(results: Results, metric: Metric) -> Figure:
    """The metric on the validation points against steps and seconds."""
    scale, unit = (100.0 if metric.unit == "%" else 1.0), f" ({metric.unit})" if metric.unit else ""
    drawn, panels = axes(2, width=4.5, height=3.2)
    values = [scale * v.figures[metric.name] for v in results.validations]
    for ax, place, name in zip(panels, ("step", "seconds"), ("step", "seconds of training"), strict=True):
        ax.plot([getattr(v, place) for v in results.validations], values, **style(0))
        ax.set(xlabel=name, ylabel=metric.name + unit)
    return drawn


def write_page(
    title: str,
    task: FieldTask,
    results: Results,
    run: Run,
    pictures: Sequence[tuple[Path, str]],
    notes: Sequence[str] = (),
) -> None:
    """``index.html`` and ``figures/curve.png``.

    Args:
        title: title to display.
        task, results, run: the fit.
        pictures: files to see (PNG, GIF) and to hear (WAV), with their captions.
        notes: paragraphs below the figures.
    """
    with styled():
        caption = f"The {task.metric.name} on the validation points during training."
        curves = saved([CaptionedFigure("curve", curve(results, task.metric), caption)], run)
    pieces = [*(media(path, caption, run.path) for path, caption in pictures), *curves]
    sections = [Section(table=summary(results), notes=notes), Section(pictures=pieces)]
    run.write_text("index.html", document(title, [task.describe()], sections))


def summary(results: Results) -> Table:
    """The figures of the fit."""
    costs = results.costs
    names = list(results.test.figures) if results.test is not None else ["PSNR", "loss"]
    splits = [(name, one) for name, one in (("Validation", results.best), ("Test", results.test)) if one is not None]

    def figure(name: str) -> Cell[Any]:
        unit = "dB" if name in ("PSNR", "SNR") else ""
        return Cell(name if unit else name.capitalize(), lambda split: f"{split[1].figures[name]:.4g}", unit)

    return sheet("", splits, [
        Cell[Any]("Split", lambda split: split[0]),
        *(figure(name) for name in names),
        Cell("At step", lambda split: str(split[1].step), "", "Step of the best validation, whose weights are tested."),
        Cell("Training", lambda split: f"{split[1].seconds:.1f}", "s", "Wall time until then."),
        Cell("Step", lambda _: shown(costs and 1e3 * costs.seconds, ".1f"), "ms",
             "Time of a training step (forward, backward and update), median over the steps."),
        Cell("Forward", lambda _: shown(costs and costs.forward, ".2f"), "evaluations",
             "Evaluations of the cell in a training step, mean over the steps."),
        Cell("Backward", lambda _: shown(costs and costs.backward, ".2f"), "products",
             "Products with the cell's Jacobian in a training step, mean over the steps."),
    ]).table  # fmt: skip


# -- The runner of every recipe that fits a field: training, and then a look at the best weights -----------------------


class FieldRunner(Runner):
    """Trains like :class:`~torchimplicit.recipes.runtime.trainer.Trainer`, then shows the fit.

    Args:
        build: makes the task from the config.
        show: ``(config, task, results, run)``: writes what there is to see and to hear into the run's directory; the
            task has the weights of the best validation, on the device that the config asks for.
        ready: as for the trainer; settings that do not go together are refused before it.
        export: ``(config, task, sizes, run)``: writes the field at the sizes that a person typed, and says where.
    """

    def __init__(
        self,
        build: Callable[[Any], FieldTask],
        show: Callable[[Any, Any, Results, Run], None],
        ready: Callable[[Any], None] | None = None,
        export: Callable[[Any, Any, tuple[int, ...], Run], Path] | None = None,
    ):
        self._trainer = Trainer(build, self._ready)
        self._own = ready
        self._show = show
        self._export = export

    def check(self, config: Any) -> None:
        self._trainer.check(config)

    def train(self, config: Any, run: Run, console: Console) -> bool:
        if not self._trainer.train(config, run, console):
            return False
        self._look(config, run, console)
        return True

    def evaluate(self, config: Any, run: Run, console: Console) -> None:
        self._trainer.evaluate(config, run, console)
        try:
            self._look(config, run, console)
        except OSError as error:
            raise UserError(f"{run} has no results yet ({error}); continue with: torchimplicit resume {run}") from None

    def export(self, config: Any, sizes: tuple[int, ...], run: Run, console: Console) -> Path:
        if self._export is None:
            raise UserError(f"{run} cannot be sampled at another size")
        if any(size < 1 for size in sizes):
            raise UserError(f"--export-size {' '.join(map(str, sizes))} must be positive")
        self.check(config)
        with threads(config.machine.threads), console.status("Sampling the field"):
            return self._export(config, self.task(config, run), sizes, run)

    def task(self, config: Any, run: Run) -> FieldTask:
        """The task with the weights of the run's best validation."""
        task: FieldTask = self._trainer.best(config, run)
        return task

    def _look(self, config: Any, run: Run, console: Console) -> None:
        with threads(config.machine.threads), console.status("Sampling the field"):
            self._show(config, self.task(config, run), Results.of(run), run)

    def _ready(self, config: Any) -> None:
        check_fit(config)
        if config.machine.precision != "32":
            raise UserError(f"--precision {config.machine.precision} would round the coordinates; fields need 32")
        if self._own is not None:
            self._own(config)
