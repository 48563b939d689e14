"""Comparison of a gradient estimate with the exact gradient, at one equilibrium and for one cotangent."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit._solve import flat_system, solve
from torchimplicit.errors import ConvergenceWarning
from torchimplicit.flat_problem import tensors_of
from torchimplicit.gradients import Gradient, Implicit, Unrolled
from torchimplicit.linear import GMRES
from torchimplicit.problems import FixedPoint, Minimum, Problem, Root
from torchimplicit.solution import Report
from torchimplicit.solvers import LBFGS, FixedPointIteration, Solver
from torchimplicit.state import Layout, row_norm


@dataclass(frozen=True)
class GradientProbe:
    """The gradients and the adjoint vector of an estimator at an equilibrium.

    Attributes:
        gradients: the gradients in the tensors ``wrt``, each like its tensor.
        adjoint: the estimate of :math:`g=(I-J)^{-T}u`, like the state.
        adjoint_norms: ``[2, batch]``, numerator and denominator of :attr:`adjoint_residual`.
        report: the estimator's report of its backward pass.
    """

    gradients: tuple[Tensor, ...]
    adjoint: Any
    adjoint_norms: Tensor
    report: Report

    @property
    def adjoint_residual(self) -> Tensor:
        """:math:`\\lVert u-(I-J)^{T}g\\rVert/\\lVert u\\rVert`, ``[batch]``; zero where u is zero."""
        left, size = self.adjoint_norms
        return left / torch.where(size > 0, size, 1)

    @property
    def total_residual(self) -> float:
        """The adjoint residual over all samples together."""
        left, size = self.adjoint_norms.double().square().sum(dim=1).sqrt().tolist()
        return left / size if size else 0.0


@dataclass(frozen=True)
class GradientComparison:
    """The difference between an estimate and the exact gradient, over all tensors together.

    Attributes:
        cosine: the cosine of the angle between the two; NaN if one of them is zero.
        norm_ratio: the norm of the estimate over that of the exact gradient.
        relative_error: :math:`\\lVert\\hat\\theta-\\bar\\theta\\rVert/\\lVert\\bar\\theta\\rVert`. Below 1 the estimate
            is an ascent direction, with a cosine of at least :math:`\\sqrt{1-\\epsilon^2}`: the condition of Theorem 1
            of Geng et al. (2021) for this cotangent (:func:`ascent_condition` is for all).
        adjoint_residual, exact_residual: the residuals of the adjoint vectors of the estimate and of the exact
            gradient, over all samples, see :attr:`GradientProbe.total_residual`. The latter is the accuracy of the
            comparison.
    """

    cosine: float
    norm_ratio: float
    relative_error: float
    adjoint_residual: float
    exact_residual: float

    @property
    def ascent(self) -> bool:
        """True if the estimate has a positive inner product with the exact gradient (eq. 7 of the paper)."""
        return self.cosine > 0


def compare_gradients(
    problem: Problem,
    z: Any,
    *args: Any,
    gradient: Gradient,
    cotangent: Any,
    exact: Gradient | None = None,
    wrt: Sequence[Tensor] | None = None,
) -> GradientComparison:
    """Compare an estimator's gradient with the exact one at the equilibrium ``z``.

    Costs one backward pass of each estimator, two products for the residuals, and no solve. No ``.grad`` is changed.

    Args:
        problem: the problem that was solved.
        z: its solution.
        args: as for :func:`solve`.
        gradient: the estimator; not :class:`Unrolled`, :class:`Reversible` or :class:`SharedInverse`, which need the
            steps of the solver.
        cotangent: u, like ``z``; or a function of the solution that returns a scalar loss.
        exact: the estimator to compare with; ``None``: :class:`Implicit` with a tight GMRES.
        wrt: the tensors in which to differentiate, among the arguments and the captured tensors of the problem's
            function; ``None``: all that require grad.

    Raises:
        ValueError: an estimator that cannot be used here, or no tensor to differentiate in.
        TypeError: the problem is not a :class:`FixedPoint`, :class:`Root` or :class:`Minimum`.
    """
    problem = problem.own_coordinates()
    if wrt is None:
        wrt = tensors_of(problem, z, args)
    exact = exact or tight(pytree.tree_leaves(z)[0].dtype)
    estimate, truth = (
        probe_gradient(problem, z, *args, gradient=each, cotangent=cotangent, wrt=wrt) for each in (gradient, exact)
    )
    return compared(estimate, truth)


def tight(dtype: torch.dtype) -> Implicit:
    """The exact gradient to nearly the precision of the dtype (5e-14 in float64)."""
    return Implicit(linear_solver=GMRES(rtol=float(torch.finfo(dtype).eps ** 0.85), max_steps=300))


def compared(estimate: GradientProbe, exact: GradientProbe) -> GradientComparison:
    """The comparison of two probes with gradients in the same tensors."""
    pairs = list(zip(estimate.gradients, exact.gradients, strict=True))
    norm = _sum(a.double().square().sum() for a, _ in pairs) ** 0.5
    exact_norm = _sum(b.double().square().sum() for _, b in pairs) ** 0.5
    inner = _sum((a.double() * b.double()).sum() for a, b in pairs)
    error = _sum((a.double() - b.double()).square().sum() for a, b in pairs) ** 0.5
    nan = float("nan")
    return GradientComparison(
        cosine=inner / (norm * exact_norm) if norm * exact_norm else nan,
        norm_ratio=norm / exact_norm if exact_norm else nan,
        relative_error=error / exact_norm if exact_norm else nan,
        adjoint_residual=estimate.total_residual,
        exact_residual=exact.total_residual,
    )


def probe_gradient(
    problem: Problem,
    z: Any,
    *args: Any,
    gradient: Gradient,
    cotangent: Any,
    wrt: Sequence[Tensor] | None = None,
) -> GradientProbe:
    """The gradients of an estimator at the equilibrium ``z``, and the adjoint vector that it used.

    The adjoint vector g of any estimator is its gradient in a constant added to the map: for :math:`f(z)+s`, the
    gradient in s is :math:`f_s^Tg=g`. Takes the arguments of :func:`compare_gradients` and raises the same errors.
    """
    problem = problem.own_coordinates()
    if wrt is None:
        wrt = tensors_of(problem, z, args)
    z = pytree.tree_map(lambda t: t.detach(), z)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the residual is in the result
        attached = Attached(problem, z, args, gradient)
        u = _cotangent(cotangent, attached.value)
        shifts, gradients = attached.pull(u, wrt)
    assert attached.solution.adjoint is not None
    return GradientProbe(gradients, shifts, _residual_norms(problem, z, args, u, shifts), attached.solution.adjoint)


class Attached:
    """A state with the derivative that an estimator gives it as a solution.

    Attributes:
        value: the state, differentiable.
        solution: the solution with this value.
    """

    def __init__(self, problem: Problem, z: Any, args: tuple[Any, ...], gradient: Gradient):
        if gradient.needs_solver_state or isinstance(gradient, Unrolled):
            raise ValueError(
                f"{type(gradient).__name__} needs the steps of the solver, but only its result is known here: compare "
                "the gradients of two solves instead"
            )
        self.shift = pytree.tree_map(lambda t: torch.zeros_like(t, requires_grad=True), z)
        shifted, self.sign = _shifted(problem)
        solver = _standing(problem, pytree.tree_leaves(z)[0].dtype)
        self.solution = solve(shifted, z, self.shift, *args, solver=solver, gradient=gradient, throw=False)
        self.value = self.solution.value

    def pull(self, u: Any, wrt: Sequence[Tensor]) -> tuple[Any, tuple[Tensor, ...]]:
        """The adjoint vector, like the state, and the gradients in ``wrt``, for the cotangent u."""
        shifts, spec = pytree.tree_flatten(self.shift)
        outputs = pytree.tree_leaves(self.value)
        inputs = [*shifts, *wrt]
        computed = torch.autograd.grad(outputs, inputs, pytree.tree_leaves(u), retain_graph=True, allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for g, t in zip(computed, inputs, strict=True)]
        adjoint = pytree.tree_unflatten([self.sign * g for g in grads[: len(shifts)]], spec)
        return adjoint, tuple(grads[len(shifts) :])


def _shifted(problem: Problem) -> tuple[Problem, int]:
    """The problem with an added constant s as its first argument, and the sign of the adjoint vector in the gradient
    in s."""
    function = problem.function

    def moved(z: Any, s: Any, *args: Any) -> Any:
        return pytree.tree_map(torch.add, function(z, *args), s)

    if isinstance(problem, FixedPoint):
        return replace(problem, f=moved, has_aux=False, unpack=False), 1
    if isinstance(problem, Root):
        return replace(problem, f=moved, has_aux=False, unpack=False), -1
    if isinstance(problem, Minimum):

        def tilted(z: Any, s: Any, *args: Any) -> Tensor:
            energy: Tensor = function(z, *args)
            pairs = zip(pytree.tree_leaves(z), pytree.tree_leaves(s), strict=True)
            # minus <z, s> adds -s to the gradient of the energy
            tilt = [(a * b).flatten(1).sum(dim=1) if problem.batched else (a * b).sum() for a, b in pairs]
            return energy - torch.stack(tilt).sum(dim=0)

        return replace(problem, energy=tilted), 1
    raise TypeError(f"gradients can be compared for FixedPoint, Root and Minimum, not for {type(problem).__name__}")


def _standing(problem: Problem, dtype: torch.dtype) -> Solver:
    """A solver that stops at its start, since every state meets its tolerance."""
    # finite, since an infinite tolerance is refused, and far enough from overflow
    anywhere = min(1e30, torch.finfo(dtype).max / 4)
    if isinstance(problem, Minimum):
        return LBFGS(rtol=0.0, atol=anywhere)
    return FixedPointIteration(rtol=0.0, atol=anywhere)


def _cotangent(cotangent: Any, value: Any) -> Any:
    if not callable(cotangent):
        return pytree.tree_map(lambda t: t.detach(), cotangent)
    leaves, spec = pytree.tree_flatten(value)
    free = [leaf.detach().requires_grad_() for leaf in leaves]
    grads = torch.autograd.grad(cotangent(pytree.tree_unflatten(free, spec)), free, allow_unused=True)
    return pytree.tree_unflatten(
        [torch.zeros_like(t) if g is None else g for g, t in zip(grads, free, strict=True)], spec
    )


def _residual_norms(problem: Problem, z: Any, args: tuple[Any, ...], u: Any, g: Any) -> Tensor:
    with torch.no_grad():
        layout = Layout.of(z, problem.batched)
        system, flat, params = flat_system(problem, z, args)
        operator = system.operator(system.linearize(flat, params), True)
        right = operator.project(layout.flatten(u, "the cotangent"))
        return torch.stack([row_norm(right - operator.product(layout.flatten(g, "the adjoint"))), row_norm(right)])


def _sum(parts: Iterable[Tensor]) -> float:
    return float(sum(float(part) for part in parts))
