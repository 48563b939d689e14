"""Forward, and forward with gradient, of one batched tanh layer: ours beside xitorch and the jitted JAX libraries.

    python benchmarks/batch_gradients.py

All solve z = tanh(W z + x) from zero in float32 to a relative tolerance of 1e-4 and give the gradients in x and in W,
on one CPU thread. The tolerances of the peers are global (one norm over the batch), ours is per sample; what each
reached is in the table.
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
import xitorch.optimize
from candidates import TOLERANCE, Variant, inference, our_variant, torchdeq_variant
from jaxopt import linear_solve
from layer import SIZES, Layer, label
from record import Bars, Candidate, Row, Target, attempt, interleave
from torch import Tensor

warnings.filterwarnings("ignore")
COLUMNS = (
    "size",
    "library",
    "setting",
    "forward ms",
    "forward + gradient ms",
    "forward wall ms",
    "forward + gradient wall ms",
    "residual",
    "gradient error",
    "times ours",
)
HEADLINE = {"fixed point, adjoint GMRES", "Anderson, adjoint GMRES"}


@dataclass(frozen=True)
class Entry:
    """A library in one setting.

    Attributes:
        forward: gives z.
        gradient: gives the gradients of the layer's loss in (x, W).
    """

    library: str
    setting: str
    forward: Callable[[], Any]
    gradient: Callable[[], tuple[Any, Any]]

    @property
    def name(self) -> str:
        """A key that is unique among the entries."""
        return f"{self.library}, {self.setting}"


def eager(layer: Layer, variant: Variant) -> Entry:
    """An entry from a variant of a torch library."""
    return Entry(
        variant.library,
        f"{variant.solver}, {variant.setting}",
        lambda: inference(variant),
        lambda: layer.gradients(variant.train()),
    )


def plain_torch(layer: Layer) -> Entry:
    """What a user would write without a library: two loops, each stopped by one global norm."""

    def forward() -> Tensor:
        with torch.no_grad():
            z = layer.z0
            for _ in range(200):
                z, previous = layer.f(z, layer.x), z
                if (z - previous).norm() <= TOLERANCE * z.norm():
                    break
        return z

    def gradient() -> tuple[Tensor, ...]:
        z = forward().requires_grad_()
        out, g = layer.f(z, layer.x), layer.cotangent
        for _ in range(200):
            g, previous = torch.autograd.grad(out, z, g, retain_graph=True)[0] + layer.cotangent, g
            if (g - previous).norm() <= TOLERANCE * g.norm():
                break
        return torch.autograd.grad(out, (layer.x, layer.w), g)

    return Entry("plain PyTorch loop", "fixed point, Neumann", forward, gradient)


def with_xitorch(layer: Layer) -> list[Entry]:
    """xitorch's equilibrium, the whole batch as one system; Broyden starts from plain iteration (``alpha=-1``)."""
    absolute = TOLERANCE * float(layer.reference["z"].norm())
    backward = {"method": "bicgstab", "rtol": TOLERANCE, "atol": 0.0, "posdef": True, "max_niter": 200}
    common = {"f_tol": absolute, "x_tol": float("inf"), "maxiter": 200, "bck_options": backward}
    settings = {"Broyden": {"method": "broyden1", "alpha": -1.0}, "Anderson": {"method": "anderson_acc"}}

    def solve(options: dict[str, Any]) -> Tensor:
        return xitorch.optimize.equilibrium(
            lambda z, x, w: torch.tanh(torch.addmm(x, z, w.t())),
            layer.z0,
            params=(layer.x, layer.w),
            **common,
            **options,
        )

    def infer(options: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            return solve(options)

    return [
        Entry(
            "xitorch",
            f"{name}, adjoint BiCGStab",
            partial(infer, options),
            lambda options=options: layer.gradients(solve(options)),
        )
        for name, options in settings.items()
    ]


def jitted(layer: Layer, library: str, setting: str, solve: Callable[[Any, Any, Any], Any]) -> Entry:
    """An entry from a JAX solve ``(z0, x, w) -> z``, compiled; calls wait for the result."""
    z0, x, w, u = (jnp.asarray(t.detach().numpy()) for t in (layer.z0, layer.x, layer.w, layer.cotangent))
    forward = jax.jit(lambda x, w: solve(z0, x, w))
    gradient = jax.jit(jax.grad(lambda x, w: jnp.vdot(u, solve(z0, x, w)), argnums=(0, 1)))
    return Entry(
        library, setting, lambda: jax.block_until_ready(forward(x, w)), lambda: jax.block_until_ready(gradient(x, w))
    )


def jax_map(z: Any, x: Any, w: Any) -> Any:
    """The layer's f."""
    return jnp.tanh(z @ w.T + x)


def with_jaxopt(layer: Layer) -> list[Entry]:
    """jaxopt's plain iteration and Anderson(5); its tolerance is absolute, on the norm over the batch."""
    absolute = TOLERANCE * float(layer.reference["z"].norm())
    bicgstab = partial(linear_solve.solve_bicgstab, tol=TOLERANCE, maxiter=200)
    gmres = partial(linear_solve.solve_gmres, tol=TOLERANCE, maxiter=20)
    plain = partial(jaxopt.FixedPointIteration, jax_map, maxiter=200, tol=absolute)
    solvers = {
        "fixed point, adjoint BiCGStab": plain(implicit_diff_solve=bicgstab),
        "fixed point, adjoint GMRES": plain(implicit_diff_solve=gmres),
        "Anderson(5), adjoint BiCGStab": jaxopt.AndersonAcceleration(
            jax_map, history_size=5, maxiter=200, tol=absolute, implicit_diff_solve=bicgstab
        ),
    }
    return [
        jitted(layer, "jaxopt", name, lambda z0, x, w, solver=solver: solver.run(z0, x, w).params)
        for name, solver in solvers.items()
    ]


def with_optimistix(layer: Layer) -> list[Entry]:
    """Optimistix's plain iteration, stopped by the root mean square over the batch; adjoint by Lineax."""

    def tolerance(scale: Tensor) -> dict[str, float]:
        return {"rtol": 0.0, "atol": TOLERANCE * float(scale.double().pow(2).mean().sqrt())}

    solver = optx.FixedPointIteration(**tolerance(layer.reference["z"]), norm=optx.rms_norm)
    adjoint_tolerance = tolerance(layer.cotangent)
    linear = {
        "BiCGStab": lx.BiCGStab(**adjoint_tolerance, norm=optx.rms_norm),
        "GMRES": lx.GMRES(**adjoint_tolerance, norm=optx.rms_norm),
        "normal CG": lx.NormalCG(**adjoint_tolerance, norm=optx.rms_norm),
    }

    def solve(adjoint: Any, z0: Any, x: Any, w: Any) -> Any:
        return optx.fixed_point(
            lambda z, args: jax_map(z, *args),
            solver,
            z0,
            (x, w),
            max_steps=200,
            throw=False,
            adjoint=optx.ImplicitAdjoint(linear_solver=adjoint),
        ).value

    return [
        jitted(layer, "Optimistix", f"fixed point, adjoint {name}", partial(solve, method))
        for name, method in linear.items()
    ]


def entries(layer: Layer) -> list[Entry]:
    """All that is compared on one layer."""
    mine = [
        our_variant(layer, solver, adjoint, rowwise)
        for solver in ("fixed point", "Anderson")
        for adjoint, rowwise in (("GMRES", False), ("Neumann", False), ("GMRES", True))
    ]
    theirs = [torchdeq_variant(layer, solver, 200) for solver in ("fixed point", "Anderson")]
    return [
        *(eager(layer, variant) for variant in mine + theirs),
        plain_torch(layer),
        *with_xitorch(layer),
        *with_jaxopt(layer),
        *with_optimistix(layer),
    ]


def accuracy(layer: Layer, entry: Entry) -> Row:
    """The residual and the error of the gradient that ``entry`` reaches."""

    def tensor(value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))

    return {
        "residual": layer.residual(tensor(entry.forward())),
        "gradient error": layer.error(tuple(tensor(g) for g in entry.gradient())),
    }


def measure(layer: Layer, repeats: int, seconds: float) -> list[Row]:
    """One row for each entry."""
    rows, timed = [], {}
    for entry in entries(layer):
        figures, failure = attempt(partial(accuracy, layer, entry))
        rows.append(
            {"size": label(layer.batch, layer.dim), "library": entry.library, "setting": entry.setting}
            | (figures or {"error": failure, "residual": failure})
        )
        if figures:
            timed[entry.name, "forward"] = Candidate(lambda _, call=entry.forward: call())
            timed[entry.name, "forward + gradient"] = Candidate(lambda _, call=entry.gradient: call())
    timings = interleave(timed, repeats, seconds, seed=layer.seed)
    for row in rows:
        for what in ("forward", "forward + gradient"):
            if (timing := timings.get((f"{row['library']}, {row['setting']}", what))) is not None:
                row |= {
                    f"{what} ms": timing.cpu_ms,
                    f"{what} wall ms": timing.wall_ms,
                    f"{what} quartiles": timing.cpu_quartiles_ms,
                }
    best = min(
        (
            row["forward + gradient ms"]
            for row in rows
            if row["library"] == "ours" and row["setting"] in HEADLINE and "forward + gradient ms" in row
        ),
        default=None,
    )
    for row in rows:
        if best and "forward + gradient ms" in row:
            row["times ours"] = row["forward + gradient ms"] / best
    return rows


def targets(rows: list[Row]) -> list[Target]:
    """Ours, without the rowwise promise, is at least as fast as each peer's fastest setting, forward with gradient."""
    out = []
    for size in dict.fromkeys(row["size"] for row in rows):
        for library in ("plain PyTorch loop", "TorchDEQ", "xitorch", "jaxopt", "Optimistix"):
            ratios = [
                row["times ours"]
                for row in rows
                if row["size"] == size and row["library"] == library and row.get("times ours")
            ]
            out.append(
                Target(f"{size}: time of {library} over ours, forward + gradient", min(ratios, default=None), ">=", 1.0)
            )
    return out


def panels(rows: list[Row]) -> list[Bars]:
    """Times by size."""
    out = []
    for what in ("forward ms", "forward + gradient ms"):
        groups: dict[str, dict[str, float]] = {}
        for row in rows:
            if what in row:
                groups.setdefault(row["size"], {})[f"{row['library']}, {row['setting']}"] = row[what]
        out.append(Bars(what[:-3], "ms of CPU", groups, log=True))
    return out


def main() -> None:
    """Measure, compare, record."""
    options = record.arguments(__doc__.splitlines()[0], repeats=15, seconds=60.0)
    load, rows = os.getloadavg(), []
    for batch, dim in SIZES[:1] if options.quick else SIZES:
        rows += measure(Layer(batch, dim, "gaussian", options.seed), options.repeats, options.seconds)
    title = "Forward, and forward with gradient"
    record.record(
        "batch_gradients",
        options,
        load_before=load,
        settings={
            "layer": "z = tanh(W z + x), Gaussian W, |W|_2 = 0.9, x precomputed, from zero; gradients in x and W",
            "tolerance": f"relative {TOLERANCE:g}, forward and adjoint: per sample for ours and TorchDEQ, "
            "over the batch for the others",
            "JAX": f"jitted, compilation untimed, XLA_FLAGS={os.environ['XLA_FLAGS']}",
        },
        rows={title: rows},
        columns={title: COLUMNS},
        targets=targets(rows),
        panels=panels(rows),
        notes=[
            "ms are medians of CPU time over all threads of the process, wall ms of elapsed time.",
            "'times ours': forward + gradient over the faster of ours with the GMRES adjoint, not rowwise.",
            "Which point is returned differs: ours is the z whose residual was tested (per sample); TorchDEQ, jaxopt, "
            "Optimistix and the plain loop return f(z), one contraction closer, at no further cost.",
        ],
    )


if __name__ == "__main__":
    main()
