"""A map at one point: its Jacobian's products there, all taken from one recorded evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchimplicit.closure import check_graph, eagerly

Map = Callable[..., Tensor]
Products = TypeVar("Products", Tensor, list[Tensor | None])


class Linearization:
    """``core(z, *params)`` evaluated once with autograd's tape; every product below runs over that tape.

    For plain tensors only (inside autograd nodes and solvers); derivatives of these products are taken elsewhere, by
    composable transforms.

    Args:
        core: ``(z [batch, dim], *params) -> [batch, dim]``.
        z, params: where.
        wanted: which parameters :meth:`pull` may be asked for.
    """

    def __init__(self, core: Map, z: Tensor, params: Sequence[Tensor], wanted: Sequence[bool] | None = None):
        self.core = core
        self.z = z.detach().requires_grad_()
        self.wanted = tuple(wanted) if wanted is not None else (False,) * len(params)
        self.params = _cut(params, self.wanted)
        with torch.enable_grad():
            self.out = core(self.z, *self.params)
        if wanted is not None:
            check_graph(self.out, (self.z, *self.params))
        self._forward: tuple[Tensor, Tensor] | None = None

    def transposed(self, v: Tensor) -> Tensor:
        """:math:`J^T v`, ``[batch, dim]``."""
        return self._retried(lambda: self._grad(self.out, self.z, v))

    def transposed_block(self, vs: Tensor) -> Tensor:
        """:math:`J^T v` for a block ``[k, batch, dim]``."""
        return self._block(self.transposed, self.out, self.z, vs)

    def plain(self, v: Tensor) -> Tensor:
        """:math:`J v`, by differentiating the transposed product, which is linear in its argument."""
        pulled, w = self._twice()
        return self._grad(pulled, w, v)

    def plain_block(self, vs: Tensor) -> Tensor:
        """:math:`J v` for a block ``[k, batch, dim]``."""
        pulled, w = self._twice()
        return self._block(self.plain, pulled, w, vs)

    def pull(self, v: Tensor, out: Tensor | None = None) -> list[Tensor | None]:
        """:math:`(\\partial\\,out/\\partial p)^T v` for each wanted parameter, ``None`` for the others.

        ``out`` is by default the core's value; it may be any tensor on the tape.
        """
        if out is None:
            return self._retried(lambda: self._pull(self.out, v))
        return self._pull(out, v)

    def _pull(self, out: Tensor, v: Tensor) -> list[Tensor | None]:
        inputs = [p for p, w in zip(self.params, self.wanted, strict=True) if w]
        if not inputs or not out.requires_grad:
            return [torch.zeros_like(p) if w else None for p, w in zip(self.params, self.wanted, strict=True)]
        grads = iter(torch.autograd.grad(out, inputs, v, retain_graph=True, allow_unused=True))
        return [_or_zero(next(grads), p) if w else None for p, w in zip(self.params, self.wanted, strict=True)]

    def _twice(self) -> tuple[Tensor, Tensor]:
        if self._forward is None:
            if _is_compiled(self.out):
                self._evaluate_eagerly()
            with torch.enable_grad():
                w = torch.zeros_like(self.out).requires_grad_()
                pulled = torch.zeros_like(self.z)
                if self.out.requires_grad:
                    (found,) = torch.autograd.grad(self.out, self.z, w, create_graph=True, allow_unused=True)
                    pulled = pulled if found is None else found
            self._forward = pulled, w
        return self._forward

    def _retried(self, product: Callable[[], Products]) -> Products:
        """The product; where compiled code refuses to run backward again, on the tape of the code as it was written."""
        try:
            return product()
        except RuntimeError:
            if not _is_compiled(self.out):
                raise
        self._evaluate_eagerly()
        return product()

    def _evaluate_eagerly(self) -> None:
        with torch.enable_grad(), eagerly():
            self.out = self.core(self.z, *self.params)

    @staticmethod
    def _grad(out: Tensor, at: Tensor, v: Tensor) -> Tensor:
        if not out.requires_grad:
            return torch.zeros_like(at)
        (grad,) = torch.autograd.grad(out, at, v, retain_graph=True, allow_unused=True)
        return _or_zero(grad, at)

    @staticmethod
    def _block(product: Callable[[Tensor], Tensor], out: Tensor, at: Tensor, vs: Tensor) -> Tensor:
        if not out.requires_grad:
            return torch.zeros_like(vs)
        try:
            (grad,) = torch.autograd.grad(out, at, vs, retain_graph=True, allow_unused=True, is_grads_batched=True)
        except RuntimeError:  # an operation in the map without a batching rule
            return torch.stack([product(v) for v in vs])
        return torch.zeros_like(vs) if grad is None else grad


def _cut(params: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """The parameters with nothing behind them; themselves where nothing is, so that the map sees its own tensors.

    A tensor that stands in several places is itself in the first one only: each place has its own gradient.
    """
    kept: dict[int, Tensor] = {}
    cut = []
    for p, w in zip(params, wanted, strict=True):
        own = p.is_leaf and (not w or (p.requires_grad and not p._backward_hooks)) and id(p) not in kept
        cut.append(kept.setdefault(id(p), p) if own else p.detach().requires_grad_(w))
    return tuple(cut)


def _is_compiled(out: Tensor) -> bool:
    """Whether compiled code lies behind ``out``: its backward has no derivative, and may give up its buffers."""
    stack: list[Any] = [out.grad_fn]
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "CompiledFunctionBackward":
            return True
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
    return False


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad
