"""The exact gradient of a network's held-out loss in its weight decays: linear solvers and preconditioners.

    python benchmarks/hypergradients.py

A network of two hidden layers is trained on the digits of scikit-learn to a minimum of its loss with a weight decay for
each layer. The gradient of the held-out loss in the three decays takes one linear solve with the Hessian there. Every
method may take a given number of products; the error is relative to a solve to 1e-10. Times are CPU times with the
preconditioner's set-up. The Neumann series is scaled by the largest eigenvalue (Lorraine et al. 2020, arXiv
1911.02590), or preconditioned.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import record  # isort: skip  (first: it sets the number of threads)

import torch
from record import Bars, Candidate, Row, Target, interleave
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import torchimplicit as ti
from torchimplicit.linear import CG, KFAC, LinearSolver, Neumann

torch.set_num_threads(1)
warnings.filterwarnings("ignore")

FIT = 1000
COLUMNS = ("width", "parameters", "products", "method", "error", "ms")


class Tuning:
    """A trained network, and the gradient in its weight decays."""

    def __init__(self, width: int, seed: int):
        torch.manual_seed(seed)
        x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
        order = torch.randperm(len(x))
        x, y = (x / 16)[order].double(), y[order]
        self.fit, self.held = (x[:FIT], y[:FIT]), (x[FIT:], y[FIT:])
        sizes = [nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)]
        self.model = nn.Sequential(*sizes).double()
        self.log_decay = torch.full((3,), -5.0, dtype=torch.float64)
        self.problem = ti.Minimum(self.energy, batched=False)
        self.solver = ti.LBFGS(rtol=0.0, atol=1e-6, memory=30, max_steps=10_000)
        start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.z = ti.solve(self.problem, start, self.log_decay, solver=self.solver).value
        self.largest = float(ti.diagnostics.curvature(self.problem, self.z, self.log_decay).largest)

    def loss(self, z: dict[str, Tensor], part: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(functional_call(self.model, z, (part[0],)), part[1])

    def energy(self, z: dict[str, Tensor], log_decay: Tensor) -> Tensor:
        squares = torch.stack([p.square().sum() for p in z.values()])  # weight, bias, weight, ...
        return self.loss(z, self.fit) + 0.5 * (log_decay.exp() * squares.view(3, 2).sum(dim=1)).sum()

    def kfac(self) -> KFAC:
        names = list(self.z)
        damping = {name: float(self.log_decay[index // 2].exp()) for index, name in enumerate(names)}
        return KFAC.at(self.model, self.z, self.fit[0], damping=damping)

    def gradient(self, solver: LinearSolver) -> Tensor:
        log_decay = self.log_decay.clone().requires_grad_()
        gradient = ti.Implicit(linear_solver=solver)
        solution = ti.solve(self.problem, self.z, log_decay, solver=self.solver, gradient=gradient)
        (found,) = torch.autograd.grad(self.loss(solution.value, self.held), log_decay)
        return found


def methods(tuning: Tuning, products: int) -> dict[str, Any]:
    """Functions that make the linear solvers, with their preconditioners."""
    budget = {"max_steps": products, "atol": 0.0}
    return {
        "Neumann": lambda: Neumann(damping=1 / tuning.largest, rtol=1e-12, **budget),
        "conjugate gradients": lambda: CG(rtol=1e-12, **budget),
        "Neumann, K-FAC": lambda: Neumann(damping=0.05, preconditioner=tuning.kfac(), rtol=1e-12, **budget),
        "conjugate gradients, K-FAC": lambda: CG(preconditioner=tuning.kfac(), rtol=1e-12, **budget),
    }


def measure(width: int, options: Any) -> list[Row]:
    tuning = Tuning(width, options.seed)
    exact = tuning.gradient(CG(rtol=1e-10, atol=0.0, max_steps=20_000, preconditioner=tuning.kfac()))
    rows: list[Row] = []
    parameters = sum(p.numel() for p in tuning.z.values())
    for products in (10, 30, 100):
        makers = methods(tuning, products)
        timed = interleave(
            {name: Candidate(lambda _, make=make: tuning.gradient(make())) for name, make in makers.items()},
            options.repeats,
            options.seconds,
        )
        for name, make in makers.items():
            error = float((tuning.gradient(make()) - exact).norm() / exact.norm())
            row = {"width": width, "parameters": parameters, "products": products, "method": name, "error": error}
            rows.append(row | {"ms": timed[name].cpu_quartiles_ms[0]})
    return rows


def main() -> None:
    """Measure, compare, record."""
    options = record.arguments(__doc__.splitlines()[0], repeats=5, seconds=20.0)
    load = os.getloadavg()
    rows = [row for width in ((32,) if options.quick else (64, 256)) for row in measure(width, options)]
    errors = {(row["width"], row["products"], row["method"]): row["error"] for row in rows}
    cases = sorted({(width, products) for width, products, _ in errors if products >= 30})
    targets = [
        Target(
            f"width {width}, {products} products: error of conjugate gradients with K-FAC, of that without",
            errors[width, products, "conjugate gradients, K-FAC"] / errors[width, products, "conjugate gradients"],
            "<=",
            0.5,
        )
        for width, products in cases
    ]
    record.record(
        "hypergradients",
        options,
        load_before=load,
        settings={"network": "64, width, width, 10; tanh; digits", "decays": "exp(-5) in each layer"},
        rows={"Table": rows},
        columns={"Table": COLUMNS},
        targets=targets,
        notes=[
            "'error' is that of the held-out loss's gradient in the three weight decays, relative to the exact one.",
            "'ms' is the lower quartile of CPU time of the backward pass with the set-up of K-FAC, and of the "
            "evaluation that confirms the minimum.",
        ],
        panels=[
            Bars(
                f"width {width}",
                "relative error",
                {
                    f"{products} products": {
                        row["method"]: row["error"]
                        for row in rows
                        if (row["width"], row["products"]) == (width, products)
                    }
                    for products in sorted({row["products"] for row in rows})
                },
                log=True,
            )
            for width in sorted({row["width"] for row in rows})
        ],
    )


if __name__ == "__main__":
    main()
