"""Equations with initial or boundary conditions, and their trusted solutions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EquationName = Literal["van-der-pol", "four-tanks", "burgers", "helmholtz"]

# -- What a differential equation states -------------------------------------------------------------------------------


Order = tuple[int, ...]
Fields = dict[Order, Tensor]
"""The function's value ``[points, outputs]`` under ``()``, and its derivatives under their coordinates."""


@dataclass(frozen=True)
class Condition:
    """What must vanish at some points: the equation inside, an initial or a boundary condition.

    Attributes:
        points: ``[points, inputs]``.
        orders: the derivatives that are needed.
        residual: of the points and the fields there, ``[points, terms]``.
        weight: of its mean square in the loss.
    """

    points: Tensor
    orders: tuple[Order, ...]
    residual: Callable[[Tensor, Fields], Tensor]
    weight: float = 1.0


class Equation(ABC):
    """A differential equation on a box, with its conditions and a trusted solution.

    Attributes:
        title: for people.
        inputs, outputs: names of the coordinates, and of the function's components.
        low, high: the box.
        source: of the trusted solution.
    """

    title: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]]
    low: ClassVar[tuple[float, ...]]
    high: ClassVar[tuple[float, ...]]
    source: ClassVar[str]

    @abstractmethod
    def conditions(self, count: int, seed: int) -> Sequence[Condition]:
        """Return what the function must satisfy, the equation itself at ``count`` points."""

    @abstractmethod
    def reference(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The trusted solution at ``[points, inputs]``: ``[points, outputs]``."""

    @abstractmethod
    def grid(self) -> NDArray[np.float64]:
        """Points ``[points, inputs]`` on which errors are measured; of an interval, evenly spaced."""

    def errors(self, values: NDArray[np.float64]) -> dict[str, float]:
        """The errors of values on the grid: the integral of the absolute error over one coordinate (IAE, summed over
        the components), and the relative error in the mean square."""
        grid = self.grid()
        right = self.reference(grid)
        gap = values - right
        found = {"relative_l2": float(np.linalg.norm(gap) / np.linalg.norm(right))}
        if len(self.inputs) == 1:
            found["iae"] = float(np.abs(gap).sum() * (grid[1, 0] - grid[0, 0]))
        return found


def scattered(count: int, low: Sequence[float], high: Sequence[float], seed: int) -> Tensor:
    """Points ``[count, inputs]`` that fill a box evenly: a scrambled Sobol sequence."""
    engine = torch.quasirandom.SobolEngine(len(low), scramble=True, seed=seed)
    a, b = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    return a + (b - a) * engine.draw(count, dtype=torch.float64)


def spread(count: int, low: float, high: float) -> Tensor:
    """Evenly spaced points of an interval, ``[count, 1]``."""
    return torch.linspace(low, high, count, dtype=torch.float64)[:, None]


# -- Ordinary differential equations from a start, with SciPy's integration as the trusted solution --------------------


class InitialValueProblem(Equation):
    """:math:`y'=s(y)` from :math:`y(t_0)`.

    Attributes:
        start: the state at the beginning of the interval.
    """

    start: ClassVar[tuple[float, ...]]
    source = "SciPy's DOP853 to 1e-12"

    @abstractmethod
    def slope(self, *state: Any) -> list[Any]:
        """The rates of the components; of numbers, or of tensors."""

    def conditions(self, count: int, seed: int) -> Sequence[Condition]:
        first = torch.tensor([self.low], dtype=torch.float64)
        return (
            Condition(first, (), lambda x, u: u[()] - torch.tensor(self.start).to(x)),
            Condition(spread(count, *self.low, *self.high), ((0,),), self.equation, weight=0.1),
        )

    def equation(self, x: Tensor, u: Fields) -> Tensor:
        """Return what the solution makes zero."""
        return u[0,] - torch.stack(self.slope(*u[()].unbind(1)), dim=1)

    def reference(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(self._integrated(x[:, 0]).T)

    @cached_property
    def _integrated(self) -> Any:
        from scipy.integrate import solve_ivp  # heavy, and settings are made without it

        return solve_ivp(
            lambda t, y: self.slope(*y),
            (*self.low, *self.high),
            self.start,
            "DOP853",
            rtol=1e-12,
            atol=1e-14,
            dense_output=True,
        ).sol


# -- The Van der Pol oscillator ----------------------------------------------------------------------------------------


MU = 1.0


class VanDerPol(InitialValueProblem):
    """:math:`y_1'=y_2`, :math:`y_2'=\\mu(1-y_1^2)y_2-y_1`, :math:`\\mu=1`, :math:`y(0)=(0, 0.1)`, on [0, 2].

    The problem of Pacheco's thesis, whose loss weighs the equation by 0.1.
    """

    title = "Van der Pol oscillator"
    inputs = ("t",)
    outputs = ("y1", "y2")
    low: ClassVar[tuple[float, ...]] = (0.0,)
    high: ClassVar[tuple[float, ...]] = (2.0,)
    start = (0.0, 0.1)

    def slope(self, *state: Any) -> list[Any]:
        y1, y2 = state
        return [y2, MU * (1 - y1**2) * y2 - y1]

    def grid(self) -> NDArray[np.float64]:
        return np.arange(0, 2 + 1e-9, 0.002)[:, None]


# -- The four-tank process ---------------------------------------------------------------------------------------------


AREA = (28.0, 32.0, 28.0, 32.0)
"""Cross-sections of the tanks, cm²."""
OUTLET = (0.071, 0.057, 0.071, 0.057)
"""Cross-sections of the outlets, cm²."""
GRAVITY = 981.0
PUMP = (3.33, 3.35)
"""Flow of the pumps per volt, cm³/(V s)."""
VALVE = (0.7, 0.6)
"""Share of each pump's flow that goes to the lower tank."""
VOLTAGE = (3.0, 3.0)
DURATION = 60.0
"""Seconds."""


class FourTanks(InitialValueProblem):
    """Four tanks that fill and drain one another (Johansson 2000, the minimum-phase setting), from a start off balance.

    The levels in cm obey :math:`A_i\\dot h_i=-a_i\\sqrt{2gh_i}+\\dots`; time, in minutes, runs from 0 to 1.
    """

    title = "Four tanks"
    inputs = ("t",)
    outputs = ("h1", "h2", "h3", "h4")
    low: ClassVar[tuple[float, ...]] = (0.0,)
    high: ClassVar[tuple[float, ...]] = (1.0,)
    start = (6.0, 6.0, 3.0, 3.0)

    def slope(self, *state: Any) -> list[Any]:
        return flows(*state)

    def grid(self) -> NDArray[np.float64]:
        return np.linspace(0, 1, 1001)[:, None]


def flows(*levels: Any) -> list[Any]:
    """The levels' rates, cm a minute; numbers or tensors."""
    out = [
        outlet * (2 * GRAVITY * (level.clamp_min(1e-3) if isinstance(level, Tensor) else max(level, 1e-3))) ** 0.5
        for outlet, level in zip(OUTLET, levels, strict=True)
    ]
    pumped = [pump * volt for pump, volt in zip(PUMP, VOLTAGE, strict=True)]
    rates = (
        -out[0] + out[2] + VALVE[0] * pumped[0],
        -out[1] + out[3] + VALVE[1] * pumped[1],
        -out[2] + (1 - VALVE[1]) * pumped[1],
        -out[3] + (1 - VALVE[0]) * pumped[0],
    )
    return [DURATION * rate / area for rate, area in zip(rates, AREA, strict=True)]


# -- Burgers' equation -------------------------------------------------------------------------------------------------


VISCOSITY = 0.1 / np.pi


class Burgers(Equation):
    """:math:`u_t+uu_x=\\nu u_{xx}` on [0, 1] × [-1, 1], :math:`u(0,x)=-\\sin\\pi x`, zero at both ends.

    :math:`\\nu=0.1/\\pi` is ten times the viscosity of Raissi et al. (2019), so that few points resolve the front.
    """

    title = "Burgers' equation"
    inputs = ("t", "x")
    outputs = ("u",)
    low: ClassVar[tuple[float, ...]] = (0.0, -1.0)
    high: ClassVar[tuple[float, ...]] = (1.0, 1.0)
    source = "the Cole–Hopf transform, by Gauss–Hermite quadrature (Basdevant et al. 1986)"

    def conditions(self, count: int, seed: int) -> Sequence[Condition]:
        some = max(8, round(count**0.5))
        x = torch.linspace(-1, 1, 2 * some, dtype=torch.float64)
        t = torch.linspace(0, 1, some, dtype=torch.float64)
        first = torch.stack([torch.zeros_like(x), x], dim=1)
        ends = torch.cat([torch.stack([t, torch.full_like(t, end)], dim=1) for end in (-1.0, 1.0)])
        return (
            Condition(first, (), lambda p, u: u[()] + torch.sin(torch.pi * p[:, 1:])),
            Condition(ends, (), lambda p, u: u[()]),
            Condition(scattered(count, self.low, self.high, seed), ((0,), (1,), (1, 1)), self.equation, weight=0.1),
        )

    @staticmethod
    def equation(x: Tensor, u: Fields) -> Tensor:
        """Return what the solution makes zero."""
        return u[0,] + u[()] * u[1,] - VISCOSITY * u[1, 1]

    def reference(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        nodes, weights = np.polynomial.hermite.hermgauss(150)
        t, place = x[:, :1], x[:, 1:]
        moved = place - np.sqrt(4 * VISCOSITY * t) * nodes
        damp = weights * np.exp(-np.cos(np.pi * moved) / (2 * np.pi * VISCOSITY))
        values = -(damp * np.sin(np.pi * moved)).sum(1) / damp.sum(1)
        return np.asarray(values[:, None])

    def grid(self) -> NDArray[np.float64]:
        t, x = np.meshgrid(np.linspace(0, 1, 51), np.linspace(-1, 1, 101), indexing="ij")
        return np.stack([t.ravel(), x.ravel()], axis=1)


# -- Helmholtz' equation on the square ---------------------------------------------------------------------------------


WAVES = (1.0, 2.0)
NUMBER = 1.0


class Helmholtz(Equation):
    """:math:`u_{xx}+u_{yy}+k^2u=q` on [-1, 1]², zero on the boundary, with the q that makes
    :math:`\\sin(\\pi x)\\sin(2\\pi y)` the solution, k = 1."""

    title = "Helmholtz' equation"
    inputs = ("x", "y")
    outputs = ("u",)
    low: ClassVar[tuple[float, ...]] = (-1.0, -1.0)
    high: ClassVar[tuple[float, ...]] = (1.0, 1.0)
    source = "the closed form"

    def conditions(self, count: int, seed: int) -> Sequence[Condition]:
        side = torch.linspace(-1, 1, max(8, round(count**0.5)), dtype=torch.float64)
        edges = []
        for end in (-1.0, 1.0):
            whole = torch.full_like(side, end)
            edges += [torch.stack([side, whole], dim=1), torch.stack([whole, side], dim=1)]
        return (
            Condition(torch.cat(edges), (), lambda p, u: u[()], weight=10.0),
            Condition(scattered(count, self.low, self.high, seed), ((0, 0), (1, 1)), self.equation, weight=0.1),
        )

    @staticmethod
    def equation(x: Tensor, u: Fields) -> Tensor:
        """Return what the solution makes zero."""
        squares = NUMBER**2 - torch.pi**2 * (WAVES[0] ** 2 + WAVES[1] ** 2)
        source = squares * torch.sin(WAVES[0] * torch.pi * x[:, :1]) * torch.sin(WAVES[1] * torch.pi * x[:, 1:])
        return u[0, 0] + u[1, 1] + NUMBER**2 * u[()] - source

    def reference(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.sin(WAVES[0] * np.pi * x[:, :1]) * np.sin(WAVES[1] * np.pi * x[:, 1:]))

    def grid(self) -> NDArray[np.float64]:
        x, y = np.meshgrid(np.linspace(-1, 1, 61), np.linspace(-1, 1, 61), indexing="ij")
        return np.stack([x.ravel(), y.ravel()], axis=1)


# -- The equations by name ---------------------------------------------------------------------------------------------


EQUATIONS: dict[str, Equation] = {
    "van-der-pol": VanDerPol(),
    "four-tanks": FourTanks(),
    "burgers": Burgers(),
    "helmholtz": Helmholtz(),
}
"""Every equation."""
