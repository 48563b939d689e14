"""Estimators for joint inference: the envelope theorem, and the first-order shortcut with a fixed input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.gradients.base import SolveTask
from torchimplicit.gradients.figures import report, truncated
from torchimplicit.gradients.nodes import FirstOrderRule
from torchimplicit.linear import LinearSolver
from torchimplicit.precision import safe_norm
from torchimplicit.problems import System
from torchimplicit.problems.fixed_point import FixedPointSystem
from torchimplicit.problems.joint_system import JointSystem
from torchimplicit.problems.linearization import Linearization, check_unmoved
from torchimplicit.solvers import Solver
from torchimplicit.validation import check_positive, check_type


class JointEstimate(FirstOrderRule):
    """Base class of the estimators for :class:`JointInference`. Reverse mode, first order."""

    def supports(self, system: System, solver: Solver) -> None:
        if not isinstance(system, JointSystem):
            raise ValueError(f"{type(self).__name__} differentiates a JointInference: for this problem use Implicit()")


@final
@dataclass(frozen=True, kw_only=True)
class Envelope(JointEstimate):
    """The envelope theorem for :class:`JointInference`: exact without a linear solve where the outer loss is the inner
    one.

    At the optimum the loss does not change with the input to first order, so
    :math:`d\\ell/d\\theta = \\ell_\\theta + \\mu^T f_\\theta` with the adjoint :math:`\\mu` that the solve has found
    (Gurumurthy et al. 2021, section 3.3). The outer loss may weight the samples, :math:`\\sum_i c_i\\ell_i` (a mean, a
    sum); the weights are inferred from the cotangent. Reverse mode, first order.

    Args:
        tolerance: the largest relative distance of the cotangent from a multiple of the inner loss's derivative.

    Raises:
        ValueError: a number is out of range; or, in the backward pass, the outer loss is another one.
    """

    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        check_positive(self, "tolerance")

    def tape(self, task: SolveTask, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]) -> Linearization:
        """The tape of the map and the loss side by side."""
        return Linearization(task.system.fn, z, params, needs_grad)

    def cotangents(
        self, task: SolveTask, u: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> list[Tensor | None]:
        system = task.system
        assert isinstance(system, JointSystem)
        _, mu, _ = system.parts.split(z)
        tape = self.tape(task, z, params, needs_grad) if task.linear.tape is None else task.linear.tape
        one = torch.ones_like(mu[:, :1])
        # if the outer loss is a weighted sum of the inner ones, each weight is the cotangent's component along one
        inner = tape.vjp(torch.cat((torch.zeros_like(mu), one), dim=1))
        size = (inner * inner).sum(dim=1, keepdim=True)
        weight = (inner * u).sum(dim=1, keepdim=True) / torch.where(size > 0, size, 1)
        finite = torch.isfinite(u).all(dim=1, keepdim=True)
        length, misfit = (safe_norm(v.where(finite, 0).flatten()) for v in (u, u - weight * inner))
        if bool(misfit > self.tolerance * length):
            raise ValueError(
                "Envelope is exact only where the outer loss is the inner one, up to a weight for each sample, but "
                f"this outer loss's derivative in the solution differs from that by {float(misfit / length):.2g} "
                "(relative). Use Implicit() (exact for every outer loss), or FixedInput() (the first-order shortcut)"
            )
        task.linear.record.report = truncated(z, 0, 0.0)
        if system.moving(needs_grad):
            # the derivative of the optimal value in a bound is the loss's slope along the input there
            slope = tape.vjp(torch.cat((mu, one), dim=1))
            g = torch.cat((weight * mu, torch.zeros_like(mu), weight * system.parts.split(slope)[2]), dim=1)
            whole = system.linearize(z, params, needs_grad)
            state, image = (t[:, : system.parts.z] for t in (z, tape.out))
            check_unmoved(torch.lerp(state, image, system.damping[0]), whole.out[:, : system.parts.z])
            return system.vjp_params(whole, system.undamped(g))
        return tape.vjp_params(torch.cat((weight * mu, torch.zeros_like(one)), dim=1))


@final
@dataclass(frozen=True, kw_only=True)
class FixedInput(JointEstimate):
    """The first-order shortcut for :class:`JointInference`: the optimized input counts as a constant.

    The gradient is that of :math:`z^*(x, \\theta)` at the optimized :math:`x`, by one adjoint solve of the map ``f``
    alone. It is exact where the outer loss is the inner one (where :class:`Envelope` is cheaper). With another loss it
    neglects how the input would move, as the code published with Gurumurthy et al. (2021) does, and may not even be a
    descent direction; take :class:`Implicit` for the exact gradient. Reverse mode, first order.

    Args:
        linear_solver: for the adjoint system of ``f``; ``None``: GMRES.

    Raises:
        TypeError: ``linear_solver`` is not a linear solver.
        UnsupportedDerivativeError: in the backward pass, if the outer loss depends on the adjoint ``mu``.
    """

    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_type(self, "linear_solver", LinearSolver, optional=True)

    def tape(self, task: SolveTask, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]) -> Linearization:
        """The tape of the map at the fixed input."""
        assert isinstance(task.system, JointSystem)
        state, _, x = task.system.parts.split(z)
        return self._alone(task.system, x.detach()).linearize(state.contiguous(), params, needs_grad)

    def cotangents(
        self, task: SolveTask, u: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> list[Tensor | None]:
        system = task.system
        assert isinstance(system, JointSystem)
        state, _, x = system.parts.split(z)
        of_state, of_mu, _ = system.parts.split(u)
        if bool((of_mu != 0).any()):
            raise UnsupportedDerivativeError(
                "FixedInput differentiates the state and not the adjoint mu, on which this outer loss depends: use "
                "Implicit()"
            )

        alone = self._alone(system, x)
        solver = task.linear.adjoint_solver(
            self.linear_solver or alone.default_linear_solver(state.shape[1], len(z)), z
        )
        tape = self.tape(task, z, params, needs_grad) if task.linear.tape is None else task.linear.tape
        solution = alone.solve_linear(tape, True, of_state.contiguous(), solver)
        report(task.linear.record, solution.report)
        return alone.vjp_params(tape, solution.value)

    def _alone(self, system: JointSystem, x: Tensor) -> FixedPointSystem:
        """The fixed-point problem of ``f`` at the fixed input ``x``."""

        def inference(state: Tensor, *params: Tensor) -> Tensor:
            return system.fn((state, x), *params)[0]

        return FixedPointSystem(fn=inference, coupling=system.coupling)
