"""The autograd node of compiled steps from the solution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from torchimplicit.captured import Continuation
from torchimplicit.closure import is_transformed
from torchimplicit.gradients.base import SolveTask
from torchimplicit.gradients.transforms import partial_vjp, refuse_batched_cotangents
from torchimplicit.precision import without_autocast
from torchimplicit.problems.linearization import check_unmoved


class Continued(Function):
    """``(task, way, h, *params) -> (end, figures)``: the steps of ``way`` from the constant ``h``, and the absolute and
    relative residual norms at their end.

    The first derivative is compiled; higher ones run the steps eagerly.
    """

    @staticmethod
    def forward(ctx: Any, task: SolveTask, way: Continuation, h: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        assert task.linear.capture is not None
        ctx.task, ctx.way = task, way
        compiled = task.linear.capture.go_on(h, params)
        if compiled is None:  # a tensor was written to since the solve began, or the compiled code has raised
            with without_autocast(h.device):
                compiled = *way.joint(task.system, h, params), ()
        out, figures, intermediates = compiled
        kept = [t for t in intermediates if isinstance(t, Tensor)]
        ctx.others = [None if isinstance(t, Tensor) else t for t in intermediates]
        ctx.count = len(params)
        ctx.save_for_backward(h, out, *params, *kept)
        ctx.mark_non_differentiable(figures)
        return out, figures

    @staticmethod
    def backward(ctx: Any, u: Tensor, _: Any) -> tuple[Any, ...]:
        refuse_batched_cotangents(u)
        h, out, *saved = ctx.saved_tensors
        params, kept = saved[: ctx.count], iter(saved[ctx.count :])
        needs_grad = ctx.needs_input_grad[3:]
        task, way = ctx.task, ctx.way
        with without_autocast(h.device):
            if ctx.others and not torch.is_grad_enabled() and not is_transformed(u):
                intermediates = [next(kept) if other is None else other for other in ctx.others]
                grads = task.linear.capture.come_back(u, h, params, intermediates, needs_grad)
                if grads is not None:
                    return None, None, None, *grads
            again, pull = partial_vjp(lambda *params: way.taken(task.system, h, params), params, needs_grad)
            check_unmoved(out, again)
            return None, None, None, *pull(u)
