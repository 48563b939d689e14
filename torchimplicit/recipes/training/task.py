"""What a recipe trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from torchimplicit.solution import Solution

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Metric:
    """The figure that training is judged by.

    Attributes:
        name: as in the figures of :meth:`Task.figures`.
        unit: for people; empty for none. With ``"%"`` the figure is a share, shown times 100.
        best: whether more is better, or less.
    """

    name: str
    unit: str
    best: Literal["max", "min"]

    def better(self, one: float, other: float) -> bool:
        """Whether ``one`` beats ``other``; nothing beats by being NaN."""
        return one > other if self.best == "max" else one < other

    def text(self, value: float) -> str:
        """For people."""
        return f"{100 * value:.2f} %" if self.unit == "%" else f"{value:.4g} {self.unit}".rstrip()


@dataclass(frozen=True)
class Shard:
    """This process's share of every batch: samples ``rank``, ``rank + world``, ..."""

    rank: int = 0
    world: int = 1


class Task(nn.Module, ABC):
    """A model, its data, and what is asked of it. Made from the config alone, in every process alike.

    Every :class:`~torchimplicit.nn.Equilibrium` within is trained with the solver and the gradient that the recipe's
    settings name: :meth:`__init__` gives them to the model.

    Attributes:
        metric: on the validation split it selects the weights that are tested.
    """

    metric: Metric

    def __init__(self) -> None:
        super().__init__()
        self.listeners: list[Callable[[Solution], None]] = []

    def solved(self, solution: Solution) -> None:
        """Tell of a solve that no layer makes, so that its evaluations are counted."""
        for listener in self.listeners:
            listener(solution)

    @abstractmethod
    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        """The batches of these optimizer steps, one each; a step's batch depends on the step and the seed alone."""

    @abstractmethod
    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        """The batches of a whole split, in order."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """What the step lowers: a scalar, a mean over the batch."""

    @abstractmethod
    def score(self, batch: Any) -> Tensor:
        """Sums ``[k]`` (float64), of which :meth:`figures` makes the figures of a split."""

    @abstractmethod
    def figures(self, sums: list[float]) -> dict[str, float]:
        """The figures of a split, from its sums; among them the metric, and usually ``loss``."""

    def begin(self) -> None:
        """Called before a pass over a split and before every segment of training: forget what is carried from batch to
        batch."""

    def describe(self) -> str:
        """The data, in one sentence for people."""
        return ""
