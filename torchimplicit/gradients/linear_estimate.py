"""Estimators that replace the inverse of the adjoint system by another linear map."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from torchimplicit.closure import is_transformed
from torchimplicit.gradients.base import SolveTask
from torchimplicit.gradients.nodes import FirstOrderRule, estimate
from torchimplicit.gradients.transforms import Grads, jvp
from torchimplicit.linear import LinearSolution
from torchimplicit.problems.linearization import Linearization
from torchimplicit.saved import past_hooks


class LinearEstimate(FirstOrderRule):
    """Base class of the estimators :math:`\\bar\\theta = -R_\\theta^T M^T u`, :math:`\\dot z = -M
    R_\\theta\\dot\\theta` with some :math:`M\\approx A^{-1}`.

    Reverse and forward mode, first order; a derivative of the estimate raises.
    """

    @abstractmethod
    def apply(self, task: SolveTask, tape: Linearization, transposed: bool, b: Tensor) -> LinearSolution:
        """:math:`M b`, or :math:`M^T b` if ``transposed``, at the tape's point; on plain tensors."""

    def tape(
        self, task: SolveTask, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Linearization | None:
        """The tape of the residual; none where the backward pass is compiled."""
        if task.linear.capture is not None and task.linear.capture.pulls:
            return None
        return task.recorded(z, params, needs_grad)

    def adjoint(
        self, task: SolveTask, u: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Grads:
        capture = task.linear.capture
        if capture is not None and not torch.is_grad_enabled() and not any(map(is_transformed, (u, z, *params))):
            compiled = capture.pull(u, z, params, needs_grad)
            if compiled is not None:
                task.linear.record.report = compiled.report
                return compiled.grads
        return super().adjoint(task, u, z, params, needs_grad)

    def cotangents(
        self, task: SolveTask, u: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        tape = task.linear.linearize(z, params, needs_grad)
        with past_hooks():
            g = self.apply(task, tape, True, u)
            task.linear.record.report = g.report
            return task.system.vjp_params(tape, g.value)

    def tangent(self, task: SolveTask, z: Tensor, params: Sequence[Tensor], dparams: Sequence[Tensor | None]) -> Tensor:
        moved = jvp(lambda *params: task.system.residual(z, *params), params, dparams)
        if moved is None:
            return torch.zeros_like(z)

        def compute(task: SolveTask, b: Tensor, z: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
            return [self.apply(task, task.system.linearize(z, params), False, b).value]

        (out,) = estimate(task, compute, type(self).__name__, -moved, z, params, of_state=True)
        return out
