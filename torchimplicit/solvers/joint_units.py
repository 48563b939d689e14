"""Joint problems solved in units of their parts, by methods whose steps depend on these."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.closure import is_transformed
from torchimplicit.precision import widened, working_dtype
from torchimplicit.problems import Point
from torchimplicit.problems.joint_system import JointSystem
from torchimplicit.solvers.base import Solver
from torchimplicit.solvers.broyden import BroydenState
from torchimplicit.solvers.result import SolverResult


@torch.no_grad()
def part_units(
    system: JointSystem, first: Point, params: Sequence[Tensor], evaluate: Callable[[Tensor], Point]
) -> Tensor:
    """``[3]``, the units of the parts in which none acts much more strongly on the others than they on it
    (:meth:`JointSystem.weights`); zero or not finite where they are not known. Takes one evaluation.

    Args:
        first: the point to begin at; it is evaluated.
    """
    assert first.image is not None
    after_step = system.refined(evaluate(system.project(first.image, params)), first)
    assert after_step.image is not None
    size = widened(system.parts.split(after_step.image)[0]).nan_to_num(0.0, 0.0, 0.0).abs().amax()
    return size / system.weights(after_step, first.z, first.residual).log().mean(dim=0).exp()


def in_part_units(
    solve: Callable[..., SolverResult],
    solver: Solver,
    system: JointSystem,
    first: Point,
    params: Sequence[Tensor],
    only: Tensor | None,
) -> SolverResult | None:
    """The outcome of a joint problem that is solved in :func:`part_units`, in its own; ``None`` where these units are
    not known.

    Args:
        first: the point to begin at; it is evaluated.
    """
    if any(map(is_transformed, (first.z, *params))):
        return None
    units = part_units(system, first, params, lambda z: system.at(z, params)).tolist()
    if not all(0 < unit < math.inf for unit in units):
        return None
    changes: dict[str, Any] = {}
    every = torch.cat([torch.full_like(part[0], u) for part, u in zip(system.parts.split(first.z), units, strict=True)])
    per_leaf = torch.tensor(units, dtype=working_dtype(first.z.dtype), device=first.z.device)
    if solver.atol is not None:
        tolerances = pytree.tree_leaves(solver.atol)
        assert system.leaves is not None
        assert system.leaves.spec is not None
        atol = [a / u for a, u in zip(tolerances if len(tolerances) == 3 else tolerances * 3, units, strict=True)]
        changes["atol"] = pytree.tree_unflatten(atol, system.leaves.spec)
    outcome = solve(replace(solver, **changes), system.in_part_units(*units), first.z / every, params, only=only)
    state = outcome.state
    if isinstance(state, BroydenState):
        state = BroydenState(state.inverse._replace(unit=widened(every)))
    return replace(outcome.having_spent(1.0).multiplied(every, per_leaf), state=state)
