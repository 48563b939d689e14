"""How near few steps come to the equilibrium that many steps have found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchimplicit.problems import FixedPoint
from torchimplicit.solution import Solution
from torchimplicit.state import Layout, detached
from torchimplicit.validation import at_least


def consistency(problem: FixedPoint, solution: Solution, *args: Any, count: int = 4, steps: int = 1) -> Tensor:
    """How far ``steps`` evaluations of a map, from states on the way to a solution, remain from that solution: the mean
    of :math:`\\lVert f^k(z_i)-z^*\\rVert^2/\\lVert z^*\\rVert^2` over ``count`` states and over the batch.

    A map trained with it does in a few steps what many have done: consistency distillation (Lin et al. 2026,
    "Consistency deep equilibrium models", arXiv 2602.03024; there the student is also told the number of the step). The
    map may be a student, such as a copy of the cell, which is then used with a given number of steps::

        teacher = Equilibrium(cell, solver=Anderson(keep_trajectory=True))
        student = copy.deepcopy(cell)
        loss = consistency(FixedPoint(student), teacher.solve(x), x)
        fast = Equilibrium(student, solver=FixedPointIteration(steps=2))

    or the cell itself, as a regularizer that makes its solves shorter.

    Args:
        problem: the map that is trained, with the state and the arguments of the solve.
        solution: of a solver with ``keep_trajectory=True``. Its states are constants here.
        args: what the map takes beside the state, as for :func:`solve`.
        count: the number of states, evenly spaced from the start to the solution, which are both among them; fewer if
            the trajectory is shorter.
        steps: k, through all of which the derivative goes.

    Returns:
        a scalar, differentiable to any order in what the map depends on. Samples whose solution is not finite are left
        out.

    Raises:
        TypeError: the problem is not a :class:`FixedPoint`.
        ValueError: the solver did not keep its iterates.
    """
    if not isinstance(problem, FixedPoint):
        raise TypeError(f"consistency needs a map: give FixedPoint(f), not {type(problem).__name__}")
    at_least("consistency", "count", count, 1)
    at_least("consistency", "steps", steps, 1)
    kept = [state for state in (*solution.trajectory[:-1], solution.value) if state is not None]
    if not solution.trajectory:
        raise ValueError(
            "consistency needs the states on the way: solve with a solver that has keep_trajectory=True, for example "
            "Anderson(keep_trajectory=True)"
        )
    places = torch.linspace(0, len(kept) - 1, min(count, len(kept))).round().int().tolist()
    terms = []
    for place in places:
        state = detached(kept[place])
        for _ in range(steps):
            state = problem.function(state, *args)
        terms.append(relative_distance(state, solution))
    return torch.stack(terms).mean()


def relative_distance(state: Any, solution: Solution) -> Tensor:
    """The mean over the samples of :math:`\\lVert z-z^*\\rVert^2/\\lVert z^*\\rVert^2`, without those whose solution is
    not finite; the solution :math:`z^*` is a constant."""
    layout = Layout.of(solution.value, batched=solution.residual.ndim > 0)
    here, there = layout.flatten(state, "state"), layout.flatten(detached(solution.value), "solution.value")
    if here.shape != there.shape:
        raise ValueError(f"the state is of another batch than the solution: {len(here)} samples and {len(there)}")
    finite = there.isfinite().all(dim=1)
    distance = (here[finite] - there[finite]).square().sum(dim=1)
    size = there[finite].square().sum(dim=1).clamp_min(torch.finfo(there.dtype).tiny)
    return (distance / size).sum() / finite.sum().clamp_min(1)
