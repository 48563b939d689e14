"""Joint inference and input optimization in flat coordinates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self, final

import torch
from torch import Tensor

from torchimplicit.linear import GMRES, Dense, LinearSolver
from torchimplicit.precision import widened
from torchimplicit.problems.image_system import ImageSystem
from torchimplicit.problems.linearization import Linearization
from torchimplicit.problems.per_sample import PerSample, stacked
from torchimplicit.problems.system import Judgement, Point, vjp
from torchimplicit.state import row_norm


class Parts(NamedTuple):
    """The parts :math:`(z, \\mu, x)` of a flat joint state ``[batch, 2 * z + x]``.

    Attributes:
        z, x: the sizes of the parts; :math:`\\mu` has the size of z.
    """

    z: int
    x: int

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three parts, as views."""
        z, mu, x = torch.split_with_sizes(flat, (self.z, self.z, self.x), dim=1)
        return z, mu, x

    def norms(self, flat: Tensor) -> Tensor:
        """The norm of each part, ``[batch, 3]``."""
        return torch.cat((row_norm(self.pair(flat)), row_norm(flat[:, None, 2 * self.z :])), dim=1)

    def pair(self, flat: Tensor) -> Tensor:
        """The parts z and mu, ``[batch, 2, z]``, as a view."""
        return flat[:, : 2 * self.z].unflatten(1, (2, self.z))


@final
@dataclass(frozen=True, kw_only=True)
class JointSystem(ImageSystem):
    """The map of :class:`~torchimplicit.problems.joint_inference.JointInference` in flat coordinates.

    ``fn`` takes the tuple ``(z, x)`` to the tuple of ``f``, ``[batch, z]``, and the loss, ``[batch]``; and the flat
    state to both side by side. With :math:`\\Lambda = \\ell + \\langle\\mu, f\\rangle`, one backward pass through
    ``fn`` with the cotangent :math:`(\\mu, 1)` gives :math:`\\Lambda_z` and :math:`\\Lambda_x`.

    Attributes:
        parts: sizes of the state's parts.
        damping: damping of each part.
        own: picks the step size ``[rows or 1, 1]`` and the tensors of the set out of the parameters.
        which: the places of these among the parameters.
        set: the projection, ``(x, *tensors) -> x``; ``None`` without a constraint.
        schedule: the step size by the number of the solver's step, instead of the tensor; ``None`` for none.
        step_size: the schedule's value for the current step.
        normalized: whether x takes steps of a fixed length; ``"sign"``: in every entry.
        restated: whether it is in other units than the user's (:meth:`in_part_units`).
    """

    parts: Parts
    damping: tuple[float, float, float]
    own: PerSample
    which: slice
    set: Callable[..., Tensor] | None = None
    schedule: Callable[[int], float] | None = None
    step_size: float | None = None
    normalized: bool | Literal["sign"] = False
    restated: bool = False

    def at(self, z: Tensor, params: Sequence[Tensor], value: Tensor | None = None) -> Point:
        image, loss, slope = self._evaluated(z, params)
        return self._judged(z, image, loss, self._pace(slope, params))

    def advanced(self, z: Tensor, params: Sequence[Tensor]) -> Tensor:
        return self._evaluated(z, params)[0]

    def _evaluated(self, z: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The map's value, the loss, and the gradient of :math:`\\Lambda` in x."""
        slopes: Sequence[Tensor]
        if torch.is_grad_enabled():
            image_of_z, loss, slopes = self._sloped(z, params)
        else:
            state, mu, x = self.parts.split(z)
            with torch.enable_grad():
                leaves = state.detach().requires_grad_(), x.detach().requires_grad_()
                image_of_z, loss = self.fn(leaves, *params)
                slopes = _slopes(image_of_z, loss, mu, leaves, create_graph=False)
            image_of_z, loss = image_of_z.detach(), loss.detach()
        return self._step(z, image_of_z, slopes, params), loss, slopes[1]

    @torch.no_grad()
    def refined(self, point: Point, before: Point) -> Point:
        """``point`` with the second order of the state's error added to its merit, from the curvature along the last
        step.

        The state of a joint solve lags behind its input, and the loss of a lagging state can be far below that of the
        equilibrium.
        """
        assert point.judgement is not None
        of_z, of_mu, _ = self.damping
        change, turn = self.parts.pair(point.z - before.z), self.parts.pair(point.residual - before.residual)
        change[:, 1].add_(turn[:, 1], alpha=1 / of_mu)
        moved, turned = row_norm(change).unbind(dim=1)
        gap = row_norm(point.residual[:, : self.parts.z])
        # a state that has not moved has no curvature to tell; its gap is zero or was judged before
        more = (gap * gap).mul_(turned / moved.clamp_min(torch.finfo(moved.dtype).tiny))
        known = point.judgement
        merit, merit_error = (torch.add(t, more, alpha=of_z**-2) for t in (known.merit, known.merit_error))
        return point.changed(judgement=known._replace(merit=merit, merit_error=merit_error))

    def image(self, z: Tensor, *params: Tensor) -> Tensor:
        image_of_z, _, slopes = self._sloped(z, params)
        return self._step(z, image_of_z, slopes, params)

    def linearize(self, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool] | None = None) -> Linearization:
        def core(flat: Tensor, *params: Tensor) -> Tensor:
            state, mu, x = self.parts.split(flat)
            image_of_z, loss = self.fn((state, x), *params)
            return self._step(flat, image_of_z, _slopes(image_of_z, loss, mu, (state, x), create_graph=True), params)

        return Linearization(core, z, params, needs_grad)

    def during(self, step: int) -> JointSystem:
        return self if self.schedule is None else replace(self, step_size=float(self.schedule(step)))

    def project(self, z: Tensor, params: Sequence[Tensor]) -> Tensor:
        if self.set is None:
            return z
        _, *tensors = self.own(z.shape[0], *params)
        return torch.cat((z[:, : 2 * self.parts.z], self.set(z[:, 2 * self.parts.z :], *tensors)), dim=1)

    def vmapped(self, size: int, dims: Sequence[int | None]) -> Self:
        return replace(super().vmapped(size, dims), own=stacked(self.own, size, tuple(dims)))

    def joined(self, rows: int, z: Tensor, params: Sequence[Tensor]) -> Self | None:
        return None  # a cost and a step size belong to each sample

    def moving(self, needs_grad: Sequence[bool]) -> bool:
        """Return whether a tensor of the constraint's set needs a gradient."""
        return any(needs_grad[self.which][1:])

    def weights(self, point: Point, before: Tensor, residual: Tensor) -> Tensor:
        """The weights of the parts' residuals, in units of z, by how strongly the parts act on each other: x on z by
        :math:`\\lVert f_x\\rVert`, mu on x by :math:`\\alpha\\lVert f_x\\rVert`. The latter is measured from how the
        first step of mu changed the step of x.

        Not by the parts' sizes, as for a map: mu and the loss that it belongs to may vanish at the solution, and with
        such weights a joint solve reached costs five times as high in the same number of steps.
        """
        assert point.judgement is not None
        assert point.image is not None
        sizes, moved, turned = (
            torch.stack([torch.linalg.vector_norm(part, dim=1) for part in self.parts.split(widened(t))])
            for t in (point.image, point.z - before, point.residual - residual)
        )
        pace, (of_z, of_mu, _), of_move, of_turn = point.judgement.pace, sizes, moved[1], turned[2]
        # an input that its constraint holds does not move, and tells nothing: then by the sizes of the other parts
        measured, sized = (of_move > 0) & (of_turn > 0), (of_z > 0) & (of_mu > 0)
        gain = torch.where(
            measured,
            of_turn / torch.where(measured, of_move, 1),
            torch.where(sized, pace * of_z / torch.where(sized, of_mu, 1), 1).sqrt(),
        )
        of_x = gain / pace
        weights = torch.stack((torch.ones_like(of_x), gain * of_x, of_x), dim=1)
        return torch.where(((weights > 0) & (weights < torch.inf)).all(dim=1, keepdim=True), weights, 1)

    def in_part_units(self, of_z: float | Tensor, of_mu: float | Tensor, of_x: float | Tensor) -> JointSystem:
        """Return the same problem with the state's parts divided by these numbers, and the loss by ``of_mu * of_z``."""
        fn, own, set_, schedule = self.fn, self.own, self.set, self.schedule
        pace: Any = 1 / of_x if self.normalized else of_mu / of_x * (of_z / of_x)

        def scaled(state: tuple[Tensor, Tensor], *params: Tensor) -> Any:
            made, loss = fn((state[0] * of_z, state[1] * of_x), *params)
            return made / of_z, loss / of_mu / of_z

        def taken(rows: int, *params: Tensor) -> tuple[Tensor, ...]:
            size, *tensors = own(rows, *params)
            return (size * pace, *tensors)

        return replace(
            self,
            restated=True,
            fn=scaled,
            own=taken,
            set=None if set_ is None else lambda x, *tensors: set_(x * of_x, *tensors) / of_x,
            schedule=None if schedule is None else lambda step: schedule(step) * pace,
            step_size=None if self.step_size is None else self.step_size * pace,
        )

    def undamped(self, g: Tensor) -> Tensor:
        """Convert a cotangent of the undamped map's residual to one of the damped map's."""
        parts = [part / share for part, share in zip(self.parts.split(g), self.damping, strict=True)]
        return torch.cat(parts, dim=1)

    def default_linear_solver(self, dim: int, batch: int) -> LinearSolver:
        return Dense() if dim <= 64 and batch * dim * dim <= 2**22 else GMRES()

    def _sloped(self, flat: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """``f``, the loss, and the gradients of :math:`\\Lambda` in z and in x; by composable transforms."""
        z, mu, x = self.parts.split(flat)
        (image_of_z, loss), pull = vjp(lambda z, x: self.fn((z, x), *params), z, x)
        return image_of_z, loss, pull((mu, torch.ones_like(loss)))

    def _step(self, flat: Tensor, image_of_z: Tensor, slopes: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """The map's value ``[batch, 2 * z + x]``, from the value of ``f`` (``image_of_z``) and the ``slopes`` of
        :math:`\\Lambda`."""
        z, mu, x = self.parts.split(flat)
        # z goes to f, mu to Lambda_z, and x a step down Lambda_x (Gurumurthy et al. 2021)
        of_z, of_x = slopes
        size, *tensors = self.own(flat.shape[0], *params)
        if self.normalized == "sign":
            of_x = torch.sign(of_x)
        elif self.normalized:
            length = torch.linalg.vector_norm(of_x, dim=1, keepdim=True)
            of_x = of_x / torch.where(length > 0, length, 1)
        if self.step_size is not None:
            moved = torch.sub(x, of_x, alpha=self.step_size)
        else:
            moved = torch.addcmul(x, size, of_x, value=-1)
        if self.set is not None:
            moved = self.set(moved, *tensors)
        parts = ((z, image_of_z), (mu, of_z), (x, moved))
        return torch.cat(
            [
                to if share == 1 else torch.lerp(at, to, share)
                for (at, to), share in zip(parts, self.damping, strict=True)
            ],
            dim=1,
        )

    def _pace(self, of_x: Tensor, params: Sequence[Tensor]) -> Tensor:
        """The factor on the gradient in x, ``[batch]``."""
        size = self.own(of_x.shape[0], *params)[0] if self.step_size is None else of_x.new_tensor([[self.step_size]])
        if self.normalized == "sign":
            size = size * of_x.shape[1] ** 0.5
        if self.normalized:
            length = torch.linalg.vector_norm(of_x, dim=1, keepdim=True)
            size = size / torch.where(length > 0, length, 1)
        return widened(size).expand(of_x.shape[0], 1).squeeze(1)

    def _judged(self, flat: Tensor, image: Tensor, loss: Tensor, pace: Tensor) -> Point:
        """The point with the residuals and sizes of its parts, ``[batch, 3]``, and its judgement: the cost of the exact
        equilibrium at the input up to second order, plus the size of the second order."""
        residual = image - flat
        with torch.no_grad():
            sizes, gaps = self.parts.norms(image), self.parts.norms(residual)
            if self.damping != (1.0, 1.0, 1.0):
                gaps = gaps / gaps.new_tensor(self.damping)
            of_z, of_mu, _ = gaps.unbind(dim=1)
            of_state, of_adjoint, of_input = sizes.unbind(dim=1)
            # mu matters only through the step of x, which is pace * f_x^T mu with f_x of about z / x: an adjoint near
            # zero is judged relative to that
            moves = (of_input / of_state * (of_input / pace)).nan_to_num(0.0, 0.0)
            torch.maximum(of_adjoint, moves, out=of_adjoint)
            second_order = of_z * of_mu
            size = self.parts.z
            cost = torch.linalg.vecdot(flat[:, size : 2 * size], residual[:, :size])
            cost = torch.add(loss, cost, alpha=1 / self.damping[0])
            # the loss may be NaN or infinite where its gradient is finite: 0 * loss hands that on to ``growth``
            growth = torch.add(torch.linalg.vector_norm(gaps, dim=1), loss, alpha=0)
            return Point(
                flat,
                residual,
                scale=sizes,
                image=image,
                error=gaps,
                judgement=Judgement(growth, cost + second_order, second_order + second_order, pace),
            )


def _slopes(
    image_of_z: Tensor, loss: Tensor, mu: Tensor, leaves: tuple[Tensor, Tensor], create_graph: bool
) -> Sequence[Tensor]:
    """The gradients of :math:`\\Lambda` in z and in x, by autograd."""
    ends = [(image_of_z, mu), (loss, torch.ones_like(loss))]
    outputs, cotangents = zip(*[end for end in ends if end[0].requires_grad] or ends, strict=True)
    return torch.autograd.grad(
        outputs, leaves, cotangents, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
