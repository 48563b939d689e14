"""A model run with the solves of its equilibria replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchimplicit._solve import solve
from torchimplicit.gradients import Gradient
from torchimplicit.members import compiled_module
from torchimplicit.nn import Equilibrium, per_solve
from torchimplicit.problems import FixedPoint
from torchimplicit.solution import Solution
from torchimplicit.solvers import Solver


class Stated(NamedTuple):
    """The equilibrium of one call of a layer by the model.

    Attributes:
        problem: the fixed-point problem; the cell's parametrized weights are those of :class:`Replaced`.
        inputs: the inputs of the layer.
        z0: the initial state.
        layer: the layer that is called.
    """

    problem: FixedPoint
    inputs: tuple[Any, ...]
    z0: Any
    layer: Equilibrium


class Replaced:
    """A model whose equilibrium layers return given states instead of solving.

    So the model's code before and after the layers runs unchanged, and need not be split. An equilibrium inside the
    cell of another is solved as usual. The cells' parametrized weights are computed once, here, without a gradient.

    Args:
        model: a module that contains one :class:`~torchimplicit.nn.Equilibrium` or more.

    Attributes:
        layers: the layers that are replaced.

    Raises:
        ValueError: there is no such layer, or one with ``batched=False``.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        layers = [module for module in model.modules() if isinstance(module, Equilibrium)]
        inner = {module for layer in layers for module in layer.cell.modules()}
        self.layers = [layer for layer in layers if layer not in inner]
        if not self.layers:
            raise ValueError(
                f"{type(model).__name__} contains no torchimplicit.nn.Equilibrium, whose state these attacks find "
                "together with the image: wrap the implicit layer in one, or use an attack for explicit networks, such "
                "as torchattacks.PGD"
            )
        if not all(layer.batched for layer in self.layers):
            raise ValueError(
                f"an Equilibrium in {type(model).__name__} was made with batched=False, so that its images share one "
                "state, but an attack changes each image separately. Make it with batched=True"
            )
        with torch.no_grad():
            self._cells = {
                layer: layer.cell if compiled_module(layer.cell) is not None else per_solve(layer.cell)
                for layer in self.layers
            }

    @property
    def rowwise(self) -> bool:
        """True if every layer promises that samples do not depend on each other."""
        return all(layer.rowwise for layer in self.layers)

    def run(self, images: Tensor, answer: Callable[[int, Stated], tuple[Any, Any]]) -> Tensor:
        """The model's scores ``[batch, classes]``, with ``answer(n, stated)`` as the value and aux of its n-th solve.

        Raises:
            ValueError: the model calls no equilibrium, or does not return scores.
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
            start = layer._initial(inputs) if z0 is None else z0
            answered = _Answer(*answer(count, Stated(problem, inputs, start, layer)))
            count += 1
            return answered

        with _answering(self.layers, solved):
            scores = self.model(images)
        if not count:
            raise ValueError(
                f"{type(self.model).__name__} contains an Equilibrium, but calling the model did not use it"
            )
        if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(images):
            shown = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise ValueError(
                f"{type(self.model).__name__} returned {shown} for {len(images)} images, but an attack needs a "
                "classifier's scores, [batch, classes]: give a module that returns only these"
            )
        return scores

    def start(self, images: Tensor) -> tuple[Any, ...]:
        """The initial states of all solves, in the order of the calls."""
        starts: list[Any] = []

        def answer(number: int, stated: Stated) -> tuple[Any, Any]:
            starts.append(stated.z0)
            _, aux = _evaluated(stated, stated.z0)
            return stated.z0, aux

        self.run(images, answer)
        return tuple(starts)

    def solved(
        self,
        images: Tensor,
        states: tuple[Any, ...],
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        throw: bool | None = None,
    ) -> tuple[Tensor, list[Solution]]:
        """The model's scores at its equilibria, and the solutions found from the starts ``states``; by the layers' own
        settings where none are given."""
        solutions: list[Solution] = []

        def answer(number: int, stated: Stated) -> tuple[Any, Any]:
            layer = stated.layer
            solution = solve(
                stated.problem,
                states[number],
                *stated.inputs,
                solver=solver or layer.eval_solver or layer.solver,
                gradient=gradient or layer.gradient,
                throw=layer.throw if throw is None else throw,
            )
            solutions.append(solution)
            return solution.value, solution.aux if layer.has_aux else None

        return self.run(images, answer), solutions

    def once(self, states: tuple[Any, ...], images: Tensor) -> tuple[tuple[Any, ...], Tensor]:
        """One evaluation of each equilibrium's map at its state, and the model's scores at these states."""
        mapped: list[Any] = []

        def answer(number: int, stated: Stated) -> tuple[Any, Any]:
            if number >= len(states):
                raise ValueError(
                    "the model calls its equilibria more often in one run than in another, but an attack needs the "
                    "same number of calls in every run"
                )
            image, aux = _evaluated(stated, states[number])
            mapped.append(image)
            return states[number], aux

        scores = self.run(images, answer)
        return tuple(mapped), scores


def _evaluated(stated: Stated, z: Any) -> tuple[Any, Any]:
    """The map at ``z``, and its aux (``None`` without ``has_aux``)."""
    problem = stated.problem
    result = problem.f(*z, *stated.inputs) if problem.unpack else problem.f(z, *stated.inputs)
    return result if problem.has_aux else (result, None)


class _Answer:
    """A stand-in for the solution of a layer that did not solve."""

    def __init__(self, value: Any, aux: Any):
        self.value, self.aux = value, aux

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"during an attack, the solution of an Equilibrium has only value and aux, no {name}")


@contextmanager
def _answering(layers: list[Equilibrium], solved: Callable[..., _Answer]) -> Iterator[None]:
    """Replace the ``solve`` of the layers by ``solved`` while the context lasts."""
    for layer in layers:
        # an attribute of the instance hides the method of the class, which forward calls as self.solve
        layer.__dict__["solve"] = partial(solved, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("solve", None)
