"""How many states a forward solve holds at once: what docs/choosing/solver.md says."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import torchimplicit as ti

BATCH, DIM = 4, 2048
STATE = BATCH * DIM * 4
"""Bytes."""


class _Living(TorchDispatchMode):
    """The most bytes that the results of operations have held at once, each storage counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._results: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._results += [weakref.ref(t) for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        """The bytes that they hold."""
        living = [t for result in self._results if (t := result()) is not None]
        self._results = [weakref.ref(t) for t in living]
        return sum({s.data_ptr(): s.nbytes() for s in map(_storage, living)}.values())


def _storage(t: torch.Tensor) -> Any:
    return t.untyped_storage()


@pytest.mark.parametrize(
    ("solver", "held"),
    [
        (ti.FixedPointIteration(), 0),
        (ti.Anderson(), 12),
        (ti.Anderson(memory=2), 4),
        (ti.Broyden(memory=10), 10),
        (ti.Broyden(max_steps=31), 30),
    ],
    ids=["plain", "Anderson", "Anderson(2)", "Broyden(10)", "Broyden(31 steps)"],
)
def test_a_forward_solve_holds_the_memory_and_eleven_states(solver, held):
    torch.manual_seed(0)
    slope, x = 0.9 * torch.rand(DIM), torch.randn(BATCH, DIM)
    with torch.no_grad(), _Living() as living:
        problem = ti.FixedPoint(lambda z, x: torch.tanh(slope * z + x))
        solution = ti.solve(problem, torch.zeros(BATCH, DIM), x, solver=solver)
    assert solution.converged.all()
    assert held <= living.peak // STATE <= held + 11


def test_what_a_solver_remembers_is_gone_when_it_is_done():
    torch.manual_seed(0)
    slope, x = 0.9 * torch.rand(DIM), torch.randn(BATCH, DIM, requires_grad=True)
    problem = ti.FixedPoint(lambda z, x: torch.tanh(slope * z + x))
    for gradient, held in ((ti.Implicit(), 0), (ti.SharedInverse(), 10)):
        with _Living() as living:
            solution = ti.solve(problem, torch.zeros(BATCH, DIM), x, solver=ti.Broyden(memory=10), gradient=gradient)
        assert held <= living.now() / STATE <= held + 6, type(gradient).__name__
        assert solution.converged.all()
