"""The derivatives of a solution along a direction, of any order, each an autograd node over one shared evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from torchimplicit.closure import is_transformed
from torchimplicit.gradients.figures import report
from torchimplicit.gradients.linear_task import LinearTask
from torchimplicit.gradients.nodes import LinearSolve
from torchimplicit.gradients.transforms import gradients
from torchimplicit.linear import LinearSolver
from torchimplicit.precision import without_autocast


class Curve:
    """A solution whose arguments move, along :math:`z+\\varepsilon z_1+\\varepsilon^2z_2/2+\\dots`.

    With a row vector w, :math:`\\varphi_0=w^TR` and :math:`\\varphi_{n+1}=\\sum_i\\partial_{z_i}\\varphi_n z_{i+1}+
    \\partial_a\\varphi_n\\dot a` is w times the n-th derivative of the residual along the curve. Each takes one more
    reverse pass over the same recorded evaluation; its gradient in w is that derivative, and its gradient in all else
    what the backward pass of :math:`z_n` needs.

    Args:
        linear, solver: of the linear solves.
        moving: the places of the parameters that move.
    """

    def __init__(self, linear: LinearTask, solver: LinearSolver, moving: Sequence[int]):
        self.linear = linear
        self.solver = solver
        self.moving = tuple(moving)
        self._tape: tuple[Tensor, list[Tensor], Tensor] | None = None

    def derivative(self, known: Sequence[Tensor], tangents: Sequence[Tensor], z: Tensor, params: Any) -> Tensor:
        """The n-th derivative of the residual along the curve with the n - 1 ``known`` derivatives, and a zero n-th."""
        own, places, out = self._recorded(z, params)
        w = torch.zeros_like(out).requires_grad_()
        states = (*(s.detach().requires_grad_() for s in known), None)
        phi = self._weighted(out, w, own, places, states, tangents)
        found = None if phi is None else _grad(phi, [w])[0]
        return torch.zeros_like(out) if found is None else found

    def vjp_params(
        self, w: Tensor, states: Sequence[Tensor], tangents: Sequence[Tensor], z: Tensor, params: Any, needs_grad: Any
    ) -> list[Tensor | None]:
        """The gradient of w times the n-th derivative, in those of z, the states but the last, the tangents and the
        parameters that need one."""
        own, places, out = self._recorded(z, params)
        tangents = [t.detach().requires_grad_() for t in tangents]
        states = [s.detach().requires_grad_() for s in states]
        phi = self._weighted(out, w, own, places, states, tangents)
        ends = (own, *states[:-1], *tangents, *places)
        grads: list[Tensor | None] = [None] * len(ends)
        chosen = [i for i, one in enumerate(needs_grad) if one]
        found = [None] * len(chosen) if phi is None else _grad(phi, [ends[i] for i in chosen])
        for i, grad in zip(chosen, found, strict=True):
            grads[i] = torch.zeros_like(ends[i]) if grad is None else grad
        return grads

    def composed(self, n: int, z: Tensor, states: Sequence[Tensor], tangents: Sequence[Tensor], params: Any) -> Tensor:
        """The n-th derivative along the curve, by transforms that nest."""
        moves = dict(zip(self.moving, tangents, strict=True))

        def residual(e: Tensor) -> Tensor:
            there, power = z, e
            for i, v in enumerate(states, start=1):
                there, power = there + power * v, power * e / (i + 1)
            moved = (p + e * moves[i] if i in moves else p for i, p in enumerate(params))
            return self.linear.system.residual(there, *moved)

        return directional(residual, n, z)

    def _recorded(self, z: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        """One evaluation of the residual: the state and the parameters with nothing behind them, and its value."""
        if self._tape is None:
            own = z.detach().requires_grad_()
            seen: set[int] = set()
            places = []
            for place, p in enumerate(params):
                # a leaf stands for itself, so that a function finds the very tensors that it captures
                itself = p.is_leaf and p.requires_grad and not p._backward_hooks and id(p) not in seen
                seen.add(id(p))
                places.append(p if itself else p.detach().requires_grad_(p.requires_grad or place in self.moving))
            with torch.enable_grad():
                self._tape = own, places, self.linear.system.residual(own, *places)
        return self._tape

    def _weighted(
        self, out: Tensor, w: Tensor, z: Tensor, params: Sequence[Tensor], states: Any, tangents: Sequence[Tensor]
    ) -> Tensor | None:
        """:math:`\\varphi_n` for n states; a state ``None`` is zero. ``None`` where it is zero."""
        moved = [params[i] for i in self.moving]
        with torch.enable_grad():
            phi = (w * out).sum()
            for n in range(len(states)):
                ends = (z, *states[:n], *moved)
                speeds = (*states[: n + 1], *tangents)
                some = [(end, speed) for end, speed in zip(ends, speeds, strict=True) if speed is not None]
                slopes = torch.autograd.grad(phi, [end for end, _ in some], create_graph=True, allow_unused=True)
                terms = [
                    (slope * speed).sum() for slope, (_, speed) in zip(slopes, some, strict=True) if slope is not None
                ]
                if not terms:
                    return None
                phi = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
                if not phi.requires_grad:
                    return None
        return phi


class Along(Function):
    """The n-th derivative of the solution along a curve: ``(curve, n, z, *known, *tangents, *params) -> z_n``, with
    n - 1 known ones and the tangents of the parameters that move."""

    @staticmethod
    def forward(ctx: Any, curve: Curve, n: int, z: Tensor, *rest: Tensor) -> Tensor:
        known, tangents, params = _parted(curve, n, rest)
        with without_autocast(z.device):
            b = -curve.derivative(known, tangents, z, params)
            _, found = curve.linear.solve(curve.solver, False, b, z, params)
        report(curve.linear.record, found.report)
        ctx.curve, ctx.n = curve, n
        ctx.save_for_backward(found.value, z, *rest)
        return found.value

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Any, ...]:
        curve, n = ctx.curve, ctx.n
        y, z, *rest = ctx.saved_tensors
        known, tangents, params = _parted(curve, n, rest)
        needs_grad = ctx.needs_input_grad[2:]
        if needs_grad[0] or any(needs_grad[n + len(curve.moving) :]):
            curve.linear.smoothness.asked()
        if not torch.is_grad_enabled() and not any(is_transformed(t) for t in (c, y, z, *rest)):
            with without_autocast(z.device):
                _, found = curve.linear.solve(curve.solver, True, c, z, params)
                report(curve.linear.record, found.report)
                return None, None, *curve.vjp_params(-found.value, (*known, y), tangents, z, params, needs_grad)
        w = LinearSolve.apply(curve.linear, curve.solver, True, c, z, *params)

        def weighted(z: Tensor, *rest: Tensor) -> Tensor:
            known, tangents, params = _parted(curve, n, rest)
            return -(w * curve.composed(n, z, (*known, y), tangents, params)).sum()

        return None, None, *gradients(weighted, (z, *rest), needs_grad)


def _parted(curve: Curve, n: int, rest: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Any]:
    """The known derivatives, the tangents, and the parameters."""
    end = n - 1 + len(curve.moving)
    return rest[: n - 1], rest[n - 1 : end], rest[end:]


def _grad(out: Tensor, inputs: Sequence[Tensor]) -> Any:
    return torch.autograd.grad(out, inputs, retain_graph=True, allow_unused=True)


def directional(fn: Callable[[Tensor], Tensor], order: int, like: Tensor) -> Tensor:
    """The derivative of that order of a function of one number, at zero, by transforms that nest."""
    zero, one = like.new_zeros(()), like.new_ones(())
    for _ in range(order):

        def slope(e: Tensor, fn: Callable[[Tensor], Tensor] = fn) -> Tensor:
            moved: Tensor = torch.func.jvp(fn, (e,), (one,))[1]
            return moved

        fn = slope
    return fn(zero)
