"""Damped steps from the solution, which autograd is to see, compiled with their derivative."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from torchimplicit.captured.compiled import Compiled, compiled, spelt
from torchimplicit.captured.graph import Graph
from torchimplicit.captured.parts import dependents, is_view, needed_before, part
from torchimplicit.problems import System
from torchimplicit.problems.image_system import ImageSystem


@dataclass(frozen=True)
class Continuation:
    """So many steps with so much damping."""

    steps: int
    damping: float

    def taken(self, system: System, h: Tensor, params: Sequence[Tensor]) -> Tensor:
        """Where they lead from ``h``; differentiable."""
        for _ in range(self.steps):
            h = self._step(system, h, params)
        return h

    def _step(self, system: System, h: Tensor, params: Sequence[Tensor]) -> Tensor:
        if not isinstance(system, ImageSystem):
            return h + self.damping * system.at(h, params).residual
        image = system.image(h, *params)
        return image if self.damping == 1.0 else torch.lerp(h, image, self.damping)

    def joint(self, system: System, h: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Likewise, and what the first step tells of the residual at ``h``, its norms and relative ones, ``[2, batch]``
        or ``[2, batch, leaves]``; NaN where that is nothing."""
        after = self._step(system, h, params)
        if isinstance(system, ImageSystem):
            moved = (after - h).detach() / self.damping
            gap, size = system.norms(moved), system.norms(h + moved)
            figures = torch.stack((gap, torch.where(gap > 0, gap / size, 0)))
        else:
            figures = torch.full_like(h[:, 0], torch.nan).expand(2, -1).clone()
        return Continuation(self.steps - 1, self.damping).taken(system, after, params), figures


class Continued(NamedTuple):
    """``forward`` is ``(h, *inputs) -> (where, figures, *made)``, ``backward`` is ``(u, h, *inputs, *made) -> grads``,
    one for each wanted input; ``None`` where there is none."""

    forward: Compiled
    backward: Compiled | None


def compiled_continuation(graph: Graph, way: Continuation, needs_grad: Sequence[bool]) -> Continued:
    """The steps, and what takes cotangents back through them: traced as one, and taken apart."""
    from torch._guards import detect_fake_mode
    from torch.fx.experimental.proxy_tensor import make_fx

    asked = [w for w, example in zip(needs_grad, graph.others, strict=True) if isinstance(example, Tensor)]

    def joint(u: Tensor, h: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        system, params = graph.system(inputs)
        with torch.enable_grad():
            params = tuple(p.detach().requires_grad_() if w else p for p, w in zip(params, asked, strict=True))
            out, figures = way.joint(system, h, params)
            chosen = [p for p, w in zip(params, asked, strict=True) if w]
            grads: Sequence[Tensor | None] = [None] * len(chosen)
            if chosen and out.requires_grad:
                grads = torch.autograd.grad(out, chosen, u, allow_unused=True)
        wanted = (torch.zeros_like(p) if grad is None else grad for grad, p in zip(grads, chosen, strict=True))
        return out.detach(), figures, *wanted

    h = graph.flat()
    examples = (torch.empty_like(h), h, *graph.others)
    with torch.no_grad(), detect_fake_mode(examples) or nullcontext():
        traced = make_fx(spelt(joint))(*examples)
    u, *inputs = traced.graph.find_nodes(op="placeholder")
    (output,) = traced.graph.find_nodes(op="output")
    out, figures, *grads = output.args[0]
    late = dependents(traced, u)
    intermediates = [node for node in needed_before(traced, late) if node.op != "placeholder"]
    forward = part(traced, inputs, [out, figures, *intermediates], lambda node: node not in late)
    back = None
    if grads:
        backward_inputs = [u, *inputs, *intermediates]
        back = compiled(
            part(traced, backward_inputs, grads, lambda node: node in late or is_view(node)),
            [_example(n) for n in backward_inputs],
        )
    return Continued(compiled(forward, examples[1:]), back)


def _example(node: fx.Node) -> Any:
    return node.meta["val"]
