"""Joint inference and input optimization in flat coordinates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self, final

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.linear import GMRES, Dense, LinearSolver
from torchimplicit.problems.image_system import ImageSystem
from torchimplicit.problems.per_sample import PerSample, stacked
from torchimplicit.problems.system import Point, vjp
from torchimplicit.state import row_norm


class Parts(NamedTuple):
    """How a flat joint state ``[batch, 2 * z + x]`` is made up: :math:`(z, \\mu, x)`.

    Attributes:
        z, x: the sizes of the parts; :math:`\\mu` is as large as z.
    """

    z: int
    x: int

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three parts, views."""
        z, mu, x = torch.split_with_sizes(flat, (self.z, self.z, self.x), dim=1)
        return z, mu, x


@final
@dataclass(frozen=True, kw_only=True)
class JointSystem(ImageSystem):
    """The map of :class:`~torchimplicit.problems.joint_inference.JointInference`; ``fn`` gives ``f`` and the loss side
    by side, ``[batch, z + 1]``.

    With :math:`\\Lambda = \\ell + \\langle\\mu, f\\rangle`, one backward pass through ``fn`` with the cotangent
    :math:`(\\mu, 1)` gives :math:`\\Lambda_z` and :math:`\\Lambda_x`.

    Attributes:
        parts: of the state.
        damping: of the parts.
        own: the step size ``[rows or 1, 1]``, then the tensors of the set.
        which: of the parameters those are.
        set: the projection, ``(x, *tensors) -> x``; ``None`` for no constraint.
        schedule: the step size by the solver's step, instead of the tensor.
        step_size: the schedule's value for the step that runs.
        normalized: whether x takes steps of a given length.
    """

    parts: Parts
    damping: tuple[float, float, float]
    own: PerSample
    which: slice
    set: Callable[..., Tensor] | None = None
    schedule: Callable[[int], float] | None = None
    step_size: float | None = None
    normalized: bool = False

    def at(self, z: Tensor, params: Sequence[Tensor], value: Tensor | None = None) -> Point:
        if torch.is_grad_enabled():
            out, slopes = self._sloped(z, params)
        else:
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                out = self.fn(leaf, *params)
                (slopes,) = torch.autograd.grad(
                    out, leaf, self._cotangent(z), allow_unused=True, materialize_grads=True
                )
            out = out.detach()
        image = self._step(z, out, slopes, params)
        return self._judged(z, image, out)

    @torch.no_grad()
    def compared(self, point: Point, before: Point) -> Point:
        """With the second order of the state's error in the merit, by the curvature along the last step.

        The state of a joint solve lags behind its input, and the loss of a state that lags can be far below that of
        the equilibrium.
        """
        assert point.merit is not None
        assert point.doubt is not None
        size, (of_z, of_mu, _) = self.parts.z, self.damping
        moved = row_norm(point.z[:, :size] - before.z[:, :size])
        turn = point.residual[:, size : 2 * size] - before.residual[:, size : 2 * size]
        turn = torch.add(point.z[:, size : 2 * size] - before.z[:, size : 2 * size], turn, alpha=1 / of_mu)
        gap = row_norm(point.residual[:, :size])
        # a state that has not moved tells nothing, and its gap is what it was
        slope = row_norm(turn) / moved.clamp_min(torch.finfo(moved.dtype).tiny)
        more = (gap * gap).mul_(slope)
        return replace(
            point,
            merit=torch.add(point.merit, more, alpha=of_z**-2),
            doubt=torch.add(point.doubt, more, alpha=of_z**-2),
        )

    def image(self, z: Tensor, *params: Tensor) -> Tensor:
        return self._step(z, *self._sloped(z, params), params)

    def during(self, step: int) -> JointSystem:
        return self if self.schedule is None else replace(self, step_size=float(self.schedule(step)))

    def place(self, z: Tensor, params: Sequence[Tensor]) -> Tensor:
        if self.set is None:
            return z
        _, *tensors = self.own(z.shape[0], *params)
        return torch.cat((z[:, : 2 * self.parts.z], self.set(z[:, 2 * self.parts.z :], *tensors)), dim=1)

    def vmapped(self, size: int, dims: Sequence[int | None]) -> Self:
        return replace(super().vmapped(size, dims), own=stacked(self.own, size, tuple(dims)))

    def moving(self, wanted: Sequence[bool]) -> bool:
        """Whether a tensor of the set is among the wanted parameters."""
        return any(wanted[self.which][1:])

    def undamped(self, g: Tensor) -> Tensor:
        """A cotangent of the plain map's residual, as one of the damped map's."""
        parts = [part / share for part, share in zip(self.parts.split(g), self.damping, strict=True)]
        return torch.cat(parts, dim=1)

    def default_linear_solver(self, dim: int, batch: int) -> LinearSolver:
        return Dense() if dim <= 64 and batch * dim * dim <= 2**22 else GMRES()

    def _cotangent(self, flat: Tensor) -> Tensor:
        return functional.pad(flat[:, self.parts.z : 2 * self.parts.z], (0, 1), value=1.0)

    def _sloped(self, flat: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``fn`` and the gradient of :math:`\\Lambda` in the state, its part of mu being zero; composable."""
        out, pull = vjp(lambda flat: self.fn(flat, *params), flat)
        return out, pull(self._cotangent(flat))[0]

    def _step(self, flat: Tensor, out: Tensor, slopes: Tensor, params: Sequence[Tensor]) -> Tensor:
        z, mu, x = self.parts.split(flat)
        of_z, _, of_x = self.parts.split(slopes)
        size, *tensors = self.own(flat.shape[0], *params)
        if self.normalized:
            length = torch.linalg.vector_norm(of_x, dim=1, keepdim=True)
            of_x = of_x / torch.where(length > 0, length, 1)
        if self.step_size is not None:
            moved = torch.sub(x, of_x, alpha=self.step_size)
        else:
            moved = torch.addcmul(x, size, of_x, value=-1)
        if self.set is not None:
            moved = self.set(moved, *tensors)
        parts = ((z, out[:, :-1]), (mu, of_z), (x, moved))
        return torch.cat(
            [
                to if share == 1 else torch.lerp(at, to, share)
                for (at, to), share in zip(parts, self.damping, strict=True)
            ],
            dim=1,
        )

    def _judged(self, flat: Tensor, image: Tensor, out: Tensor) -> Point:
        """The point, with its relative residual, its merit and twice that one's uncertainty, ``[batch]`` each."""
        residual = image - flat
        with torch.no_grad():
            steps = self.parts.split(residual)
            sizes = torch.stack([row_norm(part) for part in self.parts.split(image)])
            gaps = torch.stack([row_norm(part) for part in steps])
            if self.damping != (1.0, 1.0, 1.0):
                gaps = gaps / gaps.new_tensor(self.damping)[:, None]
            # mu matters by what it makes x do: an adjoint near zero need not be known better than that
            reach = sizes[2] if self.step_size is None else sizes[2] / self.step_size
            torch.maximum(sizes[1], reach, out=sizes[1])
            error = (gaps / sizes.add_(torch.finfo(flat.dtype).eps)).amax(dim=0)
            _, mu, _ = self.parts.split(flat)
            loss, doubt = out[:, -1], gaps[0] * gaps[1]
            energy = torch.add(loss, torch.linalg.vecdot(mu, steps[0]), alpha=1 / self.damping[0])
            return Point(
                flat,
                residual,
                scale=torch.ones_like(error),
                image=image,
                error=error,
                # a loss may be NaN or infinite where its gradient is not: such a state is no candidate
                length=torch.add(torch.linalg.vector_norm(gaps, dim=0), loss, alpha=0),
                merit=energy + doubt,
                doubt=doubt + doubt,
            )
