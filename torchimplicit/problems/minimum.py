"""Minima of an energy, free or under constraints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, final, get_args

import torch
from torch import Tensor

from torchimplicit.constraints import Constraint, LinearEquality, check_plane, onto_plane, project, unit_normal
from torchimplicit.coordinates import Coordinates, Metric, Reflection
from torchimplicit.linear import MINRES, Dense, KrylovOrDense, LinearOperator, LinearSolution, LinearSolver
from torchimplicit.linear.confirmed import block_product, solve_any
from torchimplicit.precision import UnitRows, safe_norm
from torchimplicit.problems.base import Problem, check_function
from torchimplicit.problems.linearization import Linearization
from torchimplicit.problems.per_sample import PerSample, column, flat_tree, stacked, taken
from torchimplicit.problems.projected import ProjectedSystem
from torchimplicit.problems.sets import FlatSet, flat_set
from torchimplicit.problems.system import Point, System, largest, recorded_slope, slope, vmapped
from torchimplicit.solution import Status
from torchimplicit.state import Layout


@final
@dataclass(frozen=True)
class Minimum(Problem):
    """A minimum of ``energy(z, *args)``, under ``constraint`` if there is one.

    Args:
        energy: ``energy(z, *args)``, returning one energy per sample, ``[batch]``; a scalar if not batched. It has to
            be twice differentiable where the solution is differentiated.
        constraint: a :class:`LinearEquality`, :class:`LinearEqualities`, :class:`LinearInequalities`, :class:`Box`,
            :class:`NonNegative`, :class:`Simplex`, :class:`L2Ball`, :class:`Projection` or :class:`Proximal`; a
            tuple of linear ones (all but the last three), and one :class:`L2Ball` at most, which have to hold together;
            or ``None``. A start that violates it is projected onto it (in the metric, if there is one).
        batched, rowwise: see :class:`FixedPoint`.
        metric: a :class:`Metric`, in whose coordinates the solver works; ``None``: in the state's own. Steps,
            tolerances, Hessians and eigenvalues then refer to these coordinates; the solution and its derivatives refer
            to the state's.
        eliminate: whether a :class:`LinearEquality` is eliminated, so that the solver works without a constraint in an
            orthonormal basis of :math:`w^\\perp`, with one dimension less, instead of projecting. The Hessian is then
            regular wherever the minimum is, as some factorizations need.

    Raises:
        TypeError: ``energy`` is not callable, or ``constraint`` or ``metric`` is of another type.
        ValueError: ``metric`` or ``eliminate`` does not go with the constraint.
    """

    energy: Callable[..., Any]
    constraint: Constraint | tuple[Constraint, ...] | FlatSet | None = None
    batched: bool = True
    rowwise: bool = False
    metric: Metric | None = None
    eliminate: bool = False
    by_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_function(self.energy, "energy")
        if isinstance(self.constraint, tuple) and len(self.constraint) < 2:
            object.__setattr__(self, "constraint", self.constraint[0] if self.constraint else None)
        for part in self._parts:
            if not isinstance(part, (FlatSet, *get_args(Constraint))):
                names = ", ".join(kind.__name__ for kind in get_args(Constraint))
                raise TypeError(
                    f"constraint must be one of {names}, a tuple of these, or None, not {type(part).__name__}"
                )
        if self.on_set and (self.metric is not None or self.eliminate):
            raise ValueError(
                "metric and eliminate go with a single LinearEquality: under other constraints solvers work in the "
                "state's own coordinates"
            )
        if self.metric is not None and not isinstance(self.metric, Metric):
            raise TypeError(f"metric must be a Metric, as Metric(S), or None, not {type(self.metric).__name__}")
        if self.eliminate and self.constraint is None:
            raise ValueError("eliminate=True eliminates the constraint, but there is no constraint")

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.constraint if isinstance(self.constraint, tuple) else (self.constraint,) if self.constraint else ()

    @property
    def on_set(self) -> bool:
        """True if the constraint is more than a single :class:`LinearEquality`; it is then kept by projections onto a
        set (:class:`ProjectedSystem`)."""
        return len(self._parts) > 1 or (len(self._parts) == 1 and not isinstance(self._parts[0], LinearEquality))

    def explain(self, status: Status) -> str:
        if not self.on_set or status != Status.BREAKDOWN:
            return ""
        return "An energy that is unbounded below on its set, as in an unbounded linear program, has no minimum"

    def flattened(self, layout: Layout, flat: Tensor) -> Self:
        if not self.on_set:
            return self
        on = flat_set(layout, self.constraint, len(flat))
        on.check(flat)
        return replace(self, constraint=on)

    def layout(self, z0: Any) -> Layout:
        layout = Layout.of(z0, self.batched)
        if self.metric is None and not self.eliminate:
            return layout
        rows = len(layout.flatten(z0, "z0"))
        if self.metric is not None:
            fits = (rows if self.batched else 1, layout.dim, layout.dim)
            if self.metric.root.shape not in (fits, (1, *fits[1:])):
                raise ValueError(
                    f"Metric.matrix has shape {tuple(self.metric.matrix.shape)}, but the state has {layout.dim} "
                    f"numbers for each of {rows} samples: give {fits[1:]}, or {fits} for one per sample"
                )
        reflection = None
        if self.eliminate:
            reflection = Reflection.of(*unit_normal(*self._plane(layout, rows)))
        return replace(layout, coordinates=Coordinates(self.metric, reflection))

    def own_coordinates(self) -> Self:
        return replace(self, metric=None, eliminate=False)

    def _plane(self, layout: Layout, rows: int) -> tuple[Tensor, Tensor]:
        """The weight ``[batch or 1, dim]``, in the metric's coordinates, and the total ``[batch or 1, 1]``."""
        assert isinstance(self.constraint, LinearEquality)
        weight = flat_tree(layout, self.constraint.weight, rows, "the constraint's weight")
        total = column(layout, self.constraint.total, rows, "the constraint's total")
        check_plane(weight, total)
        return weight if self.metric is None else self.metric.covector(weight), total

    @property
    def function(self) -> Callable[..., Any]:
        return self.energy

    def flat_output(self, layout: Layout, output: Any, rows: int, cast: bool) -> Tensor:
        expected = (rows,) if layout.batched else ()
        if not isinstance(output, Tensor):
            raise TypeError(f"energy must return a tensor, but it returned {type(output).__name__}")
        if tuple(output.shape) != expected:
            raise ValueError(
                f"energy returned shape {tuple(output.shape)}, but must return {expected}: "
                + ("one energy per sample" if layout.batched else "a scalar, since the problem is not batched")
            )
        if output.dtype != layout.dtype and not cast:
            raise ValueError(f"energy returned {output.dtype} for a state of {layout.dtype}: keep the dtype")
        return output.to(layout.dtype).reshape(rows)

    def constraint_tensors(self, layout: Layout, rows: int) -> tuple[Tensor, ...]:
        if isinstance(self.constraint, FlatSet):
            unknown = torch.full((rows, 1), torch.nan, dtype=layout.dtype, device=layout.device)
            return (*self.constraint.tensors, unknown)  # the step size, measured later: see ProjectedSystem.step
        return () if self.constraint is None or self.eliminate else self._plane(layout, rows)

    def system(
        self, fn: Callable[..., Tensor], row_params: tuple[bool, ...] | None, constraint: slice, layout: Layout
    ) -> System:
        if isinstance(self.constraint, FlatSet):
            return ProjectedSystem.of(fn, self.constraint, constraint, row_params=row_params, leaves=layout.leaves)
        hyperplane = taken(constraint) if self.constraint and not self.eliminate else None
        return MinimumSystem(fn=fn, row_params=row_params, leaves=layout.leaves, hyperplane=hyperplane)


@final
@dataclass(frozen=True, kw_only=True)
class MinimumSystem(System):
    """Stationarity of an energy, on a hyperplane :math:`\\langle n, z\\rangle = c` with :math:`\\lVert n\\rVert = 1`.

    :math:`R = P\\nabla E + \\sigma n(\\langle n, z\\rangle - c)` with :math:`P = I - nn^T`, so
    :math:`A = PH + \\sigma nn^T`. On the range of :math:`P`, A is the symmetric :math:`PHP`; the component along
    :math:`n` follows by substitution. Without a constraint, :math:`R = \\nabla E` and :math:`A = H`.

    Attributes:
        hyperplane: picks the weight ``[rows or 1, dim]`` and the total ``[rows or 1, 1]`` out of the parameters;
            ``None`` without a constraint.
        residuals: ``(z, *params) -> [batch, m]``, where the energies are half the sums of their squares; else ``None``.
        stiffness: :math:`\\sigma`, about the size of the Hessian, so that neither part of R is lost in the rounding of
            the other.
    """

    hyperplane: PerSample | None = None
    residuals: Callable[..., Tensor] | None = None
    stiffness: Stiffness = field(default_factory=lambda: Stiffness())

    def at(self, z: Tensor, params: Sequence[Tensor], value: Tensor | None = None) -> Point:
        if torch.is_grad_enabled():
            gradient, energy = slope(self.fn, z, params)
        else:  # plain autograd: a functional transform costs more than a small energy
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                energy = self.fn(leaf, *params)
                gradient = recorded_slope(energy, leaf, create_graph=False)
            energy = energy.detach()
        # the energy may be NaN or infinite where its gradient is finite: such a state must not be accepted
        gradient = torch.where(torch.isfinite(energy)[:, None], gradient, torch.nan)
        if self.hyperplane is None:
            return Point(z, -gradient, energy=energy)
        normal, _ = self._plane(z, params)
        # the component along n, of which the projection leaves the rounding, may be large
        return Point(z, -project(gradient, normal), energy=energy, noise=self.norms(gradient))

    def residual(self, z: Tensor, *params: Tensor) -> Tensor:
        return self._constrain(z, slope(self.fn, z, params)[0], params)

    def linearize(self, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool] | None = None) -> Linearization:
        def core(z: Tensor, *params: Tensor) -> Tensor:
            return recorded_slope(self.fn(z, *params), z, create_graph=True)

        tape = Linearization(core, z, params, needs_grad, self.leaves)
        if self.hyperplane is not None and self.stiffness.value is None:
            self.stiffness.value = 2.0 ** math.frexp(self._hessian_size(tape))[1]
        return tape

    def _hessian_size(self, tape: Linearization) -> float:
        """The largest norm of the Hessian times a vector with a component along n and one across it; .5 if that is
        zero or not finite."""
        normal = self._plane(tape.z, tape.params)[0].detach()
        image = tape.vjp(normal + project(torch.ones_like(tape.z), normal) / tape.z.shape[1] ** 0.5)
        size = float(safe_norm(image).nan_to_num(0.0, 0.0, 0.0).amax()) if image.numel() else 0.0
        return size if 0 < size < math.inf else 0.5

    def prepare(self, z: Tensor, params: Sequence[Tensor]) -> None:
        if self.hyperplane is not None and self.stiffness.value is None:
            self.linearize(z, params)

    def operator(self, tape: Linearization, transposed: bool) -> LinearOperator:
        hessian = LinearOperator(
            product=tape.vjp,
            transposed_product=tape.vjp,
            block_product=tape.vjp_block,
            batch=tape.z.shape[0],
            dim=tape.z.shape[1],
            dtype=tape.z.dtype,
            device=tape.z.device,
            symmetric=True,
            restrict=self._restricted(tape, transposed),
            coupling=self.coupling,
        )
        if self.hyperplane is None:
            return hessian
        null = self._plane(tape.z, tape.params)[0].detach()

        def projected(of_h: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda v: project(of_h(project(v, null)), null)

        product = projected(tape.vjp)
        return replace(
            hessian,
            product=product,
            transposed_product=product,
            block_product=projected(tape.vjp_block),
            null=null,
            unprojected=hessian,
        )

    def solve_linear(
        self,
        tape: Linearization,
        transposed: bool,
        b: Tensor,
        solver: LinearSolver,
        shift: Callable[[LinearOperator], Tensor] | None = None,
    ) -> LinearSolution:
        operator = self.operator(tape, transposed)
        normal = operator.null
        if normal is None:
            return _with_saddles(self._in_units(tape, transposed, b, solver, shift), operator, b, shift is None)
        # A = PH + s nn^T is block triangular in the components along n and across it:
        #   A y = b:   y_n = b_n / s,               PHP y_P = P(b - H y_n)
        #   A^T y = b: PHP y_P = P b,               y_n = (b_n - n^T H y_P) / s
        hessian_product = tape.vjp if b.ndim == 2 else tape.vjp_block
        along = (b * normal).sum(dim=-1, keepdim=True) * normal
        stiffness = self.stiffness.known
        right = b - along if transposed else project(b - hessian_product(along / stiffness), normal)
        solution = _with_saddles(solve_any(solver, operator, right, shift), operator, right, shift is None)
        if transposed:
            along = along - (hessian_product(solution.value) * normal).sum(dim=-1, keepdim=True) * normal
        return replace(solution, value=solution.value + along / stiffness)

    def seen(self, tape: Linearization) -> Point:
        z, gradient = tape.z.detach(), tape.out.detach()
        if self.hyperplane is None:
            return Point(z, -gradient)
        normal = self._plane(z, tape.params)[0].detach()
        return Point(z, -project(gradient, normal), noise=self.norms(gradient))

    def sizes(self, point: Point, params: Sequence[Tensor], first: Tensor | None = None) -> tuple[float, float]:
        """For least squares, the largest modulus of the state and of the residuals, of which the energy holds
        squares."""
        if self.residuals is None:
            return super().sizes(point, params, first)
        with torch.no_grad():
            at = point.z if first is None else torch.zeros_like(point.z)
            return largest(point.z), largest(self.residuals(at, *params))

    def in_units(self, state: float, size: float) -> Self:
        fn, residuals, plane = self.fn, self.residuals, self.hyperplane

        def energy(z: Tensor, *params: Tensor) -> Tensor:
            return fn(z * state, *params) / state / size

        def part(z: Tensor, *params: Tensor) -> Tensor:
            return residuals(z * state, *params) / size  # type: ignore[misc]

        def scaled_plane(rows: int, *params: Tensor) -> tuple[Tensor, ...]:
            weight, total = plane(rows, *params)  # type: ignore[misc]
            return weight, total / state

        changes: dict[str, Any] = {"stiffness": Stiffness()}
        if residuals is not None:
            changes |= {"residuals": part, "fn": lambda z, *params: 0.5 * part(z, *params).square().sum(dim=1)}
        else:
            changes["fn"] = energy
        return replace(self, hyperplane=None if plane is None else scaled_plane, **changes)

    def residual_unit(self, state: float, size: float) -> float:
        return size if self.residuals is None else size / state * size

    def joined(self, rows: int, z: Tensor, params: Sequence[Tensor]) -> Self | None:
        if self.hyperplane is not None:
            # Many planes are no single plane. The energy of the projected state has the projected gradient, but is flat
            # across the planes, where Newton's steps would grow until the projection loses the state to rounding: a
            # spring of the Hessian's own stiffness, which is at rest on the planes, holds it there.
            measured = replace(self, stiffness=Stiffness(1.0))
            stiffness = measured._hessian_size(measured.linearize(z, params))

            def held_energy(z: Tensor, *params: Tensor) -> Tensor:
                on_plane = self.project(z, params)
                return self.fn(on_plane, *params) + 0.5 * stiffness * (z - on_plane).square().sum(dim=1)

            return replace(self, fn=held_energy, hyperplane=None, residuals=None).joined(rows, z, params)
        together = super().joined(rows, z, params)
        residuals = self.residuals
        if together is None or residuals is None:
            return together

        def of_all(z: Tensor, *params: Tensor) -> Tensor:
            return residuals(z.reshape(len(z) * rows, -1), *params).reshape(len(z), -1)

        return replace(together, residuals=of_all)

    def on_tape(self, tape: Linearization) -> Tensor:
        return self._constrain(tape.z, tape.out, tape.params)

    def vjp_params(self, tape: Linearization, g: Tensor) -> list[Tensor | None]:
        with torch.enable_grad():
            out = self._constrain(tape.z.detach(), tape.out, tape.params)
        return tape.vjp_params(-g, out)

    def vjp_bordered(self, tape: Linearization, g: Tensor) -> list[Tensor | None]:
        """:math:`-R_\\theta^T g` on a plane, for g ``[batch, dim + 1]`` that ends with the multiplier's part, of
        :math:`R=(P\\nabla E,\\langle n,z\\rangle-c)`: nothing has to be weighed against the Hessian."""
        with torch.enable_grad():
            normal, offset = self._plane(tape.z, tape.params)
            outside = (tape.z.detach() * normal).sum(dim=1, keepdim=True) - offset
            out = torch.cat((project(tape.out, normal), outside), dim=1)
        return tape.vjp_params(-g, out)

    def normal(self, z: Tensor, params: Sequence[Tensor]) -> Tensor:
        """n, ``[batch or 1, dim]``."""
        return self._plane(z, params)[0]

    @staticmethod
    def _units(size: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        return size, size  # the same on both sides, which keeps the Hessian symmetric

    def default_linear_solver(self, dim: int, batch: int) -> LinearSolver:
        return Dense() if dim <= 128 and batch * dim * dim <= 2**22 else KrylovOrDense(krylov=MINRES())

    def project(self, z: Tensor, params: Sequence[Tensor]) -> Tensor:
        return z if self.hyperplane is None else onto_plane(z, *self._plane(z, params))

    def vmapped(self, size: int, dims: Sequence[int | None]) -> Self:
        plane = None if self.hyperplane is None else stacked(self.hyperplane, size, tuple(dims))
        residuals = None if self.residuals is None else vmapped(self.residuals, size, tuple(dims))
        return replace(super().vmapped(size, dims), hyperplane=plane, residuals=residuals)

    def lagrangian(self, z: Tensor, params: Sequence[Tensor], tilt: Tensor | None = None) -> Tensor:
        """The Lagrangian ``[batch]``: the energy plus the fixed multiplier times the violation of the constraint.

        At a minimum its gradient in the parameters is that of the minimal value (envelope theorem).

        Args:
            z: a minimum of the energy plus ``<tilt, z>``, ``[batch, dim]``.
            params: the parameters.
            tilt: ``[batch, dim]``; ``None`` for zero.
        """
        energy = self.fn(z, *params)
        if self.hyperplane is None:
            return energy
        normal, offset = self._plane(z, params)
        with torch.no_grad():
            leaf = z.detach().requires_grad_()
            with torch.enable_grad():
                gradient = recorded_slope(self.fn(leaf, *params), leaf, create_graph=False)
            if tilt is not None:
                gradient = gradient + tilt
            multiplier = -(gradient * normal).sum(dim=1)
        return energy + multiplier * ((z * normal).sum(dim=1) - offset[:, 0])

    def _plane(self, z: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The unit normal ``[rows or 1, dim]`` and the offset ``[rows or 1, 1]`` of the hyperplane."""
        assert self.hyperplane is not None
        weight, total = self.hyperplane(z.shape[0], *params)
        return unit_normal(weight, total)

    def _constrain(self, z: Tensor, gradient: Tensor, params: Sequence[Tensor]) -> Tensor:
        if self.hyperplane is None:
            return gradient
        normal, offset = self._plane(z, params)
        outside = (z * normal).sum(dim=1, keepdim=True) - offset
        return project(gradient, normal) + self.stiffness.known * outside * normal


@dataclass
class Stiffness:
    """The number :math:`\\sigma` of one solution. Its value does not matter to the derivatives, but it has to be the
    same in all of them."""

    value: float | None = None

    @property
    def known(self) -> float:
        """The number, which is fixed from now on."""
        if self.value is None:
            self.value = 1.0
        return self.value


def _with_saddles(
    solution: LinearSolution, operator: LinearOperator, b: Tensor, unshifted: bool = True
) -> LinearSolution:
    """Set the status of samples at a saddle, where the Hessian has a negative eigenvalue.

    The linear solver may have found negative curvature: :class:`Dense` does wherever there is any, :class:`MINRES` and
    :class:`CG` where the right-hand side has a component of it. The solution y proves it by
    :math:`y^T A y = y^T b < 0`. Where the solver does not look for it, or has broken down, one more product gives A on
    the span of y and b, which may prove it too.

    Args:
        solution: the solution of A y = b.
        operator: A, symmetric.
        b: ``[batch, dim]`` or ``[k, batch, dim]``.
        unshifted: whether A is the Hessian itself, with nothing added to it.
    """
    report, coupling = solution.report, operator.coupling
    rows = coupling.rows if coupling is not None and coupling.found else 1  # samples that share one Hessian
    seek = unshifted and (report.curvature is None or bool((report.status == Status.BREAKDOWN).any()))

    def unit(v: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors and their lengths."""
        whole = UnitRows.of(v.reshape(*v.shape[:-2], operator.batch // rows, rows * v.shape[-1]))
        size = torch.linalg.vector_norm(whole.unit, dim=-1, keepdim=True)
        return whole.unit / torch.where(size > 0, size, 1), size / whole.factor

    (y, length), (right, scale) = unit(solution.value), unit(b)
    relative = report.residual.nan_to_num(torch.inf).reshape(-1, rows).amax(dim=1)
    solved = relative <= 1e-2  # only then does b stand for A y
    y = torch.where(solved[:, None], y, 0)
    across = (y * right).sum(dim=-1)
    lift = torch.where(solved & (length > 0).squeeze(-1), (scale / length).squeeze(-1), 0)  # A y = lift * right
    # the residual makes an error of its own size in the curvature; ten times that has to be negative
    error = torch.clamp(10 * relative, torch.finfo(across.dtype).eps ** 0.5, 0.1).to(across.dtype)
    curvature, proved = lift * across, across < -error
    if seek:
        image = (operator.product if b.ndim == 2 else block_product(operator))(right.reshape(b.shape))
        image = image.reshape(right.shape)
        along, size = (right * image).sum(dim=-1), torch.linalg.vector_norm(image, dim=-1)
        # the 2 x 2 matrix of A in an orthonormal basis of span(b, y), and its smaller eigenvalue
        besides = (1 - across.square()).clamp_min(error)
        mixed = (lift - across * along) / besides.sqrt()
        other = across * (across * along - lift) / besides
        least = 0.5 * (along + other) - torch.hypot(0.5 * (along - other), mixed)
        sure = least < -(error / besides) * (size + lift)
        curvature, proved = torch.where(sure, least, curvature), proved | sure
        report = replace(report, evaluations=report.evaluations + (1.0 if b.ndim == 2 else float(len(b))))
    curvature = curvature.masked_fill(~proved, torch.inf)
    if curvature.ndim == 2:
        curvature = curvature.amin(dim=0)
    curvature = curvature.repeat_interleave(rows, dim=0)
    if report.curvature is not None:
        curvature = report.curvature.where(report.curvature < 0, curvature)
    saddle = curvature < 0
    status = report.status.masked_fill(saddle, int(Status.SADDLE))
    curvature = curvature.masked_fill(~saddle, torch.nan)
    return replace(solution, report=replace(report, status=status, curvature=curvature))
