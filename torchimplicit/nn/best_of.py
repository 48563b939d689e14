"""Solves from several starts, of which every sample keeps the best solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.solution import Solution

Choice = Callable[[Sequence[Solution]], Tensor]
"""A function of the solutions from all starts that returns the number of the best one, int64 ``[batch]`` (or a
scalar)."""


@dataclass(frozen=True)
class BestOf:
    """The best solution of every sample.

    Attributes:
        value: the chosen solutions, with the structure of a start; differentiable where grad mode is on.
        index: number of the start that each comes from, int64 ``[batch]``; a scalar where the problem is not batched.
        residual, converged: residual and convergence of the chosen solutions, ``[batch]`` (or scalars).
        evaluations: evaluations of all solves together, in whole-batch equivalents.
    """

    value: Any
    index: Tensor
    residual: Tensor
    converged: Tensor
    evaluations: float


def best_of(solve: Callable[[Any], Solution], starts: Sequence[Any], *, choose: Choice | None = None) -> BestOf:
    """Solve from several starts, and keep the best solution of every sample.

    Random starts scale test-time computation in breadth, as more steps do in depth (Huang et al. 2026, arXiv
    2605.21488)::

        starts = [torch.randn(batch, 8) for _ in range(4)]
        best = best_of(lambda z0: layer.solve(x, z0=z0), starts)

    The starts are tried without gradients, one after the other, so that memory does not grow with their number. In grad
    mode, one more solve from each sample's best start gives the value its gradient, by the solver and the estimator of
    ``solve``. Samples must not depend on each other for that.

    Args:
        solve: a function from a start to a :class:`~torchimplicit.Solution`, such as
            ``lambda z0: ti.solve(problem, z0, x)``; with ``throw=False`` if a start may go non-finite.
        starts: the initial states.
        choose: how to choose among the solutions; ``None``: :func:`least_residual`. :class:`Vote` is another. For a
            minimum: ``lambda solutions: torch.stack([energy(s.value) for s in solutions]).argmin(0)``.

    Raises:
        ValueError: there is no start; or ``choose`` returns indices of another shape than the residuals'.
    """
    starts = list(starts)
    if not starts:
        raise ValueError("best_of needs at least one start, and starts is empty")
    with torch.no_grad():
        solutions = [solve(z0) for z0 in starts]
        index = (choose or least_residual)(solutions)
    if index.shape != solutions[0].residual.shape:
        raise ValueError(
            f"choose must return an index of shape {tuple(solutions[0].residual.shape)}, one for each sample, and it "
            f"returned {tuple(index.shape)}"
        )
    spent = sum(solution.evaluations for solution in solutions)
    if torch.is_grad_enabled():
        last = solve(_taken(starts, index))
        return BestOf(last.value, index, last.residual, last.converged, spent + last.evaluations)
    return BestOf(
        _taken([solution.value for solution in solutions], index),
        index,
        _taken([solution.residual for solution in solutions], index),
        _taken([solution.converged for solution in solutions], index),
        spent,
    )


def least_residual(solutions: Sequence[Solution]) -> Tensor:
    """Choose the solution with the least relative residual; a residual that is not known or not finite comes last."""
    return _residuals(solutions).argmin(dim=0)


@final
@dataclass(frozen=True, kw_only=True)
class Vote:
    """Choose the solution whose answer most of the starts agree on, and of these the one with the least residual.

    Args:
        decode: a function from a state to its answer, a tensor ``[batch, ...]`` of integers; answers agree where all
            entries do.
    """

    decode: Callable[[Any], Tensor]

    def __call__(self, solutions: Sequence[Solution]) -> Tensor:
        answers = torch.stack([self.decode(solution.value).flatten(1) for solution in solutions])
        votes = (answers[:, None] == answers).all(dim=3).sum(dim=1)
        place = _residuals(solutions).argsort(dim=0).argsort(dim=0)
        return (votes - place / len(solutions)).argmax(dim=0)


def _residuals(solutions: Sequence[Solution]) -> Tensor:
    """``[starts, batch]``."""
    return torch.stack([solution.residual for solution in solutions]).nan_to_num(nan=torch.inf)


def _taken(trees: Sequence[Any], index: Tensor) -> Any:
    """For each sample, its entries of the tree that it has chosen."""
    if not index.ndim:
        return trees[int(index)]
    sample = torch.arange(len(index), device=index.device)
    return pytree.tree_map(lambda *leaves: torch.stack(leaves)[index, sample], *trees)
