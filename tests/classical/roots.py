"""Classical systems of equations, from their published definitions.

Moré, Garbow and Hillstrom, *Testing unconstrained optimization software*, ACM TOMS 7:17 (1981), and *Algorithm 566*,
unless another source is said. Each is ``f(z)`` for one state ``[n]``, with its standard start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

D = torch.float64


class Equations(NamedTuple):
    """A system and its standard start."""

    f: Callable[[Tensor], Tensor]
    start: Tensor


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=D)


def full(n: int, value: float) -> Tensor:
    return torch.full((n,), value, dtype=D)


def rosenbrock(z: Tensor) -> Tensor:
    """Rosenbrock (1960); for n > 2 the chain of it."""
    return torch.cat((1 - z[:1], 10 * (z[1:] - z[:-1] ** 2)))


def powell_singular(z: Tensor) -> Tensor:
    a, b, c, d = z.unbind()
    return torch.stack((a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2))


def powell_badly_scaled(z: Tensor) -> Tensor:
    return torch.stack((1e4 * z[0] * z[1] - 1, torch.exp(-z[0]) + torch.exp(-z[1]) - 1.0001))


def wood(z: Tensor) -> Tensor:
    """The gradient of Wood's function, but for a factor."""
    a, b, c, d = z.unbind()
    first, second = b - a * a, d - c * c
    return torch.stack(
        (
            -200 * a * first - (1 - a),
            200 * first + 20.2 * (b - 1) + 19.8 * (d - 1),
            -180 * c * second - (1 - c),
            180 * second + 20.2 * (d - 1) + 19.8 * (b - 1),
        )
    )


def helical_valley(z: Tensor) -> Tensor:
    a, b, c = z.unbind()
    angle = torch.atan(b / torch.where(a == 0, 1e-300, a)) / (2 * math.pi)
    angle = torch.where(a < 0, angle + 0.5, angle)
    return torch.stack((10 * (c - 10 * angle), 10 * (torch.hypot(a, b) - 1), c))


def watson(z: Tensor) -> Tensor:
    """The gradient of Watson's function."""
    power = torch.arange(len(z), dtype=D)
    t = (torch.arange(1, 30, dtype=D) / 29)[:, None] ** power

    def total(z: Tensor) -> Tensor:
        slope = t[:, :-1] @ (power[1:] * z[1:])
        r = torch.cat((slope - (t @ z) ** 2 - 1, z[:1], (z[1] - z[0] ** 2 - 1)[None]))
        return (r * r).sum()

    return torch.func.grad(total)(z)


def chebyquad(z: Tensor) -> Tensor:
    x, n = 2 * z - 1, len(z)
    before, now, out = torch.ones_like(z), x, []
    for i in range(1, n + 1):
        out.append(now.mean() - (0.0 if i % 2 else -1 / (i * i - 1)))
        before, now = now, 2 * x * now - before
    return torch.stack(out)


def brown_almost_linear(z: Tensor) -> Tensor:
    return torch.cat((z[:-1] + z.sum() - (len(z) + 1), (z.prod() - 1)[None]))


def _grid(n: int) -> tuple[float, Tensor]:
    h = 1 / (n + 1)
    return h, torch.arange(1, n + 1, dtype=D) * h


def discrete_boundary_value(z: Tensor) -> Tensor:
    h, t = _grid(len(z))
    around = torch.nn.functional.pad(z, (1, 1))
    return 2 * z - around[:-2] - around[2:] + h * h / 2 * (z + t + 1) ** 3


def discrete_integral(z: Tensor) -> Tensor:
    h, t = _grid(len(z))
    c = (z + t + 1) ** 3
    below = torch.cumsum(t * c, 0)
    above = ((1 - t) * c).sum() - torch.cumsum((1 - t) * c, 0)
    return z + h / 2 * ((1 - t) * below + t * above)


def trigonometric(z: Tensor) -> Tensor:
    n, k = len(z), torch.arange(1, len(z) + 1, dtype=D)
    return n - torch.cos(z).sum() + k * (1 - torch.cos(z)) - torch.sin(z)


def variably_dimensioned(z: Tensor) -> Tensor:
    j = torch.arange(1, len(z) + 1, dtype=D)
    s = (j * (z - 1)).sum()
    return z - 1 + j * s * (1 + 2 * s * s)


def broyden_tridiagonal(z: Tensor) -> Tensor:
    around = torch.nn.functional.pad(z, (1, 1))
    return (3 - 2 * z) * z - around[:-2] - 2 * around[2:] + 1


def broyden_banded(z: Tensor) -> Tensor:
    i = torch.arange(len(z))
    off = i[:, None] - i[None, :]
    near = ((off <= 5) & (off >= -1) & (off != 0)).to(D)
    return z * (2 + 5 * z * z) + 1 - near @ (z * (1 + z))


def matrix_square_root(z: Tensor) -> Tensor:
    """Hammarling's, with a defective matrix (Fletcher and others, in the NAG tests)."""
    n = math.isqrt(len(z))
    target = 1e-4 * torch.eye(n, dtype=D)
    target[0, 1] = 1
    x = z.reshape(n, n)
    return (x @ x - target).flatten()


def dennis_schnabel(z: Tensor) -> Tensor:
    """Dennis and Schnabel (1983), example 6.5.1 in this form: a line and a circle."""
    return torch.stack((z[0] + z[1] - 3, z[0] ** 2 + z[1] ** 2 - 9))


def freudenstein_roth(z: Tensor) -> Tensor:
    x, y = z.unbind()
    return torch.stack((-13 + x + ((5 - y) * y - 2) * y, -29 + x + ((y + 1) * y - 14) * y))


def boggs(z: Tensor) -> Tensor:
    """Boggs (1971)."""
    return torch.stack((z[0] ** 2 - z[1] + 1, z[0] - torch.cos(math.pi / 2 * z[1])))


def flat_root(z: Tensor) -> Tensor:
    """A root at which the Jacobian is zero."""
    return z * (z * z).sum()


def double_root(z: Tensor) -> Tensor:
    return z * (z - 5) ** 2


def gaussian_root(z: Tensor) -> Tensor:
    """Flat far from its root at zero."""
    x, y = z.unbind()
    one = torch.ones_like(x)
    return torch.stack(
        (
            -(y**2) * torch.expm1(-(x**2)) / torch.where(x == 0, one, x),
            -x * torch.expm1(-(y**2)) / torch.where(y == 0, one, y),
        )
    )


def chandrasekhar(c: float) -> Callable[[Tensor], Tensor]:
    """The H-equation by the midpoint rule (Kelley 1995, section 5.6)."""

    def f(z: Tensor) -> Tensor:
        n = len(z)
        mu = (torch.arange(1, n + 1, dtype=D) - 0.5) / n
        return z - 1 / (1 - c / (2 * n) * ((mu[:, None] / (mu[:, None] + mu)) @ z))

    return f


def _chain(n: int) -> Tensor:
    return torch.cat((row(-1.2), torch.ones(n - 1, dtype=D)))


def _parabola(n: int) -> Tensor:
    _, t = _grid(n)
    return t * (t - 1)


ROOTS: dict[str, Equations] = {
    "rosenbrock 2": Equations(rosenbrock, _chain(2)),
    "rosenbrock 10": Equations(rosenbrock, _chain(10)),
    "powell singular": Equations(powell_singular, row(3, -1, 0, 1)),
    "powell badly scaled": Equations(powell_badly_scaled, row(0, 1)),
    "wood": Equations(wood, row(-3, -1, -3, -1)),
    "helical valley": Equations(helical_valley, row(-1, 0, 0)),
    "watson 6": Equations(watson, full(6, 0)),
    "watson 9": Equations(watson, full(9, 0)),
    "chebyquad 5": Equations(chebyquad, _grid(5)[1]),
    "chebyquad 7": Equations(chebyquad, _grid(7)[1]),
    "chebyquad 9": Equations(chebyquad, _grid(9)[1]),
    "brown 10": Equations(brown_almost_linear, full(10, 0.5)),
    "brown 40": Equations(brown_almost_linear, full(40, 0.5)),
    "discrete boundary value 10": Equations(discrete_boundary_value, _parabola(10)),
    "discrete boundary value 200": Equations(discrete_boundary_value, _parabola(200)),
    "discrete integral 10": Equations(discrete_integral, _parabola(10)),
    "trigonometric 10": Equations(trigonometric, full(10, 0.1)),
    "variably dimensioned 10": Equations(variably_dimensioned, 1 - torch.arange(1, 11, dtype=D) / 10),
    "broyden tridiagonal 10": Equations(broyden_tridiagonal, full(10, -1)),
    "broyden tridiagonal 500": Equations(broyden_tridiagonal, full(500, -1)),
    "broyden banded 10": Equations(broyden_banded, full(10, -1)),
    "matrix square root 2": Equations(matrix_square_root, row(1, 0, 0, 1)),
    "matrix square root 3": Equations(matrix_square_root, torch.eye(3, dtype=D).flatten()),
    "dennis and schnabel": Equations(dennis_schnabel, row(1, 5)),
    "gaussian": Equations(gaussian_root, row(2, 2)),
    "flat root": Equations(flat_root, row(3, 3)),
    "double root": Equations(double_root, row(1)),
    "freudenstein and roth": Equations(freudenstein_roth, row(15, -2)),
    "boggs": Equations(boggs, row(1, 0)),
    "chandrasekhar 0.9": Equations(chandrasekhar(0.9), full(100, 1)),
    "chandrasekhar 0.9999": Equations(chandrasekhar(0.9999), full(100, 1)),
}

LARGE = 200
"""From so many unknowns, systems are solved from their standard start only."""
