"""Helpers for autograd nodes under ``torch.func`` and forward mode, and derivatives that compose with these."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchimplicit._torch import functorch, set_forward_mode
from torchimplicit.closure import is_transformed
from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.problems.system import vjp

Grads = tuple[Tensor | None, ...]
"""One gradient per parameter, ``None`` where none was asked for."""


def gradients(fn: Callable[..., Tensor], primals: Sequence[Tensor], needs_grad: Sequence[bool]) -> Grads:
    """The gradients of a scalar ``fn`` in the primals that need one, ``None`` for the others; differentiable."""
    out, pull = partial_vjp(fn, primals, needs_grad)
    return pull(torch.ones_like(out))


def partial_vjp(
    fn: Callable[..., Tensor], primals: Sequence[Tensor], needs_grad: Sequence[bool]
) -> tuple[Tensor, Callable[[Tensor], Grads]]:
    """``torch.func.vjp`` with respect to the primals that need a gradient; the pullback returns ``None`` for others."""
    chosen = [i for i, w in enumerate(needs_grad) if w]

    def of_chosen(*some: Tensor) -> Tensor:
        full = list(primals)
        for i, p in zip(chosen, some, strict=True):
            full[i] = p
        return fn(*full)

    out, pull = vjp(of_chosen, *(primals[i] for i in chosen))

    def pullback(v: Tensor) -> Grads:
        grads: list[Tensor | None] = [None] * len(primals)
        for i, grad in zip(chosen, pull(v), strict=True):
            grads[i] = grad
        return tuple(grads)

    return out, pullback


def jvp(fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor | None:
    """The tangent of ``fn`` by two pullbacks, which nest under every transform; ``None`` if there is no tangent."""
    moving = [t is not None for t in tangents]
    if not any(moving):
        return None
    # The pullback is linear in w, so its own pullback, at any w, is the tangent map. torch.func.jvp does not work
    # inside a jvp rule, where the inputs are dual tensors of an enclosing level.
    out, pull = partial_vjp(fn, primals, moving)
    some = [i for i, g in enumerate(moving) if g]
    _, twice = vjp(lambda w: tuple(pull(w)[i] for i in some), torch.zeros_like(out))
    return twice(tuple(tangents[i] for i in some))[0]


def nested_forward_mode() -> contextlib.AbstractContextManager[None]:
    """Switch forward mode on inside a jvp rule, where autograd switches it off. Otherwise the tangents of an enclosing
    forward level would be lost, and forward-over-forward derivatives silently wrong."""
    return set_forward_mode(True)


def saved_tensors(ctx: Any) -> list[Tensor]:
    """The saved tensors of a node, unwrapped from transforms that have ended. The pullback of ``torch.func.vjp`` runs
    after its transform has ended, and another transform cannot wrap the tensors of that one."""
    return [_of_now(t) for t in ctx.saved_tensors]


def _of_now(t: Tensor) -> Tensor:
    while (inner := functorch.unwrap_if_dead(t)) is not t:
        t = inner
    return t


def primals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors without the tangents of the level whose rule is running; those of enclosing levels stay."""
    return [forward_ad.unpack_dual(t).primal for t in tensors]


def fold_copies(info: Any, dims: Sequence[int | None], params: Sequence[Tensor]) -> tuple[int, list[int | None], Any]:
    """The number of copies, for each parameter the dimension of its copies (0 or ``None``), and the parameters with
    their copies moved to dimension 0."""
    moved = tuple(p if d is None else p.movedim(d, 0) for p, d in zip(params, dims, strict=True))
    return info.batch_size, [None if d is None else 0 for d in dims], moved


def stack_copies(t: Tensor, dim: int | None, size: int) -> Tensor:
    """Stack the copies of ``t`` (``[batch, ...]``, copies in ``dim``) along the batch, ``[size * batch, ...]``."""
    # contiguous: an expanded tensor would be written to through all of its copies at once
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.contiguous().reshape(-1, *t.shape[2:])


def is_plain(t: Tensor) -> bool:
    """Return whether ``t`` belongs to no transform that differentiates, at any level (``vmap`` does not)."""
    while functorch.is_batchedtensor(t):
        t = functorch.get_unwrapped(t)
    return not is_transformed(t)


def refuse_batched_cotangents(u: Tensor) -> None:
    """Raise for the batched cotangents of ``is_grads_batched``. A solver reads its residuals, which the older vmap
    behind that option does not allow.

    Raises:
        UnsupportedDerivativeError: ``u`` is such a cotangent.
    """
    if functorch.is_legacy_batchedtensor(u):
        raise UnsupportedDerivativeError(
            "an equilibrium cannot be differentiated for a batch of cotangents by torch.autograd.grad("
            "is_grads_batched=True), nor by torch.autograd.functional.jacobian(vectorize=True), which calls it: take "
            "torch.func.jacrev, torch.func.vmap of a pullback, or torchimplicit.derivatives.Derivatives, which solve "
            "for all cotangents together"
        )
