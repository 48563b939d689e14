"""A check that the problem's function is deterministic."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchimplicit.closure import is_transformed
from torchimplicit.members import known_by
from torchimplicit.notices import notice

LOOKS = 8
"""A function that draws random numbers is evaluated twice this often before the draws are taken to make no difference.
All of the first solves, this many, are watched, and later one in this many."""

Evaluate = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclass
class _Memory:
    """The memory of a function.

    Attributes:
        solves: the number of solves.
        looks: how often it was evaluated twice at one point.
        known: whether its value at a solution has been compared with the one that the solver evaluated there.
    """

    solves: int = 0
    looks: int = 0
    known: bool = False


class Randomness:
    """Warns, once for each function, if two evaluations at one point differ.

    It evaluates only for a reason: if random numbers were drawn during the solve, or if the value recorded at the
    solution differs from the one that the solver evaluated there.

    Args:
        function: the user's function.
        evaluate: evaluates it at a point.
    """

    def __init__(self, function: Any, evaluate: Evaluate):
        subject = known_by(function)
        memory = _memories.get(subject)
        self._memory = _memories.setdefault(subject, _Memory()) if memory is None else memory
        self._evaluate = evaluate
        self._before: Tensor | None = None

    @property
    def known(self) -> bool:
        """True if the function has been compared before, in any solve."""
        return self._memory.known

    def begin(self, z: Tensor) -> None:
        """Note the state of the random number generator before a solve from ``z``."""
        memory = self._memory
        memory.solves += 1
        watched = memory.looks < LOOKS and (memory.solves <= LOOKS or memory.solves % LOOKS == 0)
        self._before = _drawn(z.device) if watched and not is_transformed(z) else None

    def end(self, z: Tensor, params: Sequence[Tensor]) -> None:
        """Test the function if random numbers were drawn during the solve, which ended at ``z``."""
        if self._before is not None and not torch.equal(self._before, _drawn(z.device)):
            self.suspect(z, params)

    def compare(self, residual: Tensor, reported: Tensor, z: Tensor, params: Sequence[Tensor]) -> None:
        """Compare the relative residual at the solution ``z`` with the one that the solver has ended with; once."""
        if self.known or is_transformed(z):
            return
        self._memory.known = True
        gap = (residual - reported).abs()
        if bool((gap > torch.finfo(gap.dtype).eps ** 0.5 * (1 + reported.abs())).any()):
            self.suspect(z, params)

    @torch.no_grad()
    def suspect(self, z: Tensor, params: Sequence[Tensor]) -> None:
        """Evaluate twice at ``z``, and warn if the values differ."""
        memory = self._memory
        if memory.looks >= LOOKS:
            return
        with torch.random.fork_rng([z.device] if z.device.type == "cuda" else []):
            one, other = (self._evaluate(z, params) for _ in range(2))
        same = torch.equal(one.nan_to_num(), other.nan_to_num())
        memory.looks = memory.looks + 1 if same else LOOKS
        if same:
            return
        notice(
            "the problem's function is random",
            "the problem's function gives different values at one point: it is random (dropout in training?), or "
            "changes from call to call. Then there is no solution to converge to, and the derivative is that of its "
            "last evaluation. Take torchimplicit.nn.VariationalDropout, which draws one mask per solve inside an "
            "Equilibrium, or draw outside the function and pass the numbers as an argument",
            UserWarning,
        )


_memories: weakref.WeakKeyDictionary[Any, _Memory] = weakref.WeakKeyDictionary()


def _drawn(device: torch.device) -> Tensor:
    """The part of the state of the default generator of ``device`` that changes with every number drawn: its position,
    and the first words of its buffer; a copy, which does not keep the whole state alive."""
    return (torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state())[:64].clone()
