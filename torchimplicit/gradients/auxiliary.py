"""The derivative of what a map returns beside the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.closure import check_graph, is_transformed, transforms_running
from torchimplicit.gradients.base import Gradient, SolveTask, differentiable
from torchimplicit.gradients.nodes import Graft


def auxiliary(task: SolveTask, gradient: Gradient, z: Tensor, params: Sequence[Tensor]) -> Any:
    """What the map returns beside the state at the solution ``z``, as autograd sees both.

    It is that of an evaluation which was made anyway. Where a tape was recorded for the backward pass, it lies on that,
    and a node makes it a function of the solution, with its derivative, and of the parameters. Where autograd sees
    steps, it is that of the last one. Elsewhere the last evaluation counts if it was at ``z``; if not, and under
    transforms, whose tensors no note may hold, the map is evaluated there once more.
    """
    noted = task.aux
    assert noted is not None
    if noted.leaves is not None and not transforms_running():
        value = _on_tape(noted.value, noted.leaves, noted.saved, (z, *params))
    else:
        noted.listening = True
        if not _counts(task, gradient, z, params):
            task.spent(1)
            task.system.fn(z, *params)
        value = noted.value if noted.recorded else pytree.tree_map_only(Tensor, _plain, noted.value)
    noted.clear()
    noted.listening = False
    return value


def _counts(task: SolveTask, gradient: Gradient, z: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether the last evaluation is the one that is asked for."""
    noted = task.aux
    if noted is None or noted.z is None:
        return False
    seen = task.direct or differentiable((z, *params))
    if gradient.recorded(task.solver) or (gradient.goes_on and seen):
        return True
    if transforms_running() or (seen and not noted.recorded):
        return False
    return torch.equal(noted.z, z.detach())


def _plain(t: Tensor) -> Tensor:
    """``t`` without what autograd saw of it while no gradient was asked for."""
    return t if is_transformed(t) else t.detach()


def _on_tape(value: Any, leaves: Sequence[Tensor], saved: Any, actual: Sequence[Tensor]) -> Any:
    """``value``, recorded at ``leaves``, as a function of ``actual``."""
    parts, spec = pytree.tree_flatten(value)
    places = [i for i, part in enumerate(parts) if isinstance(part, Tensor) and part.requires_grad]
    recorded = [parts[i] for i in places]
    for part in recorded:
        check_graph(part, leaves)
    if recorded:
        for i, part in zip(places, Graft.apply(saved, recorded, leaves, *actual), strict=True):
            parts[i] = part
    return pytree.tree_unflatten(parts, spec)
