"""Whether a function gives one value at one point."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchimplicit.closure import is_transformed
from torchimplicit.members import known_by
from torchimplicit.notices import notice

LOOKS = 8
"""How often a function that draws random numbers is looked at, before they are taken to make no difference."""

Evaluate = Callable[[Tensor, Sequence[Tensor]], Tensor]


class Randomness:
    """Notices, and says once for each function, that two evaluations at one point differ.

    It costs no evaluation unless there is a reason: the function has drawn random numbers while the problem was
    solved, or what it gives at the solution is not what the solver has seen there.

    Args:
        function: the user's.
        evaluate: its value at a point.
    """

    def __init__(self, function: Any, evaluate: Evaluate):
        self._subject = known_by(function)
        self._evaluate = evaluate
        self._before: Tensor | None = None

    @property
    def known(self) -> bool:
        """Whether the function has been looked at, in whatever solve."""
        return self._subject in _known

    def begin(self, z: Tensor) -> None:
        """A solve begins."""
        done = _looks.get(self._subject, 0) >= LOOKS or is_transformed(z)
        self._before = None if done else _drawn(z.device)

    def end(self, z: Tensor, params: Sequence[Tensor]) -> None:
        """It has ended at ``z``."""
        if self._before is not None and not torch.equal(self._before, _drawn(z.device)):
            self.suspect(z, params)

    def compare(self, residual: Tensor, reported: Tensor, z: Tensor, params: Sequence[Tensor]) -> None:
        """Compare the relative residual at the solution ``z`` with the one that the solver has ended with; once."""
        if self.known or is_transformed(z):
            return
        _known.add(self._subject)
        gap = (residual - reported).abs()
        if bool((gap > torch.finfo(gap.dtype).eps ** 0.5 * (1 + reported.abs())).any()):
            self.suspect(z, params)

    @torch.no_grad()
    def suspect(self, z: Tensor, params: Sequence[Tensor]) -> None:
        """Evaluate twice, and warn if that gives two values."""
        looks = _looks.get(self._subject, 0)
        if looks >= LOOKS:
            return
        with torch.random.fork_rng([z.device] if z.device.type == "cuda" else []):
            one, other = (self._evaluate(z, params) for _ in range(2))
        same = torch.equal(one.nan_to_num(), other.nan_to_num())
        _looks[self._subject] = looks + 1 if same else LOOKS
        if same:
            return
        notice(
            "the problem's function is random",
            "the problem's function gives different values at one point: it is random (dropout in training?), or "
            "changes from call to call. Then there is no solution to converge to, and the derivative is that of its "
            "last evaluation. Take torchimplicit.nn.VariationalDropout, which draws one mask a solve inside an "
            "Equilibrium, or draw outside the function and pass what was drawn as an argument",
            UserWarning,
        )


_known: weakref.WeakSet[Any] = weakref.WeakSet()
_looks: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def _drawn(device: torch.device) -> Tensor:
    """What moves, with every number drawn, in the state of the generator that is drawn from on ``device`` where none is
    named: its place, and the first words of the numbers that it has ready."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return state[:64].clone()
