"""What a training solve may cost, from one training step to the next."""

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
    """A solver's budget in training: drawn at random for each step, or tightened along training, or both.

    Each solve of the layer in training mode, with gradients, counts as one step (``manual=True``: each call of
    :meth:`step`). Solves without gradients take the budget of the step that comes next; in eval mode there is none, and
    the layer's ``eval_solver`` or ``solver`` is taken as it is. The count is in the ``state_dict``, and a random budget
    depends on it and on ``seed`` alone: a resumed run goes on as it would have, and every process of a distributed one
    draws the same.

    Args:
        steps: ``(least, most)``, both included: the solver's ``max_steps`` (or its ``steps``, where it takes a given
            number) is drawn from these.
        rtol, atol: ``(first, last)``: the tolerance goes from the one to the other, by the same factor in each step.
        over: in how many steps; it stays at ``last`` afterwards.
        seed: of the random budgets.
        manual: whether you call :meth:`step` after each training step, as one does a learning rate's scheduler: where a
            step solves several times (gradient accumulation, several calls), or inside activation checkpointing, which
            solves again in the backward pass and must get the same budget there.

    Raises:
        ValueError: a number out of range, or nothing to do.
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
                raise ValueError(f"Budget.steps is {steps!r}, and must be two whole numbers, 0 <= least <= most")
        for name, span in (("rtol", rtol), ("atol", atol)):
            if span is not None and (len(span) != 2 or not all(0 < value < float("inf") for value in span)):
                raise ValueError(f"Budget.{name} is {span!r}, and must be two positive numbers, (first, last)")
        if (over is not None) != (rtol is not None or atol is not None):
            raise ValueError("Budget.over says in how many steps rtol or atol is tightened: give both or neither")
        if over is not None and over < 1:
            raise ValueError(f"Budget.over is {over}, and must be at least 1")
        self.steps, self.rtol, self.atol, self.over, self.seed, self.manual = steps, rtol, atol, over, seed, manual
        self.count = 0

    def step(self) -> None:
        """Go on to the next training step."""
        self.count += 1

    def solver(self, solver: Solver) -> Solver:
        """``solver`` with the budget of the present step."""
        changes: dict[str, Any] = {}
        if self.steps is not None:
            if solver.steps is None and not self.steps[0]:
                raise ValueError(
                    f"Budget.steps={self.steps} draws zero steps too, and max_steps of a solver with a tolerance is at "
                    "least 1: begin at 1, or give a solver with a given number of steps, such as Anderson(steps=1)"
                )
            drawn = random.Random(f"{self.seed}/{self.count}").randint(*self.steps)
            changes["max_steps" if solver.steps is None else "steps"] = drawn
        for name, span in (("rtol", self.rtol), ("atol", self.atol)):
            if span is not None:
                assert self.over is not None
                share = min(self.count / self.over, 1.0)
                changes[name] = span[0] ** (1 - share) * span[1] ** share
        return replace(solver, **changes)

    def take(self, solver: Solver) -> Solver:
        """Likewise, for a solve that counts as a step unless ``manual``."""
        chosen = self.solver(solver)
        if not self.manual and torch.is_grad_enabled():
            if backward_task() >= 0:
                raise RuntimeError(
                    "a backward pass solves again (activation checkpointing), and must get the budget of the forward "
                    "pass, but each solve takes the next one: give Budget(manual=True), and call budget.step() after "
                    "each training step"
                )
            self.step()
        return chosen

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]

    def extra_repr(self) -> str:
        given = [(name, getattr(self, name)) for name in ("steps", "rtol", "atol", "over")]
        return ", ".join(f"{name}={value}" for name, value in given if value is not None)
