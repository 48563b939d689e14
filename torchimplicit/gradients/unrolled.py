"""Differentiation through the iterations themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from torchimplicit.closure import is_vmapped
from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.gradients.base import Found, Gradient, Task, differentiable, reported


@final
@dataclass(frozen=True, kw_only=True)
class Unrolled(Gradient):
    """Backpropagation through every step of the solver, in memory that grows with the steps.

    Exact for the iterate that was reached, in any order, and with respect to ``z0`` as well. Not under
    ``torch.func.vmap``, where the number of steps would depend on the data. ``solution.adjoint`` has the figures of the
    forward pass, whose steps the backward pass goes back through.
    """

    def attach(self, task: Task, z0: Tensor, params: Sequence[Tensor]) -> Found:
        if not differentiable((z0, *params)):
            return task.solve(z0, params)
        if any(map(is_vmapped, (z0, *params))):
            raise UnsupportedDerivativeError(
                "Unrolled cannot run under torch.func.vmap, where the number of steps would depend on the data: use "
                "Implicit() or UnrolledPhantom()"
            )
        outcome = task.run(task.system, z0, params)
        task.outcomes.append(outcome)
        report = outcome.report
        # the last evaluation judges the result and is not part of it; the first one starts from a constant z0
        products = max(0.0, report.evaluations - (1 if differentiable((z0,)) else 2))
        # a copy, for the last iterate may be an argument, a buffer or a parameter that the function returned
        z = reported(outcome.z.clone(), task.record, replace(report, evaluations=products))
        return Found(z, report.status, report.steps, report.residual)
