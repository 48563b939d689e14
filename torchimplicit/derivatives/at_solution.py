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
"""The largest state for which the Jacobians are assembled and factorized where no linear solver is named.

Near it, that takes about as long as the three iterative solves of a first-order physics loss where these converge
fast, and a fraction of their time where they converge slowly, which cannot be known beforehand.
"""

DENSE_ENTRIES = 2**24
"""The most entries that they may have together."""

ROWS_AT_ONCE = 64
"""Adjoint vectors of a Jacobian that are pulled back to the argument together: fewer passes, more memory."""

Direction = tuple[Any, ...]
"""One entry for each argument of the problem: a tangent like it, or ``None`` for an argument that does not move."""


class Derivatives:
    """Tangents, second derivatives, and Hessians of losses at a solution, with the fewest linear solves.

    With :math:`R(z, a) = 0` and :math:`A = R_z` at the solution, every derivative of z is a linear system with the same
    :math:`A`, and every gradient one with :math:`A^T`. All of them here run over one evaluation of the problem's
    function, and over one factorization where :class:`Dense` is chosen. What a method says of its cost counts linear
    solves, a block of k right-hand sides as k.

    Everything that is returned can be differentiated further, in the arguments and in what the function captures (a
    network's weights), as long as gradients are recorded: a loss on :attr:`value` and on one :meth:`tangent` takes two
    more solves for its gradient, so three in all. Where reverse mode is applied twice instead, it takes two for every
    component of the state, and one.

    ::

        solution = ti.solve(problem, z0, t)
        at = ti.derivatives.Derivatives(solution)
        (velocity,) = at.along((torch.ones_like(t),))
        physics(at.value, velocity).backward()

    Args:
        solution: as :func:`solve` or :meth:`Equilibrium.solve` returned it.
        linear_solver: for all the solves; ``None``: :class:`Dense` for a small state, else what suits the problem.

    Attributes:
        value: the solution, with its exact derivative whatever estimator it was solved with.
        solves: right-hand sides so far: ``{"plain": ..., "transposed": ...}``.
        report: the figures of the last linear solve; ``None`` before the first. A sample whose :math:`A` is singular
            has ``Status.BREAKDOWN``, and the least-squares solution of least norm.

    Raises:
        ValueError: the solution does not hold its problem (``Equilibrium.solution`` does not).
    """

    def __init__(self, solution: Solution, *, linear_solver: LinearSolver | None = None):
        if solution.problem is None:
            raise ValueError(
                "this Solution does not hold its problem, as the attribute solution of an Equilibrium never does: take "
                "what torchimplicit.solve(...) or layer.solve(x) returns"
            )
        if any(is_transformed(leaf) for leaf in pytree.tree_leaves((solution.value, solution.args))):
            raise ValueError(
                "Derivatives works on plain tensors, and this solution belongs to a torch.func transform: apply the "
                "transform to torchimplicit.solve itself"
            )
        if isinstance(solution.problem, Minimum) and solution.problem.eliminate:
            raise ValueError(
                "Derivatives works in coordinates that do not move with the arguments, and under eliminate=True they "
                "move with the constraint: solve the problem without it"
            )
        flat = flatten_problem(solution.problem, detached(solution.value), solution.args, capture=True)
        z = flat.z0.detach().clone()
        if flat.layout.complex:
            raise ValueError(
                "Derivatives works on real states: state the problem in the real view of its complex state "
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
        """Right-hand sides so far."""
        return dict(self._shared.solves)

    @property
    def report(self) -> Report | None:
        """Of the last linear solve."""
        return self._record.report

    def tangent(self, direction: Direction) -> Any:
        """The derivative of the solution along ``direction``: 1 solve.

        Args:
            direction: a tangent for each argument, ``None`` for those that do not move.

        Returns:
            a state like :attr:`value`.
        """
        return self._state(self._tangent(self._flat(direction)))

    def tangents(self, directions: Direction) -> Any:
        """The derivatives along k directions: k solves, as one block.

        Args:
            directions: as for :meth:`tangent`, each tensor with the k directions in a dimension before its own.

        Returns:
            a state like :attr:`value`, each tensor with the k directions in dim 0.
        """
        return self._state(self._tangents(self._flat(directions, block=True)))

    def along(self, direction: Direction, order: int = 1) -> tuple[Any, ...]:
        """The derivatives of orders 1 to ``order`` along ``direction``: ``order`` solves.

        The n-th solves :math:`A z^{(n)} = -D_n`, where :math:`D_n` is the n-th derivative of the residual along the
        curve :math:`z+\\varepsilon z'+\\dots+\\varepsilon^{n-1}z^{(n-1)}/(n-1)!` at arguments that move by
        :math:`\\varepsilon`: what the derivatives known so far leave over.
        """
        if order < 1:
            raise ValueError(f"order is {order}, and must be at least 1")
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
        """The derivative of the solution in one tensor argument: as many solves as it has entries per sample, or as
        the state has, whichever are fewer.

        Returns:
            a state like :attr:`value`, each tensor with further dimensions like those of one sample of the argument;
            of the whole argument, where that does not carry the batch.
        """
        own = basis(self._problem, argument)
        batch, dim = self._z.shape
        # a cotangent of a tensor that all samples share does not tell them apart
        if own.count <= dim or not (own.batched or batch == 1):
            columns = self._tangents(own.directions)  # [p, batch, dim]
            matrix = columns.permute(1, 2, 0)
        else:
            eye = torch.eye(dim, dtype=self._z.dtype, device=self._z.device)
            rows = self._solved(eye[:, None, :].expand(dim, batch, dim).contiguous(), transposed=True)
            _, pull = vjp(lambda a: self._residual(self._z, *own.replaced(a)), own.tensor)
            vjp_params = torch.func.vmap(lambda g: pull(g)[0], chunk_size=ROWS_AT_ONCE)(rows)
            matrix = torch.stack([own.per_sample(-row) for row in vjp_params], dim=1)
        return self._tensor(matrix, own.shape)

    def gradient(self, loss: Callable[..., Tensor], argument: int = 0) -> Tensor:
        """The gradient of ``loss(z, *args)`` in one argument: 1 solve."""
        own = basis(self._problem, argument)
        slope, direct = self._loss_gradients(loss, own)
        g = self._solved(slope, transposed=True)
        return (direct - self._vjp(g, own)).reshape(own.tensor.shape)

    def hessian_vector(self, loss: Callable[..., Tensor], vector: Tensor, argument: int = 0) -> tuple[Tensor, Tensor]:
        """The gradient of ``loss(z, *args)`` in one argument, and its derivative along ``vector``: 3 solves, 2 beyond
        those of the gradient.

        Args:
            loss: ``loss(z, *args)``, a scalar.
            vector: like the argument.
            argument: its number.
        """
        self._warn_if_rough()
        own = basis(self._problem, argument)
        if vector.shape != own.tensor.shape:
            raise ValueError(
                f"vector has shape {tuple(vector.shape)}, and argument {argument} has {tuple(own.tensor.shape)}"
            )
        slope, direct = self._loss_gradients(loss, own)
        g = self._solved(slope, transposed=True)
        moving = own.direction(vector)
        y = self._tangent(moving)

        def gradients(z: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.grad(self._lagrangian(loss, g, own), argnums=(0, 1))(z, a)

        _, (in_z, in_a) = _directional(gradients, (self._z, own.tensor), (y, vector))
        g_moved = self._solved(in_z, transposed=True)
        return (direct - self._vjp(g, own)), in_a - self._vjp(g_moved, own)

    def hessian(self, loss: Callable[..., Tensor], argument: int = 0) -> Tensor:
        """The Hessian of ``loss(z, *args)`` in one tensor argument of n entries: n + 1 solves.

        Where the argument carries the batch, and the loss is a sum over samples, n are the entries of one sample.

        Returns:
            ``[*argument.shape, *argument.shape]``; where the argument carries the batch,
            ``[batch, *sample.shape, *sample.shape]``.
        """
        self._warn_if_rough()
        own = basis(self._problem, argument)
        slope, _ = self._loss_gradients(loss, own)
        g = self._solved(slope, transposed=True)
        tangents = self._tangents(own.directions)
        lagrangian = self._lagrangian(loss, g, own)
        moves = own.moves

        def image(y: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
            gradients = torch.func.grad(lagrangian, argnums=(0, 1))
            return _directional(gradients, (self._z, own.tensor), (y, a))[1]

        in_z, in_a = torch.func.vmap(image)(tangents, moves)
        found = own.contracted(tangents, in_z) + own.contracted(moves, in_a)
        return found.reshape(*own.lead, *own.shape, *own.shape)

    def second_derivatives(self, argument: int = 0) -> Any:
        """All second derivatives of the solution in one tensor argument of p entries: p solves for the tangents, and
        either p(p+1)/2 for the pairs or n adjoint ones for the n components of the state, whichever are fewer.

        Returns:
            a state like :attr:`value`, each tensor with twice the dimensions of one sample of the argument behind its
            own; of the whole argument, where that does not carry the batch.
        """
        self._warn_if_rough()
        own = basis(self._problem, argument)
        tangents = self._tangents(own.directions)
        batch, dim = self._z.shape
        p = own.count
        if p * (p + 1) // 2 <= dim:
            rows, columns = torch.triu_indices(p, p, device=self._z.device)
            one, other = (tangents[rows], own.moves[rows]), (tangents[columns], own.moves[columns])
            pairs = self._solved(-torch.func.vmap(self._curvature(own))(*one, *other))
            full = pairs.new_zeros(p, p, batch, dim).index_put((rows, columns), pairs)
            full = full.index_put((columns, rows), pairs)
            tensor = full.permute(2, 3, 0, 1)
        else:
            eye = torch.eye(dim, dtype=self._z.dtype, device=self._z.device)
            adjoints = self._solved(eye[:, None, :].expand(dim, batch, dim).contiguous(), transposed=True)

            curvature = torch.func.vmap(self._curvature(own), in_dims=(None, None, 0, 0))
            curved = torch.func.vmap(curvature, in_dims=(0, 0, None, None))(tangents, own.moves, tangents, own.moves)
            tensor = -torch.einsum("kbn,ijbn->bkij", adjoints, curved)
        return self._tensor(tensor, (*own.shape, *own.shape))

    # flat coordinates from here on

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
        """``[batch, dim, ...]``, of which the last dimensions become ``inner``, with the state's structure."""
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
        composed = any(is_transformed(t) for t in tangents)
        found: list[Tensor] = []
        for n in range(1, order + 1):
            if composed:
                found.append(self._solved(-curve.composed(n, self._z, found, tangents, self._problem.params)))
            else:
                found.append(Along.apply(curve, n, self._z, *found, *tangents, *self._problem.params))
        return found

    def _tangent(self, moving: Sequence[Tensor | None]) -> Tensor:
        return self._along(moving, 1)[0]

    def _tangents(self, moving: Sequence[Tensor | None]) -> Tensor:
        """The block ``[k, batch, dim]``."""
        flat = [t for t in moving if t is not None]

        def moved(*tangents: Tensor) -> Tensor:
            parts = iter(tangents)
            one = [None if t is None else next(parts) for t in moving]
            out = jvp(lambda *params: self._residual(self._z, *params), self._problem.params, one)
            assert out is not None
            return out

        return self._solved(-torch.func.vmap(moved)(*flat))

    def _second(self, one: Any, other: Any, y: Tensor, w: Tensor) -> Tensor:
        def residual(e: Tensor, h: Tensor) -> Tensor:
            params = _moved(_moved(self._problem.params, one, e), other, h)
            return self._residual(self._z + e * y + h * w, *params)

        return self._solved(-_mixed(residual, self._z))

    def _curvature(self, own: Basis) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The second derivative of the residual ``[batch, dim]`` along two moves, each a tangent and a direction."""

        def along(y: Tensor, a: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return _mixed(
                lambda e, h: self._residual(self._z + e * y + h * w, *own.replaced(own.tensor + e * a + h * b)),
                self._z,
            )

        return along

    def _vjp(self, g: Tensor, own: Basis) -> Tensor:
        """:math:`R_a^T g`, like the argument."""
        _, pull = vjp(lambda a: self._residual(self._z, *own.replaced(a)), own.tensor)
        return pull(g)[0]

    def _loss_gradients(self, loss: Callable[..., Tensor], own: Basis) -> tuple[Tensor, Tensor]:
        return torch.func.grad(self._lagrangian(loss, None, own), argnums=(0, 1))(self._z, own.tensor)

    def _lagrangian(self, loss: Callable[..., Tensor], g: Tensor | None, own: Basis) -> Callable[..., Tensor]:
        """``loss - <g, R>`` as a function of the flat state and the argument."""

        def value(z: Tensor, a: Tensor) -> Tensor:
            params = own.replaced(a)
            args = self._problem.closure.arguments(params)
            out = loss(self._problem.layout.unflatten(z), *args)
            if out.ndim:
                raise ValueError(f"loss returned a tensor of shape {tuple(out.shape)}, and must return a scalar")
            return out if g is None else out - (g * self._residual(z, *params)).sum()

        return value

    def _warn_if_rough(self) -> None:
        self._linear.smoothness.warn(self._shared.out)


def _moved(params: Sequence[Tensor], moving: Sequence[Tensor | None], e: Tensor) -> tuple[Tensor, ...]:
    return tuple(p if t is None else p + e * t for p, t in zip(params, moving, strict=True))


def _directional(fn: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """Value and derivative along ``tangents``."""
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
