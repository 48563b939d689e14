"""Whether the derivative that autograd gives of a function is the function's."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from torchimplicit.members import known_by
from torchimplicit.notices import notice
from torchimplicit.problems.linearization import Linearization

GAP = 1e-3
"""The share of a directional derivative by which autograd's may differ from it."""


class Agreement:
    """Compares, once for each function that cuts part of its graph off, its derivative in the state with a central
    difference, and warns where they differ.

    A part that is cut off (``detach()``, ``.data``, ``.item()``, ``no_grad``) counts as a constant to autograd. Where
    it depends on the state, the Jacobian lacks it, and the gradient of the solution is not the gradient.

    Args:
        function: the user's.
    """

    def __init__(self, function: Any):
        self._subject = known_by(function)

    def check(self, tape: Linearization) -> None:
        """Compare on the ``tape`` at the solution, by two evaluations that are not counted; by two more if they differ,
        since a difference across a kink or a jump, or in rounding, tells nothing: it changes with the step."""
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
        told = (tape.vjp(cotangent) * direction).sum()
        slope, typical = _slope(tape, direction, cotangent, step)
        gap = (slope - told).abs()
        if not bool(gap > GAP * typical):
            return
        again, _ = _slope(tape, direction, cotangent, step / 16)  # far enough to leave kinks behind
        if bool((again - slope).abs() > gap / 4):
            return
        notice(
            "autograd does not see all of the problem's function",
            "the problem's function cuts part of its dependence on the state off (detach(), .data, .item(), no_grad or "
            f"NumPy): along one direction autograd's derivative is {float(told):.3g}, and a central difference gives "
            f"{float(slope):.3g}. The gradient of the solution lacks that part. Compute it by differentiable "
            "operations; where it is meant (a straight-through estimator), ignore this warning",
            UserWarning,
        )


def _slope(tape: Linearization, direction: Tensor, cotangent: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """The central difference along ``direction`` in the weights ``cotangent``, and its size for weights at random."""
    values = []
    for shift in (step, -step):
        with torch.enable_grad():  # an energy's gradient is taken in the state
            there = (tape.z.detach() + shift * direction).requires_grad_()
            values.append(tape.core(there, *tape.params).detach())
    change = (values[0] - values[1]) / (2 * step)
    return (cotangent * change).sum(), torch.linalg.vector_norm(change)


_checked: weakref.WeakSet[Any] = weakref.WeakSet()
