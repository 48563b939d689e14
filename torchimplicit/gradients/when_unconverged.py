"""The gradient of samples that were not solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from torchimplicit._torch import Node
from torchimplicit.captured import Passes
from torchimplicit.closure import carries_derivative, is_transformed
from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.gradients.base import FlatSolution, Gradient, SolveTask
from torchimplicit.gradients.implicit import Implicit
from torchimplicit.gradients.one_step import OneStep
from torchimplicit.gradients.start import Start
from torchimplicit.gradients.transforms import nested_forward_mode
from torchimplicit.gradients.unrolled import Unrolled
from torchimplicit.problems import System
from torchimplicit.solution import AdjointRecord, fell_short
from torchimplicit.solvers import Solver
from torchimplicit.validation import check_positive, check_type


@final
@dataclass(frozen=True, kw_only=True)
class WhenUnconverged(Gradient):
    """``gradient`` for the samples that were solved; for the others a multiple of it, zero, or another estimate.

    At a point that is not a solution, the exact adjoint may be many times larger than the derivative that is sought.
    The cotangent of each sample that was not solved is multiplied by a number (``instead=0.0`` drops it,
    ``instead=0.1`` damps it), or goes to another estimator (``instead=OneStep()``). The value does not change, except
    that :class:`~torchimplicit.gradients.UnrolledPhantom` takes its steps in the value, too. This costs nothing if
    every sample was solved; otherwise another estimator takes one evaluation. ``solution.adjoint`` has the figures of
    ``gradient``, which sees a cotangent of zero for the other samples. Available orders and modes of differentiation
    are those that both estimators have.

    Args:
        gradient: for the samples that were solved; by default :class:`~torchimplicit.gradients.Implicit`.
        instead: for the others: a factor in [0, 1], or an estimator.
        above: the relative residual above which a sample counts as not solved; ``None``: by its status.

    Raises:
        TypeError: ``gradient`` or ``instead`` is of another type.
        ValueError: a number is out of range, or ``instead`` is :class:`Unrolled`.
    """

    gradient: Gradient = field(default_factory=Implicit)
    instead: float | Gradient = 0.0
    above: float | None = None

    def __post_init__(self) -> None:
        check_type(self, "gradient", Gradient)
        if isinstance(self.instead, Unrolled):
            raise ValueError(
                "WhenUnconverged.instead is Unrolled(), whose steps were not recorded: take UnrolledPhantom(), whose "
                "steps begin where the solver has ended"
            )
        if not isinstance(self.instead, Gradient):
            if isinstance(self.instead, bool) or not isinstance(self.instead, (int, float)):
                raise TypeError(
                    f"WhenUnconverged.instead must be a number in [0, 1] or an estimator, not {self.instead!r}"
                )
            if not 0 <= self.instead <= 1:
                raise ValueError(f"WhenUnconverged.instead is {self.instead}, and must lie in [0, 1]")
        if self.above is not None:
            check_positive(self, "above")

    @property
    def needs_solver_state(self) -> bool:  # type: ignore[override]
        return any(member.needs_solver_state for member in self.members)

    @property
    def goes_on(self) -> bool:  # type: ignore[override]
        return self.gradient.goes_on

    @property
    def members(self) -> tuple[Gradient, ...]:
        """The estimators that this one is made of."""
        return (self.gradient, self.instead) if isinstance(self.instead, Gradient) else (self.gradient,)

    def supports(self, system: System, solver: Solver) -> None:
        if solver.steps is not None and self.above is None:
            raise ValueError(
                f"WhenUnconverged cannot tell which samples are solved after steps={solver.steps}, which tests "
                "nothing: give above=..., the relative residual above which a sample counts as not solved"
            )
        for member in self.members:
            member.supports(system, solver)

    def recorded(self, solver: Solver) -> int | None:
        return None if isinstance(self.instead, Gradient) else self.gradient.recorded(solver)

    def passes(self, solver: Solver) -> Passes:
        return self.gradient.passes(solver)

    def attach(self, task: SolveTask, params: Sequence[Tensor]) -> FlatSolution:
        solution = self.gradient.attach(task, params)
        if not carries_derivative(solution.z):
            return solution
        chosen = fell_short(solution.status) if self.above is None else ~(solution.residual <= self.above)
        if not is_transformed(chosen) and not bool(chosen.any()):
            return solution
        column = chosen[:, None]
        if not isinstance(self.instead, Gradient):
            weight = torch.where(column, self.instead, 1.0).to(solution.z.dtype)
            return solution._replace(z=Weighted.apply(solution.z, weight))
        if is_transformed(solution.z) and isinstance(self.gradient, OneStep) and self.gradient.recorded(task.solver):
            raise UnsupportedDerivativeError(
                "under a torch.func transform, OneStep() after a prescribed number of steps does not know where the "
                "last step ends, and WhenUnconverged.instead would begin there: take Implicit(), or instead=0.0"
            )
        if task.aux is not None:  # the auxiliary value is that of ``gradient``
            task.aux.listening = False
        reached = task.results[-1]
        at = replace(
            task,
            start=Start(solution.z.detach()),
            run=lambda *_: reached,
            solver=replace(task.solver, steps=None),
            linear=replace(task.linear, results=[], record=AdjointRecord(), capture=None),
            randomness=None,
            direct=False,
            aux=None,
        )
        other = self.instead.attach(at, params)
        task.spent(int(at.results[-1].report.evaluations - reached.report.evaluations))
        return solution._replace(z=torch.where(column, other.z, solution.z))


class Weighted(Node):
    """A state ``[batch, dim]`` whose derivative is multiplied by ``weight`` (``[batch, 1]``)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, weight: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        return _times(u, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, dz: Tensor, _: Any) -> Tensor:
        with nested_forward_mode():
            return _times(dz, *ctx.saved_tensors)


def _times(v: Tensor, weight: Tensor) -> Tensor:
    # a weight of zero drops the sample even where its derivative is not finite
    return torch.where(weight > 0, v * weight, 0)
