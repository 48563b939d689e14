"""The product of a pseudo-inverse with a vector as an autograd node, closed under differentiation.

With :math:`y=A^+b`, :math:`r=b-Ay` and a constant rank (Golub and Pereyra 1973, eq. 4.12),

.. math::
    \\dot y = A^+(\\dot b-\\dot Ay) + A^+A^{+T}\\dot A^Tr + (I-A^+A)\\dot A^TA^{+T}y,

which consists of products with :math:`A`, :math:`A^T` and their pseudo-inverses again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit._torch import Node
from torchimplicit.coupling import Coupling
from torchimplicit.gradients.figures import report
from torchimplicit.gradients.transforms import (
    fold_copies,
    gradients,
    jvp,
    nested_forward_mode,
    primals_of,
    stack_copies,
)
from torchimplicit.linear import LinearSolver
from torchimplicit.linear.pseudo_inverse import RectangularOperator, pseudo_solve
from torchimplicit.precision import safe_norm, without_autocast
from torchimplicit.problems.linearization import Linearization
from torchimplicit.problems.system import vjp, vmapped
from torchimplicit.saved import past_hooks
from torchimplicit.solution import AdjointRecord, Report


class PseudoSolution(NamedTuple):
    """The solution as autograd sees it, ``[batch, inner]``, with its figures ``[batch]``."""

    value: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor


@dataclass(frozen=True, kw_only=True)
class Maps:
    """Linear maps :math:`A_i` as functions of parameters.

    Attributes:
        fn: ``(y [batch, inner], *params) -> [batch, outer]``, linear in y.
        inner, outer: the numbers of inputs and outputs.
        solver: for their pseudo-inverses.
        record: where the solves of derivatives leave their reports.
        coupling: see :class:`~torchimplicit.linear.LinearOperator`.
        reports: those of all solves, the first one first.
    """

    fn: Callable[..., Tensor]
    inner: int
    outer: int
    solver: LinearSolver
    record: AdjointRecord
    coupling: Coupling | None = None
    reports: list[Report] = field(default_factory=list)

    def solve(self, transposed: bool, b: Tensor, params: Sequence[Tensor]) -> PseudoSolution:
        """Multiply ``b`` with the pseudo-inverses, or with their transposes; on plain tensors."""
        with without_autocast(b.device), past_hooks():
            tape = Linearization(self.fn, b.new_zeros(len(b), self.inner), params)
            operator = RectangularOperator(
                product=tape.jvp,
                transposed_product=tape.vjp,
                batch=len(b),
                inner=self.inner,
                outer=self.outer,
                dtype=b.dtype,
                device=b.device,
                coupling=self.coupling,
            )
            solution = pseudo_solve(self.solver, operator.flipped() if transposed else operator, b)
            if not self.reports:
                # test linearity at the solution; at ones where that is zero, since zero tells nothing
                probe = torch.where((solution.value == 0).all(dim=1, keepdim=True), 1, solution.value.nan_to_num())
                self._check_linear(probe, operator.product(probe), params)
        if self.reports:
            report(self.record, solution.report)
        self.reports.append(solution.report)
        return PseudoSolution(solution.value, solution.report.status, solution.report.steps, solution.report.residual)

    @torch.no_grad()
    def _check_linear(self, y: Tensor, product: Tensor, params: Sequence[Tensor]) -> None:
        image = self.fn(y, *params)
        gap, size = safe_norm(image - product), safe_norm(image) + safe_norm(product)
        if bool((gap > torch.finfo(y.dtype).eps ** 0.5 * size).any()):
            raise ValueError(
                "the operator is not linear: its value at the solution differs from its derivative's product with it. "
                "For a nonlinear residual, take ti.solve(ti.LeastSquares(residual), z0)"
            )

    def product(self, transposed: bool, v: Tensor, params: Sequence[Tensor]) -> Tensor:
        """:math:`Av` or :math:`A^Tv`, by composable transforms."""
        if not transposed:
            return self.fn(v, *params)
        _, pull = vjp(lambda y: self.fn(y, *params), v.new_zeros(len(v), self.inner))
        return pull(v)[0]

    def vmapped(self, size: int, dims: Sequence[int | None]) -> Maps:
        """The maps of ``size`` copies, stacked along the batch."""
        return replace(self, fn=vmapped(self.fn, size, tuple(dims)))


class PseudoSolve(Node):
    """:math:`y=M^+b` with M the maps, or their transposes: ``(maps, transposed, b, *params) -> PseudoSolution``."""

    @staticmethod
    def forward(maps: Maps, transposed: bool, b: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        return tuple(maps.solve(transposed, b, params))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.maps, ctx.transposed, b, *params = inputs
        y, *figures = output
        ctx.mark_non_differentiable(*figures)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, b, *params)
        ctx.save_for_forward(y, b, *params)

    @staticmethod
    def backward(ctx: Any, c: Tensor | None, *_: Any) -> tuple[Any, ...]:
        y, b, *params = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad[3:]
        if c is None:
            return None, None, None, *(None for _ in needs_grad)
        maps, flip = ctx.maps, ctx.transposed
        g = PseudoSolve.apply(maps, not flip, c, *params)[0]
        if not any(needs_grad):
            return None, None, g, *(None for _ in needs_grad)
        rest = b - maps.product(flip, y, params)
        beyond = c - maps.product(not flip, g, params)
        k = PseudoSolve.apply(maps, flip, g, *params)[0]
        h = PseudoSolve.apply(maps, not flip, y, *params)[0]
        # the three terms of the formula above, each as the derivative of left^T M right in the parameters
        pairs = ((-g, y), (rest, k), (h, beyond))

        def weighted(*params: Tensor) -> Tensor:
            total = y.new_zeros(())
            for left, right in pairs:
                left, right = (right, left) if flip else (left, right)
                total = total + (left * maps.fn(right, *params)).sum()
            return total

        return None, None, g, *gradients(weighted, params, needs_grad)

    @staticmethod
    def jvp(ctx: Any, _maps: None, _transposed: None, db: Tensor | None, *tangents: Tensor | None) -> tuple[Any, ...]:
        with nested_forward_mode():
            y, b, *params = primals_of(ctx.saved_tensors)
            maps, flip = ctx.maps, ctx.transposed
            right = torch.zeros_like(b) if db is None else db
            beside = None
            if any(t is not None for t in tangents):

                def moved(turned: bool, v: Tensor) -> Tensor:
                    out = jvp(lambda *params: maps.product(turned, v, params), params, tangents)
                    assert out is not None
                    return out

                rest = b - maps.product(flip, y, params)
                h = PseudoSolve.apply(maps, not flip, y, *params)[0]
                beside = moved(not flip, h)
                turned = PseudoSolve.apply(maps, not flip, moved(not flip, rest), *params)[0]
                right = right - moved(flip, y) + turned - maps.product(flip, beside, params)
            out = PseudoSolve.apply(maps, flip, right, *params)[0]
            return out if beside is None else out + beside, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, maps: Maps, transposed: bool, b: Tensor, *params: Tensor) -> tuple[Any, Any]:
        size, dims, params = fold_copies(info, in_dims[3:], params)
        solution = PseudoSolve.apply(maps.vmapped(size, dims), transposed, stack_copies(b, in_dims[2], size), *params)
        return tuple(t.reshape(size, -1, *t.shape[1:]) for t in solution), (0, 0, 0, 0)
