"""The result of the loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.problems import Point
from torchimplicit.solution import Report, Turn


class Units(NamedTuple):
    """The units in which a problem is solved: the state and the terms of its residual are divided by these numbers, so
    that both are of about unit size. They are powers of two, so that changing units rounds nothing."""

    state: float
    size: float


@dataclass(frozen=True)
class SolverResult:
    """States and figures of a solve, in the problem's own units.

    Attributes:
        z: the solutions ``[batch, dim]``; the best iterate where a sample did not converge.
        report: status, steps and residual per sample.
        trajectory: the iterates that were to be kept, and ``None`` for each that was not.
        state: the solver's last state; ``None`` if samples left the batch, since then no one state covers all.
        norm: the residual norms that the tolerance was compared with, ``[batch]`` or ``[batch, leaves]``.
        parts: the relative residuals, shaped like ``norm``.
        trace: ``(norm, parts)`` of every evaluated iterate, if they were to be kept. ``parts`` is NaN where the size of
            the residual's terms is unknown.
        turns: the members of a :class:`Polyalgorithm` that took part.
        units: the units that were solved in, if not the problem's own.
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

    def multiplied(self, state: float | Tensor, residual: float | Tensor) -> SolverResult:
        """This outcome in other units: its states times ``state``, its residuals' norms times ``residual``."""
        return replace(
            self,
            z=self.z * state,
            trajectory=tuple(None if z is None else z * state for z in self.trajectory),
            norm=None if self.norm is None else self.norm * residual,
            trace=tuple((norm * residual, parts) for norm, parts in self.trace),
        )

    def having_spent(self, evaluations: float) -> SolverResult:
        """Return the same result with ``evaluations`` (of the whole batch) added to its count."""
        return replace(self, report=replace(self.report, evaluations=self.report.evaluations + evaluations))


def traced(point: Point) -> tuple[Tensor, Tensor]:
    """The norms and relative residuals of a point, for a trace."""
    norm = point.size().detach()
    return norm, relative_to(norm, torch.zeros_like(norm) if point.scale is None else point.scale.detach())


def relative_to(norm: Tensor, terms: Tensor) -> Tensor:
    """Residuals divided by the size of their terms: zero where the residual is zero, NaN where that size is unknown."""
    parts = norm / terms.masked_fill(terms == 0, torch.nan)
    return parts.masked_fill_(norm == 0, 0)


def worst(parts: Tensor) -> Tensor:
    """The largest known of each sample's relative residuals (``[batch]`` or ``[batch, leaves]``), or NaN;
    ``[batch]``."""
    if parts.ndim == 1:
        return parts
    unknown = parts.isnan()
    return parts.masked_fill(unknown, -1).amax(dim=1).masked_fill(unknown.all(dim=1), torch.nan)
