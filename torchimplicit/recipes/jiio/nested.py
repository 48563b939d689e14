"""The alternative to joint inference: an optimizer of the latent around an equilibrium solve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from torchimplicit.gradients import Implicit, OneStep
from torchimplicit.linear import GMRES
from torchimplicit.models import EquilibriumDecoder
from torchimplicit.nn import per_solve
from torchimplicit.problems import FixedPoint
from torchimplicit.solve import solve
from torchimplicit.solvers import FixedPointIteration
from torchimplicit.state import detached

Method = Literal["adam", "adam-one-step", "gradient-descent"]
METHODS: tuple[Method, ...] = ("adam", "adam-one-step", "gradient-descent")


def nested(
    decoder: EquilibriumDecoder,
    loss: Callable[..., Tensor],
    wanted: Tensor,
    method: Method,
    *,
    steps: int,
    rate: float,
    tolerance: float,
) -> Tensor:
    """The latents after some steps from zero, ``[batch, latent]``.

    Each step solves the equilibrium to ``tolerance`` from the last one, and the adjoint system likewise; only with
    ``adam-one-step`` is the equilibrium differentiated by one application of the map. Plain iteration is the cheapest
    solver of maps that contract as these do. No weight may ask for a gradient.

    Args:
        decoder: in eval mode.
        loss: ``loss(image, x, wanted)``, ``[batch]``.
        wanted: what is reconstructed.
        method: which optimizer.
        steps, rate: of it.
        tolerance: relative, of both solves.
    """
    cell = per_solve(decoder.equilibrium.cell)
    z, x = decoder.start(len(wanted))
    x = x.requires_grad_()
    optimizer: Any = torch.optim.SGD([x], rate) if method == "gradient-descent" else torch.optim.Adam([x], rate)
    gradient = OneStep() if method == "adam-one-step" else Implicit(linear_solver=GMRES(rtol=tolerance, max_steps=50))
    solver = FixedPointIteration(rtol=tolerance, max_steps=50)
    problem = FixedPoint(cell)
    for _ in range(steps):
        solution = solve(problem, z, x, solver=solver, gradient=gradient, throw=False)
        z = detached(solution.value)
        x.grad = None
        loss(decoder.head(solution.value), x, wanted).sum().backward()
        optimizer.step()
    return x.detach()
