"""A check of autograd's derivative of the problem's function against a finite difference."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from torchimplicit.members import known_by
from torchimplicit.notices import notice
from torchimplicit.problems.linearization import Linearization

GAP = 1e-3
"""The relative difference from a directional derivative above which autograd's is warned about."""


class Agreement:
    """Compares the derivative of a function that detaches part of its graph with a central difference, once for each
    function, and warns where they differ.

    A detached part (``detach()``, ``.data``, ``.item()``, ``no_grad``) counts as a constant to autograd. If it depends
    on the state, the Jacobian lacks it, and the gradient of the solution is wrong.

    Args:
        function: the user's function.
    """

    def __init__(self, function: Any):
        self._subject = known_by(function)

    def check(self, tape: Linearization) -> None:
        """Compare at the solution's ``tape``, by two evaluations that are not counted.

        If they differ, two more evaluations with another step tell a missing derivative from a kink, a jump or
        rounding: only the former gives the same difference again.
        """
        if self._subject in _checked or tape.z.ndim != 2 or not (tape.z.numel() and tape.out.requires_grad):
            return
        _checked.add(self._subject)
        generator = torch.Generator().manual_seed(0)
        direction, cotangent = (
            torch.randn(t.shape, generator=generator, dtype=torch.float64).to(tape.z) for t in (tape.z, tape.out)
        )
        size = tape.z.detach().square().mean(dim=-1, keepdim=True).sqrt()
        direction = direction * torch.where(size > 0, size, 1.0)
        step = torch.finfo(tape.z.dtype).eps ** (1 / 3)
        by_autograd = (tape.vjp(cotangent) * direction).sum()
        slope, typical = _slope(tape, direction, cotangent, step)
        gap = (slope - by_autograd).abs()
        if not bool(gap > GAP * typical):
            return
        again, _ = _slope(tape, direction, cotangent, step / 16)  # far enough to leave kinks behind
        if bool((again - slope).abs() > gap / 4):
            return
        notice(
            "autograd does not see all of the problem's function",
            "the problem's function hides part of its dependence on the state from autograd (detach(), .data, .item(), "
            f"no_grad or NumPy): along one direction autograd's derivative is {float(by_autograd):.3g}, but a central "
            f"difference gives {float(slope):.3g}. The gradient of the solution lacks that part. Compute it by "
            "differentiable operations; if it is hidden on purpose (a straight-through estimator), ignore this warning",
            UserWarning,
        )


def _slope(tape: Linearization, direction: Tensor, cotangent: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """The central difference along ``direction``, weighted by ``cotangent``; and its typical size for random
    weights."""
    values = []
    for shift in (step, -step):
        with torch.enable_grad():  # an energy's gradient is taken in the state
            there = (tape.z.detach() + shift * direction).requires_grad_()
            values.append(tape.core(there, *tape.params).detach())
    change = (values[0] - values[1]) / (2 * step)
    return (cotangent * change).sum(), torch.linalg.vector_norm(change)


_checked: weakref.WeakSet[Any] = weakref.WeakSet()
