"""A problem in flat coordinates: the solvers iterate on it, and the gradients differentiate it."""

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

from torchimplicit import records
from torchimplicit.coupling import Coupling, broken_promise
from torchimplicit.linear import LinearOperator, LinearSolution, LinearSolver
from torchimplicit.linear.confirmed import solve_any
from torchimplicit.precision import widened
from torchimplicit.problems.linearization import Linearization, check_unmoved
from torchimplicit.state import Leaves, row_norm, safe_row_norm


class Judgement(NamedTuple):
    """A system's own judgement of a point, where the residual does not tell how good it is.

    In joint inference a point may have a small residual and a high cost, or a low cost and a state far from
    equilibrium.

    Attributes:
        growth: ``[batch]``, the number by which divergence is detected; NaN for a state that is no candidate.
        merit: ``[batch]``, the best iterate is the one with the smallest merit, and an accelerated step that raises it
            for sure is taken back.
        merit_error: ``[batch]``, by how much ``merit`` may be too large.
        pace: ``[batch]``, what the plain step of an input multiplies its gradient by.
    """

    growth: Tensor
    merit: Tensor
    merit_error: Tensor
    pace: Tensor


@dataclass(frozen=True)
class Point:
    """A state with what one evaluation tells of it.

    Attributes:
        z: the state, ``[batch, dim]``.
        residual: the direction of the plain step, ``[batch, dim]``: ``f(z) - z`` for a fixed point, ``-f(z)`` for a
            root, minus the projected gradient for a minimum. Zero at the solution.
        scale: ``[batch]`` or ``[batch, leaves]``, the size of the terms that the residual sums, which the relative
            tolerance multiplies. ``None`` where an evaluation does not tell it: then the loop measures it.
        image: ``z + residual`` where the evaluation gave it, else ``None``.
        energy: ``[batch]``, for a minimum.
        error: shaped like ``scale``, the number that is compared with the tolerance; ``None``: the norm of the
            residual.
        noise: ``[batch]``, the size of terms that cancel in the residual and leave their rounding there; ``None``: none
            that ``scale`` does not include.
        product: ``[batch, dim]``, :math:`A` times ``residual``, at the first point that a solver sees and where it is
            available.
        judgement: how iterates are compared; ``None``: by the number that is compared with the tolerance.
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
        """The number that is compared with the tolerance, ``[batch]`` or ``[batch, leaves]``."""
        return row_norm(self.residual) if self.error is None else self.error

    def growth_norm(self) -> Tensor:
        """The number by which divergence is detected, ``[batch]``."""
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

    changed = records.changed

    def stopped(self, mask: Tensor, other: Point) -> Point:
        """:meth:`select` for points that no step will be taken from: their residual vectors are not kept."""
        assert self.judgement is None or self.error is not None  # or nothing would tell the size of the residual
        column = mask[:, None]
        z = torch.where(column, self.z, other.z)
        long = {"z": z, "image": z, "residual": z.new_zeros(1, 1).expand_as(z)}

        def join(name: str, mine: Tensor, theirs: Tensor) -> Tensor:
            return long[name] if name in long else torch.where(column if mine.ndim == 2 else mask, mine, theirs)

        return self._joined(other, join)

    def sizes(self) -> Self:
        """This point without its vectors, for its figures alone."""
        nothing = self.z.detach()[:, :0]
        return self.changed(z=nothing, residual=nothing, image=None, product=None, error=self.size())

    def take(self, rows: Tensor) -> Point:
        """The point of the samples ``rows`` (int64 ``[k]``)."""
        return Point(**pytree.tree_map(lambda t: None if t is None else t[rows], vars(self)))

    def put(self, rows: Tensor, other: Point) -> Point:
        """This point with the samples ``rows`` (int64 ``[k]``) taken from ``other``, which holds those alone."""
        return self._joined(other, lambda _, mine, theirs: mine.index_copy(0, rows, theirs))

    def _joined(self, other: Point, join: Callable[[str, Tensor, Tensor], Tensor]) -> Point:
        """Combine two points field by field; a field that one of them lacks is lost."""

        def joined(name: str, mine: Any, theirs: Any) -> Any:
            if mine is None or theirs is None:
                return None
            if isinstance(mine, Judgement):
                return Judgement(*(join(name, *pair) for pair in zip(mine, theirs, strict=True)))
            return join(name, mine, theirs)

        return Point(**{name: joined(name, mine, vars(other)[name]) for name, mine in vars(self).items()})


UNLIKE = 2.0**4
"""A linear system is solved in units of each leaf's size where the sizes of the leaves differ by more than this."""


@dataclass(frozen=True, kw_only=True)
class System(ABC):
    """A problem as :math:`R(z, params) = 0` over flat states ``[batch, dim]`` and a tuple of parameter tensors.

    The parameters are all tensors that the problem depends on: those of the arguments, those of a constraint, and
    those that the user's function captured. With :math:`A = \\partial R/\\partial z`, the solution's derivative is
    :math:`-A^{-1} R_\\theta`.

    Attributes:
        fn: the user's function, ``(z, *params) -> [batch, dim]`` or energies ``[batch]``.
        row_params: for each parameter, whether it carries the batch in dim 0; ``None`` where rows cannot be evaluated
            apart.
        coupling: the rows that may depend on each other; ``None`` where none can.
        leaves: the leaves of the state, each of which is judged by itself; ``None``: the state is judged as a whole.
    """

    fn: Callable[..., Tensor]
    row_params: tuple[bool, ...] | None = None
    coupling: Coupling | None = None
    leaves: Leaves | None = None

    @property
    def separate(self) -> Leaves | None:
        """The leaves that are judged by themselves; ``None`` for a state of a single one."""
        return self.leaves if self.leaves is not None and len(self.leaves.sizes) > 1 else None

    @cached_property
    def norms(self) -> Callable[[Tensor], Tensor]:
        """The function that takes ``v`` (``[..., dim]``) to the norms of its leaves, ``[..., leaves]``; to one norm,
        ``[...]``, where the state is a single leaf."""
        return row_norm if self.separate is None else self.separate.norms

    @property
    def safe_norms(self) -> Callable[[Tensor], Tensor]:
        """:attr:`norms` for vectors whose squares would underflow or overflow."""
        return safe_row_norm if self.separate is None else self.separate.safe_norms

    @abstractmethod
    def at(self, z: Tensor, params: Sequence[Tensor], value: Tensor | None = None) -> Point:
        """Evaluate the system once; differentiable by autograd where grad mode is on.

        Args:
            z: the state, ``[batch, dim]``.
            params: the parameters.
            value: the function's value at ``z``, where it is known already.
        """

    @abstractmethod
    def residual(self, z: Tensor, *params: Tensor) -> Tensor:
        """:math:`R(z)`, ``[batch, dim]``; differentiable to any order by composable transforms."""

    @abstractmethod
    def linearize(self, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool] | None = None) -> Linearization:
        """Evaluate once and record: :meth:`operator` and :meth:`vjp_params` take their products over this tape.

        Args:
            z: where, ``[batch, dim]``.
            params: the parameters.
            needs_grad: for each of them, whether :meth:`vjp_params` may be asked for it; ``None``: for none.
        """

    @abstractmethod
    def operator(self, tape: Linearization, transposed: bool) -> LinearOperator:
        """:math:`A` or :math:`A^T` at the tape's point."""

    def jacobian(self, tape: Linearization, transposed: bool, *, symmetric: bool = False) -> LinearOperator:
        """The Jacobian of the recorded function at the tape's point, or its transpose."""
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
        """The :class:`Point` of the tape, without another evaluation."""
        return Point(tape.z.detach(), -tape.out.detach())

    @abstractmethod
    def vjp_params(self, tape: Linearization, g: Tensor) -> list[Tensor | None]:
        """:math:`-R_\\theta^T g` for each parameter that needs a gradient, ``None`` for the others."""

    def on_tape(self, tape: Linearization) -> Tensor:
        """:math:`R` as it was recorded; differentiable in the tape's leaves."""
        return tape.out

    @abstractmethod
    def default_linear_solver(self, dim: int, batch: int) -> LinearSolver:
        """The solver of the adjoint system where the user named none."""

    def solve_linear(
        self,
        tape: Linearization,
        transposed: bool,
        b: Tensor,
        solver: LinearSolver,
        shift: Callable[[LinearOperator], Tensor] | None = None,
    ) -> LinearSolution:
        """Solve :math:`A y = b` or :math:`A^T y = b` at the tape's point.

        The reported residuals are those of the whole batch; where leaves differ much in size, each is in its own unit.

        Args:
            tape: the recorded evaluation.
            transposed: whether to solve with :math:`A^T`.
            b: ``[batch, dim]``, or a block ``[k, batch, dim]``.
            solver: the linear solver.
            shift: see :func:`~torchimplicit.linear.confirmed.solve_any`.
        """
        return self._in_units(tape, transposed, b, solver, shift)

    def _in_units(
        self,
        tape: Linearization,
        transposed: bool,
        b: Tensor,
        solver: LinearSolver,
        shift: Callable[[LinearOperator], Tensor] | None,
    ) -> LinearSolution:
        """:meth:`solve_linear`, in units of the leaves' sizes where these differ much."""
        operator = self.operator(tape, transposed)
        # A shift is a multiple of the identity, a preconditioner approximates A, and a truncated series is a function
        # of A, in the state's own units only. Scaling keeps the eigenvalues of a map's Jacobian, by similarity, but not
        # those of a Hessian, by congruence.
        own_units = shift is not None or solver.preconditioned or solver.truncated
        own_units = own_units or (operator.symmetric and solver.by_spectrum)
        size = None if own_units else self._leaf_sizes(tape.z)
        if size is None:
            return solve_any(solver, operator, b, shift)
        left, right = self._units(size, transposed)
        solution = solve_any(solver, operator.in_units(left, right), left * b)
        return replace(solution, value=right * solution.value)

    def _leaf_sizes(self, z: Tensor) -> Tensor | None:
        """For each entry of the state the size of its leaf, rounded to a power of two, ``[batch, dim]``; ``None`` where
        there is a single leaf, or the sizes do not differ much."""
        if self.separate is None:
            return None
        norms = self.separate.norms(z)
        sizes = torch.where((norms > 0) & (norms < torch.inf), norms, 1)
        if not bool((sizes.amax(dim=1) > UNLIKE * sizes.amin(dim=1)).any()):
            return None
        # powers of two, so that scaling and scaling back are exact
        powers = torch.exp2(torch.log2(sizes).round()).to(z.dtype)
        each = torch.tensor(self.separate.sizes, device=z.device)
        return powers.repeat_interleave(each, dim=1)

    @staticmethod
    def _units(size: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        """The diagonals to multiply :math:`A` with from the left and from the right, for leaves of these sizes.

        The residual of a leaf has the leaf's unit, as in :math:`R = z - f(z)`, and a cotangent the inverse of it.
        """
        return (size, 1 / size) if transposed else (1 / size, size)

    def prepare(self, z: Tensor, params: Sequence[Tensor]) -> None:
        """Fix at the solution the constants that must be the same in all of its derivatives."""

    def project(self, z: Tensor, params: Sequence[Tensor]) -> Tensor:
        """The nearest state that satisfies the constraint; ``z`` itself where there is none."""
        return z

    def check_representable(self, params: Sequence[Tensor]) -> None:
        """Raise :class:`UnsupportedDerivativeError` where the dtype cannot hold a number that derivatives need."""

    def remeasured(self, z: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """The parameters with the units of the residual measured at the solution ``z`` and not at the start, if they
        were so small that a residual may have vanished in the rounding of z; else ``None``. Unless autograd records,
        ``params`` are changed in place."""
        return None

    def refined(self, point: Point, before: Point) -> Point:
        """``point`` with what the step from ``before`` tells of it."""
        return point

    def during(self, step: int) -> System:
        """The system for the evaluation in a solver's ``step`` (from 1; 0 is the start), where it changes from step to
        step, as by a schedule; else itself."""
        return self

    def rows(self, params: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, ...]:
        """The parameters as the samples ``rows`` see them."""
        assert self.row_params is not None
        return tuple(p[rows] if batched else p for p, batched in zip(params, self.row_params, strict=True))

    def vmapped(self, size: int, dims: Sequence[int | None]) -> Self:
        """The system of ``size`` copies, stacked along the batch. Parameter i has its copies in dimension ``dims[i]``,
        or is shared (``None``)."""
        return replace(self, fn=vmapped(self.fn, size, tuple(dims)), row_params=None)

    def sizes(self, point: Point, params: Sequence[Tensor], first: Tensor | None = None) -> tuple[float, float]:
        """The largest modulus of the state, and of the terms of the residual, at ``point``; zero where not known.

        Args:
            first: the norms of the residual at the start, which was zero; ``None`` where ``point`` is the first one.
        """
        size = largest(point.residual)
        return largest(point.z), size if first is None else max(size, largest(first))

    def in_units(self, state: float, size: float) -> Self | None:
        """Return the same problem in other units: the state is divided by ``state``, the terms of its residual by
        ``size``. ``None`` where the problem cannot be put so."""
        return None

    def anew(self, params: Sequence[Tensor]) -> None:
        """Forget what was measured in other units."""

    def residual_unit(self, state: float, size: float) -> float:
        """The number that the residual is divided by in the units of :meth:`in_units`."""
        return size

    def joined(self, rows: int, z: Tensor, params: Sequence[Tensor]) -> Self | None:
        """Return the same problem with every ``rows`` neighbouring samples as one system, each still judged by itself;
        ``None`` where the problem cannot be put so.

        Args:
            rows: the number of samples in a system.
            z: the start, ``[batch, dim]``, at which the problem may take its measure.
            params: the system's parameters.
        """
        fn, sizes = self.fn, () if self.leaves is None else self.leaves.sizes

        def together(z: Tensor, *params: Tensor) -> Tensor:
            out = fn(z.reshape(len(z) * rows, -1), *params)
            return out.reshape(len(z), -1) if out.ndim == 2 else out.reshape(len(z), rows).sum(dim=1)

        many = sizes * rows
        leaves = Leaves(many, pytree.tree_structure((0,) * len(many)))
        return replace(self, fn=together, row_params=None, coupling=None, leaves=leaves)

    def _restricted(self, tape: Linearization, transposed: bool) -> Callable[[Tensor], LinearOperator] | None:
        """Makes the operator of some rows, by recording them anew; ``None`` where rows cannot be evaluated apart."""
        if self.row_params is None:
            return None

        def restrict(rows: Tensor) -> LinearOperator:
            with explained():
                part = self.linearize(tape.z[rows], self.rows(tape.params, rows))
            # the part is another evaluation: it must give what the whole gave
            check_unmoved(tape.out[rows], part.out, ", or its rows depend on each other and rowwise=True is not true")
            return replace(self.operator(part, transposed), setup_rows=int(rows.shape[0]))

        return restrict


def largest(t: Tensor) -> float:
    """The largest modulus of the finite entries of ``t``; zero if there are none."""
    return float(widened(t.detach()).nan_to_num(0.0, 0.0, 0.0).abs().amax()) if t.numel() else 0.0


@contextmanager
def explained() -> Iterator[None]:
    """Turn an error of the user's function on a part of the batch into one that explains ``rowwise=True``."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        broken_promise(f"f failed on part of the batch: {error}", error)


def vmapped(fn: Callable[..., Tensor], size: int, dims: tuple[int | None, ...]) -> Callable[..., Tensor]:
    """``fn`` for ``size`` copies that are stacked along the batch. Parameter i has its copies in dimension ``dims[i]``,
    or is shared (``None``)."""

    def stacked(z: Tensor | tuple[Tensor, ...], *params: Tensor) -> Any:
        copies = pytree.tree_map(lambda z: z.reshape(size, len(z) // size, *z.shape[1:]), z)
        out = torch.vmap(fn, in_dims=(0, *dims), randomness="different")(copies, *params)
        return pytree.tree_map(lambda out: out.reshape(-1, *out.shape[2:]), out)

    return stacked


def vjp(fn: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """``torch.func.vjp``, typed."""
    out, pull = torch.func.vjp(fn, *primals)[:2]
    return out, pull


def slope(energies: Callable[..., Tensor], z: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients ``[batch, dim]`` in ``z`` of ``energies`` (``(z, *params) -> [batch]``), and the energies; by
    composable transforms."""

    def total(z: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        energy = energies(z, *params)
        return energy.sum(), energy

    gradient, energy = torch.func.grad(total, has_aux=True)(z, *params)
    return gradient, energy


def recorded_slope(energy: Tensor, z: Tensor, create_graph: bool) -> Tensor:
    """The gradients ``[batch, dim]`` in ``z`` of recorded energies ``[batch]``, by autograd.

    Args:
        energy: the recorded energies.
        z: a leaf of their graph, ``[batch, dim]``.
        create_graph: whether the gradients are recorded themselves.

    Raises:
        ValueError: autograd does not see how the energies depend on anything.
    """
    if not energy.requires_grad:
        raise ValueError(
            "the energy does not depend on the state in a way that autograd can see: return a tensor computed from z "
            "by differentiable operations, without detach or no_grad"
        )
    (gradient,) = torch.autograd.grad(energy.sum(), z, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(z) if gradient is None else gradient
