"""A model run with the solves of its equilibria replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchimplicit.members import compiled_module
from torchimplicit.nn import Equilibrium, per_solve
from torchimplicit.problems import FixedPoint


class Stated(NamedTuple):
    """An equilibrium as the model states it in one of its calls.

    Attributes:
        problem: its fixed point; the cell's parametrized weights are those of :class:`Replaced`.
        inputs: its arguments.
        z0: where its solve would begin.
        layer: the layer that is called.
    """

    problem: FixedPoint
    inputs: tuple[Any, ...]
    z0: Any
    layer: Equilibrium


class Replaced:
    """A model whose equilibria take the states that they are given, and solve nothing.

    What lies before and after them is thereby known without being told apart. One inside another's cell is solved as
    ever. The cells' parametrized weights are computed once, here, without a gradient.

    Args:
        model: contains an :class:`~torchimplicit.nn.Equilibrium`, or several.

    Attributes:
        layers: those that are replaced.

    Raises:
        ValueError: there is none, or one whose state is one system for the whole batch.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        found = [module for module in model.modules() if isinstance(module, Equilibrium)]
        inner = {module for layer in found for module in layer.cell.modules()}
        self.layers = [layer for layer in found if layer not in inner]
        if not self.layers:
            raise ValueError(
                f"{type(model).__name__} contains no torchimplicit.nn.Equilibrium, whose state these attacks find "
                "together with the image: put the layer that is solved for into one, or take an attack for explicit "
                "networks, such as torchattacks.PGD"
            )
        if not all(layer.batched for layer in self.layers):
            raise ValueError(
                f"an Equilibrium in {type(model).__name__} was made with batched=False: its images share one state, "
                "and an attack changes each for itself. Make it with batched=True"
            )
        with torch.no_grad():
            self._cells = {
                layer: layer.cell if compiled_module(layer.cell) is not None else per_solve(layer.cell)
                for layer in self.layers
            }

    @property
    def rowwise(self) -> bool:
        """Whether every layer promises that samples do not depend on each other."""
        return all(layer.rowwise for layer in self.layers)

    def run(self, images: Tensor, answer: Callable[[int, Stated], tuple[Any, Any]]) -> Tensor:
        """The model's scores ``[batch, classes]``, with the n-th solve's value and aux as ``answer(n, stated)`` says.

        Raises:
            ValueError: the model calls no equilibrium, or gives no scores.
        """
        count = 0

        def solved(
            layer: Equilibrium,
            *inputs: Any,
            z0: Any = None,
            index: Any = None,
            solver: Any = None,
            gradient: Any = None,
        ) -> _Answer:
            nonlocal count
            problem = FixedPoint(self._cells[layer], rowwise=layer.rowwise, has_aux=layer.has_aux, unpack=layer.unpack)
            begun = layer._initial(inputs) if z0 is None else z0
            answered = _Answer(*answer(count, Stated(problem, inputs, begun, layer)))
            count += 1
            return answered

        with _answering(self.layers, solved):
            scores = self.model(images)
        if not count:
            raise ValueError(
                f"{type(self.model).__name__} contains an Equilibrium, and calling the model did not use it"
            )
        if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(images):
            shown = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise ValueError(
                f"{type(self.model).__name__} returned {shown} for {len(images)} images, and an attack needs a "
                "classifier's scores, [batch, classes]: give a module that returns these alone"
            )
        return scores

    def start(self, images: Tensor) -> tuple[Any, ...]:
        """Where the solves would begin, one after the other."""
        begun: list[Any] = []

        def answer(number: int, stated: Stated) -> tuple[Any, Any]:
            begun.append(stated.z0)
            _, aux = _evaluated(stated, stated.z0)
            return stated.z0, aux

        self.run(images, answer)
        return tuple(begun)

    def once(self, states: tuple[Any, ...], images: Tensor) -> tuple[tuple[Any, ...], Tensor]:
        """What each equilibrium's map makes of its state, and the scores at these states."""
        made: list[Any] = []

        def answer(number: int, stated: Stated) -> tuple[Any, Any]:
            if number >= len(states):
                raise ValueError(
                    "the model calls its equilibria more often in one run than in another: an attack needs their "
                    "number to be the same"
                )
            image, aux = _evaluated(stated, states[number])
            made.append(image)
            return states[number], aux

        scores = self.run(images, answer)
        return tuple(made), scores


def _evaluated(stated: Stated, z: Any) -> tuple[Any, Any]:
    """The map at ``z``, and what the cell returns beside it."""
    problem = stated.problem
    found = problem.f(*z, *stated.inputs) if problem.unpack else problem.f(z, *stated.inputs)
    return found if problem.has_aux else (found, None)


class _Answer:
    """What stands in for a solution where nothing was solved."""

    def __init__(self, value: Any, aux: Any):
        self.value, self.aux = value, aux

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"under an attack an Equilibrium's solution has a value and aux alone, and no {name}")


@contextmanager
def _answering(layers: list[Equilibrium], solved: Callable[..., _Answer]) -> Iterator[None]:
    """The layers' solves go to ``solved``."""
    for layer in layers:
        layer.__dict__["solve"] = partial(solved, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("solve", None)
