"""What the loop found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchimplicit.solution import Report


@dataclass(frozen=True)
class Outcome:
    """What the loop found: states ``[batch, dim]`` and the figures.

    Attributes:
        z: the solutions; the best iterate where a sample did not converge.
        report: per sample.
        trajectory: the iterates, if they were to be kept.
        state: the solver's last state (for all samples, unless some left the batch: then ``None``).
        norm: what the tolerance was compared with, ``[batch]`` or ``[batch, leaves]``.
        parts: the relative residuals likewise.
    """

    z: Tensor
    report: Report
    trajectory: tuple[Tensor, ...] = ()
    state: Any = None
    norm: Tensor | None = None
    parts: Tensor | None = None
