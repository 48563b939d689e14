"""The one-step, or Jacobian-free, gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from torchimplicit.gradients.base import Task
from torchimplicit.gradients.linear_estimate import LinearEstimate
from torchimplicit.linear import LinearSolution
from torchimplicit.problems.linearization import Linearization
from torchimplicit.solution import Report, Status


@final
@dataclass(frozen=True, kw_only=True)
class OneStep(LinearEstimate):
    """The inverse replaced by the identity: :math:`\\bar\\theta = f_\\theta^T u` (Fung et al. 2022, JFB; Bolte et al.
    2023). One backward pass through ``f``; an ascent direction where the map contracts well."""

    def apply(self, task: Task, tape: Linearization, transposed: bool, b: Tensor) -> LinearSolution:
        zero = torch.zeros(b.shape[0], dtype=torch.int64, device=b.device)
        unknown = torch.full(b.shape[:1], torch.nan, dtype=b.dtype, device=b.device)
        return LinearSolution(b, Report(zero + int(Status.MAX_STEPS), zero, unknown, 0.0))
