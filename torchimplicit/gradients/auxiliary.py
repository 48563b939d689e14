"""The auxiliary value of a map (``has_aux``), with its derivative."""

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
    """The auxiliary value of the map at the solution ``z``, differentiable like the solution.

    It comes from an evaluation that was made anyway, where possible. If a tape was recorded for the backward pass, the
    value lies on that tape, and a node makes it a function of the solution and the parameters. If autograd records the
    steps, it is the value of the last step. Otherwise the last evaluation counts if it was at ``z``. If it was not, and
    under transforms, whose tensors may not outlive them, the map is evaluated there once more.
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
    """Return whether the value of the last evaluation is the one to return."""
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
    """``t`` without a graph that was recorded although no gradient is asked for."""
    return t if is_transformed(t) else t.detach()


def _on_tape(value: Any, leaves: Sequence[Tensor], saved: Any, actual: Sequence[Tensor]) -> Any:
    """``value``, a pytree recorded at ``leaves``, as a function of the ``actual`` tensors that these stand for."""
    parts, spec = pytree.tree_flatten(value)
    places = [i for i, part in enumerate(parts) if isinstance(part, Tensor) and part.requires_grad]
    recorded = [parts[i] for i in places]
    for part in recorded:
        check_graph(part, leaves)
    if recorded:
        for i, part in zip(places, Graft.apply(saved, recorded, leaves, *actual), strict=True):
            parts[i] = part
    return pytree.tree_unflatten(parts, spec)
