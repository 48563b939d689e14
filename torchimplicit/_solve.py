"""``solve``: solve a problem, and give the solution its derivative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.captured import Capture, Capturing
from torchimplicit.closure import beside_transforms, is_transformed, register, transforms_running, watched
from torchimplicit.compiler import untraced
from torchimplicit.defaults import default_solver
from torchimplicit.errors import ConvergenceWarning, SolveError
from torchimplicit.flat_problem import FlatProblem, flatten_problem
from torchimplicit.gradients import Gradient, Implicit
from torchimplicit.gradients.agreement import Agreement
from torchimplicit.gradients.auxiliary import auxiliary
from torchimplicit.gradients.base import Runner, SolveTask, differentiable, run_by
from torchimplicit.gradients.empty import solved_without_numbers
from torchimplicit.gradients.figures import reported
from torchimplicit.gradients.linear_task import LinearTask
from torchimplicit.gradients.randomness import Randomness
from torchimplicit.gradients.start import Start
from torchimplicit.inference import outside_inference_mode
from torchimplicit.notices import count_solve, notice
from torchimplicit.precision import at_precision, without_autocast
from torchimplicit.problems import FixedPoint, LeastSquares, Minimum, Problem, System
from torchimplicit.saved import hooked
from torchimplicit.solution import AdjointRecord, Report, Solution, Status, turned
from torchimplicit.solvers import (
    LBFGS,
    Anderson,
    Broyden,
    GradientDescent,
    LevenbergMarquardt,
    NewtonKrylov,
    Polyalgorithm,
    ProjectedNewton,
    Solver,
    SolverResult,
    in_turn,
    iterate,
)
from torchimplicit.state import row_norm

EXACT = Implicit()
"""The default estimator."""

UNTRACED = (
    "an implicit layer's solver takes as many steps as its input needs, so there is no fixed graph to export: export "
    "the map (the cell) and the layers around it, or unroll a fixed number of steps"
)


@untraced(UNTRACED)
def solve(
    problem: Problem,
    z0: Any,
    *args: Any,
    solver: Solver | None = None,
    gradient: Gradient | None = None,
    throw: bool = True,
    compile: bool = False,
) -> Solution:
    """Solve ``problem`` from ``z0``, and attach the derivative that ``gradient`` computes.

    Args:
        problem: the problem whose solution is sought.
        z0: the initial state: a tensor or a pytree of tensors, of one floating dtype and device. For
            :class:`JointInference` the pair ``(z0, x0)``, or a :class:`JointState`.
        args: further arguments of the problem's function: pytrees of tensors, in which the solution is differentiable.
            It is also differentiable in tensors and module parameters that the function captures and uses when it is
            called at ``z0``. A tensor that it uses only elsewhere has to be passed as an argument.
        solver: how to find the point; ``None``: several solvers in turn (:class:`Polyalgorithm`), each for the samples
            that the ones before it have not solved, beginning with :class:`Anderson` for a fixed point,
            :class:`NewtonKrylov` for a root, :class:`LBFGS` for a minimum, and :class:`LevenbergMarquardt` for least
            squares.
        gradient: how to differentiate it; ``None``: :class:`Implicit`.
        throw: whether to raise :class:`SolveError` where a sample goes non-finite. ``False``: its last good iterate
            is returned and a warning given.
        compile: whether to compile the solve and its backward pass as a whole. Where that is not possible, the eager
            loop runs, with a :class:`CaptureWarning`.

    Returns:
        The :class:`Solution`; its ``value`` has the structure of ``z0`` (for :class:`JointInference`, a
        :class:`JointState`).

    Raises:
        SolveError: a sample went non-finite (the error carries the solution).
        ValueError: an input does not fit the problem, the solver or the gradient; the message says what to do.
        TypeError: an input is of the wrong type.

    Warns:
        ConvergenceWarning: a sample stopped at ``max_steps`` or broke down.
        CaptureWarning: ``compile=True``, but the solve cannot be compiled; once for each reason and line.
    """
    return solve_from([z0], problem, args, solver=solver, gradient=gradient, throw=throw, compile=compile)


@outside_inference_mode
def solve_from(
    start: list[Any],
    problem: Problem,
    args: tuple[Any, ...],
    *,
    solver: Solver | None,
    gradient: Gradient | None,
    throw: bool,
    compile: bool,
) -> Solution:
    """:func:`solve` from the one state in the list ``start``, which is emptied: if nobody else refers to the state, its
    memory is freed as soon as the solver has left it."""
    if torch.compiler.is_exporting():
        raise RuntimeError(UNTRACED)
    solver, gradient = _strategies(problem, solver, gradient)
    # Captured tensors are found by one call of the function, which serves as the solver's first evaluation where
    # possible. It is not needed where plain autograd records the steps itself (``direct``).
    plain = not transforms_running()
    recorded = gradient.recorded(solver)
    direct = recorded is not None and torch.is_grad_enabled() and plain and not watched()
    capture = (torch.is_grad_enabled() or not plain) and not direct
    capturing = Capturing(problem, args, gradient.passes(solver.leading)) if compile else None
    known = None if capturing is None else capturing.tensors
    # an auxiliary value is one of the whole batch, so no sample may leave the batch before the last call
    apart = not gradient.needs_solver_state and (torch.is_grad_enabled() or not problem.has_aux)
    # with zero steps, that call is the evaluation for the backward pass as well
    opening = solver.steps == 0 and isinstance(problem, FixedPoint) and plain and not watched() and not hooked()
    flat = flatten_problem(problem, start.pop(), args, capture=capture, rowwise=apart, known=known, opening=opening)
    compiled = None if capturing is None else capturing.capture
    direct = direct and compiled is None
    layout, system, params, call = flat.layout, flat.system, flat.params, flat.call
    solver = at_precision(solver, flat.precision)
    solver.supports(system)
    gradient.supports(system, solver)

    if problem.announces_start:
        _warn_of_moved_start(problem, system, flat.z0, params)

    record = AdjointRecord()
    task = SolveTask(
        linear=LinearTask(system=system, record=record, precision=flat.precision, capture=compiled),
        start=_start(flat, evaluated=not problem.by_gradient and compiled is None),
        run=_runner(solver, system, compiled, recorded, gradient.needs_solver_state),
        solver=solver,
        # a function that draws random numbers is not compiled, and prescribed steps behave as a loop written by hand
        randomness=Randomness(problem.stated_by, lambda z, p: system.fn(z, *p))
        if solver.steps is None and compiled is None
        else None,
        agreement=Agreement(problem.stated_by) if flat.closure.cuts else None,
        function=problem.stated_by,
        direct=direct,
        aux=call.aux,
    )
    del flat  # it refers to the start

    def unflattened(z: Tensor, record: AdjointRecord) -> Any:
        """The flat state ``z`` with the structure of ``z0``: the very leaves that the function returned, if
        possible."""
        leaves = call.returned(z)
        if leaves is None:
            return layout.unflatten(z)
        if record.coming is not None:
            for leaf in pytree.tree_leaves(leaves):
                reported(leaf, record, record.coming)
        return leaves

    with (
        without_autocast(layout.device),
        call.at_home(),
        beside_transforms((task.start.z, *params)),
        call.following(direct),
    ):
        empty = not (task.start.z.numel() or direct)
        flat_solution = solved_without_numbers(task, params) if empty else gradient.attach(task, params)
        register(flat_solution)
        aux = None
        if task.aux is not None:
            aux = auxiliary(task, gradient, flat_solution.z, params)
            register(pytree.tree_leaves(aux))
        value = unflattened(flat_solution.z, record)
    outcome = task.results[-1]
    transformed = is_transformed(flat_solution.z)
    flat_iterates = () if transformed else outcome.trajectory
    iterates = [None if z is None else layout.unflatten(z) for z in flat_iterates]
    was_recorded = [z is not None and z.requires_grad for z in flat_iterates]
    if layout.parted:  # the unflattened leaves are copies, so drop the flat iterates
        flat_iterates, outcome = (), replace(outcome, trajectory=())
        task.results[-1] = outcome

    def attach(i: int) -> Any:
        """Iterate ``i``, with the derivative that it would have as the solution."""
        # an estimator that differentiates the last steps needs these recorded: take them again, from where they began
        again = bool(recorded) and not was_recorded[i]
        count = min(i, recorded or 0) if again else 0
        begin = iterates[i - count]
        z = layout.flatten(begin, "the trajectory") if layout.parted else flat_iterates[i - count]
        assert z is not None
        linear = replace(task.linear, results=[])
        at = replace(task, linear=linear, start=Start(z), randomness=None, aux=None)
        if again:
            last = solver.given(count)
            at = replace(at, solver=last, run=_runner(last, system, None, count, False))
        else:
            reached = SolverResult(z, outcome.report, state=outcome.state)
            at = replace(at, run=lambda *_: reached)
        with without_autocast(layout.device), call.following(direct, (z, begin)):
            return unflattened(gradient.attach(at, params).z, record)

    figures = (flat_solution.status, flat_solution.steps, flat_solution.residual)
    status, steps, residual = figures if problem.batched else (t[0] for t in figures)
    trajectory = tuple(z if solver.keeps(i) else None for i, z in enumerate(iterates))
    solution = Solution(
        value,
        status,
        steps,
        residual,
        outcome.report.evaluations,
        trajectory,
        aux=aux,
        turns=outcome.turns,
        problem=problem,
        args=args,
        _norms=(None, ()) if transformed else (outcome.norm, outcome.trace),
        _record=record,
        _attach=attach,
    )
    _warn(solution, outcome.report, solver, throw)
    return solution


def flat_system(problem: Problem, z: Any, args: tuple[Any, ...]) -> tuple[System, Tensor, tuple[Tensor, ...]]:
    """``problem`` in flat coordinates at the state ``z``, not differentiated: ``(system, flat z, params)``."""
    flat = flatten_problem(problem, z, args, capture=False)
    return flat.system, flat.z0.detach(), flat.params


def _strategies(problem: Any, solver: Any, gradient: Any) -> tuple[Solver, Gradient]:
    """The solver and the gradient, checked, with the defaults filled in."""
    for name, value, kind, example in (
        ("problem", problem, Problem, "FixedPoint(f)"),
        ("solver", solver, Solver, "Anderson()"),
        ("gradient", gradient, Gradient, "Implicit()"),
    ):
        if value is None and name != "problem":
            continue
        if not isinstance(value, kind):
            raise TypeError(
                f"{name} must be a {kind.__name__}, for example {name}={example}, not "
                + (f"the class {value.__name__}" if isinstance(value, type) else f"{value!r}")
            )
    if solver is None:
        solver = default_solver(problem)
    return solver, gradient or EXACT


def _start(flat: FlatProblem, evaluated: bool) -> Start:
    """The start of the solve.

    Args:
        flat: the problem.
        evaluated: whether the value from the call that found captured tensors is an evaluation of the system.
    """
    z, value, recorded = flat.z0, flat.value, flat.closure.recorded
    if not differentiable((z,)):
        z = z.detach()
    if value is None or not evaluated or is_transformed(value):
        return Start(z, recorded=recorded)
    with torch.no_grad(), without_autocast(z.device):
        return Start(z, flat.system.at(z.detach(), flat.params, value), recorded)


def _runner(solver: Solver, stated: System, compiled: Capture | None, recorded: int | None, keeps: bool) -> Runner:
    """The function that runs the solver: compiled if possible, else the eager loop.

    Args:
        solver: the solver.
        stated: the system that ``compiled`` belongs to.
        compiled: the compiled form of the solve; ``None`` for none.
        recorded: number of last steps that autograd records, of a prescribed number.
        keeps: whether the solver's state is needed afterwards.
    """
    eager = run_by(solver, recorded)

    def run(system: System, start: Start, params: Sequence[Tensor]) -> SolverResult:
        if compiled is not None and system is stated:
            outcome = compiled.solve(solver.leading, system, start.z, params)
            if outcome is not None:
                if isinstance(solver, Polyalgorithm) and solver.steps is None:
                    outcome = in_turn(iterate, solver, system, start.z, params, begun=outcome)
                return outcome
        outcome = eager(system, start, params)
        # the solver's state may be as large as many states, and would stay in memory with the solution
        return outcome if keeps or outcome.state is None else replace(outcome, state=None)

    return run


def _warn_of_moved_start(problem: Problem, system: System, z0: Tensor, params: Sequence[Tensor]) -> None:
    """Warn where the projection onto the constraint's set moves the start by more than rounding."""
    if any(is_transformed(t) for t in (z0, *params)):
        return
    with torch.no_grad():
        projected = system.project(z0, params)
        if projected is z0:
            return
        moved = row_norm(projected - z0) > torch.finfo(z0.dtype).eps ** 0.5 * row_norm(z0)
        count = int(moved.sum())
    if count:
        notice("the start was moved onto the constraint", problem.explain_start(count, len(z0)), UserWarning)


def _warn(solution: Solution, report: Report, solver: Solver, throw: bool) -> None:
    """Count the solve, and raise or warn where samples did not converge. One read from the device where all did."""
    samples = report.status.numel()
    if not bool((report.status if solver.steps is None else report.fell_short).any()):
        count_solve(samples, 0)
        return
    count_solve(samples, int(report.fell_short.sum()))
    bad = (report.status == Status.NONFINITE).nonzero().flatten().tolist()
    name = ", then ".join(turn.solver for turn in solution.turns) or type(solver).__name__
    if not bad:
        worst = Status(int(report.status.amax()))
        summary = solver.fell_short(report.summary() + turned(solution.turns))
        notice(f"{name} did not converge", _sentences(summary, solution.problem.explain(worst)), ConvergenceWarning)
        return
    shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    left = "each is frozen at its last good iterate" if solver.steps is None else "all steps were taken nevertheless"
    message = (
        f"{name} met NaN, infinity or a residual that grew without bound in {len(bad)} of {samples} samples ({shown}); "
        f"{left}. Try {_remedies(solution.problem, solver)}, or look for bad input in those samples"
    )
    at_once = int(((report.status == Status.NONFINITE) & (report.steps == 0)).sum())
    if at_once:
        which = "all" if at_once == len(bad) else str(at_once)
        message += f". The function or its gradient is not finite at the very start of {which} of them: start elsewhere"
    message = _sentences(message, solution.problem.explain(Status.NONFINITE))
    if throw:
        held = "error.solution holds every sample's result; throw=False returns it"
        raise SolveError(_sentences(message, held), solution)
    notice(f"{name} met NaN or infinity", message, ConvergenceWarning)


def _sentences(*parts: str) -> str:
    """Join sentences without full stops; empty ones are left out."""
    return ". ".join(filter(None, parts))


def _remedies(problem: Problem, solver: Solver) -> str:
    """Advice against a solve that diverges: smaller steps, or solvers other than those that were tried."""
    shorter = {"damping": "more damping (a smaller damping=...)", "step_size": "a smaller step_size"}
    lead = solver.leading
    advice = [text for name, text in shorter.items() if hasattr(lead, name) and not lead.searches]
    known = {type(member) for member in solver.members} if isinstance(solver, Polyalgorithm) else {type(solver)}
    minimizes = isinstance(problem, Minimum | LeastSquares)
    kinds: tuple[type[Solver], ...] = (Anderson, Broyden, NewtonKrylov)
    if minimizes:
        kinds = (GradientDescent, LBFGS, NewtonKrylov)
    if isinstance(problem, LeastSquares):
        kinds = (LevenbergMarquardt, *kinds)
    elif isinstance(problem, Minimum) and problem.on_set:  # the others do not support sets
        kinds = (ProjectedNewton, NewtonKrylov)
    others = ", ".join(kind.__name__ for kind in kinds if kind not in known)
    if minimizes:
        return ", ".join([*advice, f"another solver ({others})" if others else "another start"])
    if others:
        advice.append(f"another solver that does not need a contraction ({others})")
    return ", ".join([*advice, "a normalized map (torchimplicit.nn.spectral_norm)"])
