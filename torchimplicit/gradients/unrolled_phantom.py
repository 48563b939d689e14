"""The phantom gradient by damped unrolling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from torchimplicit.captured import Continuation, Passes
from torchimplicit.gradients.base import FlatSolution, Gradient, SolveTask, differentiable, owned, refuse_detached
from torchimplicit.gradients.continued import Continued
from torchimplicit.gradients.figures import reported, truncated
from torchimplicit.gradients.nodes import DerivativeRule, by_node, undifferentiated
from torchimplicit.gradients.transforms import Grads
from torchimplicit.solvers import Solver
from torchimplicit.validation import check_count, check_fraction


@final
@dataclass(frozen=True, kw_only=True)
class UnrolledPhantom(Gradient):
    """The unrolled phantom gradient (UPG; Geng et al. 2021, eq. 16): takes ``steps`` damped steps
    :math:`h \\leftarrow \\lambda f(h) + (1-\\lambda) h` from the solution, differentiates these, and returns the last
    :math:`h`.

    Derivatives of every order and mode are those of these steps; they tend to the exact ones as ``steps`` grows if the
    damped map contracts. Memory grows with ``steps``. ``solution.evaluations`` counts the steps, and
    ``solution.adjoint`` the ``steps - 1`` products with the Jacobian between them.

    Args:
        steps: k, the number of steps.
        damping: :math:`\\lambda` in (0, 1].

    Raises:
        ValueError: a number is out of range.
    """

    goes_on: ClassVar[bool] = True

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        check_count(self, "steps")
        check_fraction(self, "damping")

    def attach(self, task: SolveTask, params: Sequence[Tensor]) -> FlatSolution:
        compiled = task.linear.capture is not None and task.linear.capture.goes_on
        if task.direct or (compiled and task.solver.steps is not None):
            solution = task.solve(params, given_away=False)
        elif not differentiable(params):
            return undifferentiated(task, _Constant(), params)
        elif compiled:
            solution = task.solve(params, given_away=False)
        else:
            solution = FlatSolution(*(t.detach() for t in by_node(task, _Constant(), params)))
        way = Continuation(self.steps, self.damping)
        h = (
            Continued.apply(task, way, solution.z, *params)[0]
            if compiled
            else way.taken(task.system, solution.z, params)
        )
        # a single step is not differentiated in the state; prescribed steps behave as a loop written by hand
        if self.steps > 1 and h.requires_grad and task.solver.steps is None:
            refuse_detached(task, solution.z, params)
        task.spent(self.steps)
        figures = truncated(h.detach(), self.steps, float(self.steps - 1))
        return solution._replace(z=reported(owned(task, h), task.linear.record, figures))

    def passes(self, solver: Solver) -> Passes:
        return Passes(solver=solver, continuation=Continuation(self.steps, self.damping))

    def recorded(self, solver: Solver) -> int | None:
        return None if solver.steps is None else 0


class _Constant(DerivativeRule):
    """The rule for the point from which the steps start: a constant."""

    def adjoint(
        self, task: SolveTask, u: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Grads:
        return (None,) * len(params)

    def tangent(self, task: SolveTask, z: Tensor, params: Sequence[Tensor], dparams: Sequence[Tensor | None]) -> Tensor:
        return torch.zeros_like(z)
