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
    """The curve :math:`z+\\varepsilon z_1+\\varepsilon^2z_2/2+\\dots` of a solution whose arguments move.

    With a vector w, :math:`\\varphi_0=w^TR` and :math:`\\varphi_{n+1}=\\sum_i\\partial_{z_i}\\varphi_n z_{i+1}+
    \\partial_a\\varphi_n\\dot a`, the scalar :math:`\\varphi_n` is w times the n-th derivative of the residual along
    the curve. Each :math:`\\varphi_n` takes one more reverse pass over the same recorded evaluation. Its gradient in w
    is the n-th derivative of the residual; its gradients in the other variables are what the backward pass of
    :math:`z_n` needs.

    Args:
        linear, solver: the task and the solver of the linear solves.
        moving: the places of the parameters that move.
    """

    def __init__(self, linear: LinearTask, solver: LinearSolver, moving: Sequence[int]):
        self.linear = linear
        self.solver = solver
        self.moving = tuple(moving)
        self._tape: tuple[Tensor, list[Tensor], Tensor] | None = None

    def derivative(self, known: Sequence[Tensor], tangents: Sequence[Tensor], z: Tensor, params: Any) -> Tensor:
        """The n-th derivative of the residual along the curve with the n - 1 ``known`` derivatives, and a zero n-th."""
        leaf, leaves, out = self._recorded(z, params)
        # phi is linear in w, so that its gradient in w does not depend on w, which can be zero
        w = torch.zeros_like(out).requires_grad_()
        states = (*(s.detach().requires_grad_() for s in known), None)
        phi = self._weighted(out, w, leaf, leaves, states, tangents)
        grad = None if phi is None else _grad(phi, [w])[0]
        return torch.zeros_like(out) if grad is None else grad

    def vjp_params(
        self, w: Tensor, states: Sequence[Tensor], tangents: Sequence[Tensor], z: Tensor, params: Any, needs_grad: Any
    ) -> list[Tensor | None]:
        """The gradients of w times the n-th derivative in z, in the states except the last, in the tangents and in the
        parameters; ``None`` for those that need none."""
        leaf, leaves, out = self._recorded(z, params)
        tangents = [t.detach().requires_grad_() for t in tangents]
        states = [s.detach().requires_grad_() for s in states]
        phi = self._weighted(out, w, leaf, leaves, states, tangents)
        inputs = (leaf, *states[:-1], *tangents, *leaves)
        grads: list[Tensor | None] = [None] * len(inputs)
        chosen = [i for i, needed in enumerate(needs_grad) if needed]
        computed = [None] * len(chosen) if phi is None else _grad(phi, [inputs[i] for i in chosen])
        for i, grad in zip(chosen, computed, strict=True):
            grads[i] = torch.zeros_like(inputs[i]) if grad is None else grad
        return grads

    def composed(self, n: int, z: Tensor, states: Sequence[Tensor], tangents: Sequence[Tensor], params: Any) -> Tensor:
        """The n-th derivative of the residual along the curve by nested ``torch.func.jvp``, for transformed tensors."""
        moves = dict(zip(self.moving, tangents, strict=True))

        def residual(e: Tensor) -> Tensor:
            there, power = z, e
            for i, v in enumerate(states, start=1):
                there, power = there + power * v, power * e / (i + 1)
            moved = (p + e * moves[i] if i in moves else p for i, p in enumerate(params))
            return self.linear.system.residual(there, *moved)

        return directional(residual, n, z)

    def _recorded(self, z: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        """One recorded evaluation of the residual: the state and the parameters as leaves, and the residual."""
        if self._tape is None:
            leaf = z.detach().requires_grad_()
            seen: set[int] = set()
            leaves = []
            for place, p in enumerate(params):
                # A leaf stands for itself, so that the function finds the very tensors that it captures. Not with
                # hooks, which would run here too, and not a second time, where the gradient would be that of both.
                itself = p.is_leaf and p.requires_grad and not p._backward_hooks and id(p) not in seen
                seen.add(id(p))
                leaves.append(p if itself else p.detach().requires_grad_(p.requires_grad or place in self.moving))
            with torch.enable_grad():
                self._tape = leaf, leaves, self.linear.system.residual(leaf, *leaves)
        return self._tape

    def _weighted(
        self, out: Tensor, w: Tensor, z: Tensor, params: Sequence[Tensor], states: Any, tangents: Sequence[Tensor]
    ) -> Tensor | None:
        """:math:`\\varphi_n` for n states, ``None`` if it is zero; a state ``None`` stands for zero."""
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
    """The autograd node of the n-th derivative along a curve: ``(curve, n, z, *known, *tangents, *params) -> z_n``,
    where ``known`` are the n - 1 lower derivatives and ``tangents`` those of the parameters that move."""

    @staticmethod
    def forward(ctx: Any, curve: Curve, n: int, z: Tensor, *rest: Tensor) -> Tensor:
        known, tangents, params = _parted(curve, n, rest)
        with without_autocast(z.device):
            b = -curve.derivative(known, tangents, z, params)
            _, solution = curve.linear.solve(curve.solver, False, b, z, params)
        report(curve.linear.record, solution.report)
        ctx.curve, ctx.n = curve, n
        ctx.save_for_backward(solution.value, z, *rest)
        return solution.value

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
                _, solution = curve.linear.solve(curve.solver, True, c, z, params)
                report(curve.linear.record, solution.report)
                return None, None, *curve.vjp_params(-solution.value, (*known, y), tangents, z, params, needs_grad)
        # the gradient is to be differentiated again: by operations that autograd and torch.func can follow
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
    """The derivative of order ``order`` of a function of one number, at zero, by nested ``torch.func.jvp``."""
    zero, one = like.new_zeros(()), like.new_ones(())
    for _ in range(order):

        def slope(e: Tensor, fn: Callable[[Tensor], Tensor] = fn) -> Tensor:
            moved: Tensor = torch.func.jvp(fn, (e,), (one,))[1]
            return moved

        fn = slope
    return fn(zero)
