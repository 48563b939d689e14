"""A point of a system with the work that all linear solves there share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchimplicit.linear import LinearSolution, LinearSolver
from torchimplicit.problems import System
from torchimplicit.problems.linearization import Linearization


class SharedPoint:
    """A solution whose tape and whose linear solver's factorization or preconditioner serve many linear solves.

    Args:
        system: evaluated once, on construction.
        z, params: the solution, ``[batch, dim]``, and its parameters; neither may be written to afterwards.
        solver: for all the solves.

    Attributes:
        solves: the number of right-hand sides that were solved for with :math:`A` and with :math:`A^T`.
    """

    def __init__(self, system: System, z: Tensor, params: Sequence[Tensor], solver: LinearSolver):
        self.system = system
        self.solver = solver.init()
        self.solves = {"plain": 0, "transposed": 0}
        self._where = _memory((z, *params))
        self._needs_grad = tuple(p.requires_grad for p in params)
        self._tape = system.linearize(z, params, self._needs_grad)

    @property
    def out(self) -> Tensor:
        """The recorded value: that of the map, or the energy's gradient."""
        return self._tape.out

    def tape(
        self, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool] | None = None
    ) -> Linearization | None:
        """The tape, if this is the point ``(z, params)`` and the tape knows all parameters that need a gradient."""
        if needs_grad is not None and any(
            w and not known for w, known in zip(needs_grad, self._needs_grad, strict=True)
        ):
            return None
        return self._tape if _memory((z, *params)) == self._where else None

    def solve(self, tape: Linearization, transposed: bool, b: Tensor) -> LinearSolution:
        """Solve with :math:`A` or :math:`A^T` for ``b`` (``[batch, dim]`` or a block ``[k, batch, dim]``)."""
        self.solves["transposed" if transposed else "plain"] += 1 if b.ndim == 2 else len(b)
        return self.system.solve_linear(tape, transposed, b, self.solver)


def _memory(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    """A key that is equal for tensors in the same memory with the same contents (autograd counts in-place writes)."""
    return tuple(
        (t.data_ptr(), t._version, t.shape, t.stride(), t.dtype) if t.layout is torch.strided else (id(t), t._version)
        for t in tensors
    )
