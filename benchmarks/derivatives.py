"""First and second derivatives through a fixed point: are they right, and what do they cost?

    python benchmarks/derivatives.py

One state of size d solves z = tanh(W z + x + 0.1 z∘x) in float64; the loss is <c, z> + |z|²/2. Every library gives the
gradient in x and a Hessian-vector product, reverse over reverse and forward over reverse, which are compared with the
closed form of DESIGN.md evaluated densely. The torch libraries are also put through the transforms of torch.func.
What a library cannot do is recorded with the first line of its exception.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import record  # isort: skip  (first: it sets the number of threads)

import jax
import jax.numpy as jnp
import jaxopt
import lineax as lx
import numpy as np
import optimistix as optx
import torch
import torchdeq
import torchopt
import xitorch.optimize
from jaxopt import linear_solve
from record import Bars, Candidate, Row, Target, attempt, interleave
from torch import Tensor

import torchimplicit as ti

torch.set_num_threads(1)
jax.config.update("jax_enable_x64", True)
warnings.filterwarnings("ignore")

SIZES = (10, 100, 1000)
MIX = 0.1
RIGHT = 1e-8
"""A derivative counts as right when its relative error is at most this; the solves aim at 1e-12."""
TIGHT = 1e-12
STEPS = 400
ORDERS = ("gradient", "HVP, reverse over reverse", "HVP, forward over reverse")
TRANSFORMS = ("func.grad", "func.jvp", "func.vmap", "func.vmap of grad", "func.hessian")
Array = np.ndarray
Solve = Callable[[Any], Any]


# ------------------------------------------------------------------------------------------ the problem, in closed form


@dataclass(frozen=True)
class Problem:
    """The weights, the point at which derivatives are taken, the direction, and the loss's coefficients."""

    w: Array
    x: Array
    v: Array
    c: Array

    @property
    def d(self) -> int:
        """Size of the state and of x."""
        return self.x.size


def problem(d: int, seed: int) -> Problem:
    """A random instance whose map contracts, by the factor 0.8 or so."""
    generator = np.random.default_rng(seed)
    w = generator.standard_normal((d, d))
    vectors = generator.standard_normal((3, d))
    return Problem(0.7 * w / np.linalg.norm(w, 2), *vectors)


def state(p: Problem, x: Array) -> Array:
    """The fixed point, by Newton's method to round-off."""
    z = np.zeros_like(x)
    for _ in range(50):
        fz = np.tanh(p.w @ z + x + MIX * z * x)
        jacobian = (1 - fz * fz)[:, None] * (p.w + MIX * np.diag(x))
        step = np.linalg.solve(np.eye(p.d) - jacobian, fz - z)
        z = z + step
        if np.abs(step).max() < 1e-15:
            break
    return z


def derivatives(p: Problem, x: Array, v: Array) -> tuple[Array, Array]:
    """The gradient, and the Hessian times v: DESIGN.md's closed form along v, by dense solves."""
    z = state(p, x)
    slope, mixing, outer = 1 - z * z, p.w + MIX * np.diag(x), 1 + MIX * z
    adjoint = np.eye(p.d) - (slope[:, None] * mixing).T
    lam = np.linalg.solve(adjoint, p.c + z)
    gradient = outer * slope * lam
    dz = np.linalg.solve(adjoint.T, slope * outer * v)
    dslope = -2 * z * slope * (mixing @ dz + outer * v)
    dlam = np.linalg.solve(adjoint, dz + mixing.T @ (dslope * lam) + MIX * v * slope * lam)
    return gradient, MIX * dz * slope * lam + outer * (dslope * lam + slope * dlam)


# -------------------------------------------------------------------------------------------------------- the libraries


@dataclass(frozen=True)
class Method:
    """A library in one setting: ``solve`` maps x to z, with torch tensors or with JAX arrays."""

    library: str
    setting: str
    backend: str
    solve: Solve

    @property
    def name(self) -> str:
        """A key that is unique among the methods."""
        return f"{self.library}, {self.setting}"


def ours(p: Problem) -> list[Method]:
    """Ours: the same forward solve, with an iterative and a dense adjoint."""
    w, z0 = torch.from_numpy(p.w), torch.zeros(p.d, dtype=torch.float64)
    fixed_point = ti.FixedPoint(lambda z, x: torch.tanh(z @ w.t() + x + MIX * z * x), batched=False)
    solver = ti.Anderson(rtol=TIGHT, atol=0.0, max_steps=STEPS)

    def solve(linear: Any, x: Tensor) -> Tensor:
        return ti.solve(fixed_point, z0, x, solver=solver, gradient=ti.Implicit(linear_solver=linear)).value

    return [
        Method("ours", "Implicit, GMRES 1e-12", "torch", partial(solve, ti.GMRES(rtol=TIGHT))),
        Method("ours", "Implicit, Dense", "torch", partial(solve, ti.Dense())),
    ]


def with_torchdeq(p: Problem) -> list[Method]:
    """TorchDEQ's two implementations of implicit differentiation, with Anderson and relative tolerances."""
    w, z0 = torch.from_numpy(p.w), torch.zeros(1, p.d, dtype=torch.float64)

    def solve(hook: bool, x: Tensor) -> Tensor:
        model = torchdeq.get_deq(
            f_solver="fixed_point_iter",
            b_solver="fixed_point_iter",
            ift=not hook,
            hook_ift=hook,
            f_max_iter=STEPS,
            b_max_iter=STEPS,
            f_tol=TIGHT,
            b_tol=TIGHT,
            f_stop_mode="rel",
            b_stop_mode="rel",
        )
        return model(lambda z: torch.tanh(z @ w.t() + x + MIX * z * x), z0)[0][-1][0]

    return [
        Method("TorchDEQ", "ift", "torch", partial(solve, False)),
        Method("TorchDEQ", "hook_ift", "torch", partial(solve, True)),
    ]


def with_xitorch(p: Problem) -> list[Method]:
    """xitorch's equilibrium with BiCGStab and with a dense adjoint.

    ``alpha=-1`` starts Broyden's method from plain iteration; the default's start has the other sign, and costs ten to
    a hundred times as many evaluations.
    """
    w, z0 = torch.from_numpy(p.w), torch.zeros(p.d, dtype=torch.float64)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ w.t() + x + MIX * z * x)

    def solve(forward: dict[str, Any], backward: dict[str, Any], x: Tensor) -> Tensor:
        return xitorch.optimize.equilibrium(f, z0, params=(x,), bck_options=backward, **forward)

    tight = {"method": "bicgstab", "rtol": TIGHT, "atol": 0.0, "posdef": True, "max_niter": STEPS}
    broyden = {"method": "broyden1", "alpha": -1.0, "f_tol": TIGHT * p.d**0.5, "maxiter": STEPS}
    settings = {
        "Broyden from plain iteration, BiCGStab 1e-12": (broyden, tight),
        "Broyden from plain iteration, dense": (broyden, {"method": "exactsolve"}),
        "defaults": ({}, {}),
    }
    return [Method("xitorch", name, "torch", partial(solve, *options)) for name, options in settings.items()]


def with_torchopt(p: Problem) -> list[Method]:
    """TorchOpt's custom_root around plain iteration, with its default adjoint (normal CG) made tight, and Neumann."""
    w, z0 = torch.from_numpy(p.w), torch.zeros(p.d, dtype=torch.float64)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ w.t() + x + MIX * z * x)

    def solve(linear: Any, x: Tensor) -> Tensor:
        @torchopt.diff.implicit.custom_root(lambda z, x: f(z, x) - z, argnums=1, solve=linear)
        def iterate(z: Tensor, x: Tensor) -> Tensor:
            for _ in range(STEPS):
                z, previous = f(z, x), z
                if (z - previous).norm() < TIGHT * z.norm():
                    break
            return z

        return iterate(z0, x)

    return [
        Method(
            "TorchOpt",
            "normal CG 1e-12",
            "torch",
            partial(solve, torchopt.linear_solve.solve_normal_cg(rtol=TIGHT, atol=0.0, maxiter=10 * STEPS)),
        )
    ]


def with_theseus(p: Problem) -> list[Method]:
    """Theseus: the least-squares problem min |z - f(z)|², Gauss-Newton with a dense factorisation, implicit mode."""
    import theseus as th

    w = torch.from_numpy(p.w)

    def residual(optim_vars: Any, aux_vars: Any) -> Tensor:
        z, x = optim_vars[0].tensor, aux_vars[0].tensor
        return z - torch.tanh(z @ w.t() + x + MIX * z * x)

    def solve(x: Tensor) -> Tensor:
        z, injected = th.Vector(p.d, name="z", dtype=torch.float64), th.Variable(x[None], name="x")
        objective = th.Objective(dtype=torch.float64)
        unweighted = th.ScaleCostWeight(torch.ones(1, 1, dtype=torch.float64))
        objective.add(th.AutoDiffCostFunction([z], residual, p.d, unweighted, aux_vars=[injected]))
        optimizer = th.GaussNewton(objective, max_iterations=20, abs_err_tolerance=1e-28, rel_err_tolerance=0.0)
        start = {"z": torch.zeros(1, p.d, dtype=torch.float64), "x": x[None]}
        values, _ = th.TheseusLayer(optimizer).forward(start, optimizer_kwargs={"backward_mode": "implicit"})
        return values["z"][0]

    return [Method("Theseus", "Gauss-Newton, implicit", "torch", solve)]


def with_jaxopt(p: Problem) -> list[Method]:
    """jaxopt's two fixed-point solvers, with a tight GMRES, and with the default adjoint."""
    w, z0 = jnp.asarray(p.w), jnp.zeros(p.d)

    def f(z: Any, x: Any) -> Any:
        return jnp.tanh(w @ z + x + MIX * z * x)

    tight = partial(linear_solve.solve_gmres, tol=TIGHT, maxiter=STEPS)
    plain = partial(jaxopt.FixedPointIteration, f, maxiter=STEPS, tol=TIGHT * p.d**0.5, implicit_diff=True)
    anderson = jaxopt.AndersonAcceleration(
        f,
        history_size=5,
        ridge=1e-12,
        maxiter=STEPS,
        tol=TIGHT * p.d**0.5,
        implicit_diff=True,
        implicit_diff_solve=tight,
    )
    solvers = {
        "FixedPointIteration, GMRES 1e-12": plain(implicit_diff_solve=tight),
        "Anderson, GMRES 1e-12": anderson,
        "FixedPointIteration, default (normal CG)": plain(),
    }
    return [
        Method("jaxopt", name, "jax", lambda x, solver=solver: solver.run(z0, x).params)
        for name, solver in solvers.items()
    ]


def with_optimistix(p: Problem) -> list[Method]:
    """Optimistix's fixed point with the default (dense) and with a GMRES adjoint."""
    w, z0 = jnp.asarray(p.w), jnp.zeros(p.d)
    solver = optx.FixedPointIteration(rtol=TIGHT, atol=TIGHT, norm=optx.rms_norm)

    def solve(adjoint: Any, x: Any) -> Any:
        return optx.fixed_point(
            lambda z, x: jnp.tanh(w @ z + x + MIX * z * x), solver, z0, x, adjoint=adjoint, max_steps=STEPS, throw=False
        ).value

    gmres = optx.ImplicitAdjoint(linear_solver=lx.GMRES(rtol=TIGHT, atol=TIGHT))
    return [
        Method("Optimistix", "ImplicitAdjoint, default (dense)", "jax", partial(solve, optx.ImplicitAdjoint())),
        Method("Optimistix", "ImplicitAdjoint, GMRES 1e-12", "jax", partial(solve, gmres)),
    ]


LIBRARIES = (ours, with_torchdeq, with_xitorch, with_torchopt, with_theseus, with_jaxopt, with_optimistix)


# ---------------------------------------------------------------------------------------------------------- derivatives


def torch_calls(method: Method, p: Problem) -> dict[str, Callable[[], Tensor]]:
    """The derivatives, and the transforms of torch.func, as calls that return what the reference gives."""
    x, v, c = (torch.from_numpy(a) for a in (p.x, p.v, p.c))

    def loss(x: Tensor) -> Tensor:
        z = method.solve(x)
        return (c * z).sum() + 0.5 * (z * z).sum()

    def gradient() -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    def reverse_over_reverse() -> Tensor:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        return torch.autograd.grad((first * v).sum(), leaf)[0]

    def batch() -> Tensor:
        return torch.stack([x, x + 0.5 * v, x - 0.5 * v])

    return {
        ORDERS[0]: gradient,
        ORDERS[1]: reverse_over_reverse,
        ORDERS[2]: lambda: torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1],
        "func.grad": lambda: torch.func.grad(loss)(x),
        "func.jvp": lambda: torch.func.jvp(loss, (x,), (v,))[1],
        "func.vmap": lambda: torch.func.vmap(method.solve)(batch()),
        "func.vmap of grad": lambda: torch.func.vmap(torch.func.grad(loss))(batch()),
        "func.hessian": lambda: torch.func.hessian(loss)(x) @ v,
    }


def jax_calls(method: Method, p: Problem) -> dict[str, Callable[[], Any]]:
    """The derivatives, jitted; calls wait for the result."""
    x, v, c = (jnp.asarray(a) for a in (p.x, p.v, p.c))

    def loss(x: Any) -> Any:
        z = method.solve(x)
        return jnp.vdot(c, z) + 0.5 * jnp.vdot(z, z)

    first = jax.grad(loss)
    gradient = jax.jit(first)
    reverse = jax.jit(lambda x, v: jax.grad(lambda x: jnp.vdot(first(x), v))(x))
    forward = jax.jit(lambda x, v: jax.jvp(first, (x,), (v,))[1])
    return {
        ORDERS[0]: lambda: gradient(x).block_until_ready(),
        ORDERS[1]: lambda: reverse(x, v).block_until_ready(),
        ORDERS[2]: lambda: forward(x, v).block_until_ready(),
    }


def references(p: Problem) -> dict[str, Array]:
    """What each call should give."""
    gradient, product = derivatives(p, p.x, p.v)
    batch = [p.x, p.x + 0.5 * p.v, p.x - 0.5 * p.v]
    return {
        ORDERS[0]: gradient,
        ORDERS[1]: product,
        ORDERS[2]: product,
        "func.grad": gradient,
        "func.jvp": np.asarray(gradient @ p.v),
        "func.hessian": product,
        "func.vmap": np.stack([state(p, x) for x in batch]),
        "func.vmap of grad": np.stack([derivatives(p, x, p.v)[0] for x in batch]),
    }


def relative_error(value: Any, reference: Array) -> float:
    """|value - reference| / |reference|."""
    value = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def judge(call: Callable[[], Any], reference: Array) -> tuple[float | None, str]:
    """The relative error, and a verdict: ``right``, ``WRONG`` or the exception's first line."""
    error, failure = attempt(lambda: relative_error(call(), reference))
    if failure:
        return None, failure
    return error, "right" if error <= RIGHT else "inaccurate" if error <= 1e-2 else "WRONG"


def number_exceptions(rows: list[Row], names: tuple[str, ...]) -> list[str]:
    """Replace the exceptions in the rows by ``fails [k]``, and return the list that k points into."""
    legend: dict[str, int] = {}
    for row in rows:
        for name in names:
            if row.get(f"{name}: error", 0.0) is None:
                row[f"{name}: exception"] = row[name]
                row[name] = f"fails [{legend.setdefault(row[name], len(legend) + 1)}]"
    return [f"[{k}] {message}" for message, k in legend.items()]


def methods(p: Problem) -> tuple[list[Method], list[str]]:
    """All methods, and a line for each library that could not be set up."""
    found, failures = [], []
    for library in LIBRARIES:
        made, failure = attempt(partial(library, p))
        found += made or []
        failures += [f"{library.__name__.removeprefix('with_')}: {failure}"] if failure else []
    return found, failures


def measure(d: int, seed: int, repeats: int, seconds: float) -> tuple[list[Row], list[Row], list[str]]:
    """Rows of errors and times, rows of the torch.func transforms, and set-up failures, at one size."""
    p = problem(d, seed)
    wanted, (found, failures) = references(p), methods(p)
    rows, transforms, timed = [], [], {}
    for method in found:
        calls = (torch_calls if method.backend == "torch" else jax_calls)(method, p)
        row: Row = {"d": d, "library": method.library, "setting": method.setting}
        for order in ORDERS:
            row[f"{order}: error"], row[order] = judge(calls[order], wanted[order])
            if row[f"{order}: error"] is not None:
                timed[method.name, order] = Candidate(lambda _, call=calls[order]: call())
        rows.append(row)
        if method.backend == "torch" and d == SIZES[0]:
            verdicts = {name: judge(calls[name], wanted[name]) for name in TRANSFORMS}
            transforms.append(
                {"library": method.library, "setting": method.setting}
                | {name: verdict for name, (_, verdict) in verdicts.items()}
                | {f"{name}: error": error for name, (error, _) in verdicts.items()}
            )
    timings = interleave(timed, repeats, seconds, seed)
    for row in rows:
        for order in ORDERS:
            if (timing := timings.get((f"{row['library']}, {row['setting']}", order))) is not None:
                row |= {
                    f"{order}: ms": timing.cpu_ms,
                    f"{order}: wall ms": timing.wall_ms,
                    f"{order}: quartiles": timing.cpu_quartiles_ms,
                }
    return rows, transforms, failures


def targets(rows: list[Row], transforms: list[Row]) -> list[Target]:
    """Ours is right to ``RIGHT`` in every order and every transform."""
    wanted = [
        Target(f"d = {row['d']}, {row['setting']}: error of the {order}", row[f"{order}: error"], "<=", RIGHT)
        for row in rows
        if row["library"] == "ours"
        for order in ORDERS
    ]
    return wanted + [
        Target(f"{row['setting']}: error of {name}", row[f"{name}: error"], "<=", RIGHT)
        for row in transforms
        if row["library"] == "ours"
        for name in TRANSFORMS
    ]


def panels(rows: list[Row]) -> list[Bars]:
    """Errors and times by size, for the gradient and the reverse-over-reverse product."""
    out = []
    for order in ORDERS[:2]:
        for what, label in (("error", "relative error"), ("ms", "ms")):
            groups: dict[str, dict[str, float]] = {}
            for row in rows:
                value = row.get(f"{order}: {what}")
                if value is not None:
                    groups.setdefault(f"d = {row['d']}", {})[f"{row['library']}, {row['setting']}"] = max(value, 1e-17)
            out.append(Bars(f"{order}: {label}", label, groups, log=True))
    return out


def main() -> None:
    """Measure, compare, record."""
    options = record.arguments(__doc__.splitlines()[0], repeats=11, seconds=60.0)
    load, rows, transforms, failures = os.getloadavg(), [], [], []
    for d in SIZES[:1] if options.quick else SIZES:
        some, more, failed = measure(d, options.seed, options.repeats, options.seconds)
        rows, transforms, failures = rows + some, transforms + more, failures + failed
    exceptions = number_exceptions([*rows, *transforms], (*ORDERS, *TRANSFORMS))
    verdicts = "Right or wrong (relative error against the closed form)"
    times, functional = "Time, ms of CPU, the forward solve included", f"torch.func at d = {SIZES[0]}"
    record.record(
        "derivatives",
        options,
        load_before=load,
        settings={
            "problem": "z = tanh(W z + x + 0.1 z∘x), |W|_2 = 0.7, one state of size d, float64, from zero; "
            "loss <c, z> + |z|²/2, derivatives in x",
            "tolerance": f"{TIGHT:g} relative, forward and adjoint, where the library lets it be set",
            "verdicts": f"right: relative error <= {RIGHT:g}; inaccurate: <= 1e-2; WRONG: above",
        },
        rows={verdicts: rows, times: rows, functional: transforms},
        columns={
            verdicts: ("d", "library", "setting", *(name for order in ORDERS for name in (order, f"{order}: error"))),
            times: ("d", "library", "setting", *(f"{order}: ms" for order in ORDERS)),
            functional: ("library", "setting", *TRANSFORMS),
        },
        targets=targets(rows, transforms),
        panels=panels(rows),
        notes=[
            "Torch libraries run eagerly, JAX libraries jitted (compilation untimed).",
            "JAX's reverse over reverse is jax.grad of <jax.grad, v>; forward over reverse is jax.jvp of jax.grad.",
            *exceptions,
            *(f"Not set up: {failure}" for failure in dict.fromkeys(failures)),
        ],
    )


if __name__ == "__main__":
    main()
