"""``linear_solve``: differentiable solutions of linear systems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.closure import is_transformed, register, through_modes, transforms_running
from torchimplicit.compiler import untraced
from torchimplicit.errors import ConvergenceWarning, SolveError
from torchimplicit.flat_problem import FlatProblem, flatten_problem
from torchimplicit.gradients import Implicit
from torchimplicit.gradients.base import FlatSolution, SolveTask, differentiable
from torchimplicit.gradients.figures import nearly_singular
from torchimplicit.gradients.linear_task import LinearTask
from torchimplicit.gradients.pseudo_inverse import Maps, PseudoSolution, PseudoSolve
from torchimplicit.gradients.start import Start
from torchimplicit.inference import outside_inference_mode
from torchimplicit.linear import LSMR, Dense, LinearSolver
from torchimplicit.notices import notice
from torchimplicit.precision import at_precision, safe_norm, without_autocast
from torchimplicit.problems import System
from torchimplicit.problems.linear_equations import LinearEquations
from torchimplicit.solution import AdjointRecord, Report, Solution, Status
from torchimplicit.solvers import NewtonKrylov, SolverResult
from torchimplicit.state import Layout

SMALL = 256
"""A pseudo-inverse is computed by singular values up to this many unknowns and equations, where no solver is named."""


@untraced("a linear solve by an iterative method takes as many steps as its input needs")
@outside_inference_mode
def linear_solve(
    operator: Tensor | Callable[..., Any],
    b: Any,
    *args: Any,
    like: Any = None,
    least_squares: bool | None = None,
    symmetric: bool = False,
    solver: LinearSolver | None = None,
    batched: bool = True,
    rowwise: bool = False,
    throw: bool = True,
) -> Solution:
    """Solve :math:`A y = b` for each sample, with derivatives of every order and mode with respect to ``b`` and to all
    tensors that the operator depends on.

    A square system is solved as such. For one that is not square, or with ``least_squares=True`` for one that may be
    singular, the result is the minimum-norm least-squares solution :math:`y=A^+b`, whose derivative is valid where the
    rank is constant (Golub and Pereyra 1973).

    Args:
        operator: a matrix ``[m, n]``, or one per sample ``[batch, m, n]``; or a function ``operator(y, *args)`` that is
            linear in y, of which only products are taken. The function may capture tensors.
        b: the right-hand side: a tensor or a pytree of tensors, with the batch in dim 0.
        args: further arguments of the operator: pytrees of tensors, in which the solution is differentiable.
        like: a pytree of tensors with the structure of the solution, where that is not the structure of ``b``; only
            their shapes are used.
        least_squares: whether to return :math:`A^+b`; ``None``: if the numbers of equations and unknowns differ.
        symmetric: a promise that A equals its transpose (its conjugate transpose, if complex), as :class:`CG` and
            :class:`MINRES` need. It is tested on one vector.
        solver: a linear solver with its preconditioner. ``None``: for a square system, :class:`Dense` if it is small,
            else :class:`GMRES`, or :class:`MINRES` if it is symmetric; for :math:`A^+b`, :class:`Dense` (by singular
            values) or :class:`LSMR`. Other methods compute :math:`A^+b` from the normal equations, which square the
            condition number; a preconditioner then is one for these.
        batched, rowwise: see :class:`FixedPoint`.
        throw: whether to raise :class:`SolveError` where the operator or ``b`` is not finite. ``False``: those samples
            are NaN, and a warning is given.

    Returns:
        The :class:`Solution`. Its ``residual`` is :math:`\\lVert b-Ay\\rVert/\\lVert b\\rVert`; for a least-squares
        solution with a residual, :math:`\\lVert A^T(b-Ay)\\rVert/\\lVert A^Tb\\rVert`. Its ``evaluations`` count
        products.

    Raises:
        SolveError: the operator or ``b`` is not finite in a sample (the error carries the solution).
        ValueError: the operator is not linear, or not symmetric as promised, or an input does not fit.
        TypeError: an input is of the wrong type.

    Warns:
        ConvergenceWarning: a sample was not solved to the tolerance, or its matrix is nearly singular.
    """
    if solver is not None and not isinstance(solver, LinearSolver):
        raise TypeError(f"solver must be a linear solver, for example solver=GMRES(), not {solver!r}")
    if isinstance(operator, Tensor):
        function, args, unknown = _of_matrix(operator, b, args, batched)
        like = unknown if like is None else like
    elif callable(operator):
        function = operator
    else:
        raise TypeError(f"operator must be a matrix or a function operator(y, *args), not {type(operator).__name__}")
    range_layout = Layout.of(b, batched)
    right = range_layout.flatten(b, "b")
    start = pytree.tree_map(lambda t: torch.zeros_like(t, requires_grad=False), b if like is None else like)
    layout = Layout.of(start, batched)
    if len(layout.flatten(start, "like")) != len(right):
        raise ValueError("like and b have different batch sizes: there is one solution for each right-hand side")
    if (layout.dtype, layout.device) != (range_layout.dtype, range_layout.device):
        raise ValueError(
            f"b is {range_layout.dtype} on {range_layout.device}, but like is {layout.dtype} on {layout.device}: "
            "convert one of them"
        )
    unequal = layout.dim != range_layout.dim
    if least_squares is False and unequal:
        raise ValueError(
            f"there are {range_layout.dim} equations for {layout.dim} unknowns, but least_squares=False needs as many "
            "equations as unknowns: leave it out for the least-squares solution"
        )
    square = not (unequal or least_squares)
    problem = LinearEquations(
        operator=function,
        range=range_layout,
        b=right,
        square=square,
        symmetric=symmetric and square,
        batched=batched,
        rowwise=rowwise,
    )
    capture = torch.is_grad_enabled() or transforms_running()
    flat = flatten_problem(problem, start, args, capture=capture, rowwise=square)
    record = AdjointRecord()
    flat_solution, report = (_system if square else _pseudo)(flat, right, solver, record)
    register(flat_solution)
    figures = (flat_solution.status, flat_solution.steps, flat_solution.residual)
    status, steps, residual = figures if batched else (t[0] for t in figures)
    value = layout.unflatten(flat_solution[0])
    solution = Solution(value, status, steps, residual, report.evaluations, _record=record)
    _warn(solution, report, throw)
    return solution


def _of_matrix(matrix: Tensor, b: Any, args: tuple[Any, ...], batched: bool) -> tuple[Any, tuple[Any, ...], Any]:
    """A matrix as a function with its arguments, and a tensor shaped like the solution."""
    if args:
        raise TypeError("operator is a matrix, which takes no further arguments: only operator(y, *args) does")
    if not isinstance(b, Tensor) or b.ndim != 1 + batched:
        shape = "[batch, m] ([m] with batched=False)" if batched else "[m]"
        raise ValueError(f"for a matrix operator, b must be a tensor {shape}; only a function takes other pytrees")
    lead = (b.shape[0],) if batched else ()
    if (
        matrix.shape[-2:-1] != b.shape[-1:]
        or matrix.ndim not in (2, 2 + batched)
        or matrix.shape[:-2] not in ((), lead)
    ):
        raise ValueError(
            f"operator has shape {tuple(matrix.shape)}, but b has {tuple(b.shape)}: give a matrix "
            f"({b.shape[-1]}, n)" + (f", or one per sample, ({b.shape[0]}, {b.shape[-1]}, n)" if batched else "")
        )
    if matrix.dtype != b.dtype or matrix.device != b.device:
        raise ValueError(
            f"operator is {matrix.dtype} on {matrix.device}, but b is {b.dtype} on {b.device}: convert one of them"
        )

    def product(y: Tensor, matrix: Tensor) -> Tensor:
        return (matrix @ y[..., None])[..., 0]

    return product, (matrix,), b.new_zeros(*lead, matrix.shape[-1])


def _system(
    flat: FlatProblem, right: Tensor, solver: LinearSolver | None, record: AdjointRecord
) -> tuple[FlatSolution, Report]:
    """Solve a square system."""
    chosen = at_precision(solver or flat.system.default_linear_solver(right.shape[1], right.shape[0]), flat.precision)

    def run(system: System, start: Start, params: Sequence[Tensor]) -> SolverResult:
        # the start is zero, where the residual A y - b is -b: one Newton step from there solves the system
        tape = system.linearize(start.take(), params)
        b = -tape.out.detach()
        operator = system.operator(tape, False)
        if operator.symmetric:
            _check_symmetric(operator.product, operator.transposed_product, b)
        solution = system.solve_linear(tape, False, b, chosen)
        with torch.no_grad():
            rest, scale = safe_norm(system.fn(solution.value, *params)), safe_norm(b)
        report = solution.report
        # The residual of the function itself, beside that of its derivative: a nonlinear one differs.
        eps, rtol = torch.finfo(b.dtype).eps, report.residual.nan_to_num(0.0).clamp_min(chosen.tolerances(b.dtype)[0])
        if bool((report.converged & (rest > (100 * rtol + eps**0.5) * scale)).any()):
            raise ValueError(
                "the operator is not linear: it does not map the solution of its linear part to b. For a root of a "
                "nonlinear function, take ti.solve(ti.Root(f), z0)"
            )
        return SolverResult(solution.value, report)

    task = SolveTask(
        linear=LinearTask(system=flat.system, record=record, precision=flat.precision),
        start=Start(flat.z0),
        run=run,
        solver=NewtonKrylov(linear_solver=chosen),  # of which this is one step
    )
    with without_autocast(flat.layout.device), flat.call.at_home():
        solution = Implicit(linear_solver=chosen).attach(task, flat.params)
    return solution, task.results[-1].report


def _pseudo(
    flat: FlatProblem, right: Tensor, solver: LinearSolver | None, record: AdjointRecord
) -> tuple[PseudoSolution, Report]:
    """Compute :math:`A^+b`."""
    inner, outer, rows = flat.layout.dim, right.shape[1], len(right)
    small = max(inner, outer) <= SMALL and rows * max(inner, outer) ** 2 <= 2**22
    chosen = at_precision(solver or (Dense() if small else LSMR()), flat.precision)
    params = flat.params
    maps = Maps(fn=flat.closure, inner=inner, outer=outer, solver=chosen, record=record, coupling=flat.system.coupling)
    with torch.no_grad(), flat.call.at_home():
        at_zero = flat.value if flat.value is not None else flat.closure(flat.z0, *params)
    if not is_transformed(at_zero) and bool((at_zero != 0).any()):
        raise ValueError("the operator is not linear: it does not map zero to zero. Move constant terms into b")
    (b,) = through_modes((right,))
    with without_autocast(flat.layout.device), flat.call.at_home():
        if differentiable((b, *params)):
            solution = PseudoSolution(*PseudoSolve.apply(maps, False, b, *params))
        else:
            solution = maps.solve(False, b, params)
    return solution, maps.reports[0]


def _check_symmetric(product: Callable[[Tensor], Tensor], transposed: Any, like: Tensor) -> None:
    """Raise where products with the operator and its transpose differ on one fixed vector."""
    probe = torch.sin(torch.arange(1, like.numel() + 1, device=like.device, dtype=torch.float64) ** 2)
    v = probe.reshape(like.shape).to(like.dtype)
    one, other = product(v), transposed(v)
    gap, size = safe_norm(one - other), safe_norm(one) + safe_norm(other)
    if bool((gap > torch.finfo(like.dtype).eps ** 0.5 * size).any()):
        raise ValueError(
            "the operator is not symmetric although symmetric=True says so: products with it and with its transpose "
            "differ. Leave symmetric out"
        )


def _warn(solution: Solution, report: Report, throw: bool) -> None:
    """Raise or warn where samples are not solved, or nearly singular."""
    ill = nearly_singular(report)
    failed, singular = torch.stack((report.status != Status.CONVERGED, ill)).any(dim=1).tolist()
    if singular:
        assert report.condition is not None
        notice(
            "linear_solve met a matrix that is nearly singular",
            f"the operator is nearly singular in {int(ill.sum())} of {ill.numel()} samples (condition at least "
            f"{float(report.condition[ill].max()):.1g}): the solution may be one of many, or wrong in all its digits, "
            "and so may the derivative. least_squares=True gives the minimum-norm solution and its derivative",
            ConvergenceWarning,
        )
    if not failed:
        return
    bad = int((report.status == Status.NONFINITE).sum())
    if bad:
        message = (
            f"the operator or the right-hand side holds NaN or infinity in {bad} of {report.status.numel()} samples"
        )
        if throw:
            raise SolveError(message + ". error.solution holds every sample's result; throw=False returns it", solution)
    else:
        message = (
            f"the linear solve did not converge: {report.summary()}. Give solver=... more max_steps, a preconditioner, "
            "or another method (Dense() where the matrix fits into memory); for a singular system least_squares=True "
            "gives the minimum-norm solution"
        )
    notice("linear_solve met NaN or infinity" if bad else "linear_solve did not converge", message, ConvergenceWarning)
