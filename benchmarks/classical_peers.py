"""The systems of ``tests/classical/roots.py`` in JAX, and what jaxopt and Optimistix make of them.

A process of its own, as ``classical.py`` starts it: JSON on the standard input, ``{problem: [start, f(start)]}``, where
the second checks that this is the same system; JSON lines on the standard output, ``[solver, times, {problem:
[residual, claimed, evaluations]}]``. A step of Optimistix is one evaluation of the function and of its derivatives.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt
import optimistix as optx

jax.config.update("jax_enable_x64", True)

Array = Any
STEPS, SMALL = 1000, 1e-8


def rosenbrock(z: Array) -> Array:
    return jnp.concatenate((1 - z[:1], 10 * (z[1:] - z[:-1] ** 2)))


def powell_singular(z: Array) -> Array:
    a, b, c, d = z
    return jnp.stack((a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2))


def powell_badly_scaled(z: Array) -> Array:
    return jnp.stack((1e4 * z[0] * z[1] - 1, jnp.exp(-z[0]) + jnp.exp(-z[1]) - 1.0001))


def wood(z: Array) -> Array:
    a, b, c, d = z
    first, second = b - a * a, d - c * c
    return jnp.stack(
        (
            -200 * a * first - (1 - a),
            200 * first + 20.2 * (b - 1) + 19.8 * (d - 1),
            -180 * c * second - (1 - c),
            180 * second + 20.2 * (d - 1) + 19.8 * (b - 1),
        )
    )


def helical_valley(z: Array) -> Array:
    a, b, c = z
    angle = jnp.arctan(b / jnp.where(a == 0, 1e-300, a)) / (2 * math.pi)
    angle = jnp.where(a < 0, angle + 0.5, angle)
    return jnp.stack((10 * (c - 10 * angle), 10 * (jnp.hypot(a, b) - 1), c))


def watson(z: Array) -> Array:
    power = jnp.arange(len(z), dtype=float)
    t = (jnp.arange(1, 30, dtype=float) / 29)[:, None] ** power

    def total(z: Array) -> Array:
        slope = t[:, :-1] @ (power[1:] * z[1:])
        r = jnp.concatenate((slope - (t @ z) ** 2 - 1, z[:1], (z[1] - z[0] ** 2 - 1)[None]))
        return (r * r).sum()

    return jax.grad(total)(z)


def chebyquad(z: Array) -> Array:
    x, n = 2 * z - 1, len(z)
    before, now, out = jnp.ones_like(z), x, []
    for i in range(1, n + 1):
        out.append(now.mean() - (0.0 if i % 2 else -1 / (i * i - 1)))
        before, now = now, 2 * x * now - before
    return jnp.stack(out)


def brown_almost_linear(z: Array) -> Array:
    return jnp.concatenate((z[:-1] + z.sum() - (len(z) + 1), (z.prod() - 1)[None]))


def _grid(n: int) -> tuple[float, Array]:
    h = 1 / (n + 1)
    return h, jnp.arange(1, n + 1, dtype=float) * h


def discrete_boundary_value(z: Array) -> Array:
    h, t = _grid(len(z))
    around = jnp.pad(z, 1)
    return 2 * z - around[:-2] - around[2:] + h * h / 2 * (z + t + 1) ** 3


def discrete_integral(z: Array) -> Array:
    h, t = _grid(len(z))
    c = (z + t + 1) ** 3
    above = ((1 - t) * c).sum() - jnp.cumsum((1 - t) * c)
    return z + h / 2 * ((1 - t) * jnp.cumsum(t * c) + t * above)


def trigonometric(z: Array) -> Array:
    n, k = len(z), jnp.arange(1, len(z) + 1, dtype=float)
    return n - jnp.cos(z).sum() + k * (1 - jnp.cos(z)) - jnp.sin(z)


def variably_dimensioned(z: Array) -> Array:
    j = jnp.arange(1, len(z) + 1, dtype=float)
    s = (j * (z - 1)).sum()
    return z - 1 + j * s * (1 + 2 * s * s)


def broyden_tridiagonal(z: Array) -> Array:
    around = jnp.pad(z, 1)
    return (3 - 2 * z) * z - around[:-2] - 2 * around[2:] + 1


def broyden_banded(z: Array) -> Array:
    i = jnp.arange(len(z))
    off = i[:, None] - i[None, :]
    near = ((off <= 5) & (off >= -1) & (off != 0)).astype(float)
    return z * (2 + 5 * z * z) + 1 - near @ (z * (1 + z))


def matrix_square_root(z: Array) -> Array:
    n = math.isqrt(len(z))
    x = z.reshape(n, n)
    return (x @ x - (1e-4 * jnp.eye(n)).at[0, 1].set(1)).flatten()


def dennis_schnabel(z: Array) -> Array:
    return jnp.stack((z[0] + z[1] - 3, z[0] ** 2 + z[1] ** 2 - 9))


def freudenstein_roth(z: Array) -> Array:
    x, y = z
    return jnp.stack((-13 + x + ((5 - y) * y - 2) * y, -29 + x + ((y + 1) * y - 14) * y))


def boggs(z: Array) -> Array:
    return jnp.stack((z[0] ** 2 - z[1] + 1, z[0] - jnp.cos(math.pi / 2 * z[1])))


def flat_root(z: Array) -> Array:
    return z * (z * z).sum()


def double_root(z: Array) -> Array:
    return z * (z - 5) ** 2


def gaussian_root(z: Array) -> Array:
    x, y = z
    return jnp.stack(
        (
            -(y**2) * jnp.expm1(-(x**2)) / jnp.where(x == 0, 1.0, x),
            -x * jnp.expm1(-(y**2)) / jnp.where(y == 0, 1.0, y),
        )
    )


def chandrasekhar(c: float) -> Callable[[Array], Array]:
    def f(z: Array) -> Array:
        n = len(z)
        mu = (jnp.arange(1, n + 1, dtype=float) - 0.5) / n
        return z - 1 / (1 - c / (2 * n) * ((mu[:, None] / (mu[:, None] + mu)) @ z))

    return f


NAMED = {
    "rosenbrock": rosenbrock,
    "powell singular": powell_singular,
    "powell badly scaled": powell_badly_scaled,
    "wood": wood,
    "helical valley": helical_valley,
    "watson": watson,
    "chebyquad": chebyquad,
    "brown": brown_almost_linear,
    "discrete boundary value": discrete_boundary_value,
    "discrete integral": discrete_integral,
    "trigonometric": trigonometric,
    "variably dimensioned": variably_dimensioned,
    "broyden tridiagonal": broyden_tridiagonal,
    "broyden banded": broyden_banded,
    "matrix square root": matrix_square_root,
    "dennis and schnabel": dennis_schnabel,
    "gaussian": gaussian_root,
    "flat root": flat_root,
    "double root": double_root,
    "freudenstein and roth": freudenstein_roth,
    "boggs": boggs,
    "chandrasekhar 0.9": chandrasekhar(0.9),
    "chandrasekhar 0.9999": chandrasekhar(0.9999),
}

OPTIMISTIX: dict[str, Any] = {
    "Newton": optx.Newton(rtol=SMALL, atol=SMALL),
    "Chord": optx.Chord(rtol=SMALL, atol=SMALL),
    "Dogleg": optx.Dogleg(rtol=SMALL, atol=SMALL),
    "LevenbergMarquardt": optx.LevenbergMarquardt(rtol=SMALL, atol=SMALL),
    "IndirectLevenbergMarquardt": optx.IndirectLevenbergMarquardt(rtol=SMALL, atol=SMALL),
}
OPTIMISTIX["BestSoFar(Newton)"] = optx.BestSoFarRootFinder(OPTIMISTIX["Newton"])


def optimistix(solver: Any, f: Any) -> Callable[[Array], tuple[Array, Array, Array]]:
    def run(start: Array) -> tuple[Array, Array, Array]:
        found = optx.root_find(lambda z, _: f(z), solver, start, max_steps=STEPS, throw=False)
        return found.value, found.result == optx.RESULTS.successful, found.stats["num_steps"]

    return run


def broyden(f: Any) -> Callable[[Array], tuple[Array, Array, Array]]:
    def run(start: Array) -> tuple[Array, Array, Array]:
        found = jaxopt.Broyden(f, maxiter=200, tol=SMALL, implicit_diff=False).run(start)
        return found.params, found.state.error <= SMALL, found.state.num_fun_eval

    return run


def levenberg_marquardt(f: Any) -> Callable[[Array], tuple[Array, Array, Array]]:
    """Its claim is of the gradient of half the square of the residual: a minimum of it need be no root, and no root is
    claimed where that is large."""

    def run(start: Array) -> tuple[Array, Array, Array]:
        found = jaxopt.LevenbergMarquardt(f, maxiter=STEPS, tol=1e-12, implicit_diff=False).run(start)
        return found.params, found.state.error <= 1e-12, found.state.iter_num

    return run


SOLVERS: dict[str, Any] = {
    "jaxopt Broyden": broyden,
    "jaxopt LevenbergMarquardt": levenberg_marquardt,
} | {f"Optimistix {n}": (lambda f, solver=s: optimistix(solver, f)) for n, s in OPTIMISTIX.items()}


def function(problem: str) -> Callable[[Array], Array]:
    return NAMED[problem] if problem in NAMED else NAMED[problem.rsplit(" ", 1)[0]]


def main() -> None:
    told = json.load(sys.stdin)
    for problem, (start, value) in told["problems"].items():
        mine = function(problem)(jnp.array(start))
        scale = max(1.0, float(jnp.abs(mine).max()))
        if not bool(jnp.abs(mine - jnp.array(value)).max() <= 1e-9 * scale):
            sys.exit(f"{problem} is another system here: {mine} beside {value}")
    versions = {name: version(name) for name in ("jax", "jaxopt", "optimistix")}
    print(json.dumps(["versions", 0, versions]), flush=True)
    for name, solver in SOLVERS.items():
        rows: dict[int, Any] = {times: {} for times in told["times"]}
        for problem, (start, _) in told["problems"].items():
            f = function(problem)
            run = jax.jit(solver(f))
            for times in told["times"]:
                if times == 1 or any(start):
                    z, claimed, count = run(times * jnp.array(start))
                    rows[times][problem] = [float(jnp.linalg.norm(f(z))), bool(claimed), int(count)]
        for times, found in rows.items():
            print(json.dumps([name, times, found]), flush=True)


if __name__ == "__main__":
    main()
