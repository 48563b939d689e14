"""The consistency loss: the distance to the equilibrium after few steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchimplicit.problems import FixedPoint
from torchimplicit.solution import Solution
from torchimplicit.state import Layout, detached
from torchimplicit.validation import at_least


def consistency(problem: FixedPoint, solution: Solution, *args: Any, count: int = 4, steps: int = 1) -> Tensor:
    """The relative distance to a solution after ``steps`` evaluations of a map from iterates of the solve: the mean of
    :math:`\\lVert f^k(z_i)-z^*\\rVert^2/\\lVert z^*\\rVert^2` over ``count`` iterates and over the batch.

    A map trained with it reaches the solution in few steps: consistency distillation (Lin et al. 2026, "Consistency
    deep equilibrium models", arXiv 2602.03024; there the student also gets the number of the step as input). The map
    may be a student, such as a copy of the cell, which is then used with a fixed number of steps::

        teacher = Equilibrium(cell, solver=Anderson(keep_trajectory=True))
        student = copy.deepcopy(cell)
        loss = consistency(FixedPoint(student), teacher.solve(x), x)
        fast = Equilibrium(student, solver=FixedPointIteration(steps=2))

    or the cell itself, as a regularizer that makes its solves shorter.

    Args:
        problem: the map that is trained, with the state and the arguments of the solve.
        solution: the solution of a solver with ``keep_trajectory=True``. Its states are constants here.
        args: the arguments of the map after the state, as for :func:`solve`.
        count: the number of iterates, evenly spaced from the start to the solution, both included; fewer if the
            trajectory is shorter.
        steps: k, the number of evaluations, all of which are differentiated.

    Returns:
        a scalar, differentiable to any order in the arguments and parameters of the map. Samples whose solution is not
        finite are left out.

    Raises:
        TypeError: the problem is not a :class:`FixedPoint`.
        ValueError: the solver did not keep its iterates, or ``count`` or ``steps`` is below 1.
    """
    if not isinstance(problem, FixedPoint):
        raise TypeError(f"consistency needs a map: give FixedPoint(f), not {type(problem).__name__}")
    at_least("consistency", "count", count, 1)
    at_least("consistency", "steps", steps, 1)
    if not solution.trajectory:
        raise ValueError(
            "consistency needs the iterates: solve with a solver that has keep_trajectory=True, for example "
            "Anderson(keep_trajectory=True)"
        )
    kept = [state for state in (*solution.trajectory[:-1], solution.value) if state is not None]
    places = torch.linspace(0, len(kept) - 1, min(count, len(kept))).round().int().tolist()
    terms = []
    for place in places:
        state = detached(kept[place])
        for _ in range(steps):
            state = problem.function(state, *args)
        terms.append(relative_distance(state, solution))
    return torch.stack(terms).mean()


def relative_distance(state: Any, solution: Solution) -> Tensor:
    """The mean of :math:`\\lVert z-z^*\\rVert^2/\\lVert z^*\\rVert^2` over the samples with a finite solution
    :math:`z^*`, which is a constant here."""
    layout = Layout.of(solution.value, batched=solution.residual.ndim > 0)
    z, target = layout.flatten(state, "state"), layout.flatten(detached(solution.value), "solution.value")
    if z.shape != target.shape:
        raise ValueError(f"the state is of another batch than the solution: {len(z)} samples and {len(target)}")
    # selected rather than multiplied by zero: the gradient of a NaN row would be NaN even so
    finite = target.isfinite().all(dim=1)
    distance = (z[finite] - target[finite]).square().sum(dim=1)
    size = target[finite].square().sum(dim=1).clamp_min(torch.finfo(target.dtype).tiny)
    return (distance / size).sum() / finite.sum().clamp_min(1)
