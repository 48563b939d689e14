"""The models of the graph recipes, with the solver and the estimator that the settings name."""

from __future__ import annotations

from torchimplicit.gradients import Gradient, Implicit
from torchimplicit.linear import Neumann
from torchimplicit.models import IGNN, IGNNConfig
from torchimplicit.recipes.runtime.settings import Equilibria
from torchimplicit.recipes.runtime.task import gradient, solver


def made(architecture: IGNNConfig, settings: Equilibria) -> IGNN:
    """The network."""
    return IGNN(architecture, solver=solver(settings), gradient=estimator(settings))


def estimator(settings: Equilibria) -> Gradient:
    """The estimator that the settings name, the exact one with the plain series.

    An IGNN's map contracts by construction, so that the series converges. On directed chains, whose Jacobian is close
    to a Jordan block, GMRES would have to keep as many directions as a chain has nodes.
    """
    if settings.gradient == "implicit":
        return Implicit(linear_solver=Neumann(rtol=settings.backward_tolerance, max_steps=settings.backward_steps))
    return gradient(settings)
