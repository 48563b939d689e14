"""The cost of training solves, varied from one training step to the next."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, final

import torch
from torch import nn

from torchimplicit._torch import backward_task
from torchimplicit.solvers import Solver

Span = tuple[float, float]


@final
class Budget(nn.Module):
    """A schedule for the solver in training: a random number of steps, or a tolerance that tightens, or both.

    Each solve of the layer in training mode, with gradients, counts as one training step (``manual=True``: each call of
    :meth:`step`). Solves without gradients use the budget of the next training step. In eval mode there is no budget:
    the layer's ``eval_solver`` or ``solver`` is used unchanged. The count is in the ``state_dict``, and a random budget
    depends only on it and on ``seed``: a resumed run continues as it would have, and all processes of a distributed run
    draw the same.

    Args:
        steps: ``(least, most)``, both included: the range from which the solver's ``max_steps`` is drawn (its
            ``steps``, if it runs a fixed number).
        rtol, atol: ``(first, last)``: the tolerance changes geometrically from the first to the last value.
        over: the number of training steps that this takes; the tolerance then stays at ``last``.
        seed: the seed of the random numbers of steps.
        manual: whether you call :meth:`step` after each training step, like a learning-rate scheduler. Needed where a
            training step solves several times (gradient accumulation, several calls), and inside activation
            checkpointing, which solves again in the backward pass and must get the same budget there.

    Raises:
        ValueError: a number is out of range, or neither ``steps`` nor a tolerance is given.
    """

    def __init__(
        self,
        *,
        steps: tuple[int, int] | None = None,
        rtol: Span | None = None,
        atol: Span | None = None,
        over: int | None = None,
        seed: int = 0,
        manual: bool = False,
    ) -> None:
        super().__init__()
        if steps is None and rtol is None and atol is None:
            raise ValueError("Budget needs steps=(least, most), rtol=(first, last) or atol=(first, last)")
        if steps is not None:
            whole = all(isinstance(n, int) and not isinstance(n, bool) for n in steps)
            if len(steps) != 2 or not whole or not 0 <= steps[0] <= steps[1]:
                raise ValueError(f"Budget.steps is {steps!r}, but must be two whole numbers, 0 <= least <= most")
        for name, span in (("rtol", rtol), ("atol", atol)):
            if span is not None and (len(span) != 2 or not all(0 < value < float("inf") for value in span)):
                raise ValueError(f"Budget.{name} is {span!r}, but must be two positive numbers, (first, last)")
        if (over is not None) != (rtol is not None or atol is not None):
            raise ValueError(
                "Budget.over is the number of training steps over which rtol or atol is tightened: give both or neither"
            )
        if over is not None and over < 1:
            raise ValueError(f"Budget.over is {over}, but must be at least 1")
        self.steps, self.rtol, self.atol, self.over, self.seed, self.manual = steps, rtol, atol, over, seed, manual
        self.count = 0

    def step(self) -> None:
        """Go on to the next training step."""
        self.count += 1

    def solver(self, solver: Solver) -> Solver:
        """``solver`` with the budget of the present training step."""
        changes: dict[str, Any] = {}
        if self.steps is not None:
            if solver.steps is None and not self.steps[0]:
                raise ValueError(
                    f"Budget.steps={self.steps} can draw zero steps, but a solver with a tolerance needs max_steps of "
                    "at least 1: begin at 1, or use a solver with a fixed number of steps, such as Anderson(steps=1)"
                )
            # seeded by the count, not a running generator: the draw of a step is the same after a restart
            drawn = random.Random(f"{self.seed}/{self.count}").randint(*self.steps)
            changes["max_steps" if solver.steps is None else "steps"] = drawn
        for name, span in (("rtol", self.rtol), ("atol", self.atol)):
            if span is not None:
                assert self.over is not None
                share = min(self.count / self.over, 1.0)
                changes[name] = span[0] ** (1 - share) * span[1] ** share
        return replace(solver, **changes)

    def take(self, solver: Solver) -> Solver:
        """``solver`` with the budget of a solve that begins now, which counts as a training step unless ``manual``."""
        chosen = self.solver(solver)
        if not self.manual and torch.is_grad_enabled():
            if backward_task() >= 0:
                raise RuntimeError(
                    "activation checkpointing solves again in the backward pass and must get the budget of the forward "
                    "pass there, but each solve uses up one budget: use Budget(manual=True), and call budget.step() "
                    "after each training step"
                )
            self.step()
        return chosen

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]

    def extra_repr(self) -> str:
        options = [(name, getattr(self, name)) for name in ("steps", "rtol", "atol", "over")]
        return ", ".join(f"{name}={value}" for name, value in options if value is not None)
