"""The Neumann series, also known as Richardson's iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.linear.base import LinearSolution
from torchimplicit.linear.cycle import Method
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.series import Begun, series
from torchimplicit.linear.system import LinearSystem
from torchimplicit.precision import safe_norm, working_dtype
from torchimplicit.validation import check_positive


@final
@dataclass(frozen=True, kw_only=True)
class Neumann(IterativeSolver):
    """The Neumann series: iterates :math:`y \\leftarrow y + \\lambda M^{-1}(b - Ay)`.

    Converges where the eigenvalues of :math:`I - \\lambda M^{-1}A` lie in the unit disc. Its step is the cheapest of
    all, so it is the fastest method where :math:`A = I - J` with a small :math:`J`.

    With ``rtol=0`` and ``atol=0`` it is a truncated series: exactly ``max_steps`` terms,
    :math:`\\lambda\\sum_{i<k}(I-\\lambda A)^i b` from zero, in :math:`k-1` products. The last iterate is then returned
    (not the best), and ``report.residual`` belongs to the iterate before it, whose residual is the last term.

    Attributes:
        damping: :math:`\\lambda`, above 0.

    Raises:
        ValueError: a number is out of range.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "damping")

    @property
    def truncated(self) -> bool:
        return self.rtol == 0 and self.atol == 0

    @property
    def by_spectrum(self) -> bool:
        return True

    def _begin(self, operator: LinearOperator, b: Tensor) -> LinearSolution | Begun | None:
        apart = operator.restrict is not None or operator.null is not None  # rows may leave, or need a projection
        if self.truncated or apart or self.check_every > 1 or b.dtype != working_dtype(b.dtype):
            return None
        rtol, atol = self.tolerances(b.dtype)
        return series(operator, b, damping=self.damping, rtol=rtol, atol=atol, max_steps=self.max_steps)

    def method(self, operator: LinearOperator) -> Method:
        return _Richardson(self.damping, truncated=self.truncated)


class _State(NamedTuple):
    norm: Tensor
    b: Tensor
    x: Tensor
    r: Tensor
    fresh: bool


class _Richardson(Method):
    """``fresh`` says that ``r`` is the residual of ``x``. In a truncated series it lags one step behind, which saves
    the last product."""

    def __init__(self, damping: float, truncated: bool) -> None:
        self.damping, self.truncated = damping, truncated
        self.monotone, self.watched = truncated, not truncated
        # the rows of a truncated series never stop; otherwise the loop keeps the best iterate
        self.kept = ("b", "x") if truncated else ()

    def start(self, system: LinearSystem, b: Tensor, x: Tensor, r: Tensor, norm: Tensor) -> _State:
        return _State(norm, b, x, r, True)

    def step(self, system: LinearSystem, state: _State, slow: int | None) -> _State:
        r = state.r if state.fresh else state.b - system.product(state.x)
        x = torch.add(state.x, system.precondition(r), alpha=self.damping)
        if not self.truncated:
            r = state.b - system.product(x)
        norm = safe_norm(r) if self.truncated else torch.linalg.vector_norm(r, dim=-1)
        return _State(norm, state.b, x, r, not self.truncated)
