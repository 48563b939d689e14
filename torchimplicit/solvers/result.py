"""What the loop found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.problems import Point
from torchimplicit.solution import Report, Turn


class Units(NamedTuple):
    """What the state, and what its residual is made of, are divided by so that they are of about unit size: powers of
    two."""

    state: float
    size: float


@dataclass(frozen=True)
class SolverResult:
    """What the loop found: states ``[batch, dim]`` and the figures.

    Attributes:
        z: the solutions; the best iterate where a sample did not converge.
        report: per sample.
        trajectory: the iterates, if any were to be kept; ``None`` in the place of one that was not.
        state: the solver's last state (for all samples, unless some left the batch: then ``None``).
        norm: what the tolerance was compared with, ``[batch]`` or ``[batch, leaves]``.
        parts: the relative residuals likewise.
        trace: the two of every iterate that was evaluated, if they were to be kept; no size of terms, no relative one,
            which is NaN then.
        units: in which it was solved, where not in the problem's own, in which everything here is.
        turns: of several solvers, which ones took part.
    """

    z: Tensor
    report: Report
    trajectory: tuple[Tensor | None, ...] = ()
    state: Any = None
    norm: Tensor | None = None
    parts: Tensor | None = None
    trace: tuple[tuple[Tensor, Tensor], ...] = ()
    turns: tuple[Turn, ...] = ()
    units: Units | None = None

    def having_spent(self, evaluations: float) -> SolverResult:
        """The same, with ``evaluations`` of the whole batch more."""
        return replace(self, report=replace(self.report, evaluations=self.report.evaluations + evaluations))


def traced(point: Point) -> tuple[Tensor, Tensor]:
    """What a trace keeps of a point."""
    norm = point.size().detach()
    return norm, relative_to(norm, torch.zeros_like(norm) if point.scale is None else point.scale.detach())


def relative_to(norm: Tensor, terms: Tensor) -> Tensor:
    """Residuals relative to their terms: NaN where there are no terms to compare with, and zero where there is no
    residual."""
    return torch.where(norm == 0, 0, norm / torch.where(terms > 0, terms, torch.nan))


def worst(parts: Tensor) -> Tensor:
    """``[batch]``, of relative residuals ``[batch]`` or ``[batch, leaves]``: the largest that is known, or NaN."""
    if parts.ndim == 1:
        return parts
    unknown = parts.isnan()
    return parts.masked_fill(unknown, -1).amax(dim=1).masked_fill(unknown.all(dim=1), torch.nan)
