"""The verb for linear systems."""

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
"""Up to so many unknowns and equations, a pseudo-inverse is found by singular values where no method is named."""


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
    """Solve :math:`A y = b`, every sample its own system, and attach the derivatives of every order and mode in ``b``
    and in all that the operator depends on.

    A square system is solved as such. One that is not square, or is called singular by ``least_squares=True``, has the
    least-squares solution of least norm, :math:`y=A^+b`, whose derivative holds where the rank does not change
    (Golub and Pereyra 1973).

    Args:
        operator: a matrix ``[m, n]``, or one per sample ``[batch, m, n]``; or a function ``operator(y, *args)``, linear
            in y, of which products alone are taken. A function may capture tensors, as a problem's may.
        b: the right-hand side: a tensor or a pytree of tensors, with the batch in dim 0.
        args: what the operator takes beside y: pytrees, whose tensors the solution can be differentiated in.
        like: a pytree of tensors with the structure of the solution, where that is not the structure of ``b``; their
            values are not used.
        least_squares: whether the solution is :math:`A^+b`; ``None``: where there are not as many equations as
            unknowns.
        symmetric: a promise that A equals its transpose (for complex systems, its conjugate transpose), as :class:`CG`
            and :class:`MINRES` need. It is tried on one vector.
        solver: a linear solver with its preconditioner. ``None``: for a system, :class:`Dense` where it is small,
            :class:`GMRES`, or :class:`MINRES` where it is symmetric, where it is not; for :math:`A^+b`, :class:`Dense`
            (by singular values) or :class:`LSMR`. Any other method takes :math:`A^+b` from the normal equations, whose
            condition number is the square; a preconditioner is one of these then.
        batched, rowwise: see :class:`FixedPoint`.
        throw: whether to raise :class:`SolveError` where the operator or ``b`` is not finite. ``False``: NaN in those
            samples, and a warning.

    Returns:
        the :class:`Solution`. Its ``residual`` is :math:`\\lVert b-Ay\\rVert/\\lVert b\\rVert`; of a least-squares
        solution with a residual, :math:`\\lVert A^T(b-Ay)\\rVert/\\lVert A^Tb\\rVert`. Its ``evaluations`` are
        products.

    Raises:
        SolveError: a sample went non-finite (it carries the solution).
        ValueError, TypeError: bad input, said in words; an operator that is not linear, or not symmetric as promised.

    Warns:
        ConvergenceWarning: a sample was not solved to the tolerance.
    """
    if solver is not None and not isinstance(solver, LinearSolver):
        raise TypeError(f"solver must be a linear solver, for example solver=GMRES(), and it is {solver!r}")
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
            f"b is {range_layout.dtype} on {range_layout.device}, and like {layout.dtype} on {layout.device}"
        )
    unequal = layout.dim != range_layout.dim
    if least_squares is False and unequal:
        raise ValueError(
            f"there are {range_layout.dim} equations for {layout.dim} unknowns, and least_squares=False asks for as "
            "many of the one as of the other"
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
    found, report = (_system if square else _pseudo)(flat, right, solver, record)
    register(found)
    figures = (found.status, found.steps, found.residual)
    status, steps, residual = figures if batched else (t[0] for t in figures)
    value = layout.unflatten(found[0])
    solution = Solution(value, status, steps, residual, report.evaluations, _record=record)
    _tell(solution, report, throw)
    return solution


def _of_matrix(matrix: Tensor, b: Any, args: tuple[Any, ...], batched: bool) -> tuple[Any, tuple[Any, ...], Any]:
    """The matrix as a function with its arguments, and a tensor like the solution."""
    if args:
        raise TypeError("operator is a matrix, and takes no arguments: give those of a function operator(y, *args)")
    if not isinstance(b, Tensor) or b.ndim != 1 + batched:
        shape = "[batch, m] ([m] with batched=False)" if batched else "[m]"
        raise ValueError(f"operator is a matrix, and b must be a tensor {shape} then; a function takes any pytree")
    lead = (b.shape[0],) if batched else ()
    if (
        matrix.shape[-2:-1] != b.shape[-1:]
        or matrix.ndim not in (2, 2 + batched)
        or matrix.shape[:-2] not in ((), lead)
    ):
        raise ValueError(
            f"operator has shape {tuple(matrix.shape)}, and b has {tuple(b.shape)}: give a matrix "
            f"({b.shape[-1]}, n)" + (f", or one per sample, ({b.shape[0]}, {b.shape[-1]}, n)" if batched else "")
        )
    if matrix.dtype != b.dtype or matrix.device != b.device:
        raise ValueError(
            f"operator is {matrix.dtype} on {matrix.device}, and b is {b.dtype} on {b.device}: convert one of them"
        )

    def product(y: Tensor, matrix: Tensor) -> Tensor:
        return (matrix @ y[..., None])[..., 0]

    return product, (matrix,), b.new_zeros(*lead, matrix.shape[-1])


def _system(
    flat: FlatProblem, right: Tensor, solver: LinearSolver | None, record: AdjointRecord
) -> tuple[FlatSolution, Report]:
    chosen = at_precision(solver or flat.system.default_linear_solver(right.shape[1], right.shape[0]), flat.precision)

    def run(system: System, start: Start, params: Sequence[Tensor]) -> SolverResult:
        tape = system.linearize(start.take(), params)
        b = -tape.out.detach()
        operator = system.operator(tape, False)
        if operator.symmetric:
            _check_symmetric(operator.product, operator.transposed_product, b)
        found = system.solve_linear(tape, False, b, chosen)
        with torch.no_grad():
            rest, scale = safe_norm(system.fn(found.value, *params)), safe_norm(b)
        report = found.report
        eps, rtol = torch.finfo(b.dtype).eps, report.residual.nan_to_num(0.0).clamp_min(chosen.tolerances(b.dtype)[0])
        if bool((report.converged & (rest > (100 * rtol + eps**0.5) * scale)).any()):
            raise ValueError(
                "the operator is not linear: it does not map the solution of its linear part to b. A root of a "
                "nonlinear function is a problem, ti.solve(ti.Root(f), z0)"
            )
        return SolverResult(found.value, report)

    task = SolveTask(
        linear=LinearTask(system=flat.system, record=record, precision=flat.precision),
        start=Start(flat.z0),
        run=run,
        solver=NewtonKrylov(linear_solver=chosen),  # of which this is one step
    )
    with without_autocast(flat.layout.device), flat.call.at_home():
        found = Implicit(linear_solver=chosen).attach(task, flat.params)
    return found, task.results[-1].report


def _pseudo(
    flat: FlatProblem, right: Tensor, solver: LinearSolver | None, record: AdjointRecord
) -> tuple[PseudoSolution, Report]:
    inner, outer, rows = flat.layout.dim, right.shape[1], len(right)
    small = max(inner, outer) <= SMALL and rows * max(inner, outer) ** 2 <= 2**22
    chosen = at_precision(solver or (Dense() if small else LSMR()), flat.precision)
    params = flat.params
    maps = Maps(fn=flat.closure, inner=inner, outer=outer, solver=chosen, record=record, coupling=flat.system.coupling)
    with torch.no_grad(), flat.call.at_home():
        at_zero = flat.value if flat.value is not None else flat.closure(flat.z0, *params)
    if not is_transformed(at_zero) and bool((at_zero != 0).any()):
        raise ValueError("the operator is not linear: it does not map zero to zero. Put what is constant into b")
    (b,) = through_modes((right,))
    with without_autocast(flat.layout.device), flat.call.at_home():
        if differentiable((b, *params)):
            found = PseudoSolution(*PseudoSolve.apply(maps, False, b, *params))
        else:
            found = maps.solve(False, b, params)
    return found, maps.reports[0]


def _check_symmetric(product: Callable[[Tensor], Tensor], transposed: Any, like: Tensor) -> None:
    probe = torch.sin(torch.arange(1, like.numel() + 1, device=like.device, dtype=torch.float64) ** 2)
    v = probe.reshape(like.shape).to(like.dtype)
    one, other = product(v), transposed(v)
    gap, size = safe_norm(one - other), safe_norm(one) + safe_norm(other)
    if bool((gap > torch.finfo(like.dtype).eps ** 0.5 * size).any()):
        raise ValueError(
            "symmetric=True is not true of this operator: its transpose gives another product with a vector"
        )


def _tell(solution: Solution, report: Report, throw: bool) -> None:
    ill = nearly_singular(report)
    failed, singular = torch.stack((report.status != Status.CONVERGED, ill)).any(dim=1).tolist()
    if singular:
        assert report.condition is not None
        notice(
            "linear_solve met a matrix that is nearly singular",
            f"the operator is nearly singular in {int(ill.sum())} of {ill.numel()} samples (condition at least "
            f"{float(report.condition[ill].max()):.1g}): the solution may be one of many, or wrong in all its digits, "
            "and so may the derivative. least_squares=True gives the solution of least norm and its derivative",
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
            "or another method (Dense() where the matrix fits into memory); of a singular system least_squares=True "
            "gives the solution of least norm"
        )
    notice("linear_solve met NaN or infinity" if bad else "linear_solve did not converge", message, ConvergenceWarning)
