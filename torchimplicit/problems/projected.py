"""Minima on sets, as fixed points of the projected gradient step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, final

import torch
from torch import Tensor

from torchimplicit.closure import is_transformed
from torchimplicit.errors import SmoothnessWarning, UnsupportedDerivativeError
from torchimplicit.linear import GMRES, Dense, LinearOperator, LinearSolver
from torchimplicit.linear.operator import Product
from torchimplicit.notices import notice
from torchimplicit.precision import safe_norm
from torchimplicit.problems.linearization import Linearization
from torchimplicit.problems.sets import FlatPolyhedron, FlatSet
from torchimplicit.problems.system import Point, System, largest, recorded_slope, slope, vmapped

ENTRIES = 2**24
"""The most entries of the Hessians that are assembled for a step."""

FURTHEST = 1e3
"""A point is projected onto a polyhedron from at most this many times the polyhedron's own size away: from further, its
faces are lost in rounding."""

FLATTER = 100
"""The step size is measured anew where it is this many times as large at the solution as at the start."""

KINK = 1e-6
"""A point is moved by this share of its size to test whether it lies on a kink of the projection."""


_OF_SETS = ("newton", "projector", "extent", "dependent")
"""The functions of a set that a system may have, beside the projection."""


@final
@dataclass(frozen=True, kw_only=True)
class ProjectedSystem(System):
    """A minimum on a convex set, or with a penalty: :math:`R = z - \\Pi(z-\\sigma\\nabla E)` with the projection onto
    the set, or the proximal operator.

    R vanishes at the stationary points of the energy on the set (of the energy plus the penalty), for any
    :math:`\\sigma>0`. :math:`A = I - \\Pi'(I-\\sigma H)` is regular where the multipliers of the active constraints are
    not zero (strict complementarity) and the energy is curved along the set.

    Attributes:
        projection: ``((z, step), *params)``, see :class:`~torchimplicit.problems.sets.FlatSet`.
        penalty: ``(z, *params) -> [batch]``; ``None`` for a set.
        newton: ``((z, slope, hessian, size, moved), *params)``, see
            :class:`~torchimplicit.problems.sets.FlatPolyhedron`; ``None`` on other sets.
        projector: ``(z, *params) -> [batch, dim, dim]``; ``None`` on other sets.
        extent: ``(z, *params) -> [batch]``; ``None`` on other sets.
        dependent: ``(z, *params)``, see :class:`~torchimplicit.problems.sets.FlatSet`; ``None`` where the test is not
            available.
        own: the places of the set's tensors among the parameters.
        lengths: for each of those, whether it is a length, in the unit of the state; ``None`` where that is unknown.
        step: the place of :math:`\\sigma` among the parameters, ``[rows, 1]``, about the inverse size of the Hessian.
            It is NaN until it is measured, then the same in all derivatives of one solution.
    """

    projection: Callable[..., Tensor]
    step: int
    penalty: Callable[..., Tensor] | None = None
    newton: Callable[..., tuple[Tensor, Tensor]] | None = None
    projector: Callable[..., Tensor] | None = None
    extent: Callable[..., Tensor] | None = None
    dependent: Callable[..., Tensor] | None = None
    own: range = range(0)
    lengths: tuple[bool, ...] | None = None

    @staticmethod
    def of(fn: Callable[..., Tensor], on: FlatSet, places: slice, **fields: Any) -> ProjectedSystem:
        """The system of the energies ``fn`` on the set ``on``, whose tensors, followed by the step, stand at ``places``
        among the parameters; ``fields`` are those of :class:`System`."""
        places, step = slice(places.start, places.stop - 1), places.stop - 1

        def projection(at: tuple[Tensor, Tensor], *params: Tensor) -> Tensor:
            return on.project(*at, *params[places])

        def penalty(z: Tensor, *params: Tensor) -> Tensor:
            return on.penalty(z, *params[places])

        def dependent(z: Tensor, *params: Tensor) -> Tensor:
            return on.dependent(z, *params[places])

        newton = projector = extent = None
        if isinstance(on, FlatPolyhedron):
            polyhedron = on

            def newton(at: tuple[Tensor, ...], *params: Tensor) -> tuple[Tensor, Tensor]:
                return polyhedron.newton(*at, *params[places])

            def projector(z: Tensor, *params: Tensor) -> Tensor:
                return polyhedron.projector(z, *params[places])

            def extent(z: Tensor, *params: Tensor) -> Tensor:
                return polyhedron.extent(z, *params[places])

        return ProjectedSystem(
            fn=fn,
            projection=projection,
            step=step,
            penalty=penalty if on.proximal else None,
            newton=newton,
            projector=projector,
            extent=extent,
            dependent=dependent,
            own=range(places.start, places.stop),
            lengths=on.lengths,
            **fields,
        )

    def total(self, z: Tensor, *params: Tensor) -> Tensor:
        """The energies with the penalties, ``[batch]``."""
        energy = self.fn(z, *params)
        return energy if self.penalty is None else energy + self.penalty(z, *params)

    def at(self, z: Tensor, params: Sequence[Tensor], value: Tensor | None = None) -> Point:
        gradient, energy = self.slope(z, params)
        gradient = torch.where(torch.isfinite(energy)[:, None], gradient, torch.nan)
        if self.penalty is not None:
            energy = energy + self.penalty(z, *params)
        size = self.steps(z, params)
        image = self.projection((z - size * gradient, size), *params)
        return Point(z, image - z, image=image, energy=energy, noise=self.norms(size * gradient))

    def slope(self, z: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The gradients ``[batch, dim]`` and the energies ``[batch]``, without the penalties."""
        if torch.is_grad_enabled():
            return slope(self.fn, z, params)
        measure = self._unknown(params)
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            energy = self.fn(leaf, *params)
            gradient = recorded_slope(energy, leaf, create_graph=measure)
            if measure:
                self._measure(leaf, gradient, params)
        return gradient.detach(), energy.detach()

    @torch.no_grad()
    def newton_step(self, point: Point, params: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
        """The steps from ``point`` to the minima on the set of the energies' quadratic models.

        Returns:
            The steps ``[batch, dim]``, NaN where a model is not convex; bool ``[batch]``, where a model is flat in some
            direction and the step is that of the proximal point method; and the gradients ``[batch, dim]``. ``None``
            where the set has no such step, the Hessians are too large, or samples depend on each other.
        """
        batch, dim = point.z.shape
        if self.newton is None or batch * dim * dim > ENTRIES:
            return None
        tape = self.linearize(point.z, params)
        eye = torch.eye(dim, dtype=point.z.dtype, device=point.z.device)
        hessian = tape.vjp_block(eye[:, None, :].expand(-1, batch, -1).contiguous()).permute(1, 0, 2)
        # clone: where autograd knows a derivative to be zero, it returns a tensor without storage (ZeroTensor)
        hessian = 0.5 * (hessian + hessian.mT).clone()
        sizes = (self.size(point.z, params), safe_norm(point.residual))
        step, flat = self.newton((point.z, tape.out.detach(), hessian, *sizes), *params)
        if self.coupling is not None and not self.coupling.promised:
            # the assembled blocks are each sample's own only if a product with them agrees with that of the whole
            probe = step.nan_to_num(0.0, 0.0, 0.0)
            gap = (hessian @ probe[:, :, None])[:, :, 0] - tape.vjp(probe)
            size = safe_norm(hessian.flatten(1)) * safe_norm(probe)
            if bool((safe_norm(gap) > torch.finfo(gap.dtype).eps ** 0.6 * size).any()):
                self.coupling.memory.found = True
                return None
        return step, flat, tape.out.detach()

    def image(self, z: Tensor, *params: Tensor) -> Tensor:
        """:math:`\\Pi(z-\\sigma\\nabla E)`, differentiable to any order by composable transforms."""
        return self._stepped(z, slope(self.fn, z, params)[0], params)

    def _stepped(self, z: Tensor, gradient: Tensor, params: Sequence[Tensor]) -> Tensor:
        """The projected gradient step from ``z``."""
        size = self.steps(z, params)
        return self.projection((z - size * gradient, size), *params)

    def residual(self, z: Tensor, *params: Tensor) -> Tensor:
        return z - self.image(z, *params)

    def linearize(self, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool] | None = None) -> Linearization:
        """Record the gradient only: the projection's derivative is taken by itself (:meth:`tangent`)."""

        def core(z: Tensor, *params: Tensor) -> Tensor:
            return recorded_slope(self.fn(z, *params), z, create_graph=True)

        tape = Linearization(core, z, params, needs_grad, self.leaves)
        if needs_grad is not None and any(needs_grad):
            self._look_for_kinks(tape)
            if self.dependent is not None and any(needs_grad[i] for i in self.own):
                self._look_for_dependence(z, params)
        return tape

    def on_tape(self, tape: Linearization) -> Tensor:
        return tape.z - self._stepped(tape.z, tape.out, tape.params)

    def seen(self, tape: Linearization) -> Point:
        with torch.no_grad():
            z, gradient = tape.z.detach(), tape.out.detach()
            image = self._stepped(z, gradient, tape.params)
            return Point(z, image - z, image=image, noise=self.norms(self.steps(z, tape.params) * gradient))

    def operator(self, tape: Linearization, transposed: bool) -> LinearOperator:
        size, products = self.steps(tape.z.detach(), tape.params).detach(), self.tangent(tape)

        def after(pi: Product, hessian: Product) -> Product:
            """A v = v - Pi'(v - s H v)."""
            return lambda v: v - pi(v - size * hessian(v))

        def before(pi_t: Product, hessian: Product) -> Product:
            """A^T v = v - (I - s H) Pi'^T v."""

            def product(v: Tensor) -> Tensor:
                image = pi_t(v)
                return v - image + hessian(size * image)

            return product

        plain, flipped = after(products[0], tape.vjp), before(products[1], tape.vjp)
        return replace(
            self.jacobian(tape, transposed),
            product=flipped if transposed else plain,
            transposed_product=plain if transposed else flipped,
            block_product=before(products[3], tape.vjp_block) if transposed else after(products[2], tape.vjp_block),
        )

    def tangent(self, tape: Linearization) -> tuple[Product, ...]:
        """Products with :math:`\\Pi'` at the end of the tape's gradient step, and with its transpose; then the same two
        for blocks of vectors."""
        z, params = tape.z.detach(), tuple(p.detach() for p in tape.params)
        size = self.steps(z, params)
        return self._projected(z - size * tape.out.detach(), size, params)

    def _projected(self, y: Tensor, size: Tensor, params: Sequence[Tensor]) -> tuple[Product, ...]:
        if self.projector is None:
            on = Linearization(lambda y, *params: self.projection((y, size), *params), y, params)
            return on.jvp, on.vjp, on.jvp_block, on.vjp_block
        matrix = self.projector(y, *params)  # an orthogonal projector: symmetric
        return (
            *(lambda v: (v[:, None] @ matrix)[:, 0],) * 2,
            *(lambda vs: (vs.transpose(0, 1) @ matrix).transpose(0, 1),) * 2,
        )

    def vjp_params(self, tape: Linearization, g: Tensor) -> list[Tensor | None]:
        with torch.enable_grad():
            image = self._stepped(tape.z.detach(), tape.out, tape.params)
        return tape.vjp_params(g, image)

    def default_linear_solver(self, dim: int, batch: int) -> LinearSolver:
        return Dense() if dim <= 128 and batch * dim * dim <= 2**22 else GMRES()

    def prepare(self, z: Tensor, params: Sequence[Tensor]) -> None:
        if bool(params[self.step].isnan().any()):
            self.at(z, params)

    def project(self, z: Tensor, params: Sequence[Tensor]) -> Tensor:
        return z if self.penalty is not None else self.projection((z, torch.ones_like(z[:, :1])), *params)

    def vmapped(self, size: int, dims: Sequence[int | None]) -> Self:
        penalty = None if self.penalty is None else vmapped(self.penalty, size, tuple(dims))
        projection = vmapped(self.projection, size, tuple(dims))
        mapped = {name: getattr(self, name) for name in ("newton", "projector", "extent")}
        known: dict[str, Any] = {n: None if f is None else vmapped(f, size, tuple(dims)) for n, f in mapped.items()}
        system = replace(super().vmapped(size, dims), projection=projection, penalty=penalty, dependent=None)
        return replace(system, **known)

    def joined(self, rows: int, z: Tensor, params: Sequence[Tensor]) -> Self | None:
        together = super().joined(rows, z, params)
        assert together is not None
        projection, penalty, extent = self.projection, self.penalty, self.extent

        def apart(z: Tensor) -> Tensor:
            return z.reshape(len(z) * rows, -1)

        def all_projected(at: tuple[Tensor, Tensor], *params: Tensor) -> Tensor:
            z, step = at
            return projection((apart(z), step.repeat_interleave(rows, dim=0)), *params).reshape(z.shape)

        def all_penalties(z: Tensor, *params: Tensor) -> Tensor:
            assert penalty is not None
            return penalty(apart(z), *params).reshape(len(z), rows).sum(dim=1)

        def whole_extent(z: Tensor, *params: Tensor) -> Tensor:
            assert extent is not None
            return extent(apart(z), *params).reshape(len(z), rows).nanmedian(dim=1).values

        return replace(
            together,
            projection=all_projected,
            penalty=None if penalty is None else all_penalties,
            extent=None if extent is None else whole_extent,
            projector=None,
            dependent=None,
        )

    def sizes(self, point: Point, params: Sequence[Tensor], first: Tensor | None = None) -> tuple[float, float]:
        """The residual is a step, in the state's unit; it is made of the gradient."""
        gradient, _ = self.slope(point.z, params)
        known = (point.z, point.residual) if first is None else (point.z, point.residual, first)
        return max(map(largest, known)), largest(gradient)

    def in_units(self, state: float, size: float) -> Self:
        fn, projection, penalty = self.fn, self.projection, self.penalty
        if self.lengths is None:  # a user's own operator, which knows its own unit alone

            def nearest(at: tuple[Tensor, Tensor], *params: Tensor) -> Tensor:
                z, step = at
                return projection((z * state, step * state / size), *params) / state

            return replace(
                self,
                fn=lambda z, *params: fn(z * state, *params) / state / size,
                projection=nearest,
                penalty=None if penalty is None else lambda z, *params: penalty(z * state, *params) / state / size,
            )
        measured = [i for i, is_length in zip(self.own, self.lengths, strict=True) if is_length]

        def scaled(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
            """``function`` of the set, with the set in the new unit."""
            if function is None:
                return None
            return lambda at, *params: function(at, *(p / state if i in measured else p for i, p in enumerate(params)))

        functions: dict[str, Any] = {name: scaled(getattr(self, name)) for name in ("projection", *_OF_SETS)}
        return replace(self, fn=lambda z, *params: fn(z * state, *params) / state / size, **functions)

    def anew(self, params: Sequence[Tensor]) -> None:
        params[self.step].fill_(torch.nan)

    def check_representable(self, params: Sequence[Tensor]) -> None:
        held, number = params[self.step], torch.finfo(params[self.step].dtype)
        if not is_transformed(held) and bool(((held <= number.tiny) | (held >= number.max)).any()):
            raise UnsupportedDerivativeError(
                f"the energy's Hessian, or its inverse, is beyond the range of {held.dtype}, so that this derivative "
                "cannot be computed: state the problem in other units of the state or the energy, or in float64"
            )

    def remeasured(self, z: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor] | None:
        held = params[self.step]
        if self.newton is not None or any(map(is_transformed, (z, *params))) or not held.numel():
            return None  # on a polyhedron steps are judged that come from the gradient itself
        fresh, recording = [*params], torch.is_grad_enabled()
        fresh[self.step] = torch.full_like(held, torch.nan)
        with torch.no_grad():
            self.at(z, fresh)
            grown = fresh[self.step] > FLATTER * held
            if not bool(grown.any()):
                return None
            fresh[self.step] = torch.where(grown, fresh[self.step], held)
            if not recording:
                held.copy_(fresh[self.step])
        return fresh

    def residual_unit(self, state: float, size: float) -> float:
        return state

    def steps(self, z: Tensor, params: Sequence[Tensor]) -> Tensor:
        """The step sizes :math:`\\sigma`, ``[rows, 1]``; measured where they are not known yet."""
        if self._unknown(params):
            with torch.no_grad():
                self.slope(z.detach(), tuple(p.detach() for p in params))
        held = params[self.step].reshape(-1, 1)
        if len(held) > len(z):  # samples that were joined into one take the smallest of theirs
            return held.reshape(len(z), -1).amin(dim=1, keepdim=True)
        return held if len(held) == len(z) else held.repeat(len(z) // len(held), 1)

    def size(self, z: Tensor, params: Sequence[Tensor]) -> Tensor:
        """The larger of the norm of ``z`` and the typical distance of a polyhedron's faces from it, ``[batch]``."""
        with torch.no_grad():
            norm = safe_norm(z)
            return norm if self.extent is None else torch.fmax(norm, self.extent(z, *params))

    def _unknown(self, params: Sequence[Tensor]) -> bool:
        """Return whether the step sizes are to be measured; under a transform they cannot be read, and count as
        known."""
        held = params[self.step]
        return not is_transformed(held) and bool(held.isnan().any())

    def _measure(self, z: Tensor, gradient: Tensor, params: Sequence[Tensor]) -> None:
        """Measure :math:`\\sigma` by one product with the Hessian, and write it into its parameter.

        It is written in place since it has to be the same tensor, with the same value, in all derivatives of this
        solution. It is rounded to a power of two.

        Args:
            z: the state, a leaf.
            gradient: recorded as a function of it.
            params: the parameters.
        """
        size = safe_norm(gradient.detach())
        along, aside = gradient.detach() / torch.where(size > 0, size, 1)[:, None], z.shape[1] ** -0.5
        # not zero where the gradient is sparse, nor where it is the opposite
        way = along + torch.where(((along + aside).abs() < 0.1 * aside).all(dim=1, keepdim=True), 0, aside)
        turned = None
        if gradient.requires_grad:
            (turned,) = torch.autograd.grad(gradient, z, way, retain_graph=True, allow_unused=True)
        length = self.size(z.detach(), params)
        curvature = size / length  # without curvature, a step as long as the state
        if turned is not None:
            known = safe_norm(turned.clone()) / safe_norm(way)  # clone: it may be autograd's zero without storage
            # where the derivative of a finite gradient overflows, hardly any step is short enough
            steep = torch.full_like(known, torch.finfo(known.dtype).max).where(size.isfinite(), 0)
            known = torch.where(known.isfinite(), known, steep)
            if self.extent is not None:  # a point that is projected from too far away is lost in rounding
                known = torch.maximum(known, curvature / FURTHEST)
            curvature = torch.where(known > 0, known, curvature)
        curvature = torch.where((curvature > 0) & curvature.isfinite(), curvature, 1)
        held = params[self.step]
        measured = torch.exp2(-curvature.log2().round())
        if measured.numel() < held.numel():  # samples that were joined into one
            measured = measured.repeat_interleave(held.numel() // measured.numel())
        number = torch.finfo(held.dtype)
        measured = measured.clamp(number.tiny, number.max)
        if held.numel():
            held.copy_(measured.reshape(-1, *held.shape).amin(dim=0))  # vmap's copies of one problem share it

    def _look_for_kinks(self, tape: Linearization) -> None:
        """Warn where the projection has a kink at the solution: there are then only one-sided derivatives.

        The derivative of the projection is compared at two points, a little to either side.
        """
        z, params = tape.z.detach(), tuple(p.detach() for p in tape.params)
        size = self.steps(z, params)
        y = z - size * tape.out.detach()
        number = torch.arange(1, y.numel() + 1, dtype=torch.float64, device=y.device)
        probe = torch.sin(number.square()).reshape(y.shape).to(y.dtype)
        away = KINK * torch.maximum(safe_norm(y), safe_norm(z))[:, None] * probe.sign()
        sides = [self._projected(there, size, params)[1](probe) for there in (y + away, y - away)]
        gap = (sides[0] - sides[1]).abs().amax(dim=1) > 0.05 * probe.abs().amax(dim=1)
        if bool(gap.any()):
            notice(
                "the solution lies on a kink of its constraint",
                f"the solution lies on a kink of its constraint in {int(gap.sum())} of {len(gap)} samples: a "
                "constraint is active there with a multiplier of zero, or nearly so (no strict complementarity). Only "
                "one-sided derivatives exist, and the one returned is that of one side",
                SmoothnessWarning,
            )

    def _look_for_dependence(self, z: Tensor, params: Sequence[Tensor]) -> None:
        """Warn where more constraints meet at the solution than are independent: then only one-sided derivatives with
        respect to the constraints exist."""
        assert self.dependent is not None
        with torch.no_grad():
            odd = self.dependent(z, *params)
        if bool(odd.any()):
            notice(
                "more constraints meet at the solution than are independent",
                f"more constraints meet at the solution than are independent of each other, in {int(odd.sum())} of "
                f"{len(odd)} samples (a degenerate vertex, or a constraint that is given twice): only one-sided "
                "derivatives with respect to the constraints exist, and the one returned is that of one side",
                SmoothnessWarning,
            )
