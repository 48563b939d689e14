"""The one-step, or Jacobian-free, gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from torchimplicit.gradients.base import Task, truncated
from torchimplicit.gradients.linear_estimate import LinearEstimate
from torchimplicit.linear import LinearSolution
from torchimplicit.problems.linearization import Linearization


@final
@dataclass(frozen=True, kw_only=True)
class OneStep(LinearEstimate):
    """The inverse replaced by the identity: :math:`\\bar\\theta = f_\\theta^T u` (Fung et al. 2022, JFB; Bolte et al.
    2023). One backward pass through ``f``; an ascent direction where the map contracts well."""

    def apply(self, task: Task, tape: Linearization, transposed: bool, b: Tensor) -> LinearSolution:
        return LinearSolution(b, truncated(b, 0, 0.0))
