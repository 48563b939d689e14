"""The point of least energy, free or under a linear constraint."""

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
from torchimplicit.problems.system import Point, System, largest, vmapped
from torchimplicit.solution import Status
from torchimplicit.state import Layout


@final
@dataclass(frozen=True)
class Minimum(Problem):
    """The state of least ``energy(z, *args)``, on ``constraint`` if there is one.

    Args:
        energy: ``energy(z, *args)``, returning one energy per sample, ``[batch]``; a scalar if not batched. Twice
            differentiable where the solution is to be differentiated.
        constraint: a :class:`LinearEquality`, :class:`LinearEqualities`, :class:`LinearInequalities`, :class:`Box`,
            :class:`NonNegative`, :class:`Simplex`, :class:`L2Ball`, :class:`Projection` or :class:`Proximal`; a
            tuple of linear ones (all but the last three), which have to hold together; or ``None``. A start that
            violates it is moved to the nearest state (in the sense of the metric) that does not.
        batched, rowwise: see :class:`FixedPoint`.
        metric: the coordinates to solve in, those of a :class:`Metric`; ``None``: the state's own. Steps, tolerances,
            Hessians and their eigenvalues are theirs; the solution and its derivatives are the state's.
        eliminate: whether the constraint is solved for, so that the solver works freely in an orthonormal basis of
            :math:`w^\\perp` (of one dimension less), rather than kept by projections. The Hessian is then regular where
            the minimum is, which a dense factorization or a solver without projections may want.
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
                "metric and eliminate go with a single LinearEquality: on other constraints a solver works in the "
                "state's own coordinates"
            )
        if self.metric is not None and not isinstance(self.metric, Metric):
            raise TypeError(f"metric must be a Metric, as Metric(S), or None, not {type(self.metric).__name__}")
        if self.eliminate and self.constraint is None:
            raise ValueError("eliminate=True solves the constraint for a coordinate, and there is no constraint")

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.constraint if isinstance(self.constraint, tuple) else (self.constraint,) if self.constraint else ()

    @property
    def on_set(self) -> bool:
        """Whether the constraint is more than a plane, which has a way of its own."""
        return len(self._parts) > 1 or (len(self._parts) == 1 and not isinstance(self._parts[0], LinearEquality))

    def explain(self, status: Status) -> str:
        if not self.on_set or status != Status.BREAKDOWN:
            return ""
        return "An energy that falls without end on its set, as that of an unbounded linear program, has no minimum"

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
                    f"Metric.matrix has shape {tuple(self.metric.matrix.shape)}, and the state has {layout.dim} "
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
            raise TypeError(f"energy must return a tensor, and it returned {type(output).__name__}")
        if tuple(output.shape) != expected:
            raise ValueError(
                f"energy returned shape {tuple(output.shape)} and must return {expected}: "
                + ("one energy per sample" if layout.batched else "a scalar, since the problem is not batched")
            )
        if output.dtype != layout.dtype and not cast:
            raise ValueError(f"energy returned {output.dtype} for a state of {layout.dtype}: keep the dtype")
        return output.to(layout.dtype).reshape(rows)

    def constraint_tensors(self, layout: Layout, rows: int) -> tuple[Tensor, ...]:
        if isinstance(self.constraint, FlatSet):
            unknown = torch.full((rows, 1), torch.nan, dtype=layout.dtype, device=layout.device)
            return (*self.constraint.tensors, unknown)  # of the step: see ProjectedSystem
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
    """Stationarity on the hyperplane :math:`\\langle n, z\\rangle = c`, :math:`\\lVert n\\rVert = 1`.

    :math:`R = P\\nabla E + \\sigma n(\\langle n, z\\rangle - c)` with :math:`P = I - nn^T`, so
    :math:`A = PH + \\sigma nn^T`. On the range of :math:`P` that is the symmetric :math:`PHP`; the component along
    :math:`n` follows by substitution. Without a constraint, :math:`R = \\nabla E` and :math:`A = H`.
    """

    hyperplane: PerSample | None = None
    """Of weight ``[rows or 1, dim]`` and total ``[rows or 1, 1]``."""
    residuals: Callable[..., Tensor] | None = None
    """``(z, *params) -> [batch, m]``, where the energies are half the sums of their squares."""
    stiffness: Stiffness = field(default_factory=lambda: Stiffness())
    """:math:`\\sigma`, about the size of the Hessian, so that neither part of R is lost in the other's rounding."""

    def at(self, z: Tensor, params: Sequence[Tensor], value: Tensor | None = None) -> Point:
        if torch.is_grad_enabled():
            gradient, energy = torch.func.grad(self._total, has_aux=True)(z, *params)
        else:
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                energy = self.fn(leaf, *params)
                gradient = _gradient(energy, leaf, create_graph=False)
            energy = energy.detach()
        # an energy may be NaN or infinite where its gradient is not: such a state is no candidate
        gradient = torch.where(torch.isfinite(energy)[:, None], gradient, torch.nan)
        if self.hyperplane is None:
            return Point(z, -gradient, energy=energy)
        normal, _ = self._plane(z, params)
        return Point(z, -project(gradient, normal), energy=energy, noise=self.norms(gradient))

    def residual(self, z: Tensor, *params: Tensor) -> Tensor:
        gradient, _ = torch.func.grad(self._total, has_aux=True)(z, *params)
        return self._constrain(z, gradient, params)

    def linearize(self, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool] | None = None) -> Linearization:
        def core(z: Tensor, *params: Tensor) -> Tensor:
            return _gradient(self.fn(z, *params), z, create_graph=True)

        tape = Linearization(core, z, params, needs_grad, self.leaves)
        if self.hyperplane is not None and self.stiffness.value is None:
            normal = self._plane(tape.z, tape.params)[0].detach()
            probe = normal + project(torch.ones_like(tape.z), normal) / z.shape[1] ** 0.5
            self.stiffness.measure(tape.vjp(probe))
        return tape

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
            found, right = self._in_units(tape, transposed, b, solver, shift)
            return _told_of_saddles(found, operator, right, shift is None)
        curvature = tape.vjp if b.ndim == 2 else tape.vjp_block
        along = (b * normal).sum(dim=-1, keepdim=True) * normal
        stiffness = self.stiffness.known
        right = b - along if transposed else project(b - curvature(along / stiffness), normal)
        found = _told_of_saddles(solve_any(solver, operator, right, shift), operator, right, shift is None)
        if transposed:
            along = along - (curvature(found.value) * normal).sum(dim=-1, keepdim=True) * normal
        return replace(found, value=found.value + along / stiffness)

    def seen(self, tape: Linearization) -> Point:
        z, gradient = tape.z.detach(), tape.out.detach()
        if self.hyperplane is None:
            return Point(z, -gradient)
        normal = self._plane(z, tape.params)[0].detach()
        return Point(z, -project(gradient, normal), noise=self.norms(gradient))

    def sizes(self, point: Point, params: Sequence[Tensor]) -> tuple[float, float]:
        """Of least squares, those of the state and of the residuals, whose squares are in the gradient too."""
        if self.residuals is None:
            return super().sizes(point, params)
        with torch.no_grad():
            return largest(point.z), largest(self.residuals(point.z, *params))

    def in_units(self, state: float, size: float) -> Self:
        fn, residuals, plane = self.fn, self.residuals, self.hyperplane

        def energy(z: Tensor, *params: Tensor) -> Tensor:
            return fn(z * state, *params) / state / size

        def part(z: Tensor, *params: Tensor) -> Tensor:
            return residuals(z * state, *params) / size  # type: ignore[misc]

        def placed(rows: int, *params: Tensor) -> tuple[Tensor, ...]:
            weight, total = plane(rows, *params)  # type: ignore[misc]
            return weight, total / state

        changes: dict[str, Any] = {"stiffness": Stiffness()}
        if residuals is not None:
            changes |= {"residuals": part, "fn": lambda z, *params: 0.5 * part(z, *params).square().sum(dim=1)}
        else:
            changes["fn"] = energy
        return replace(self, hyperplane=None if plane is None else placed, **changes)

    def residual_unit(self, state: float, size: float) -> float:
        return size if self.residuals is None else size / state * size

    def joined(self, rows: int) -> Self | None:
        if self.hyperplane is not None:  # the energies of the nearest states on the planes have the projected gradients

            def placed(z: Tensor, *params: Tensor) -> Tensor:
                return self.fn(self.project(z, params), *params)

            return replace(self, fn=placed, hyperplane=None, residuals=None).joined(rows)
        together = super().joined(rows)
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

    @staticmethod
    def _units(size: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        return size, size

    def default_linear_solver(self, dim: int, batch: int) -> LinearSolver:
        return Dense() if dim <= 128 and batch * dim * dim <= 2**22 else KrylovOrDense(krylov=MINRES())

    def project(self, z: Tensor, params: Sequence[Tensor]) -> Tensor:
        return z if self.hyperplane is None else onto_plane(z, *self._plane(z, params))

    def vmapped(self, size: int, dims: Sequence[int | None]) -> Self:
        plane = None if self.hyperplane is None else stacked(self.hyperplane, size, tuple(dims))
        residuals = None if self.residuals is None else vmapped(self.residuals, size, tuple(dims))
        return replace(super().vmapped(size, dims), hyperplane=plane, residuals=residuals)

    def lagrangian(self, z: Tensor, params: Sequence[Tensor], tilt: Tensor | None = None) -> Tensor:
        """The energies ``[batch]`` plus the multiplier, held fixed, times the violation of the constraint: at a
        minimum of the energy plus ``<tilt, z>``, its gradient in the parameters is that of the least value."""
        energy = self.fn(z, *params)
        if self.hyperplane is None:
            return energy
        normal, offset = self._plane(z, params)
        with torch.no_grad():
            leaf = z.detach().requires_grad_()
            with torch.enable_grad():
                slope = _gradient(self.fn(leaf, *params), leaf, create_graph=False)
            if tilt is not None:
                slope = slope + tilt
            multiplier = -(slope * normal).sum(dim=1)
        return energy + multiplier * ((z * normal).sum(dim=1) - offset[:, 0])

    def _total(self, z: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        energy = self.fn(z, *params)
        return energy.sum(), energy

    def _plane(self, z: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
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
    """One number for all the derivatives of one solution: whatever it is they are right, if it stays."""

    value: float | None = None

    @property
    def known(self) -> float:
        """The number, which from now on stays."""
        if self.value is None:
            self.value = 1.0
        return self.value

    def measure(self, image: Tensor) -> None:
        """Take the size of the largest of some vectors, to a power of two."""
        size = float(safe_norm(image).nan_to_num(0.0, 0.0, 0.0).amax()) if image.numel() else 0.0
        self.value = 2.0 ** math.frexp(size)[1] if 0 < size < math.inf else 1.0


def _gradient(energy: Tensor, z: Tensor, create_graph: bool) -> Tensor:
    if not energy.requires_grad:
        raise ValueError(
            "the energy does not depend on the state in a way that autograd can see: return a tensor computed from z "
            "by differentiable operations, without detach or no_grad"
        )
    (gradient,) = torch.autograd.grad(energy.sum(), z, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(z) if gradient is None else gradient


def _told_of_saddles(
    found: LinearSolution, operator: LinearOperator, b: Tensor, unshifted: bool = True
) -> LinearSolution:
    """With the status of samples at a saddle: the solver has found negative curvature (:class:`Dense` does wherever
    there is any, :class:`MINRES` and :class:`CG` where the right-hand side has a part of it), or the solution y proves
    it, by :math:`y^T A y = y^T b < 0`. Where the solver looks for none, or has broken down, the span of y and b may
    prove it, by one product more."""
    report, coupling = found.report, operator.coupling
    rows = coupling.rows if coupling is not None and coupling.found else 1  # that have one Hessian
    seek = unshifted and (report.curvature is None or bool((report.status == Status.BREAKDOWN).any()))

    def unit(v: Tensor) -> tuple[Tensor, Tensor]:
        whole = UnitRows.of(v.reshape(*v.shape[:-2], operator.batch // rows, rows * v.shape[-1]))
        size = torch.linalg.vector_norm(whole.unit, dim=-1, keepdim=True)
        return whole.unit / torch.where(size > 0, size, 1), size / whole.factor

    (y, length), (right, scale) = unit(found.value), unit(b)
    relative = report.residual.nan_to_num(torch.inf).reshape(-1, rows).amax(dim=1)
    solved = relative <= 1e-2  # or it is not known what A makes of y
    y = torch.where(solved[:, None], y, 0)
    across = (y * right).sum(dim=-1)
    lift = torch.where(solved & (length > 0).squeeze(-1), (scale / length).squeeze(-1), 0)  # A y = lift * right
    error = torch.clamp(10 * relative, torch.finfo(across.dtype).eps ** 0.5, 0.1).to(across.dtype)
    curvature, proved = lift * across, across < -error
    if seek:
        image = (operator.product if b.ndim == 2 else block_product(operator))(right.reshape(b.shape))
        image = image.reshape(right.shape)
        along, size = (right * image).sum(dim=-1), torch.linalg.vector_norm(image, dim=-1)
        # on the orthonormal basis of b and what y has besides
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
    return replace(found, report=replace(report, status=status, curvature=curvature))
