"""The autograd nodes. Two of them, each closed under differentiation, give every order and every mode.

``Solve`` is the solution as a function of the parameters; ``LinearSolve`` is the solution of a linear system with the
Jacobian there. The derivatives of each consist of evaluations of the system, of products with its Jacobian, and of the
two nodes again. The solution is saved as an *output* of its node, so that a second derivative runs back through the
solution as well: re-attaching by a call of the map at a detached solution would lose those terms.

In reverse mode the system is evaluated once at the solution in the forward pass, and its graph is kept. The products
and the pullback of the backward pass run over that graph. So do their derivatives, which ``Graft`` turns into functions
of the solution and the parameters again. Hence the map that is differentiated is the one that was evaluated in the
forward pass, and where one of its tensors was changed in place since, autograd raises its usual error. Under
transforms, which would need a graph of their own, the system is evaluated again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchimplicit._torch import Node
from torchimplicit.closure import is_transformed
from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.gradients.base import FlatSolution, Gradient, SolveTask, differentiable
from torchimplicit.gradients.figures import report
from torchimplicit.gradients.linear_task import LinearTask
from torchimplicit.gradients.start import Start
from torchimplicit.gradients.transforms import (
    Grads,
    fold_copies,
    gradients,
    is_plain,
    jvp,
    nested_forward_mode,
    partial_vjp,
    primals_of,
    refuse_batched_cotangents,
    saved_tensors,
    stack_copies,
)
from torchimplicit.linear import LinearSolver
from torchimplicit.precision import without_autocast
from torchimplicit.problems.fixed_point import FixedPointSystem
from torchimplicit.problems.linearization import Linearization, check_unmoved, recorded_gradients
from torchimplicit.problems.system import vjp
from torchimplicit.records import changed
from torchimplicit.saved import Saved, kept, unpack
from torchimplicit.state import row_norm


class DerivativeRule(Gradient):
    """An estimator that gives the solution's derivative itself, as a pullback and a tangent at the solution.

    The :class:`Solve` node runs the solver hidden from autograd, and calls the rule for its derivatives. A rule with
    derivatives of higher order consists of composable products (:func:`vjp_params`, :func:`jvp`) and of
    :class:`LinearSolve`; one of first order calls :func:`estimate`, so that a second derivative raises.

    Attributes:
        of_start: whether the solution has a derivative with respect to the initial state as well.
    """

    of_start: ClassVar[bool] = False

    @abstractmethod
    def adjoint(
        self, task: SolveTask, u: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Grads:
        """The cotangents of the parameters, ``None`` for those that need none.

        Args:
            task: the solve; ``task.system`` is the problem in flat coordinates.
            u: the cotangent of the solution, ``[batch, dim]``.
            z: the solution, ``[batch, dim]``.
            params: the parameters of the system.
            needs_grad: for each of ``params``, whether its cotangent is needed.
        """

    def adjoint_with_start(
        self, task: SolveTask, u: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Grads:
        """The cotangents of the initial state and of the parameters, for a rule with :attr:`of_start`."""
        raise AssertionError

    @abstractmethod
    def tangent(self, task: SolveTask, z: Tensor, params: Sequence[Tensor], dparams: Sequence[Tensor | None]) -> Tensor:
        """The tangent of the solution, ``[batch, dim]``.

        Args:
            task, z, params: as for :meth:`adjoint`.
            dparams: the tangents of ``params``, ``None`` for those that have none.

        Raises:
            UnsupportedDerivativeError: the rule has no forward mode.
        """

    def tape(
        self, task: SolveTask, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Linearization | None:
        """The evaluation of the problem's function that :meth:`adjoint` needs, recorded in the forward pass; ``None``
        if it needs none."""
        return None

    def attach(self, task: SolveTask, params: Sequence[Tensor]) -> FlatSolution:
        """Solve, and differentiate by the rule."""
        from_start = self.of_start and differentiable((task.start.z,))
        if not (from_start or differentiable(params)):
            return undifferentiated(task, self, params)
        # under a transform that differentiates, derivatives are taken of the transform's tensors: a graph of the plain
        # tensors below would hardly ever be used
        task = task if all(map(is_plain, params)) else changed(task, records=False)
        return by_node(task, self, params)


class Solve(Node):
    """The solution of a task as a function of its parameters: ``(task, rule, z0, *params) -> FlatSolution``.

    ``z0`` is ``None`` and the start taken from the task, except where a transform has to see it. The pullback is the
    rule's :meth:`~DerivativeRule.adjoint`, the tangent its :meth:`~DerivativeRule.tangent`.
    """

    @staticmethod
    def forward(task: SolveTask, rule: DerivativeRule, z0: Tensor | None, *params: Tensor) -> tuple[Tensor, ...]:
        return tuple((task if z0 is None else changed(task, start=Start(z0))).solve(params))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.task, ctx.rule, _, *params = inputs
        z, *figures = output
        ctx.mark_non_differentiable(*figures)
        ctx.set_materialize_grads(False)  # without a cotangent there is nothing to solve; zeros would be solved for
        ctx.kept, graph = _recorded(ctx.task, ctx.rule, z, params, ctx.needs_input_grad[3:])
        if graph:
            _compare(ctx.task, graph[0], FlatSolution(*output), params)
        # z is saved as an output, so that derivatives of the backward pass run back through the solution: these are the
        # terms with z_t and z_x of the second derivative, A z_tx = f_tx + f_tz z_x + f_zx z_t + f_zz[z_t, z_x]
        ctx.save_for_backward(z, *params, *graph)
        ctx.save_for_forward(z, *params)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, *_: Any) -> tuple[Any, ...]:
        z, *params = saved_tensors(ctx)
        of_start, *needs_grad = ctx.needs_input_grad[2:]
        if u is None:
            return None, None, None, *(None for _ in needs_grad)
        refuse_batched_cotangents(u)
        task = changed(ctx.task, linear=_restored(ctx.task.linear, ctx.kept, params))
        with without_autocast(z.device):
            if of_start:
                return None, None, *ctx.rule.adjoint_with_start(task, u, z, params, needs_grad)
            return None, None, None, *ctx.rule.adjoint(task, u, z, params, needs_grad)

    @staticmethod
    def jvp(ctx: Any, _task: None, _rule: None, _z0: Any, *dparams: Tensor | None) -> tuple[Any, ...]:
        with nested_forward_mode():
            z, *params = primals_of(saved_tensors(ctx))
            return ctx.rule.tangent(ctx.task, z, params, dparams), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, task: SolveTask, rule: DerivativeRule, z0: Tensor, *params: Tensor
    ) -> tuple[Any, Any]:
        size, dims, params = fold_copies(info, in_dims[3:], params)
        flat = stack_copies(z0, in_dims[2], size)
        solution = Solve.apply(task.vmapped(size, dims), rule, flat, *params)
        return tuple(t.reshape(size, -1, *t.shape[1:]) for t in solution), (0, 0, 0, 0)


class LinearSolve(Node):
    """The solution :math:`y` of :math:`A y = b`, or of :math:`A^T y = b` if ``transposed``, with :math:`A` the
    Jacobian of the system's residual at ``z``: ``(linear, solver, transposed, b, z, *params) -> y``.

    ``b`` is ``[batch, dim]``, or a block ``[k, batch, dim]`` of right-hand sides for one point, which are solved
    together from one evaluation of the map.
    """

    @staticmethod
    def forward(
        linear: LinearTask, solver: LinearSolver, transposed: bool, b: Tensor, z: Tensor, *params: Tensor
    ) -> Tensor:
        with without_autocast(z.device):
            _, solution = linear.solve(solver, transposed, b, z, params)
        report(linear.record, solution.report)
        return solution.value

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        linear, ctx.solver, ctx.transposed, _, z, *params = inputs
        ctx.linear, ctx.kept, graph = _parted(linear)
        ctx.save_for_backward(output, z, *params, *graph)
        ctx.save_for_forward(output, z, *params)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Any, ...]:
        y, z, *params = saved_tensors(ctx)
        needs_grad = ctx.needs_input_grad[4:]
        refuse_batched_cotangents(c)
        if any(needs_grad):  # the derivative of A is a second derivative of the residual
            ctx.linear.smoothness.asked()
        linear = _restored(ctx.linear, ctx.kept, params)
        w = LinearSolve.apply(linear, ctx.solver, not ctx.transposed, c, z, *params)  # the cotangent of b
        # y depends on (z, params) through -w.(dA y), or -w.(dA^T y): the gradient of -left^T A right at fixed ends
        left, right = (y, w) if ctx.transposed else (w, y)
        return None, None, None, w, *_bilinear(linear, left, right, z, params, needs_grad)

    @staticmethod
    def jvp(ctx: Any, _t: None, _s: None, _f: None, db: Tensor | None, *tangents: Tensor | None) -> Tensor:
        with nested_forward_mode():
            y, z, *params = primals_of(saved_tensors(ctx))
            if any(t is not None for t in tangents):
                ctx.linear.smoothness.asked()
            moved = LinearSolve._tangent(ctx, y, z, params, tangents)
            right = _difference(db, moved, y)
            return LinearSolve.apply(ctx.linear, ctx.solver, ctx.transposed, right, z, *params)

    @staticmethod
    def _tangent(ctx: Any, y: Tensor, z: Tensor, params: Sequence[Tensor], tangents: Any) -> Tensor | None:
        """The tangent of the product with ``y`` at fixed ``y``."""

        def product(z: Tensor, *params: Tensor) -> Tensor:
            pull = _vjp(ctx.linear, z, params)
            if ctx.transposed:
                return pull(y)
            _, twice = vjp(pull, torch.zeros_like(y))
            return twice(y)[0]

        return jvp(product, (z, *params), tangents)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, linear: LinearTask, solver: Any, transposed: bool, b: Any, z: Any, *params: Any
    ) -> Any:
        if all(dim is None for dim in in_dims[4:]):  # copies that differ in b alone are right-hand sides at one point
            b = b.movedim(in_dims[3], 0)
            y = LinearSolve.apply(linear, solver, transposed, b.reshape(-1, *b.shape[-2:]), z, *params)
            return y.reshape(b.shape), 0
        size, dims, params = fold_copies(info, in_dims[5:], params)
        shape = b.shape if in_dims[3] is None else b.movedim(in_dims[3], 0).shape[1:]
        if len(shape) == 3:  # a block for each copy: fold the copies into the batch
            b = b.expand(size, *shape) if in_dims[3] is None else b.movedim(in_dims[3], 0)
            b = b.movedim(0, 1).reshape(shape[0], -1, shape[2])
        else:
            b = stack_copies(b, in_dims[3], size)
        z = stack_copies(z, in_dims[4], size)
        y = LinearSolve.apply(linear.vmapped(size, dims), solver, transposed, b, z, *params)
        if len(shape) == 3:
            return y.reshape(shape[0], size, *shape[1:]).movedim(1, 0), 0
        return y.reshape(size, *shape), 0


def _vjp(linear: LinearTask, z: Tensor, params: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The map :math:`v\\mapsto A^T v` at ``z``, composable, for a vector or a block of vectors."""
    _, pull = vjp(lambda z: linear.system.residual(z, *params), z)

    def of_one_or_a_block(v: Tensor) -> Tensor:
        if v.ndim == z.ndim:
            return pull(v)[0]
        return torch.func.vmap(lambda v: pull(v)[0])(v)

    return of_one_or_a_block


class Graft(Node):
    """Tensors recorded on a tape, as functions of the actual tensors that its leaves stand for:
    ``(kept, recorded, leaves, *actual)``.

    A tape is recorded at detached leaves. This node connects its tensors to the graph outside; the derivatives are
    taken over the same tape.
    """

    @staticmethod
    def forward(kept: Saved, recorded: Sequence[Tensor], leaves: Sequence[Tensor], *actual: Tensor) -> Any:
        return tuple(t.detach() for t in recorded)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.kept, recorded, ctx.leaves, *actual = inputs
        ctx.count = len(recorded)
        ctx.save_for_backward(*recorded, *actual)

    @staticmethod
    def backward(ctx: Any, *vs: Tensor) -> tuple[Any, ...]:
        saved = saved_tensors(ctx)
        recorded, actual = saved[: ctx.count], saved[ctx.count :]
        for v in vs:
            refuse_batched_cotangents(v)
        needs_grad = ctx.needs_input_grad[3:]
        unpack(ctx.kept)
        if not torch.is_grad_enabled():
            return None, None, None, *recorded_gradients(recorded, ctx.leaves, vs, needs_grad, create_graph=False)
        # the cotangents become leaves of the tape as well, so that the result can be differentiated in them
        ends = tuple(v.detach().requires_grad_() for v in vs)
        grads = recorded_gradients(recorded, ctx.leaves, ends, needs_grad, create_graph=True)
        return None, None, None, *_grafted(ctx.kept, grads, (*ctx.leaves, *ends), (*actual, *vs))


class FirstOrder(Node):
    """An estimate without a derivative: ``(task, compute, name, of_state, x, z, *params) -> tensors``.

    ``compute(task, x, z, params)`` runs on plain tensors, and returns tangents of the state (``of_state``) or
    cotangents of parameters. Differentiating the result raises, so that a second derivative through a first-order
    estimator is never silently wrong.
    """

    @staticmethod
    def forward(
        task: SolveTask, compute: Any, name: str, of_state: bool, x: Any, z: Tensor, *params: Tensor
    ) -> tuple[Tensor, ...]:
        with without_autocast(z.device):
            return tuple(compute(task, x, z, params))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[2]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedDerivativeError(_first_order_only(ctx.name))

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise UnsupportedDerivativeError(_first_order_only(ctx.name))

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, task: SolveTask, compute: Any, name: str, of_state: bool, x: Any, z: Any, *params: Any
    ) -> Any:
        size, dims, params = fold_copies(info, in_dims[6:], params)
        x, z = stack_copies(x, in_dims[4], size), stack_copies(z, in_dims[5], size)
        if not of_state:
            # a cotangent of a shared parameter is needed for each copy separately
            params = tuple(
                p if d is not None else p.expand(size, *p.shape).contiguous() for p, d in zip(params, dims, strict=True)
            )
            dims = [0] * len(params)
        out = FirstOrder.apply(task.vmapped(size, dims), compute, name, of_state, x, z, *params)
        if of_state:
            out = tuple(t.reshape(size, -1, *t.shape[1:]) for t in out)
        return tuple(out), (0,) * len(out)


class FirstOrderRule(DerivativeRule):
    """A rule for first derivatives in reverse mode; all others raise :class:`UnsupportedDerivativeError`."""

    @abstractmethod
    def cotangents(
        self, task: SolveTask, u: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """The cotangents that :meth:`adjoint` returns, computed on plain tensors, by any means."""

    def adjoint(
        self, task: SolveTask, u: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Grads:
        def compute(task: SolveTask, u: Tensor, z: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
            return [grad for grad in self.cotangents(task, u, z, params, needs_grad) if grad is not None]

        grads = iter(estimate(task, compute, type(self).__name__, u, z, params))
        return tuple(next(grads) if w else None for w in needs_grad)

    def tangent(self, task: SolveTask, z: Tensor, params: Sequence[Tensor], dparams: Sequence[Tensor | None]) -> Tensor:
        raise UnsupportedDerivativeError(
            f"{type(self).__name__} has no forward mode: it needs the cotangent of a loss. Use Implicit() there"
        )


def by_node(task: SolveTask, rule: DerivativeRule, params: Sequence[Tensor]) -> FlatSolution:
    """The solution of the task, by a :class:`Solve` node."""
    z0 = None
    if rule.of_start and differentiable((task.start.z,)):
        z0 = task.start.take()
    elif any(map(is_transformed, (task.start.z, *params))):
        z0 = task.start.fixed().take()
    return FlatSolution(*Solve.apply(task, rule, z0, *params))


def undifferentiated(task: SolveTask, rule: DerivativeRule, params: Sequence[Tensor]) -> FlatSolution:
    """The solution of a task with no derivative to take. A start that belongs to a transform still goes through the
    node, which unwraps it, since the solver runs on plain tensors."""
    return by_node(task, rule, params) if is_transformed(task.start.z) else task.solve(params)


def vjp_params(linear: LinearTask, g: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]) -> Grads:
    """:math:`R_\\theta^T g` for the parameters that need a gradient, ``None`` for the others; differentiable."""
    tape = linear.tape
    if tape is not None and not torch.is_grad_enabled():  # nobody differentiates the result: plain autograd is enough
        tape.check()
        with torch.enable_grad():
            out = linear.system.on_tape(tape)
        return _or_zeros(
            recorded_gradients((out,), tape.params, (g,), needs_grad, create_graph=False), params, needs_grad
        )
    if tape is None or is_transformed(g):
        out, pull = partial_vjp(lambda *params: linear.system.residual(z, *params), params, needs_grad)
        if tape is not None:
            check_unmoved(linear.system.on_tape(tape), out)
        return pull(g)
    tape.check()
    tape.make_differentiable()
    end = g.detach().requires_grad_()
    with torch.enable_grad():
        out = linear.system.on_tape(tape)
    grads = recorded_gradients((out,), tape.params, (end,), needs_grad, create_graph=True)
    return _or_zeros(_grafted(tape.saved, grads, (tape.z, *tape.params, end), (z, *params, g)), params, needs_grad)


def _bilinear(
    linear: LinearTask, left: Tensor, right: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
) -> Grads:
    """The gradient of :math:`-l^T A r` with respect to z and the parameters, at fixed l and r; differentiable, in l and
    r too.

    Args:
        linear: with the system whose Jacobian is A.
        left, right: l and r, ``[batch, dim]``, or blocks ``[k, batch, dim]``.
        z, params: where.
        needs_grad: for each of ``(z, *params)``.
    """
    tape = linear.tape
    if tape is None or left.ndim != z.ndim or is_transformed(left) or is_transformed(right):

        def weighted(z: Tensor, *params: Tensor) -> Tensor:
            return -(_vjp(linear, z, params)(left) * right).sum()

        if tape is not None:
            check_unmoved(linear.system.on_tape(tape), linear.system.residual(z, *params))
        return gradients(weighted, (z, *params), needs_grad)
    tape.check()
    tape.make_differentiable()
    ends = tuple(t.detach().requires_grad_() for t in (left, right))
    leaves = (tape.z, *tape.params)
    with torch.enable_grad():
        out = linear.system.on_tape(tape)
        (turned,) = recorded_gradients((out,), (tape.z,), ends[:1], (True,), create_graph=True)
        total = None if turned is None else -(turned * ends[1]).sum()
    if total is None:
        return _or_zeros([None] * len(leaves), leaves, needs_grad)
    again = torch.is_grad_enabled()
    grads = recorded_gradients((total,), leaves, (torch.ones_like(total),), needs_grad, create_graph=again)
    if again:
        grads = _grafted(tape.saved, grads, (*leaves, *ends), (z, *params, left, right))
    return _or_zeros(grads, leaves, needs_grad)


def _grafted(
    kept: Saved, recorded: Sequence[Tensor | None], leaves: Sequence[Tensor], actual: Sequence[Tensor]
) -> list[Tensor | None]:
    """Recorded tensors as functions of ``actual``, see :class:`Graft`; those without a graph are constants."""
    joined = list(recorded)
    places = [i for i, t in enumerate(joined) if t is not None and t.requires_grad]
    if places:
        grafts = Graft.apply(kept, [recorded[i] for i in places], leaves, *actual)
        for i, t in zip(places, grafts, strict=True):
            joined[i] = t
    return joined


def _or_zeros(grads: Sequence[Tensor | None], like: Sequence[Tensor], needs_grad: Sequence[bool]) -> Grads:
    return tuple(
        torch.zeros_like(t) if w and grad is None else grad for grad, t, w in zip(grads, like, needs_grad, strict=True)
    )


def _recorded(
    task: SolveTask, rule: DerivativeRule, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
) -> tuple[Linearization | None, tuple[Tensor, ...]]:
    """Record the solution's tape; returns it without its graph, and the tensors that hold the graph. A node saves these
    with ``save_for_backward``, so that autograd frees the graph when it frees its own."""
    if not task.records or not any(needs_grad) or any(map(is_transformed, (z, *params))):
        return None, ()
    with kept() as saved:
        tape = rule.tape(task, z, params, needs_grad)
    if tape is None:
        return None, ()
    tape.saved = saved
    if task.aux is not None:
        task.aux.hold((tape.z, *tape.params), saved)
    if task.agreement is not None:
        task.agreement.check(tape)
    parted, out = tape.parted()
    return parted, (out,)


def _compare(task: SolveTask, out: Tensor, solution: FlatSolution, params: Sequence[Tensor]) -> None:
    """Compare the value ``out`` that was recorded at the solution with the one that the solver evaluated there: they
    differ if the function is random."""
    look = task.randomness
    if look is None or look.known or not isinstance(task.system, FixedPointSystem) or out.ndim != 2:
        return
    with torch.no_grad():
        last = solution.steps == solution.steps.amax()  # the others stopped earlier, beside other states
        residual = row_norm(out - solution.z) / row_norm(out)
        look.compare(residual[last], solution.residual[last], solution.z, params)


def _parted(linear: LinearTask) -> tuple[LinearTask, Linearization | None, tuple[Tensor, ...]]:
    """``linear`` without its tape, the tape without its graph, and the tensors that hold the graph; see
    :func:`_recorded`."""
    if linear.tape is None:
        return linear, None, ()
    tape, out = linear.tape.parted()
    return changed(linear, tape=None), tape, (out,)


def _restored(linear: LinearTask, tape: Linearization | None, saved: list[Tensor]) -> LinearTask:
    """``linear`` with its tape, whose graph is held by the last of the ``saved`` tensors, which is removed from
    them."""
    if tape is None:
        return linear
    unpack(tape.saved)
    return changed(linear, tape=tape.joined(saved.pop()))


def estimate(
    task: SolveTask,
    compute: Callable[[SolveTask, Any, Tensor, Sequence[Tensor]], Sequence[Tensor]],
    name: str,
    x: Any,
    z: Tensor,
    params: Sequence[Tensor],
    of_state: bool = False,
) -> Sequence[Tensor]:
    """``compute(task, x, z, params)`` as a tensor whose differentiation raises, see :class:`FirstOrder`."""
    if not torch.is_grad_enabled() and not any(is_transformed(t) for t in (x, z, *params)):
        return compute(task, x, z, params)
    return FirstOrder.apply(task, compute, name, of_state, x, z, *params)


def _difference(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor:
    if a is None:
        return torch.zeros_like(like) if b is None else -b
    return a if b is None else a - b


def _first_order_only(name: str) -> str:
    return (
        f"{name} estimates first derivatives only, but a derivative of its estimate was asked for: use Implicit() "
        "(exact to any order), or Unrolled()"
    )
