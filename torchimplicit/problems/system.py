"""A problem in flat coordinates: what the solvers iterate on and what the gradients differentiate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.coupling import Coupling, broken_promise
from torchimplicit.linear import LinearOperator, LinearSolution, LinearSolver
from torchimplicit.linear.confirmed import solve_any
from torchimplicit.precision import widened
from torchimplicit.problems.linearization import Linearization, check_unmoved
from torchimplicit.state import Leaves, row_norm, safe_row_norm


class Judgement(NamedTuple):
    """What a system says of a point where its residual does not tell how good it is, as in joint inference: a small
    residual there may stand beside a high cost, and a low cost beside a state that is far from its equilibrium.

    Attributes:
        growth: ``[batch]``, what may not grow without bound; NaN for a state that is no candidate.
        merit: ``[batch]``, what the best iterate has least of, and what an accelerated step may not surely raise.
        merit_error: ``[batch]``, by how much ``merit`` may be too large.
        pace: ``[batch]``, what the plain step of an input multiplies its gradient by.
    """

    growth: Tensor
    merit: Tensor
    merit_error: Tensor
    pace: Tensor


@dataclass(frozen=True)
class Point:
    """What one evaluation tells of a state.

    Attributes:
        z: the state, ``[batch, dim]``.
        residual: the direction of the plain step, ``[batch, dim]``: ``f(z) - z`` for a fixed point, ``-f(z)`` for a
            root, minus the projected gradient for a minimum. Zero at the solution.
        scale: ``[batch]`` or ``[batch, leaves]``, what the relative tolerance multiplies: the size of the terms that
            the residual is the sum of. ``None`` where one evaluation does not tell it: the loop measures it then.
        image: ``z + residual`` where the evaluation gave it, else ``None``.
        energy: ``[batch]``, for a minimum.
        error: like ``scale``, what the tolerance is compared with; ``None``: the norm of the residual.
        noise: ``[batch]``, the size of terms whose rounding is in the residual though they cancel there; ``None``: no
            more than ``scale`` tells.
        product: ``[batch, dim]``, at the first point that a solver sees: :math:`A` times ``residual``, where that is to
            be had.
        judgement: the system's own, by which iterates are compared; ``None``: by what the tolerance is compared with.
    """

    z: Tensor
    residual: Tensor
    scale: Tensor | None = None
    image: Tensor | None = None
    energy: Tensor | None = None
    error: Tensor | None = None
    noise: Tensor | None = None
    product: Tensor | None = None
    judgement: Judgement | None = None

    def size(self) -> Tensor:
        """What the tolerance is compared with, ``[batch]`` or ``[batch, leaves]``."""
        return row_norm(self.residual) if self.error is None else self.error

    def growth_norm(self) -> Tensor:
        """``[batch]``, what may not grow without bound."""
        if self.judgement is not None:
            return self.judgement.growth
        size = self.size()
        return size if size.ndim == 1 else row_norm(size)

    def select(self, mask: Tensor, other: Point) -> Point:
        """This point where ``mask`` (bool ``[batch]``) holds, else ``other``."""
        column = mask[:, None]
        return self._joined(
            other, lambda _, mine, theirs: torch.where(column if mine.ndim == 2 else mask, mine, theirs)
        )

    def changed(self, **values: Any) -> Self:
        """With other values: what ``dataclasses.replace`` does, in a fifth of its time."""
        return type(self)(**{**vars(self), **values})

    def stopped(self, mask: Tensor, other: Point) -> Point:
        """Likewise, of points that no step will be taken from: their residuals, long vectors, count as zero."""
        assert self.judgement is None or self.error is not None  # or nothing would tell the size of the residual
        column = mask[:, None]
        z = torch.where(column, self.z, other.z)
        long = {"z": z, "image": z, "residual": z.new_zeros(1, 1).expand_as(z)}

        def join(name: str, mine: Tensor, theirs: Tensor) -> Tensor:
            return long[name] if name in long else torch.where(column if mine.ndim == 2 else mask, mine, theirs)

        return self._joined(other, join)

    def sizes(self) -> Self:
        """Without its vectors, for its figures alone."""
        nothing = self.z.detach()[:, :0]
        return self.changed(z=nothing, residual=nothing, image=None, product=None, error=self.size())

    def take(self, rows: Tensor) -> Point:
        """The samples ``rows`` (int64 ``[k]``)."""
        return Point(**pytree.tree_map(lambda t: None if t is None else t[rows], vars(self)))

    def put(self, rows: Tensor, other: Point) -> Point:
        """This point with the samples ``rows`` (int64 ``[k]``) taken from ``other``, which holds those alone."""
        return self._joined(other, lambda _, mine, theirs: mine.index_copy(0, rows, theirs))

    def _joined(self, other: Point, join: Callable[[str, Tensor, Tensor], Tensor]) -> Point:
        def joined(name: str, mine: Any, theirs: Any) -> Any:
            if mine is None or theirs is None:
                return None
            if isinstance(mine, Judgement):
                return Judgement(*(join(name, *pair) for pair in zip(mine, theirs, strict=True)))
            return join(name, mine, theirs)

        return Point(**{name: joined(name, mine, vars(other)[name]) for name, mine in vars(self).items()})


UNLIKE = 2.0**4
"""Beyond this factor between the sizes of its leaves, a linear system is solved in units of each leaf's size."""


@dataclass(frozen=True, kw_only=True)
class System(ABC):
    """A problem as :math:`R(z, params) = 0` over flat states ``[batch, dim]`` and a tuple of parameter tensors.

    The parameters are all tensors that the problem depends on: those of the arguments, those of a constraint, and
    those that the user's function captured. With :math:`A = \\partial R/\\partial z`, the solution's derivative is
    :math:`-A^{-1} R_\\theta`.

    Attributes:
        fn: the user's function, ``(z, *params) -> [batch, dim]`` or energies ``[batch]``.
        row_params: which parameters carry the batch in dim 0; ``None`` where rows cannot be evaluated apart.
        coupling: which rows may depend on each other; ``None`` where they cannot.
        leaves: of the state, each of which is judged by itself; ``None``: the state is judged as a whole.
    """

    fn: Callable[..., Tensor]
    row_params: tuple[bool, ...] | None = None
    coupling: Coupling | None = None
    leaves: Leaves | None = None

    @property
    def separate(self) -> Leaves | None:
        """The parts of the state that are judged by themselves; ``None`` for a state that is one."""
        return self.leaves if self.leaves is not None and len(self.leaves.sizes) > 1 else None

    @cached_property
    def norms(self) -> Callable[[Tensor], Tensor]:
        """The norm of each part of ``v`` (``[..., dim]``): ``[..., parts]``, or ``[...]`` where the state is one."""
        return row_norm if self.separate is None else self.separate.norms

    @property
    def safe_norms(self) -> Callable[[Tensor], Tensor]:
        """The same, where squares would underflow or overflow."""
        return safe_row_norm if self.separate is None else self.separate.safe_norms

    @abstractmethod
    def at(self, z: Tensor, params: Sequence[Tensor], value: Tensor | None = None) -> Point:
        """One evaluation; differentiable by autograd where grad mode is on.

        Args:
            value: the function's value at ``z``, where it is known already.
        """

    @abstractmethod
    def residual(self, z: Tensor, *params: Tensor) -> Tensor:
        """:math:`R`, differentiable to any order by composable transforms."""

    @abstractmethod
    def linearize(self, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool] | None = None) -> Linearization:
        """The tape from which :meth:`operator` and :meth:`vjp_params` take their products; one evaluation."""

    @abstractmethod
    def operator(self, tape: Linearization, transposed: bool) -> LinearOperator:
        """:math:`A` or :math:`A^T` at the tape's point."""

    def jacobian(self, tape: Linearization, transposed: bool, *, symmetric: bool = False) -> LinearOperator:
        """Of what the tape holds, at its point, or its transpose."""
        return LinearOperator(
            product=tape.vjp if transposed else tape.jvp,
            transposed_product=tape.jvp if transposed else tape.vjp,
            block_product=tape.vjp_block if transposed else tape.jvp_block,
            batch=tape.z.shape[0],
            dim=tape.z.shape[1],
            dtype=tape.z.dtype,
            device=tape.z.device,
            symmetric=symmetric,
            transposed=transposed,
            restrict=self._restricted(tape, transposed),
            coupling=self.coupling,
        )

    def seen(self, tape: Linearization) -> Point:
        """The tape's point, from what the tape has evaluated."""
        return Point(tape.z.detach(), -tape.out.detach())

    @abstractmethod
    def vjp_params(self, tape: Linearization, g: Tensor) -> list[Tensor | None]:
        """:math:`-R_\\theta^T g` for each parameter that needs a gradient."""

    def on_tape(self, tape: Linearization) -> Tensor:
        """:math:`R` as it was recorded; differentiable in the tape's leaves."""
        return tape.out

    @abstractmethod
    def default_linear_solver(self, dim: int, batch: int) -> LinearSolver:
        """What solves the adjoint system where the user named nothing."""

    def solve_linear(
        self,
        tape: Linearization,
        transposed: bool,
        b: Tensor,
        solver: LinearSolver,
        shift: Callable[[LinearOperator], Tensor] | None = None,
    ) -> LinearSolution:
        """Solve :math:`A y = b` or :math:`A^T y = b` at the tape's point, for ``b`` of ``[batch, dim]`` or for a block
        ``[k, batch, dim]``. The residuals that are reported are those of the whole batch, leaves of very different size
        each in units of its own.

        Args:
            shift: ``[batch]``, of an operator of that batch: what is added to its diagonal.
        """
        return self._in_units(tape, transposed, b, solver, shift)[0]

    def _in_units(
        self,
        tape: Linearization,
        transposed: bool,
        b: Tensor,
        solver: LinearSolver,
        shift: Callable[[LinearOperator], Tensor] | None,
    ) -> tuple[LinearSolution, Tensor]:
        """The solution, and ``b``, whose product is that in any units."""
        operator = self.operator(tape, transposed)
        size = None if shift is not None or getattr(solver, "preconditioner", None) else self._leaf_sizes(tape.z)
        if size is None:
            return solve_any(solver, operator, b, shift), b
        left, right = self._units(size, transposed)
        found = solve_any(solver, operator.in_units(left, right), left * b)
        return replace(found, value=right * found.value), b

    def _leaf_sizes(self, z: Tensor) -> Tensor | None:
        """``[batch, dim]``, powers of two: the size of the leaf that a number belongs to; ``None`` where leaves do not
        differ much, or there is one."""
        if self.separate is None:
            return None
        norms = self.separate.norms(z)
        sizes = torch.where((norms > 0) & (norms < torch.inf), norms, 1)
        if not bool((sizes.amax(dim=1) > UNLIKE * sizes.amin(dim=1)).any()):
            return None
        powers = torch.exp2(torch.log2(sizes).round()).to(z.dtype)
        each = torch.tensor(self.separate.sizes, device=z.device)
        return powers.repeat_interleave(each, dim=1)

    @staticmethod
    def _units(size: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        """What a residual, and what the solution of a linear system, is multiplied by, for leaves of that size."""
        return (size, 1 / size) if transposed else (1 / size, size)

    def prepare(self, z: Tensor, params: Sequence[Tensor]) -> None:
        """Settle at the solution what must be the same in all of its derivatives."""

    def project(self, z: Tensor, params: Sequence[Tensor]) -> Tensor:
        """The nearest state that satisfies the constraint; ``z`` itself where there is none."""
        return z

    def refined(self, point: Point, before: Point) -> Point:
        """``point`` with what is learned of it from the point that the step to it began at."""
        return point

    def during(self, step: int) -> System:
        """The system as the evaluation of a solver's ``step`` sees it, 0 being the first; itself where the way to the
        solution does not change."""
        return self

    def rows(self, params: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, ...]:
        """The parameters as the samples ``rows`` see them."""
        assert self.row_params is not None
        return tuple(p[rows] if batched else p for p, batched in zip(params, self.row_params, strict=True))

    def vmapped(self, size: int, dims: Sequence[int | None]) -> Self:
        """The system of ``size`` copies, stacked along the batch, where parameter i has its copies in ``dims[i]``."""
        return replace(self, fn=vmapped(self.fn, size, tuple(dims)), row_params=None)

    def sizes(self, point: Point, params: Sequence[Tensor]) -> tuple[float, float]:
        """The largest number of the state, and of what the residual is made of, at ``point``; zero where it is not
        known."""
        return largest(point.z), largest(point.residual)

    def in_units(self, state: float, size: float) -> Self | None:
        """The same problem for a state that is divided by ``state``, what its residual is made of by ``size``; ``None``
        where that is not to be had."""
        return None

    def residual_unit(self, state: float, size: float) -> float:
        """What the residual is divided by then."""
        return size

    def joined(self, rows: int) -> Self | None:
        """The same problem with ``rows`` neighbouring samples as one, each of them judged by itself; ``None`` where
        that is not to be had."""
        fn, sizes = self.fn, () if self.leaves is None else self.leaves.sizes

        def together(z: Tensor, *params: Tensor) -> Tensor:
            out = fn(z.reshape(len(z) * rows, -1), *params)
            return out.reshape(len(z), -1) if out.ndim == 2 else out.reshape(len(z), rows).sum(dim=1)

        many = sizes * rows
        leaves = Leaves(many, pytree.tree_structure((0,) * len(many)))
        return replace(self, fn=together, row_params=None, coupling=None, leaves=leaves)

    def _restricted(self, tape: Linearization, transposed: bool) -> Callable[[Tensor], LinearOperator] | None:
        if self.row_params is None:
            return None

        def restrict(rows: Tensor) -> LinearOperator:
            with explained():
                part = self.linearize(tape.z[rows], self.rows(tape.params, rows))
            check_unmoved(tape.out[rows], part.out, ", or its rows depend on each other and rowwise=True is not true")
            return replace(self.operator(part, transposed), setup_rows=int(rows.shape[0]))

        return restrict


def largest(t: Tensor) -> float:
    """The absolute value of the largest of finite numbers."""
    return float(widened(t.detach()).nan_to_num(0.0, 0.0, 0.0).abs().amax()) if t.numel() else 0.0


@contextmanager
def explained() -> Iterator[None]:
    """Says what to do where a function fails because finished samples have left its batch."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        broken_promise(f"f failed on part of the batch: {error}", error)


def vmapped(fn: Callable[..., Tensor], size: int, dims: tuple[int | None, ...]) -> Callable[..., Tensor]:
    """``fn`` of ``size`` copies, stacked along the batch, where parameter i has its copies in ``dims[i]``."""

    def stacked(z: Tensor | tuple[Tensor, ...], *params: Tensor) -> Any:
        copies = pytree.tree_map(lambda z: z.reshape(size, len(z) // size, *z.shape[1:]), z)
        out = torch.vmap(fn, in_dims=(0, *dims), randomness="different")(copies, *params)
        return pytree.tree_map(lambda out: out.reshape(-1, *out.shape[2:]), out)

    return stacked


def vjp(fn: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """``torch.func.vjp``, typed."""
    out, pull = torch.func.vjp(fn, *primals)[:2]
    return out, pull
