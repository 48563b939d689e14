"""The adjoint by the inverse that the forward solve has built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.gradients.base import SolveTask
from torchimplicit.gradients.linear_estimate import LinearEstimate
from torchimplicit.linear import GMRES, LinearOperator, LinearSolution
from torchimplicit.linear.confirmed import confirmed
from torchimplicit.precision import UnitRows, safe_norm
from torchimplicit.problems import System
from torchimplicit.problems.linearization import Linearization
from torchimplicit.solution import Report, Status
from torchimplicit.solvers import Broyden, Solver
from torchimplicit.solvers.broyden import BroydenState
from torchimplicit.validation import check_count, check_positive


@final
@dataclass(frozen=True, kw_only=True)
class SharedInverse(LinearEstimate):
    """SHINE (Ramzi et al. 2022): the transpose of Broyden's estimate of the inverse, in place of that of the adjoint.

    Needs :class:`Broyden` as the forward solver; no sample leaves the batch then, not even with ``rowwise=True``, since
    the inverse belongs to the whole batch. The estimate's residual :math:`\\lVert A^T g - u\\rVert` is measured by one
    product. A sample falls back to the one-step estimate :math:`g=u` where that has the smaller residual, or where
    :math:`\\lVert g\\rVert > ` ``ratio`` :math:`\\lVert u\\rVert` (section 3 of the paper tests the ratio alone).
    Optionally, ``refine`` steps of GMRES improve the estimate. Reverse and forward mode, first order.

    Args:
        refine: the number of GMRES steps from the estimate; 0 for the estimate itself.
        ratio: the largest norm of the estimate relative to the cotangent's.

    Raises:
        ValueError: a number is out of range; or, at the solve, the solver is not :class:`Broyden`.
    """

    needs_solver_state: ClassVar[bool] = True

    refine: int = 0
    ratio: float = 10.0

    def __post_init__(self) -> None:
        check_count(self, "refine", least=0)
        check_positive(self, "ratio")

    def supports(self, system: System, solver: Solver) -> None:
        if not isinstance(solver.leading, Broyden):
            raise ValueError(
                f"SharedInverse reuses the inverse that Broyden builds, but the solver is "
                f"{type(solver.leading).__name__}: solve with solver=Broyden(), or take another gradient"
            )

    def apply(self, task: SolveTask, tape: Linearization, transposed: bool, b: Tensor) -> LinearSolution:
        state = task.results[-1].state
        operator = task.system.operator(tape, transposed)
        whole = UnitRows.as_they_are(b)
        right = whole.unit
        size = safe_norm(right)
        value, residual = right, safe_norm(right - operator.product(right))
        products = 1
        if isinstance(state, BroydenState) and state.inverse.updates:
            systems, _, dim = state.inverse.steps.ring.shape  # of samples, or of samples that were solved as one
            if systems * dim != b.numel():
                raise UnsupportedDerivativeError(
                    "SharedInverse cannot be used where only the backward pass is vectorized (jacrev, vmap of vjp): "
                    "the inverse belongs to the forward batch. Use Implicit() there"
                )
            wide = right.reshape(systems, dim).to(state.inverse.steps.ring.dtype)
            shared = state.inverse.transposed_times(wide) if transposed else state.inverse.times(wide)
            shared = shared.reshape(b.shape).to(b.dtype)
            # Broyden's matrix is a good inverse along the steps that were taken, and arbitrary elsewhere. It is used
            # for a cotangent only where its residual is smaller than that of the identity.
            measured = safe_norm(right - operator.product(shared))
            products += 1
            trusted = (measured < residual) & (safe_norm(shared) <= self.ratio * size)
            value = torch.where(trusted[:, None], shared, right)
            residual = torch.where(trusted, measured, residual)
            if operator.coupling is not None:  # coupled rows of the two estimates, mixed, have another residual
                residual = safe_norm(right - operator.product(value))
                products += 1
        if self.refine:
            steps = GMRES(max_steps=self.refine, rtol=0.0)

            def refined(operator: LinearOperator, b: Tensor) -> LinearSolution:
                return steps.solve(operator, b, value.reshape(b.shape))

            solution = confirmed(refined, operator, right, steps.tolerances(b.dtype))
            report = replace(solution.report, evaluations=solution.report.evaluations + products)
            return LinearSolution(whole.restored(solution.value), report)
        steps_taken = torch.zeros(b.shape[0], dtype=torch.int64, device=b.device)
        relative = residual / torch.where(size > 0, size, 1)
        figures = Report(steps_taken + int(Status.STEPS_TAKEN), steps_taken, relative, float(products))
        return LinearSolution(whole.restored(value), figures)
