"""How a differential equation is stated: where it is asked for, and what must vanish there.

::

    from torch import pi, sin

    from torchimplicit.recipes.physics.statement import Condition, Equation

    equation = Equation(
        title="Heat on a rod",
        inputs={"t": (0.0, 1.0), "x": (0.0, 1.0)},
        outputs=("u",),
        inside=lambda p: p.u_t - 0.1 * p.u_xx,
        conditions=(
            Condition(lambda p: p.u - sin(pi * p.x), at={"t": 0.0}),
            Condition(lambda p: p.u, at={"x": 0.0}),
            Condition(lambda p: p.u, at={"x": 1.0}),
        ),
    )
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchimplicit.recipes.runtime.errors import UserError

Array = NDArray[np.float64]
Order = tuple[int, ...]

MEASURES = {"iae": "IAE", "relative_l2": "Relative error (L2)"}
"""Labels of the errors that :meth:`Equation.errors` gives."""

# -- What residuals are made of ----------------------------------------------------------------------------------------


class At:
    """The points of a condition, as its residual sees them: coordinates, the function and its derivatives, and unknown
    parameters, each ``[points]`` under its name.

    The outputs and the inputs of ``Equation(inputs={"t": ..., "x": ...}, outputs=("u",))`` are ``p.u``, ``p.t`` and
    ``p.x``, derivatives ``p.u_t``, ``p.u_xx``, ``p.u_tx``, of any order.
    """

    def __init__(self, names: Names, points: Tensor, derivatives: Callable[[int, Order], Tensor], unknown: Any):
        self._names, self._points, self._derivatives, self._unknown = names, points, derivatives, unknown

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__"):  # asked for by copying and pickling
            raise AttributeError(name)
        if name in self._names.inputs:
            return self._points[:, self._names.inputs.index(name)]
        if name in self._names.unknown:
            value: Tensor = self._unknown[name]
            return value
        derivative = self._names.derivative(name)
        if derivative is None:
            raise UserError(f"the equation asks for '{name}', and there is none; there are {self._names.listed()}")
        return self._derivatives(*derivative)


@dataclass(frozen=True)
class Names:
    """The names that residuals may use."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    unknown: tuple[str, ...]

    def __post_init__(self) -> None:
        every = (*self.inputs, *self.outputs, *self.unknown)
        if wrong := [name for name in every if not name.isidentifier() or "_" in name]:
            raise UserError(f"'{wrong[0]}' cannot name a coordinate, an output or a parameter: letters and digits can")
        if len(set(every)) < len(every):
            raise UserError(f"coordinates, outputs and parameters must have different names, and they are {every}")
        if clash := [one for one in self.inputs for other in self.inputs if one != other and other.startswith(one)]:
            raise UserError(
                f"no coordinate's name may begin another's, as '{clash[0]}' does: derivatives would be unclear"
            )

    def derivative(self, name: str) -> tuple[int, Order] | None:
        """The output and the coordinates of ``u`` or ``u_tx``; ``None`` if it is neither."""
        output, _, rest = name.partition("_")
        if output not in self.outputs or (not rest and "_" in name):
            return None
        order = []
        while rest:
            begins = [i for i, one in enumerate(self.inputs) if rest.startswith(one)]
            if not begins:
                return None
            order.append(begins[0])
            rest = rest[len(self.inputs[begins[0]]) :]
        return self.outputs.index(output), tuple(sorted(order))

    def listed(self) -> str:
        """List the available names."""
        names, one = ", ".join((*self.inputs, *self.outputs, *self.unknown)), f"{self.outputs[0]}_{self.inputs[0]}"
        return f"{names}, and derivatives such as {one} and {one}{self.inputs[-1]}"


Residual = Callable[[At], "Tensor | Sequence[Tensor]"]
"""The residual of the equation: a tensor ``[points]``, or several, one for each equation of a system."""

# -- The equation and its conditions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """An initial or boundary condition, or measurements that the solution must match.

    Attributes:
        residual: what must vanish there.
        at: where: coordinates that are fixed, as ``{"t": 0.0}``, the others spread over the box; or the points
            themselves, ``[points, inputs]``; or a function of their number that gives them.
        weight: weight of its mean square in the loss.
        dense: how many points, where ``at`` leaves it open: times the root of ``--points``, 8 at least.
    """

    residual: Residual
    at: Mapping[str, float] | Tensor | Callable[[int], Tensor]
    weight: float = 1.0
    dense: float = 1.0


@dataclass(frozen=True)
class Measured:
    """Measured values that the solution must match.

    Attributes:
        points: where, ``[points, inputs]``.
        values: values of outputs by name, ``[points]`` each.
        weight: weight of the mean square of what is missed, in the loss.
        noise: the standard deviation of noise that is added to the values, other noise with every seed: for trials with
            made-up measurements.
    """

    points: Tensor
    values: Mapping[str, Tensor]
    weight: float = 1.0
    noise: float = 0.0

    @staticmethod
    def read(path: str | Path, inputs: Sequence[str], outputs: Sequence[str], weight: float = 1.0) -> Measured:
        """Read a CSV file with a header that names inputs and outputs, and a number in every cell.

        Raises:
            UserError: the file cannot be read, lacks a column, or holds something else than numbers.
        """
        try:
            with Path(path).open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            missing = [name for name in (*inputs, *outputs) if not rows or name not in rows[0]]
            if missing:
                header = ", ".join(rows[0]) if rows else "nothing below its header"
                raise UserError(f"{path} has no column '{missing[0]}'; it has {header}")
            table = {name: [float(row[name]) for row in rows] for name in (*inputs, *outputs)}
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, csv.Error) as error:
            raise UserError(f"{path} must hold a number in every cell ({error})") from None
        columns = {name: torch.tensor(values, dtype=torch.float64) for name, values in table.items()}
        points = torch.stack([columns[name] for name in inputs], dim=1)
        return Measured(points, {name: columns[name] for name in outputs}, weight)

    def condition(self, seed: int) -> Condition:
        """The condition that the values are matched."""
        chance = torch.Generator().manual_seed(seed)
        values = {
            name: torch.as_tensor(value, dtype=torch.float64)
            + self.noise * torch.randn(len(self.points), dtype=torch.float64, generator=chance)
            for name, value in self.values.items()
        }
        return Condition(
            lambda p: [getattr(p, name) - value for name, value in values.items()], self.points, self.weight
        )


@dataclass(frozen=True)
class Equation:
    """A differential equation on a box, or on a part of one, with its conditions.

    Attributes:
        title: title to display.
        inputs: the coordinates by name, each with its least and greatest value.
        outputs: names of the function's components.
        inside: what the equation makes zero.
        conditions: at the start and the boundary, and measurements.
        weight: weight of the equation's mean square in the loss.
        unknown: parameters to be found, by name, each with a first guess; residuals know them by these names.
        where: which points of the box belong to the domain: ``[points, inputs]`` to booleans; ``None``: all.
        trusted: the solution, if it is known, of arrays of the coordinates: an array, or one for each output. It trains
            nothing.
        source: source of the trusted solution.
        grid: along each coordinate, how many points errors are measured and pictures drawn on; ``None``: 1001 for one
            coordinate, 61 each for two, 21 each for more.
        true: the parameters' true values, where they are known.
    """

    title: str
    inputs: Mapping[str, tuple[float, float]]
    outputs: tuple[str, ...]
    inside: Residual
    conditions: tuple[Condition | Measured, ...]
    weight: float = 1.0
    unknown: Mapping[str, float] = field(default_factory=dict)
    where: Callable[[Tensor], Tensor] | None = None
    trusted: Callable[..., Any] | None = None
    source: str = "the trusted solution that was given"
    grid: tuple[int, ...] | None = None
    true: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, box in self.inputs.items():
            if len(box) != 2 or not box[0] < box[1]:
                raise UserError(f"'{name}' must run from a least to a greatest value, and it has {box}")
        if not self.inputs or not self.outputs:
            raise UserError("an equation needs a coordinate and an output")
        if self.grid is not None and len(self.grid) != len(self.inputs):
            raise UserError(f"grid must have a number for each of {', '.join(self.inputs)}, and it is {self.grid}")
        for condition in self.conditions:
            if isinstance(condition, Measured):
                if strange := [name for name in condition.values if name not in self.outputs]:
                    raise UserError(f"'{strange[0]}' is measured, and the outputs are {', '.join(self.outputs)}")
            elif isinstance(condition.at, Mapping) and (wrong := set(condition.at) - set(self.inputs)):
                raise UserError(f"a condition is at '{min(wrong)}', and the coordinates are {', '.join(self.inputs)}")
        _ = self.names

    @cached_property
    def names(self) -> Names:
        """The names that residuals may use."""
        return Names(tuple(self.inputs), tuple(self.outputs), tuple(self.unknown))

    @property
    def low(self) -> tuple[float, ...]:
        """The box's lower corner."""
        return tuple(float(box[0]) for box in self.inputs.values())

    @property
    def high(self) -> tuple[float, ...]:
        """The box's upper corner."""
        return tuple(float(box[1]) for box in self.inputs.values())

    def stated(self, count: int, seed: int, held_out: bool = False) -> list[Stated]:
        """The conditions, and the equation itself at ``count`` points; with ``held_out`` at other points."""
        some = max(8, round(count**0.5))
        conditions = [c.condition(seed) if isinstance(c, Measured) else c for c in self.conditions]
        defined = [
            Stated(self, c.residual, self._points(c.at, max(2, round(c.dense * some))), c.weight) for c in conditions
        ]
        return [*defined, Stated(self, self.inside, self._inner(count, seed, held_out), self.weight)]

    def _points(self, at: Mapping[str, float] | Tensor | Callable[[int], Tensor], count: int) -> Tensor:
        if callable(at):
            at = at(count)
        if isinstance(at, Mapping):
            free = [name for name in self.inputs if name not in at]
            boxes = [self.inputs[name] for name in free]
            spread = iter(evenly(count, boxes).unbind(1)) if free else iter(())
            number = (count if len(free) == 1 else round(count ** (1 / len(free))) ** len(free)) if free else 1
            columns = [
                torch.full((number,), float(at[name]), dtype=torch.float64) if name in at else next(spread)
                for name in self.inputs
            ]
            return self._within(torch.stack(columns, dim=1))
        points = torch.as_tensor(at, dtype=torch.float64)
        if points.ndim != 2 or points.shape[1] != len(self.inputs):
            raise UserError(
                f"a condition's points must be [points, {len(self.inputs)}], a column for each of "
                f"{', '.join(self.inputs)}, and they are {list(points.shape)}"
            )
        return points

    def _inner(self, count: int, seed: int, held_out: bool) -> Tensor:
        tried, box = count, (self.low, self.high)
        while tried <= 1000 * count:
            points = self._within(scattered(tried, *box, seed + HELD_OUT if held_out else seed, even=not held_out))
            if len(points) >= count:
                return points[:count]
            tried *= 2
        raise UserError("the domain holds fewer than one in a thousand points of its box: make the box smaller")

    def _within(self, points: Tensor) -> Tensor:
        return points if self.where is None else points[self.where(points).reshape(-1).bool()]

    # -- the trusted solution

    def points(self) -> Array:
        """The points ``[points, inputs]`` of the box on which errors are measured; evenly spaced on an interval."""
        sizes = self.grid or {1: (1001,), 2: (61, 61)}.get(len(self.inputs), (21,) * len(self.inputs))
        axes = [np.linspace(low, high, size) for (low, high), size in zip(self.inputs.values(), sizes, strict=True)]
        return np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)

    def reference(self, x: Array) -> Array | None:
        """The trusted solution ``[points, outputs]`` at ``[points, inputs]``, if there is one."""
        if self.trusted is None:
            return None
        values = self.trusted(*x.T)
        values = (
            np.stack(values, axis=1) if isinstance(values, list | tuple) else np.asarray(values).reshape(len(x), -1)
        )
        if values.shape != (len(x), len(self.outputs)):
            raise UserError(
                f"the trusted solution at {len(x)} points must be {len(self.outputs)} arrays of as many values, and it "
                f"is {values.shape}"
            )
        return np.asarray(values, dtype=np.float64)

    def errors(self, values: Array) -> dict[str, float]:
        """The errors on the grid points that belong to the domain: the relative root-mean-square error and, for one
        coordinate, the integral of the absolute error (IAE, summed over the components)."""
        grid = self.points()
        right = self.reference(grid)
        if right is None:
            return {}
        inside = np.ones(len(grid), bool) if self.where is None else self.where(torch.as_tensor(grid)).numpy().ravel()
        gap = (values - right)[inside]
        errors = {"relative_l2": float(np.linalg.norm(gap) / np.linalg.norm(right[inside]))}
        if len(self.inputs) == 1:
            errors["iae"] = float(np.abs(gap).sum() * (grid[1, 0] - grid[0, 0]))
        return errors


class Stated:
    """A condition with its points.

    Attributes:
        points: ``[points, inputs]``.
        orders: the derivatives that its residual asks for.
        weight: weight of its mean square in the loss.
    """

    def __init__(self, equation: Equation, residual: Residual, points: Tensor, weight: float):
        self.equation, self.points, self.weight = equation, points, weight
        self._residual = residual
        asked: dict[Order, None] = {}

        def tried(output: int, order: Order) -> Tensor:
            asked[order] = None
            return torch.ones(len(points), dtype=points.dtype)

        unknown = {name: torch.tensor(float(value)) for name, value in equation.unknown.items()}
        self.terms = self(tried, unknown).shape[1]
        self.orders = tuple(order for order in asked if order)

    def __call__(self, derivatives: Callable[[int, Order], Tensor], unknown: Mapping[str, Tensor]) -> Tensor:
        """The residuals ``[points, terms]``, from derivatives ``[points]`` by output and order, and from the
        parameters, each one number or ``[points]``."""
        residual = self._residual(At(self.equation.names, self.points, derivatives, unknown))
        each: list[Any] = list(residual) if isinstance(residual, list | tuple) else [residual]
        for one in each:
            if not isinstance(one, Tensor) or one.shape != (len(self.points),):
                got = f"has shape {list(one.shape)}" if isinstance(one, Tensor) else f"is a {type(one).__name__}"
                raise UserError(
                    f"a residual must be a tensor with a value for each of {len(self.points)} points, and it {got}"
                )
        return torch.stack(each, dim=1)


# -- Points ------------------------------------------------------------------------------------------------------------


HELD_OUT = 10_000
"""First seed of the held-out points."""


def scattered(count: int, low: Sequence[float], high: Sequence[float], seed: int, even: bool = False) -> Tensor:
    """Points ``[count, inputs]`` that fill a box evenly: a scrambled Sobol sequence, or with ``even``, evenly spaced on
    an interval."""
    if even and len(low) == 1:
        return evenly(count, [(low[0], high[0])])
    engine = torch.quasirandom.SobolEngine(len(low), scramble=True, seed=seed)
    a, b = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    return a + (b - a) * engine.draw(count, dtype=torch.float64)


def evenly(count: int, boxes: Sequence[tuple[float, float]]) -> Tensor:
    """About ``count`` points ``[points, inputs]`` on an even grid of a box, its corners among them."""
    side = count if len(boxes) == 1 else max(2, round(count ** (1 / len(boxes))))
    axes = [torch.linspace(low, high, side, dtype=torch.float64) for low, high in boxes]
    return torch.stack([axis.reshape(-1) for axis in torch.meshgrid(*axes, indexing="ij")], dim=1)
