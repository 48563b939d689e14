"""Equations with initial or boundary conditions, and their reference solutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from math import log
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, exp, pi, sin

from torchimplicit.recipes.physics.statement import HELD_OUT, Array, At, Condition, Equation, Measured, scattered

EquationName = Literal["van-der-pol", "four-tanks", "burgers", "helmholtz"]

# -- Ordinary differential equations from a start, with SciPy's integration as the trusted solution --------------------


def initial_value(
    title: str,
    span: tuple[float, float],
    start: Mapping[str, float],
    slope: Callable[..., list[Any]],
    weight: float = 1.0,
) -> Equation:
    """:math:`y'=s(y)` from :math:`y(t_0)`.

    Args:
        title: title to display.
        span: the interval of ``t``.
        start: the state at its beginning, by name.
        slope: the rates, of the components; of numbers, or of tensors.
        weight: weight of the equation in the loss.
    """
    names = tuple(start)

    @cache
    def integrated() -> Any:
        from scipy.integrate import solve_ivp  # heavy, and settings are made without it

        trajectory = solve_ivp(
            lambda t, y: slope(*y), span, list(start.values()), "DOP853", rtol=1e-12, atol=1e-14, dense_output=True
        )
        return trajectory.sol

    def inside(p: At) -> list[Tensor]:
        rates = slope(*(getattr(p, name) for name in names))
        return [getattr(p, f"{name}_t") - rate for name, rate in zip(names, rates, strict=True)]

    return Equation(
        title=title,
        inputs={"t": span},
        outputs=names,
        inside=inside,
        conditions=(
            Condition(lambda p: [getattr(p, name) - value for name, value in start.items()], at={"t": span[0]}),
        ),
        weight=weight,
        trusted=lambda t: list(integrated()(t)),
        source="SciPy's DOP853 to 1e-12",
    )


MU = 1.0


def oscillator(mu: Any, y1: Any, y2: Any) -> list[Any]:
    """Van der Pol's: :math:`y_1'=y_2`, :math:`y_2'=\\mu(1-y_1^2)y_2-y_1`."""
    return [y2, mu * (1 - y1**2) * y2 - y1]


VAN_DER_POL = initial_value(
    "Van der Pol oscillator", (0.0, 2.0), {"y1": 0.0, "y2": 0.1}, lambda y1, y2: oscillator(MU, y1, y2), weight=0.1
)
"""The problem of Pacheco's thesis, whose loss weighs the equation by 0.1."""

AREA = (28.0, 32.0, 28.0, 32.0)
"""Cross-sections of the tanks, in cm²."""
OUTLET = (0.071, 0.057, 0.071, 0.057)
"""Cross-sections of the outlets, in cm²."""
GRAVITY = 981.0
PUMP = (3.33, 3.35)
"""Flow of the pumps per volt, in cm³/(V s)."""
VALVE = (0.7, 0.6)
"""Share of each pump's flow that goes to the lower tank."""
VOLTAGE = (3.0, 3.0)
DURATION = 60.0
"""Duration in seconds."""


def flows(*levels: Any) -> list[Any]:
    """The rates of the levels in cm per minute, for numbers or tensors."""
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


FOUR_TANKS = initial_value("Four tanks", (0.0, 1.0), {"h1": 6.0, "h2": 6.0, "h3": 3.0, "h4": 3.0}, flows, weight=0.1)
"""Four tanks that fill and drain one another (Johansson 2000, the minimum-phase setting), from a start off balance: the
levels in cm obey :math:`A_i\\dot h_i=-a_i\\sqrt{2gh_i}+\\dots`; time, in minutes, runs from 0 to 1."""


# -- Partial differential equations ------------------------------------------------------------------------------------


VISCOSITY = 0.1 / pi


def cole_hopf(t: Array, x: Array) -> Array:
    """Burgers' solution from :math:`-\\sin\\pi x`, by Gauss–Hermite quadrature (Basdevant et al. 1986)."""
    nodes, weights = np.polynomial.hermite.hermgauss(150)
    moved = x[:, None] - np.sqrt(4 * VISCOSITY * t[:, None]) * nodes
    damp = weights * np.exp(-np.cos(np.pi * moved) / (2 * np.pi * VISCOSITY))
    return np.asarray(-(damp * np.sin(np.pi * moved)).sum(1) / damp.sum(1))


BURGERS = Equation(
    title="Burgers' equation",
    inputs={"t": (0.0, 1.0), "x": (-1.0, 1.0)},
    outputs=("u",),
    inside=lambda p: p.u_t + p.u * p.u_x - VISCOSITY * p.u_xx,
    conditions=(
        Condition(lambda p: p.u + sin(pi * p.x), at={"t": 0.0}, dense=2),
        Condition(lambda p: p.u, at={"x": -1.0}, weight=0.5),
        Condition(lambda p: p.u, at={"x": 1.0}, weight=0.5),
    ),
    weight=0.1,
    trusted=cole_hopf,
    source="the Cole–Hopf transform, by Gauss–Hermite quadrature (Basdevant et al. 1986)",
    grid=(51, 101),
)
"""The viscosity, :math:`0.1/\\pi`, is ten times that of Raissi et al. (2019), so that few points resolve the front."""

WAVES = (1.0, 2.0)
NUMBER = 1.0


def _waves(of: Any, x: Any, y: Any) -> Any:
    return of(WAVES[0] * pi * x) * of(WAVES[1] * pi * y)


def _helmholtz(p: At) -> Tensor:
    source = (NUMBER**2 - pi**2 * (WAVES[0] ** 2 + WAVES[1] ** 2)) * _waves(torch.sin, p.x, p.y)
    return p.u_xx + p.u_yy + NUMBER**2 * p.u - source


HELMHOLTZ = Equation(
    title="Helmholtz' equation",
    inputs={"x": (-1.0, 1.0), "y": (-1.0, 1.0)},
    outputs=("u",),
    inside=_helmholtz,
    conditions=tuple(
        Condition(lambda p: p.u, at={name: end}, weight=2.5) for name in ("x", "y") for end in (-1.0, 1.0)
    ),
    weight=0.1,
    trusted=lambda x, y: _waves(np.sin, x, y),
    source="the closed form",
)
""":math:`u_{xx}+u_{yy}+k^2u=q`, k = 1, zero on the boundary, with q such that the solution is
:math:`\\sin(\\pi x)\\sin(2\\pi y)`."""


# -- The equations by name ---------------------------------------------------------------------------------------------


EQUATIONS: dict[str, Equation] = {
    "van-der-pol": VAN_DER_POL,
    "four-tanks": FOUR_TANKS,
    "burgers": BURGERS,
    "helmholtz": HELMHOLTZ,
}
"""All equations, by name."""


# -- The same with a parameter unknown, from noisy values of the solution ----------------------------------------------


def _measured(equation: Equation, count: int, noise: float, outputs: tuple[str, ...]) -> Measured:
    """Values of the reference solution at scattered points, with noise relative to their standard deviation."""
    points = scattered(count, equation.low, equation.high, seed=HELD_OUT - 1)
    right = equation.reference(points.numpy())
    assert right is not None
    values = {name: torch.from_numpy(right[:, equation.outputs.index(name)]) for name in outputs}
    return Measured(points, values, noise=noise * float(torch.stack(list(values.values())).std()))


@cache
def inverse(name: str, noise: float) -> Equation:
    """An equation whose parameter is to be estimated from values with this relative noise."""
    if name == "van-der-pol-mu":
        return replace(
            VAN_DER_POL,
            title="Van der Pol oscillator, μ unknown",
            inside=lambda p: [
                rate - slope for rate, slope in zip((p.y1_t, p.y2_t), oscillator(p.mu, p.y1, p.y2), strict=True)
            ],
            conditions=(_measured(VAN_DER_POL, 30, noise, ("y1",)),),
            unknown={"mu": 0.0},
            true={"mu": MU},
        )
    return replace(
        BURGERS,
        title="Burgers' equation, ν unknown",
        inside=lambda p: p.u_t + p.u * p.u_x - exp(p.lognu) * p.u_xx,
        conditions=(*BURGERS.conditions, _measured(BURGERS, 100, noise, ("u",))),
        unknown={"lognu": log(0.1)},
        true={"lognu": log(VISCOSITY)},
    )


INVERSE = {
    f"{name}-{round(100 * noise)}": (name, noise)
    for name in ("van-der-pol-mu", "burgers-viscosity")
    for noise in (0.0, 0.01, 0.05)
}
"""Equations with an unknown parameter, by name: the parameter, and the noise in percent. The oscillator's initial state
is not given, and only one of its components is measured. For Burgers' equation the logarithm of the viscosity is
estimated, which keeps it positive."""


# -- A field unknown, as an output of its own that no value is given of ------------------------------------------------


WAVE_NUMBER = 4.0
MODES = 36
"""Chebyshev polynomials along each coordinate; 44 change the waves by 1e-8."""


def squared_slowness(x: Any, y: Any) -> Any:
    """The medium, relative to the one around it: two round inclusions, one slow and one fast."""
    e = torch.exp if isinstance(x, Tensor) else np.exp
    return 1 + 0.5 * e(-((x - 0.3) ** 2 + (y - 0.2) ** 2) / 0.08) - 0.4 * e(-((x + 0.4) ** 2 + (y + 0.3) ** 2) / 0.1)


def _incoming(of: Any, x: Any, y: Any) -> list[Any]:
    return [of(WAVE_NUMBER * x), of(WAVE_NUMBER * y)]


@cache
def _waves_in(modes: int = MODES) -> Array:
    """Chebyshev coefficients ``[2, modes, modes]`` of the waves in the medium that equal two plane ones on the
    boundary, by collocation."""
    from numpy.polynomial import chebyshev

    nodes = np.cos(np.pi * np.arange(modes) / (modes - 1))
    values = chebyshev.chebvander(nodes, modes - 1)
    second = chebyshev.chebvander(nodes, modes - 3) @ chebyshev.chebder(np.eye(modes), 2)
    x, y = (grid.ravel() for grid in np.meshgrid(nodes, nodes, indexing="ij"))
    inside = np.maximum(abs(x), abs(y)) < 1 - 1e-12
    at = np.kron(values, values)
    laplacian = np.kron(second, values) + np.kron(values, second)
    medium = WAVE_NUMBER**2 * squared_slowness(x, y)
    matrix = np.where(inside[:, None], laplacian + medium[:, None] * at, at)
    right = np.where(inside, 0, _incoming(np.cos, x, y))
    return np.asarray(np.linalg.solve(matrix, right.T).T.reshape(2, modes, modes))


def waves(x: Array, y: Array) -> list[Array]:
    """The two waves and the squared slowness at points."""
    from numpy.polynomial import chebyshev

    return [*(chebyshev.chebval2d(x, y, of) for of in _waves_in()), squared_slowness(x, y)]


@cache
def slowness(noise: float = 0.01) -> Equation:
    """The squared slowness m of a medium, from two waves of one frequency: :math:`\\Delta u+k^2mu=0`, k = 4.

    The waves are measured at 200 points, with this relative noise, and known on the boundary; m is an output of the
    field as they are, of which nothing is known but the equation.
    """
    box = (-1.0, 1.0)

    def incoming(p: At) -> list[Tensor]:
        return [wave - right for wave, right in zip((p.u, p.v), _incoming(torch.cos, p.x, p.y), strict=True)]

    points = scattered(200, (-1.0, -1.0), (1.0, 1.0), seed=HELD_OUT - 1)
    *measured, _ = (torch.from_numpy(wave) for wave in waves(*points.numpy().T))
    deviation = noise * float(torch.stack(measured).std())
    return Equation(
        title="A medium from the waves in it",
        inputs={"x": box, "y": box},
        outputs=("u", "v", "m"),
        inside=lambda p: [
            d_xx + d_yy + WAVE_NUMBER**2 * p.m * d for d, d_xx, d_yy in ((p.u, p.u_xx, p.u_yy), (p.v, p.v_xx, p.v_yy))
        ],
        conditions=(
            *(Condition(incoming, at={name: end}, dense=1.5) for name in ("x", "y") for end in box),
            Measured(points, dict(zip(("u", "v"), measured, strict=True)), weight=10.0, noise=deviation),
        ),
        weight=0.1,
        trusted=waves,
        source=f"Chebyshev collocation with {MODES} polynomials along each coordinate",
    )


FIELDS: dict[str, Callable[[], Equation]] = {"slowness": slowness}
"""Equations in which a field is unknown, by name."""
