"""The two eager libraries on :class:`layer.Layer`: each variant is a call that returns z, with or without a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchdeq
from layer import Layer
from torch import Tensor

import torchimplicit as ti

SOLVERS = ("fixed point", "Anderson", "Broyden")
TOLERANCE = 1e-4
MAX_STEPS = 200
_TORCHDEQ = {"fixed point": "fixed_point_iter", "Anderson": "anderson", "Broyden": "broyden"}


@dataclass(frozen=True)
class Variant:
    """A library's way to solve a layer.

    Attributes:
        library: ``ours`` or ``TorchDEQ``.
        solver: of the forward pass, one of ``SOLVERS``.
        setting: the rest, in words.
        train: the call with a graph.
        infer: the call that inference makes; it runs under ``no_grad``.
    """

    library: str
    solver: str
    setting: str
    train: Callable[[], Tensor]
    infer: Callable[[], Tensor]

    @property
    def name(self) -> str:
        """A key that is unique among the variants of one solver."""
        return f"{self.library}, {self.setting}"


def torchdeq_variant(
    layer: Layer, solver: str, cap: int, backward: str | None = None, tolerance: float = TOLERANCE
) -> Variant:
    """TorchDEQ, ``cap`` evaluations in both passes, relative tolerances; ``backward`` names another adjoint solver."""
    adjoint = backward or solver
    model = torchdeq.get_deq(
        f_solver=_TORCHDEQ[solver],
        b_solver=_TORCHDEQ[adjoint],
        ift=True,
        f_max_iter=cap,
        b_max_iter=cap,
        f_tol=tolerance,
        b_tol=tolerance,
        f_stop_mode="rel",
        b_stop_mode="rel",
    )
    assert model.f_max_iter == model.b_max_iter == cap  # it ignores names that it does not know

    def call(training: bool) -> Tensor:
        model.train(training)
        return model(lambda z: layer.f(z, layer.x), layer.z0)[0][-1]

    return Variant("TorchDEQ", solver, f"adjoint {adjoint}, cap {cap}", lambda: call(True), lambda: call(False))


def our_solver(solver: str, tolerance: float = TOLERANCE, max_steps: int = MAX_STEPS) -> object:
    """Our solver of that name, at its defaults but for the tolerance."""
    kind = {"fixed point": ti.FixedPointIteration, "Anderson": ti.Anderson, "Broyden": ti.Broyden}[solver]
    return kind(rtol=tolerance, atol=0.0, max_steps=max_steps)


def our_variant(
    layer: Layer,
    solver: str,
    adjoint: str = "GMRES",
    rowwise: bool = False,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> Variant:
    """Ours, with x as an argument and W captured by the closure, as a user would write it."""
    linear = {"GMRES": ti.GMRES, "Neumann": ti.Neumann, "BiCGStab": ti.BiCGStab}[adjoint](rtol=tolerance)
    method, gradient = our_solver(solver, tolerance, max_steps), ti.Implicit(linear_solver=linear)
    problem = ti.FixedPoint(layer.f, rowwise=rowwise)

    def call() -> Tensor:
        return ti.solve(problem, layer.z0, layer.x, solver=method, gradient=gradient).value

    return Variant("ours", solver, f"adjoint {adjoint}" + (", rowwise" if rowwise else ""), call, call)


def inference(variant: Variant) -> Tensor:
    """The call of ``variant`` under ``no_grad``."""
    with torch.no_grad():
        return variant.infer()
