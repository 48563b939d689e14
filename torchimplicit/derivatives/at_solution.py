"""The derivatives of one solution, by direct routines that share their work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.closure import is_transformed
from torchimplicit.derivatives.curve import Along, Curve
from torchimplicit.derivatives.directions import Basis, basis, flat_direction
from torchimplicit.flat_problem import flatten_problem
from torchimplicit.gradients import Implicit
from torchimplicit.gradients.base import SolveTask
from torchimplicit.gradients.linear_task import LinearTask
from torchimplicit.gradients.nodes import LinearSolve
from torchimplicit.gradients.point import SharedPoint
from torchimplicit.gradients.start import Start
from torchimplicit.gradients.transforms import jvp
from torchimplicit.linear import Dense, LinearSolver
from torchimplicit.precision import at_precision, without_autocast
from torchimplicit.problems import Minimum
from torchimplicit.problems.system import vjp
from torchimplicit.solution import AdjointRecord, Report, Solution
from torchimplicit.solvers import SolverResult
from torchimplicit.solvers.given import Given
from torchimplicit.state import detached

DENSE_DIM = 256
"""The largest state whose Jacobians are assembled and factorized if no linear solver is given.

At this size, assembly and factorization take about as long as the three iterative solves of a first-order physics loss
that converge fast, and a fraction of the time of solves that converge slowly; which of the two it is cannot be known
beforehand.
"""

DENSE_ENTRIES = 2**24
"""The most entries that the Jacobians of a batch may have together (128 MiB in float64)."""

ROWS_AT_ONCE = 64
"""The number of adjoint vectors that are pulled back to the argument in one pass: more need more memory."""

Direction = tuple[Any, ...]
"""One entry for each argument of the problem: a tangent like it, or ``None`` for an argument that does not move."""


class Derivatives:
    """Tangents, second derivatives, and Hessians of losses at a solution, with the fewest linear solves.

    With :math:`R(z, a) = 0` and :math:`A = R_z` at the solution, every derivative of z solves a linear system with the
    same :math:`A`, and every gradient one with :math:`A^T` (the implicit function theorem). All methods share one
    evaluation of the problem's function, and with :class:`Dense` one factorization. The costs given below count linear
    solves; a block of k right-hand sides counts as k.

    All results can be differentiated further, in the arguments and in captured tensors (a network's weights), if
    gradients are recorded: a loss on :attr:`value` and on one :meth:`tangent` needs two more solves for its gradient,
    so three in all. Reverse mode applied twice would need two for every component of the state, and one more.

    ::

        solution = ti.solve(problem, z0, t)
        at = ti.derivatives.Derivatives(solution)
        (velocity,) = at.along((torch.ones_like(t),))
        physics(at.value, velocity).backward()

    Args:
        solution: a solution that :func:`solve` or :meth:`Equilibrium.solve` returned.
        linear_solver: the linear solver of all solves; ``None``: :class:`Dense` for a small state, else the default of
            the problem.

    Attributes:
        value: the solution, with its exact derivative, whatever estimator it was solved with.
        solves: the number of right-hand sides so far: ``{"plain": ..., "transposed": ...}``.
        report: the report of the last linear solve; ``None`` before the first. A sample with a singular :math:`A` has
            ``Status.BREAKDOWN``, and the least-squares solution of least norm.

    Raises:
        ValueError: the solution does not hold its problem (as ``Equilibrium.solution``), is complex, belongs to a
            ``torch.func`` transform, or was found with ``eliminate=True``.
    """

    def __init__(self, solution: Solution, *, linear_solver: LinearSolver | None = None):
        if solution.problem is None:
            raise ValueError(
                "this Solution does not hold its problem, as is always the case for the attribute solution of an "
                "Equilibrium: use the one that torchimplicit.solve(...) or layer.solve(x) returns"
            )
        if any(is_transformed(leaf) for leaf in pytree.tree_leaves((solution.value, solution.args))):
            raise ValueError(
                "Derivatives needs plain tensors, but this solution belongs to a torch.func transform: apply the "
                "transform to torchimplicit.solve itself"
            )
        if isinstance(solution.problem, Minimum) and solution.problem.eliminate:
            raise ValueError(
                "Derivatives does not support eliminate=True, whose coordinates move with the constraint and so with "
                "the arguments: solve the problem without it"
            )
        flat = flatten_problem(solution.problem, detached(solution.value), solution.args, capture=True)
        z = flat.z0.detach().clone()
        if flat.layout.complex:
            raise ValueError(
                "Derivatives needs a real state: write the problem in the real view of its complex state "
                "(torch.view_as_real)"
            )
        batch, dim = z.shape
        chosen = linear_solver
        if chosen is None and dim <= DENSE_DIM and batch * dim * dim <= DENSE_ENTRIES:
            chosen = Dense()
        self._problem, self._record = flat, AdjointRecord()
        self._curves: dict[tuple[int, ...], Curve] = {}
        self._rule = Implicit(linear_solver=chosen)
        self._solver = at_precision(chosen or flat.system.default_linear_solver(dim, batch), flat.precision)
        figures = (solution.status.reshape(-1), solution.steps.reshape(-1), solution.residual.detach().reshape(-1))
        reached = SolverResult(z, Report(*figures, solution.evaluations))
        with without_autocast(flat.layout.device):
            self._shared = SharedPoint(flat.system, z, flat.params, self._solver)
            self._linear = LinearTask(
                system=flat.system, record=self._record, precision=flat.precision, shared=self._shared
            )
            task = SolveTask(linear=self._linear, start=Start(flat.z0), run=lambda *_: reached, solver=Given())
            self._z = self._rule.attach(task, flat.params).z
        self.value = flat.layout.unflatten(self._z)

    @property
    def solves(self) -> dict[str, int]:
        """The number of right-hand sides so far."""
        return dict(self._shared.solves)

    @property
    def report(self) -> Report | None:
        """The report of the last linear solve."""
        return self._record.report

    def tangent(self, direction: Direction) -> Any:
        """The derivative of the solution along ``direction``: 1 solve.

        Args:
            direction: a tangent for each argument, ``None`` for those that do not move.

        Returns:
            a state like :attr:`value`.

        Raises:
            ValueError, TypeError: the direction does not fit the arguments, or moves none.
        """
        return self._state(self._tangent(self._flat(direction)))

    def tangents(self, directions: Direction) -> Any:
        """The derivatives of the solution along k directions: k solves, as one block.

        Args:
            directions: as for :meth:`tangent`, each tensor with an additional first dimension of size k.

        Returns:
            a state like :attr:`value`, each tensor with the k directions in dim 0.
        """
        return self._state(self._tangents(self._flat(directions, block=True)))

    def along(self, direction: Direction, order: int = 1) -> tuple[Any, ...]:
        """The derivatives of orders 1 to ``order`` along ``direction``: ``order`` solves.

        The n-th solves :math:`A z^{(n)} = -D_n`, where :math:`D_n` is the n-th derivative in :math:`\\varepsilon` of
        the residual along the curve :math:`z+\\varepsilon z'+\\dots+\\varepsilon^{n-1}z^{(n-1)}/(n-1)!`, with arguments
        that move by :math:`\\varepsilon` times the direction.

        Returns:
            ``order`` states like :attr:`value`.

        Raises:
            ValueError: ``order`` is below 1, or the direction does not fit the arguments.
        """
        if order < 1:
            raise ValueError(f"order is {order}, but must be at least 1")
        if order > 1:
            self._warn_if_rough()
        return tuple(map(self._state, self._along(self._flat(direction), order)))

    def second(self, first: Direction, second: Direction) -> Any:
        """The second derivative of the solution along two directions: 3 solves (2 where they are the same)."""
        self._warn_if_rough()
        one = self._flat(first)
        other = one if second is first else self._flat(second)
        y = self._tangent(one)
        return self._state(self._second(one, other, y, y if other is one else self._tangent(other)))

    def jacobian(self, argument: int = 0) -> Any:
        """The derivative of the solution in one tensor argument: as many solves as the argument or the state has
        entries per sample, whichever are fewer.

        Returns:
            a state like :attr:`value`, each tensor with the dimensions of one sample of the argument appended; of the
            whole argument, if it does not carry the batch.

        Raises:
            ValueError: there is no such argument, or it is not a floating-point tensor.
        """
        argument_basis = basis(self._problem, argument)
        batch, dim = self._z.shape
        # Rows need one cotangent of the argument per sample, but that of a shared argument is summed over the samples:
        # then only columns can be used, however many there are.
        if argument_basis.count <= dim or not (argument_basis.batched or batch == 1):
            columns = self._tangents(argument_basis.directions)  # [p, batch, dim]
            matrix = columns.permute(1, 2, 0)
        else:
            eye = torch.eye(dim, dtype=self._z.dtype, device=self._z.device)
            rows = self._solved(eye[:, None, :].expand(dim, batch, dim).contiguous(), transposed=True)
            _, pull = vjp(lambda a: self._residual(self._z, *argument_basis.replaced(a)), argument_basis.tensor)
            vjp_params = torch.func.vmap(lambda g: pull(g)[0], chunk_size=ROWS_AT_ONCE)(rows)
            matrix = torch.stack([argument_basis.per_sample(-row) for row in vjp_params], dim=1)
        return self._tensor(matrix, argument_basis.shape)

    def gradient(self, loss: Callable[..., Tensor], argument: int = 0) -> Tensor:
        """The gradient of the scalar ``loss(z, *args)`` in one tensor argument: 1 solve."""
        argument_basis = basis(self._problem, argument)
        slope, direct = self._loss_gradients(loss, argument_basis)
        g = self._solved(slope, transposed=True)
        return (direct - self._vjp(g, argument_basis)).reshape(argument_basis.tensor.shape)

    def hessian_vector(self, loss: Callable[..., Tensor], vector: Tensor, argument: int = 0) -> tuple[Tensor, Tensor]:
        """The gradient of ``loss(z, *args)`` in one argument, and its derivative along ``vector``: 3 solves, 2 more
        than the gradient alone.

        With the Lagrangian :math:`L(z, a)=\\ell(z, a)-g^TR(z, a)`, where :math:`A^Tg=\\ell_z`, the gradient is
        :math:`L_a`, and its derivative along :math:`\\dot a` is :math:`\\dot L_a-R_a^T\\dot g` with
        :math:`A^T\\dot g=\\dot L_z`. The dots are derivatives along :math:`(\\dot z, \\dot a)` at constant g.

        Args:
            loss: ``loss(z, *args)``, a scalar.
            vector: a tensor like the argument.
            argument: the number of the argument.

        Returns:
            two tensors like the argument.

        Raises:
            ValueError: ``vector`` does not have the shape of the argument, or the loss is not a scalar.
        """
        self._warn_if_rough()
        argument_basis = basis(self._problem, argument)
        if vector.shape != argument_basis.tensor.shape:
            raise ValueError(
                f"vector has shape {tuple(vector.shape)}, but argument {argument} has "
                f"{tuple(argument_basis.tensor.shape)}"
            )
        slope, direct = self._loss_gradients(loss, argument_basis)
        g = self._solved(slope, transposed=True)
        moving = argument_basis.direction(vector)
        y = self._tangent(moving)

        def gradients(z: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.grad(self._lagrangian(loss, g, argument_basis), argnums=(0, 1))(z, a)

        _, (in_z, in_a) = _directional(gradients, (self._z, argument_basis.tensor), (y, vector))
        g_moved = self._solved(in_z, transposed=True)
        return (direct - self._vjp(g, argument_basis)), in_a - self._vjp(g_moved, argument_basis)

    def hessian(self, loss: Callable[..., Tensor], argument: int = 0) -> Tensor:
        """The Hessian of ``loss(z, *args)`` in one tensor argument of n entries: n + 1 solves.

        If the argument carries the batch, the loss must be a sum over samples, and n counts the entries of one sample.

        Returns:
            ``[*argument.shape, *argument.shape]``; if the argument carries the batch,
            ``[batch, *sample.shape, *sample.shape]``.
        """
        self._warn_if_rough()
        argument_basis = basis(self._problem, argument)
        slope, _ = self._loss_gradients(loss, argument_basis)
        g = self._solved(slope, transposed=True)
        tangents = self._tangents(argument_basis.directions)
        lagrangian = self._lagrangian(loss, g, argument_basis)
        moves = argument_basis.moves

        def image(y: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
            gradients = torch.func.grad(lagrangian, argnums=(0, 1))
            return _directional(gradients, (self._z, argument_basis.tensor), (y, a))[1]

        in_z, in_a = torch.func.vmap(image)(tangents, moves)
        # the second derivative of the Lagrangian along pairs of curves: no solve per direction beyond its tangent,
        # since g makes the terms with second derivatives of z vanish
        matrix = argument_basis.contracted(tangents, in_z) + argument_basis.contracted(moves, in_a)
        return matrix.reshape(*argument_basis.lead, *argument_basis.shape, *argument_basis.shape)

    def second_derivatives(self, argument: int = 0) -> Any:
        """All second derivatives of the solution in one tensor argument of p entries: p solves for the tangents, and
        either p(p+1)/2 for the pairs or n adjoint solves for the n components of the state, whichever are fewer.

        Returns:
            a state like :attr:`value`, each tensor with the dimensions of one sample of the argument appended twice; of
            the whole argument, if it does not carry the batch.
        """
        self._warn_if_rough()
        argument_basis = basis(self._problem, argument)
        tangents = self._tangents(argument_basis.directions)
        batch, dim = self._z.shape
        p = argument_basis.count
        if p * (p + 1) // 2 <= dim:
            rows, columns = torch.triu_indices(p, p, device=self._z.device)
            one, other = (
                (tangents[rows], argument_basis.moves[rows]),
                (tangents[columns], argument_basis.moves[columns]),
            )
            pairs = self._solved(-torch.func.vmap(self._curvature(argument_basis))(*one, *other))
            full = pairs.new_zeros(p, p, batch, dim).index_put((rows, columns), pairs)
            full = full.index_put((columns, rows), pairs)
            tensor = full.permute(2, 3, 0, 1)
        else:
            eye = torch.eye(dim, dtype=self._z.dtype, device=self._z.device)
            adjoints = self._solved(eye[:, None, :].expand(dim, batch, dim).contiguous(), transposed=True)

            curvature = torch.func.vmap(self._curvature(argument_basis), in_dims=(None, None, 0, 0))
            curved = torch.func.vmap(curvature, in_dims=(0, 0, None, None))(
                tangents, argument_basis.moves, tangents, argument_basis.moves
            )
            tensor = -torch.einsum("kbn,ijbn->bkij", adjoints, curved)
        return self._tensor(tensor, (*argument_basis.shape, *argument_basis.shape))

    # The methods below work in flat coordinates: states [batch, dim], directions as lists over the parameters.

    def _residual(self, z: Tensor, *params: Tensor) -> Tensor:
        return self._problem.system.residual(z, *params)

    def _flat(self, direction: Direction, block: bool = False) -> list[Tensor | None]:
        return flat_direction(self._problem, direction, block)

    def _state(self, flat: Tensor) -> Any:
        if flat.ndim == self._z.ndim:
            return self._problem.layout.unflatten(flat)
        each = [self._problem.layout.unflatten(one) for one in flat]
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *each)

    def _tensor(self, matrix: Tensor, inner: Sequence[int]) -> Any:
        """``[batch, dim, ...]`` with the state's structure, and its last dimensions reshaped to ``inner``."""
        matrix = matrix.reshape(*matrix.shape[:2], -1)
        each = [self._problem.layout.unflatten(one) for one in matrix.unbind(-1)]
        return pytree.tree_map(lambda *leaves: torch.stack(leaves, dim=-1).reshape(*leaves[0].shape, *inner), *each)

    def _solved(self, b: Tensor, transposed: bool = False) -> Tensor:
        with without_autocast(self._problem.layout.device):
            return LinearSolve.apply(self._linear, self._solver, transposed, b, self._z, *self._problem.params)

    def _along(self, moving: Sequence[Tensor | None], order: int) -> list[Tensor]:
        """The derivatives of orders 1 to ``order``, flat."""
        places = [place for place, t in enumerate(moving) if t is not None]
        tangents = [t for t in moving if t is not None]
        curve = self._curves.setdefault(tuple(places), Curve(self._linear, self._solver, places))
        # the node Along differentiates a recorded graph, which cannot hold tensors of a torch.func transform
        composed = any(is_transformed(t) for t in tangents)
        derivatives: list[Tensor] = []
        for n in range(1, order + 1):
            if composed:
                b = -curve.composed(n, self._z, derivatives, tangents, self._problem.params)
                derivatives.append(self._solved(b))
            else:
                derivatives.append(Along.apply(curve, n, self._z, *derivatives, *tangents, *self._problem.params))
        return derivatives

    def _tangent(self, moving: Sequence[Tensor | None]) -> Tensor:
        return self._along(moving, 1)[0]

    def _tangents(self, moving: Sequence[Tensor | None]) -> Tensor:
        """The derivatives along k directions, ``[k, batch, dim]``."""
        flat = [t for t in moving if t is not None]

        def moved(*tangents: Tensor) -> Tensor:
            parts = iter(tangents)
            one = [None if t is None else next(parts) for t in moving]
            out = jvp(lambda *params: self._residual(self._z, *params), self._problem.params, one)
            assert out is not None
            return out

        return self._solved(-torch.func.vmap(moved)(*flat))

    def _second(self, one: Any, other: Any, y: Tensor, w: Tensor) -> Tensor:
        """The second derivative along two directions with the tangents y and w: the mixed derivative of
        :math:`R(z+\\varepsilon y+\\eta w, a+\\varepsilon\\dot a+\\eta\\dot b)` is what it has to cancel."""

        def residual(e: Tensor, h: Tensor) -> Tensor:
            params = _moved(_moved(self._problem.params, one, e), other, h)
            return self._residual(self._z + e * y + h * w, *params)

        return self._solved(-_mixed(residual, self._z))

    def _curvature(self, argument_basis: Basis) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The second derivative of the residual, ``[batch, dim]``, along two pairs of a tangent and a direction."""

        def along(y: Tensor, a: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return _mixed(
                lambda e, h: self._residual(
                    self._z + e * y + h * w, *argument_basis.replaced(argument_basis.tensor + e * a + h * b)
                ),
                self._z,
            )

        return along

    def _vjp(self, g: Tensor, argument_basis: Basis) -> Tensor:
        """:math:`R_a^T g`, like the argument."""
        _, pull = vjp(lambda a: self._residual(self._z, *argument_basis.replaced(a)), argument_basis.tensor)
        return pull(g)[0]

    def _loss_gradients(self, loss: Callable[..., Tensor], argument_basis: Basis) -> tuple[Tensor, Tensor]:
        return torch.func.grad(self._lagrangian(loss, None, argument_basis), argnums=(0, 1))(
            self._z, argument_basis.tensor
        )

    def _lagrangian(
        self, loss: Callable[..., Tensor], g: Tensor | None, argument_basis: Basis
    ) -> Callable[..., Tensor]:
        """``loss - <g, R>`` as a function of the flat state and the argument."""

        def value(z: Tensor, a: Tensor) -> Tensor:
            params = argument_basis.replaced(a)
            args = self._problem.closure.arguments(params)
            out = loss(self._problem.layout.unflatten(z), *args)
            if out.ndim:
                raise ValueError(f"loss returned a tensor of shape {tuple(out.shape)}, but must return a scalar")
            return out if g is None else out - (g * self._residual(z, *params)).sum()

        return value

    def _warn_if_rough(self) -> None:
        self._linear.smoothness.warn(self._shared.out)


def _moved(params: Sequence[Tensor], moving: Sequence[Tensor | None], e: Tensor) -> tuple[Tensor, ...]:
    return tuple(p if t is None else p + e * t for p, t in zip(params, moving, strict=True))


def _directional(fn: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """The value of ``fn`` and its derivative along ``tangents``."""
    out, moved = torch.func.jvp(fn, primals, tangents)[:2]
    return out, moved


def _mixed(fn: Callable[[Tensor, Tensor], Tensor], like: Tensor) -> Tensor:
    """The mixed second derivative of a function of two numbers, at zero."""
    zero, one = like.new_zeros(()), like.new_ones(())

    def slope(h: Tensor) -> Tensor:
        moved: Tensor = torch.func.jvp(lambda e: fn(e, h), (zero,), (one,))[1]
        return moved

    moved: Tensor = torch.func.jvp(slope, (zero,), (one,))[1]
    return moved
