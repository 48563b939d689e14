"""States without numbers, such as that of an empty batch: there is nothing to solve, and all derivatives are zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchimplicit.gradients.base import FlatSolution, SolveTask, differentiable
from torchimplicit.gradients.figures import reported
from torchimplicit.solution import Report, Status
from torchimplicit.solvers import SolverResult


def solved_without_numbers(task: SolveTask, params: Sequence[Tensor]) -> FlatSolution:
    """The start as the solution after zero steps, with a graph that gives ``params`` gradients of zero."""
    z0 = task.start.take()
    count = torch.full(z0.shape[:1], int(Status.CONVERGED), dtype=torch.int64, device=z0.device)
    figures = Report(count, torch.zeros_like(count), z0.detach().new_zeros(z0.shape[:1]), 0.0)
    task.results.append(SolverResult(z0.detach(), figures, trajectory=(z0.detach(),) if task.solver.keeps(0) else ()))
    z = z0.detach().clone()
    if differentiable(params):
        tensors = (p.to_dense() if p.layout is not torch.strided else p for p in params)
        z = z + sum(t.flatten()[:0].sum() for t in tensors if t.is_floating_point())
    return FlatSolution(reported(z, task.linear.record, figures), count, figures.steps, figures.residual)
