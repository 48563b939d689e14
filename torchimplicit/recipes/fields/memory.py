"""Steps of bounded memory: a mean over many points, differentiated chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import Function

from torchimplicit.recipes.fields.settings import FieldSettings
from torchimplicit.recipes.runtime.errors import UserError


def chunk_points(config: FieldSettings, training: int, slopes: bool = False) -> int:
    """How many points may go through at a time; ``training``: how many there are to train on, ``slopes``: whether the
    loss holds the field's.

    Raises:
        UserError: if the states alone, which amortized training remembers of every point, take more than there is.
    """
    chosen, batch = config.representation, config.optimization.batch_size
    bound = chosen.memory_mb * 2**20
    each = 4 * floats_a_point(config, slopes)
    fitting = bound // each
    if chosen.implicit and chosen.amortize != "off" and min(batch, fitting) < training:
        states = 4 * chosen.width * training
        fitting = (bound - states) // each
        if fitting < 1:
            raise UserError(
                f"the states of {training} points of width {chosen.width} take {states / 2**20:.0f} MB, and "
                f"--memory-mb is {chosen.memory_mb}; give more, or forget the states: --amortize off"
            )
    return max(1, fitting)


HELD = {"siren": 3, "fourier": 4, "gabor": 7}
"""Vectors of the model's width that a step holds for each filter and the layer behind it, as measured."""


SLOPES = 2.2
"""How many times as much is held where the loss holds slopes, which are differentiated again; likewise."""


def floats_a_point(config: FieldSettings, slopes: bool = False) -> int:
    """What a step holds for a point at its peak: as measured, with the first step's solve, and rounded up."""
    chosen, solve = config.representation, config.equilibria
    vectors = HELD[chosen.filter] * (chosen.depth + 1) + 2
    if chosen.implicit:
        solving = {"anderson": 40, "broyden": 2 * solve.solver_steps + 16, "fixed-point": 16}[solve.solver]
        backward = 4
        if solve.gradient == "implicit":
            backward = min(solve.backward_steps, 30) + 17  # GMRES's basis
        elif solve.gradient in ("unrolled-phantom", "unrolled"):
            steps = solve.phantom_steps if solve.gradient == "unrolled-phantom" else solve.solver_steps
            backward = 3 * chosen.depth * steps + 8
        vectors += max(solving, backward)
    return round(chosen.width * vectors * (SLOPES if slopes else 1))


def accumulated(value: Callable[[Tensor], Tensor], index: Tensor, chunk: int, weights: Sequence[Tensor]) -> Tensor:
    """The mean of ``value`` over the points ``index``, at most ``chunk`` of them at a time.

    ``value`` gives the mean over the points it is given. Where there are several chunks, the gradient in ``weights``
    is computed with the value, chunk by chunk, and handed on by the backward pass: the memory is that of one chunk, and
    the result is that of one pass, up to rounding. First derivatives only, and in ``weights`` only.
    """
    if len(index) <= chunk:
        return value(index)
    parts = index.split(chunk)
    if not torch.is_grad_enabled():
        return torch.stack([value(part) * (len(part) / len(index)) for part in parts]).sum()
    wanted = [w for w in weights if w.requires_grad]
    sums = [torch.zeros_like(w) for w in wanted]
    total: float | Tensor = 0.0
    for part in parts:
        share = value(part) * (len(part) / len(index))
        for held, grad in zip(sums, torch.autograd.grad(share, wanted, allow_unused=True), strict=True):
            if grad is not None:
                held += grad
        total = total + share.detach()
    return cast(Tensor, _Known.apply(total, sums, *wanted))


class _Known(Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        return None, None, *(u * grad for grad in ctx.saved_tensors)
