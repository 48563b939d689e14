"""The mixed second derivative of an equilibrium: ours, and a formula that circulates, against finite differences.

    python benchmarks/second_order_check.py

For z = f(z, t, x), with A = I - f_z, z_t = A⁻¹ f_t and z_x = A⁻¹ f_x, the right second derivative is

    z_tx = A⁻¹ [f_tx + f_tz z_x + f_zx z_t + f_zz[z_t, z_x]];

the circulating derivation has A⁻¹ [f_tx - f_zx z_t]. The differences are taken of the solution alone, which Newton's
method finds to round-off, and are extrapolated three times (Richardson), so that they are good to ten digits or so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import record  # isort: skip  (first: it sets the number of threads)

import torch
from record import Bars, Row, Target
from torch import Tensor
from torch.func import jacrev

import torchimplicit as ti
from torchimplicit.derivatives import Derivatives

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

DIM = 5
STEPS = (2e-2, 1e-2, 5e-3, 2.5e-3)
"""Of the differences, each half the one before."""
NEAR, FAR = 1e-8, 0.1
Map = Callable[[Tensor, Tensor, Tensor], Tensor]


def maps(seed: int) -> dict[str, Map]:
    """Contractions of ``DIM`` components, that depend on two numbers."""
    generator = torch.Generator().manual_seed(seed)
    w, v = (0.6 * torch.linalg.qr(torch.randn(DIM, DIM, generator=generator)).Q for _ in range(2))
    a, b = torch.randn(2, DIM, generator=generator)
    return {
        "sin(zt)/2 + 3/5 sin(xz) + tx": lambda z, t, x: 0.5 * torch.sin(z * t) + 0.6 * torch.sin(x * z) + t * x + 0 * a,
        "tanh(Wz + at + bx)": lambda z, t, x: torch.tanh(w @ z + a * t + b * x),
        "tanh((W + tV)z + bx)": lambda z, t, x: torch.tanh((w + 0.3 * t * v) @ z + b * x),
        "sin(Wz + tx a) + x softplus(Vz)/2": lambda z, t, x: (
            torch.sin(w @ z + t * x * a) + 0.5 * x * torch.nn.functional.softplus(v @ z)
        ),
    }


def solution(f: Map, t: Tensor, x: Tensor) -> Tensor:
    """By Newton's method, to round-off."""
    z = torch.zeros(DIM)
    for _ in range(100):
        step = torch.linalg.solve(torch.eye(DIM) - jacrev(f)(z, t, x), f(z, t, x) - z)
        z = z + step
        if float(step.abs().max()) < 1e-15:
            break
    return z


def differences(f: Map, t: Tensor, x: Tensor) -> tuple[Tensor, float]:
    """The second difference, extrapolated, and how far the last two stages of the extrapolation are apart."""
    row = []
    for h in STEPS:
        corners = [[solution(f, t + i * h, x + j * h) for j in (1, -1)] for i in (1, -1)]
        row.append((corners[0][0] - corners[0][1] - corners[1][0] + corners[1][1]) / (4 * h * h))
    power = 4
    while len(row) > 1:
        last = row[-1]
        row = [(power * fine - coarse) / (power - 1) for coarse, fine in pairwise(row)]
        power *= 4
    return row[0], float((row[0] - last).norm() / row[0].norm())


def closed_form(f: Map, t: Tensor, x: Tensor, circulating: bool) -> Tensor:
    """The formulas of the head of this file, with dense Jacobians."""
    z = solution(f, t, x)
    f_z, f_t, f_x = jacrev(f, argnums=(0, 1, 2))(z, t, x)
    a = torch.eye(DIM) - f_z
    z_t, z_x = torch.linalg.solve(a, f_t), torch.linalg.solve(a, f_x)
    f_tz, _, f_tx = jacrev(jacrev(f, argnums=1), argnums=(0, 1, 2))(z, t, x)
    f_zz, _, f_zx = jacrev(jacrev(f, argnums=0), argnums=(0, 1, 2))(z, t, x)
    through_t = f_zx @ z_t
    if circulating:
        return torch.linalg.solve(a, f_tx - through_t)
    curved = torch.einsum("ikl,k,l->i", f_zz, z_t, z_x)
    return torch.linalg.solve(a, f_tx + f_tz @ z_x + through_t + curved)


def ours(f: Map, t: Tensor, x: Tensor) -> dict[str, Tensor]:
    """By composition, and by the direct routine."""
    problem = ti.FixedPoint(f, batched=False)
    solver = ti.NewtonKrylov(linear_solver=ti.Dense(), rtol=1e-15, atol=1e-15, max_steps=50)
    implicit = ti.Implicit(linear_solver=ti.Dense())

    def value(t: Tensor, x: Tensor) -> Tensor:
        return ti.solve(problem, torch.zeros(DIM), t, x, solver=solver, gradient=implicit, throw=False).value

    at = Derivatives(ti.solve(problem, torch.zeros(DIM), t, x, solver=solver, throw=False))
    one = torch.ones(())
    return {
        "composed": torch.func.jacfwd(jacrev(value), argnums=1)(t, x),
        "Derivatives.second": at.second((one, None), (None, one)),
    }


def compared(name: str, f: Map) -> Row:
    """Relative errors against the differences."""
    t, x = torch.tensor(0.8), torch.tensor(0.5)
    expected, unsure = differences(f, t, x)
    values = {
        **ours(f, t, x),
        "closed form": closed_form(f, t, x, circulating=False),
        "circulating formula": closed_form(f, t, x, circulating=True),
    }
    errors: dict[str, Any] = {key: float((value - expected).norm() / expected.norm()) for key, value in values.items()}
    return {"map": name, **errors, "differences' own": unsure}


def main() -> None:
    """Compare, record."""
    options = record.arguments(__doc__.splitlines()[0])
    load = os.getloadavg()
    rows = [compared(name, f) for name, f in maps(options.seed).items()]
    names = [name for name in rows[0] if name != "map"]
    right = [Target(f"{row['map']}: error of {name}", row[name], "<=", NEAR) for row in rows for name in names[:3]]
    wrong = [
        Target(f"{row['map']}: error of the circulating formula", row["circulating formula"], ">=", FAR) for row in rows
    ]
    title = "Relative error of the mixed second derivative against finite differences"
    record.record(
        "second_order_check",
        options,
        load_before=load,
        settings={"problem": f"z = f(z, t, x) with {DIM} components and two numbers, at t = 0.8, x = 0.5, float64"},
        rows={title: rows},
        columns={title: ("map", *names)},
        targets=[*right, *wrong],
        panels=[Bars(title, "relative error", {row["map"]: {n: row[n] for n in names} for row in rows}, log=True)],
        notes=["The last column is how far the last two stages of the extrapolation are apart."],
    )


if __name__ == "__main__":
    main()
