"""Times one tree's library for ``regression.py``, call by call: a case's name on the standard input, its time back.

The library is what ``PYTHONPATH`` says; only names that both trees have may be used here.
"""

from __future__ import annotations

import record  # isort: skip  (first: it sets the number of threads)

import gc
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from layer import SIZES, Layer, label
from record import Candidate
from torch.nn import functional

import torchimplicit as ti
from torchimplicit.models import MDEQ, mdeq_small

TOLERANCE = 1e-4
SOLVERS = {"plain": ti.FixedPointIteration, "Anderson": ti.Anderson, "Broyden": ti.Broyden}
IMAGES, SETTLING_STEPS = 8, 10
FIXED_SIZES = ((1, 16), (64, 128))


def layer_cases(layer: Layer) -> dict[str, Candidate]:
    """The forward pass alone, and with a backward pass."""
    made: dict[str, Candidate] = {}
    problem = ti.FixedPoint(layer.f)
    implicit = ti.Implicit(linear_solver=ti.GMRES(rtol=TOLERANCE))

    def solve(solver: str, gradient: object) -> torch.Tensor:
        method = SOLVERS[solver](rtol=TOLERANCE, atol=0.0, max_steps=200)
        return ti.solve(problem, layer.z0, layer.x, solver=method, gradient=gradient).value

    def forward(solver: str) -> Callable[[object], None]:
        def run(_: object) -> None:
            with torch.no_grad():
                solve(solver, implicit)

        return run

    def step(solver: str, gradient: object) -> Callable[[object], None]:
        def run(_: object) -> None:
            layer.gradients(solve(solver, gradient))

        return run

    size = label(layer.batch, layer.dim)
    for solver in SOLVERS:
        made[f"{size} | {solver} | forward"] = Candidate(forward(solver))
        made[f"{size} | {solver} | forward + Implicit"] = Candidate(step(solver, implicit))
    made[f"{size} | Anderson | forward + OneStep"] = Candidate(step("Anderson", ti.OneStep()))
    made[f"{size} | Anderson | forward + UnrolledPhantom"] = Candidate(step("Anderson", ti.UnrolledPhantom()))
    return made


def mdeq_cases(seed: int) -> dict[str, Candidate]:
    """A training step of a small multiscale model (the optimizer left out), after a few steps on its batch."""
    torch.manual_seed(seed)
    solver = ti.Broyden(rtol=1e-3, atol=0.0, max_steps=22)
    config = replace(mdeq_small(image_channels=3, downsamplings=2), weight_norm=False)
    gradients = {
        "Implicit": ti.Implicit(linear_solver=ti.GMRES(rtol=1e-3, max_steps=24)),
        "UnrolledPhantom": ti.UnrolledPhantom(steps=5, damping=0.5),
    }
    model = MDEQ(config, solver=solver, gradient=gradients["UnrolledPhantom"])
    images = torch.randn(IMAGES, 3, 32, 32)
    labels = torch.arange(IMAGES) % config.classes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(name: str) -> Callable[[object], None]:
        def run(_: object) -> None:
            model.equilibrium.gradient = gradients[name]
            model.zero_grad()
            functional.cross_entropy(model(images), labels).backward()

        return run

    for _ in range(SETTLING_STEPS):
        step("UnrolledPhantom")(None)
        optimizer.step()
    return {f"MDEQ-small, {IMAGES} images | Broyden | step, {name}": Candidate(step(name)) for name in gradients}


def fixed_cases(layer: Layer) -> dict[str, Candidate]:
    """A solve that begins at its solution and takes no step, and the evaluation that it makes; recorded and not."""
    problem, solver = ti.FixedPoint(layer.f), ti.FixedPointIteration(rtol=TOLERANCE, atol=0.0)
    z = layer.reference["z"].float()

    def evaluated(_: object) -> None:
        layer.f(z.detach().requires_grad_(torch.is_grad_enabled()), layer.x)

    def solved(_: object) -> None:
        ti.solve(problem, z, layer.x, solver=solver)

    def unrecorded(run: Callable[[object], None]) -> Callable[[object], None]:
        def under(argument: object) -> None:
            with torch.no_grad():
                run(argument)

        return under

    size = label(layer.batch, layer.dim)
    return {
        f"{size} | evaluation": Candidate(unrecorded(evaluated)),
        f"{size} | recorded evaluation": Candidate(evaluated),
        f"{size} | solve": Candidate(unrecorded(solved)),
        f"{size} | recorded solve": Candidate(solved),
    }


def main() -> None:
    """Answer until the standard input ends."""
    warnings.simplefilter("ignore")
    chosen, seed = sys.argv[1], int(sys.argv[2])
    cases: dict[str, Candidate] = {}
    if chosen == "fixed":
        for batch, dim in FIXED_SIZES:
            cases |= fixed_cases(Layer(batch, dim, "gaussian", seed))
    else:
        for batch, dim in SIZES[:1] if chosen == "quick" else SIZES:
            cases |= layer_cases(Layer(batch, dim, "gaussian", seed))
    if chosen == "whole":
        cases |= mdeq_cases(seed)
    calls = {name: record.calls_per_sample(candidate) for name, candidate in cases.items()}
    gc.collect()
    gc.freeze()  # so that collecting between calls takes no time
    print(json.dumps({"file": ti.__file__, "cases": list(cases)}), flush=True)
    for line in sys.stdin:
        name = line.strip()
        gc.collect()
        record.sample(cases[name], 1)  # the other process has had the caches
        print(json.dumps(record.sample(cases[name], calls[name])), flush=True)


if __name__ == "__main__":
    main()
