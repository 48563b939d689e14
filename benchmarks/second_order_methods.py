"""The physics loss of ``second_order.py``, its dense reference, and the ways to its gradient, library by library.

The equilibrium of z = tanh(Wz + Ut + b) at collocation points t gives outputs u = Cz; the loss is the mean square of
the residual u' + u/2 - sin t of an ordinary differential equation, or of u'' + u'/2 + u - sin t. What is wanted is its
gradient in W, U and b.
"""

from __future__ import annotations

import record  # noqa: F401  # isort: skip  (first: it sets the number of threads)

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.derivatives import Derivatives
from torchimplicit.gradients.linear_task import LinearTask

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

OUTPUTS = 2
TOLERANCE = 1e-10
"""Of the forward solves, relative; the adjoint ones where a library takes one."""
RIGHT = 1e-8
"""The relative error of a gradient that counts as right, and that the unrolled iteration has to reach."""
POINTS = {10: 32, 50: 32, 200: 32, 500: 16, 1000: 8, 2000: 4}
LIMIT = 5000
DENSE_NUMEL = 400
"""xitorch's dense solve assembles one matrix of all samples together: up to this many entries of the state."""
FORWARD: dict[str, ti.solvers.Solver] = {
    "plain iteration": ti.FixedPointIteration(rtol=TOLERANCE, max_steps=LIMIT),
    "Anderson": ti.Anderson(rtol=TOLERANCE, max_steps=LIMIT),
    "Newton, dense": ti.NewtonKrylov(linear_solver=ti.Dense(), rtol=TOLERANCE, max_steps=50),
}
Gradient = tuple[Any, ...]


def residual(derivatives: Any, t: Any, sin: Callable[[Any], Any]) -> Any:
    """The residual of the differential equation from u and its derivatives."""
    if len(derivatives) == 2:
        u, first = derivatives
        return first + 0.5 * u - sin(t)
    u, first, second = derivatives
    return second + 0.5 * first + u - sin(t)


@dataclass
class Physics:
    """One instance.

    Args:
        n, points: the size of the state, and how many collocation points there are.
        kind: of W: ``gaussian``, or ``orthogonal``, whose iteration is slow.
        norm: the largest singular value of W.
        order: the highest derivative in the loss.
    """

    n: int
    points: int
    kind: str
    norm: float
    order: int
    seed: int = 0
    w: Tensor = field(init=False)
    u: Tensor = field(init=False)
    b: Tensor = field(init=False)
    c: Tensor = field(init=False)
    t: Tensor = field(init=False)
    calls: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        w = torch.randn(self.n, self.n, generator=generator)
        w = torch.linalg.qr(w).Q if self.kind == "orthogonal" else w / torch.linalg.matrix_norm(w, 2)
        self.w = (self.norm * w).requires_grad_()
        self.u = (0.5 * torch.randn(self.n, 1, generator=generator)).requires_grad_()
        self.b = (0.1 * torch.randn(self.n, generator=generator)).requires_grad_()
        self.c = torch.randn(OUTPUTS, self.n, generator=generator) / self.n**0.5
        self.t = torch.linspace(-1, 1, self.points)[:, None]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """What the gradient is wanted in."""
        return self.w, self.u, self.b

    @property
    def z0(self) -> Tensor:
        """Where the iterations start."""
        return torch.zeros(self.points, self.n)

    def f(self, z: Tensor, t: Tensor) -> Tensor:
        """The map; counts its calls."""
        self.calls += 1
        return torch.tanh(z @ self.w.t() + t @ self.u.t() + self.b)

    def loss(self, *states: Tensor) -> Tensor:
        """Of z and its derivatives."""
        return residual([z @ self.c.t() for z in states], self.t, torch.sin).square().mean()

    def gradient(self, *states: Tensor) -> Gradient:
        """Of the loss, through whatever recorded the states."""
        return torch.autograd.grad(self.loss(*states), self.weights)

    def error(self, gradient: Gradient, reference: Gradient) -> float:
        """The largest relative error among W, U and b."""
        pairs = zip((torch.as_tensor(g) for g in gradient), reference, strict=True)
        return max(float((g - r).norm() / r.norm()) for g, r in pairs)


def reference(p: Physics) -> Gradient:
    """By dense algebra, point by point: Newton to round-off, then autograd through the formulas for z' and z''."""
    total = [torch.zeros_like(w) for w in p.weights]
    eye = torch.eye(p.n)
    for k in range(p.points):
        t = p.t[k]
        with torch.no_grad():
            z = torch.zeros(p.n)
            for _ in range(50):
                gap = torch.tanh(p.w @ z + p.u @ t + p.b) - z
                slope = 1 - (gap + z) ** 2
                factors = torch.linalg.lu_factor(eye - slope[:, None] * p.w)
                step = torch.linalg.lu_solve(*factors, gap[:, None])[:, 0]
                z = z + step
                if float(step.abs().max()) < 1e-15:
                    break
        # one step of Newton's method with a constant matrix has the solution's first derivative
        gap = torch.tanh(p.w @ z + p.u @ t + p.b) - z
        z = z + torch.linalg.lu_solve(*factors, gap[:, None])[:, 0]
        slope = 1 - z * z
        matrix = eye - slope[:, None] * p.w
        states = [z, torch.linalg.solve(matrix, slope * p.u[:, 0])]
        if p.order == 2:
            states.append(torch.linalg.solve(matrix, -2 * z * slope * (p.w @ states[1] + p.u[:, 0]) ** 2))
        out = residual([p.c @ state for state in states], t, torch.sin).square().sum() / (p.points * OUTPUTS)
        total = [a + g for a, g in zip(total, torch.autograd.grad(out, p.weights), strict=True)]
    return tuple(total)


# ----------------------------------------------------------------------------------------------------------------- ours


def direct(p: Physics, solver: Any = None, linear: Any = None) -> tuple[Gradient, int]:
    """``Derivatives`` at the solution; also the linear solves that it made."""
    with torch.no_grad():
        solution = ti.solve(ti.FixedPoint(p.f), p.z0, p.t, solver=solver)
    at = Derivatives(solution, linear_solver=linear)
    gradient = p.gradient(at.value, *at.along((torch.ones_like(p.t),), order=p.order))
    return gradient, sum(at.solves.values())


def forward_first(p: Physics, value: Callable[[Tensor], Tensor]) -> Gradient:
    """Forward mode for the derivatives in t, reverse mode for the gradient."""

    def along(t: Tensor, order: int) -> tuple[Tensor, ...]:
        if not order:
            return (value(t),)
        below, moved = torch.func.jvp(lambda t: along(t, order - 1), (t,), (torch.ones_like(t),))
        return (*below, moved[-1])

    return p.gradient(*along(p.t, p.order))


def reverse_first(p: Physics, value: Callable[[Tensor], Tensor]) -> Gradient:
    """Reverse mode over reverse mode: a backward pass for every output, as is done with any network."""
    t = p.t.clone().requires_grad_()
    found = [value(t) @ p.c.t()]
    for _ in range(p.order):
        slopes = [torch.autograd.grad(column.sum(), t, create_graph=True)[0] for column in found[-1].unbind(1)]
        found.append(torch.cat(slopes, 1))
    loss = residual(found, p.t, torch.sin).square().mean()
    return torch.autograd.grad(loss, p.weights)


def equilibrium(p: Physics, solver: Any, linear: Any, t: Tensor) -> Tensor:
    """The layer, to be composed."""
    gradient = ti.Implicit(linear_solver=linear)
    return ti.solve(ti.FixedPoint(p.f), p.z0, t, solver=solver, gradient=gradient).value


def unrolled(p: Physics, steps: int, t: Tensor) -> Tensor:
    """Plain iteration that stays on the tape."""
    z = p.z0
    for _ in range(steps):
        z = p.f(z, t)
    return z


def steps_needed(p: Physics, wanted: Gradient) -> int:
    """The fewest steps, up to one in twenty, with which the unrolled iteration's gradient is right."""

    def right(steps: int) -> bool:
        return p.error(forward_first(p, partial(unrolled, p, steps)), wanted) <= RIGHT

    high = 16
    while not right(high):
        high *= 2
        if high > LIMIT:
            raise RuntimeError(f"unrolling is not right after {high // 2} steps")
    low = high // 2
    while high - low > max(1, high // 20):
        middle = (low + high) // 2
        low, high = (low, middle) if right(middle) else (middle, high)
    return high


# --------------------------------------------------------------------------------------------------------- the others


def with_xitorch(p: Physics, dense: bool, broyden: bool, t: Tensor) -> Tensor:
    """xitorch's equilibrium; it takes all points together as one system.

    The forward solve is Broyden's method started from plain iteration (its default starts with the other sign), or
    plain iteration itself; the adjoint is BiCGStab or dense.
    """
    import xitorch.optimize

    def f(z: Tensor, t: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
        p.calls += 1
        return torch.tanh(z @ w.t() + t @ u.t() + b)

    def plain(gap: Callable[..., Tensor], z: Tensor, params: Any, **_: Any) -> Tensor:
        for _step in range(LIMIT):
            step = gap(z, *params)  # z - f(z), or a root finder's function
            z = z - step
            if bool(step.norm() <= TOLERANCE * z.norm()):
                break
        return z

    numel = p.points * p.n
    forward: dict[str, Any] = {"method": plain}
    if broyden:
        forward = {"method": "broyden1", "alpha": -1.0, "f_tol": TOLERANCE * numel**0.5, "maxiter": LIMIT}
    options: dict[str, Any] = {"method": "exactsolve"}
    if not dense:
        options = {"method": "bicgstab", "rtol": TOLERANCE, "atol": 0.0, "posdef": True, "max_niter": 500}
    return xitorch.optimize.equilibrium(f, p.z0, params=(t, *p.weights), bck_options=options, **forward)


def with_optimistix(p: Physics, dense: bool) -> Callable[[], Gradient]:
    """Optimistix and Lineax: every point by itself (vmap), forward mode for the derivatives in t, jitted."""
    import jax
    import jax.numpy as jnp
    import lineax as lx
    import optimistix as optx

    jax.config.update("jax_enable_x64", True)
    solver = optx.FixedPointIteration(rtol=TOLERANCE, atol=TOLERANCE, norm=optx.rms_norm)
    linear = lx.LU() if dense else lx.GMRES(rtol=TOLERANCE, atol=TOLERANCE, restart=40)
    adjoint = optx.ImplicitAdjoint(linear_solver=linear)
    c, points = jnp.asarray(p.c.numpy()), jnp.asarray(p.t.numpy())

    def value(t: Any, w: Any, u: Any, b: Any) -> Any:
        def f(z: Any, args: Any) -> Any:
            t, w, u, b = args
            return jnp.tanh(w @ z + u @ t + b)

        start = jnp.zeros(p.n)
        return optx.fixed_point(f, solver, start, (t, w, u, b), adjoint=adjoint, max_steps=LIMIT, throw=False).value

    def along(t: Any, order: int, *weights: Any) -> Any:
        if not order:
            return (value(t, *weights),)
        below, moved = jax.jvp(lambda t: along(t, order - 1, *weights), (t,), (jnp.ones_like(t),))
        return (*below, moved[-1])

    def loss(weights: Any) -> Any:
        states = jax.vmap(lambda t: along(t, p.order, *weights))(points)
        return jnp.mean(residual([z @ c.T for z in states], points, jnp.sin) ** 2)

    gradient = jax.jit(jax.grad(loss))
    weights = tuple(jnp.asarray(w.detach().numpy()) for w in p.weights)
    return lambda: tuple(g.block_until_ready() for g in gradient(weights))


# -------------------------------------------------------------------------------------------------------------- by name

DIRECT = "direct"
COMPOSED = ("composed, forward then reverse", "composed, reverse over reverse")
UNROLLED = ("unrolled, forward then reverse", "unrolled, reverse over reverse")
XITORCH = ("xitorch, BiCGStab", "xitorch, BiCGStab, Broyden", "xitorch, dense")
OPTIMISTIX = ("Optimistix, GMRES", "Optimistix, LU")


def methods(p: Physics, forward: str, steps: int) -> dict[str, Callable[[], Gradient]]:
    """The ways to the gradient, as calls.

    Args:
        p: the instance.
        forward: the name of the solver of our forward solves.
        steps: of the unrolled iteration.
    """
    solver = FORWARD[forward]
    found: dict[str, Callable[[], Gradient]] = {DIRECT: lambda: direct(p, solver)[0]}
    for suffix, linear in (("", None), (", Dense", ti.Dense())):
        if linear is None or p.n <= 200:
            layer = partial(equilibrium, p, solver, linear)
            found[COMPOSED[0] + suffix] = partial(forward_first, p, layer)
            found[COMPOSED[1] + suffix] = partial(reverse_first, p, layer)
    found[UNROLLED[0]] = partial(forward_first, p, partial(unrolled, p, steps))
    found[UNROLLED[1]] = partial(reverse_first, p, partial(unrolled, p, steps))
    found[XITORCH[0]] = partial(reverse_first, p, partial(with_xitorch, p, False, False))
    if p.n <= 200:
        found[XITORCH[1]] = partial(reverse_first, p, partial(with_xitorch, p, False, True))
    if p.n * p.points <= DENSE_NUMEL:
        found[XITORCH[2]] = partial(reverse_first, p, partial(with_xitorch, p, True, False))
    found[OPTIMISTIX[0]] = lambda: with_optimistix(p, False)()
    if p.n <= 200:
        found[OPTIMISTIX[1]] = lambda: with_optimistix(p, True)()
    return found


@contextlib.contextmanager
def counted(p: Physics) -> Iterator[dict[str, int]]:
    """Counts calls of the map, and linear solves: right-hand sides, of our nodes and of xitorch's."""
    figures = {"solves": 0, "calls": 0}
    ours = LinearTask.solve

    def solve(self: LinearTask, solver: Any, transposed: bool, b: Tensor, *rest: Any) -> Any:
        figures["solves"] += 1 if b.ndim == 2 else len(b)
        return ours(self, solver, transposed, b, *rest)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(LinearTask, "solve", solve))
        with contextlib.suppress(ImportError):
            from xitorch.linalg.solve import solve_torchfcn

            theirs = solve_torchfcn.forward

            def forward(*args: Any) -> Any:
                figures["solves"] += 1
                return theirs(*args)

            stack.enter_context(mock.patch.object(solve_torchfcn, "forward", staticmethod(forward)))
        before = p.calls
        yield figures
        figures["calls"] = p.calls - before
