"""How the equilibria of a field's points are found, from those of the points that it was trained at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchimplicit._solve import solve
from torchimplicit.linear import Dense
from torchimplicit.problems import FixedPoint
from torchimplicit.solution import Solution
from torchimplicit.solvers import NewtonKrylov, Solver

NEWTON = NewtonKrylov(linear_solver=Dense(), rtol=1e-12, max_steps=15, halvings=6)
"""Finds an equilibrium in a few steps from a state nearby."""

SAME = 1e-6
"""States that differ by less than this, relative to one and their size, are the same equilibrium."""


class Settling(nn.Module):
    """Solves for the states at points, each from the state of the nearest point that the field was trained at.

    A map may have several equilibria at a point. The ones that training has settled in are followed from step to step,
    since the weights move little, and continued elsewhere: from zero, Newton's method may find others, or none. Only
    evaluations with gradients are remembered, so that neither a rejected step nor an evaluation elsewhere changes the
    field. The memory is part of the module's state.

    Nothing else keeps neighbouring points on one branch: between two of them a field could jump. So an evaluation
    without gradients also starts every point from a second neighbour (along the shortest spanning tree of the training
    points), and a point that settles elsewhere counts as not converged.

    Args:
        states: size of the equilibrium state at a point.
        solver: solver for it; ``None``: Newton's method with factorized Jacobians.
        unique: whether the equilibrium is known to be unique, so that no second start is needed.

    Attributes:
        last: the last solution.
        converged: where an equilibrium was found, and the same from both starts, ``[points]``.
    """

    def __init__(self, states: int, solver: Solver | None, *, unique: bool = False):
        super().__init__()
        self.states = states
        self.solver = solver or NEWTON
        self.unique = unique
        self.last: Solution | None = None
        self.converged: Tensor | None = None
        self._known: tuple[Tensor, Tensor] | None = None
        self._tree: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        cell: Callable[..., Tensor],
        x: Tensor,
        *args: Any,
        own: bool,
        nearer: Callable[[Tensor], Tensor] | None = None,
    ) -> Solution:
        """The solution of ``z = cell(z, *args)``.

        Args:
            cell: the map, of states ``[points, states]``.
            x: the points ``[points, inputs]``.
            args: further arguments of the cell.
            own: whether every tensor among them has the points in dim 0.
            nearer: moves states towards the solution before the solve, where the cell's Jacobian is known in closed
                form; not used with a solver of the user's choice.
        """

        def settled(start: Tensor) -> Solution:
            with torch.no_grad():
                near = start if nearer is None or self.solver is not NEWTON else nearer(start)
                return solve(FixedPoint(cell, rowwise=own), near, *args, solver=self.solver, throw=False)

        start, second = self._starts(x)
        solution = self.last = settled(start)
        self.converged = solution.converged
        if torch.is_grad_enabled():
            if bool(solution.converged.all()):
                self._known = x.detach(), solution.value
        elif not self.unique and second is not None and bool(solution.converged.any()):
            other = settled(second(solution.value))
            gap = (other.value - solution.value).norm(dim=1)
            self.converged = solution.converged & other.converged & (gap <= SAME * (1 + solution.value.norm(dim=1)))
        return solution

    def _starts(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """A start for every point, and how another is made of the states that were found from it."""
        if self._known is None:
            return x.new_zeros(len(x), self.states), None
        known, states = (one.to(x) for one in self._known)
        if len(known) == 1:
            return states.expand(len(x), -1), None
        if known.shape == x.shape and torch.equal(known, x):
            return states, lambda z: z[self._parents(known)]
        nearest = torch.cdist(x, known).topk(2, largest=False).indices
        return states[nearest[:, 0]], lambda z: states[nearest[:, 1]]

    def _parents(self, points: Tensor) -> Tensor:
        if self._tree is None or not torch.equal(self._tree[0].to(points), points):
            self._tree = points, spanning_tree(points)
        return self._tree[1].to(points.device)

    def get_extra_state(self) -> Any:
        """The points that were trained at, and their states; ``None`` before there are any."""
        return self._known

    def set_extra_state(self, state: Any) -> None:
        """Take those of another."""
        self._known = cast("tuple[Tensor, Tensor] | None", state)


def spanning_tree(points: Tensor) -> Tensor:
    """Each point's neighbour in the tree of least total length that joins them all (Prim 1957), the first's being the
    second that was joined."""
    parents = torch.zeros(len(points), dtype=torch.long)
    distance = (points - points[0]).norm(dim=1)
    distance[0] = torch.inf
    first = int(distance.argmin())
    for _ in range(len(points) - 1):
        joined = int(distance.argmin())
        distance[joined] = torch.inf
        gap = (points - points[joined]).norm(dim=1)
        nearer = (gap < distance) & distance.isfinite()
        parents[nearer] = joined
        distance = torch.where(nearer, gap, distance)
    parents[0] = first
    return parents
