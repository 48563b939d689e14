"""What stands beside an optimizer: its budget, the measurements, the checkpoint, the bar."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from torchimplicit.recipes.errors import DivergedError
from torchimplicit.recipes.optimizing.objective import Array, Budget, Clock, Objective
from torchimplicit.recipes.plain import to_plain
from torchimplicit.recipes.progress import NOTED_EVERY
from torchimplicit.recipes.run import Run

FIRST, RATIO = 1 / 30, 1.5
"""With a budget of time: the share of it at which the error is measured first, and what it grows by."""

Look = Callable[[float, bool], None]
"""Called with the loss, and whether to measure, when the weights of an iteration are in the model: puts what is found
into the history."""


class Enough(Exception):
    """The budget is spent."""


class Keeper:
    """Called after every iteration; see :data:`~.optimizers.Step`.

    The clock is that of the processor's time, so that what else runs on a machine takes nothing from the budget, and it
    stands while errors are measured.
    """

    def __init__(
        self,
        budget: Budget,
        objective: Objective,
        history: Clock,
        look: Look,
        run: Run,
        console: Console,
    ):
        self.budget, self.objective, self.look = budget, objective, look
        self.history, self.run = history, run
        self.interrupted = False
        self._reached: tuple[Array, float] | None = None
        self._bar = Progress(console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("Training", total=100, completed=self._percent())
        self._mark = FIRST
        self._pass_marks()
        self._counted = (0, 0, 0)
        self._noted = time.perf_counter()
        self._clock = time.process_time()

    @property
    def spent(self) -> float:
        """The share of the budget."""
        by_number = self.history.iterations / self.budget.iterations
        return by_number if self.budget.seconds is None else max(by_number, self.history.seconds / self.budget.seconds)

    def __enter__(self) -> Keeper:
        self._bar.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._bar.stop()

    def step(self, weights: Array, loss: float) -> float:
        """After an iteration."""
        self.history.seconds += time.process_time() - self._clock
        self.history.iterations += 1
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at iteration {self.history.iterations}")
        self._reached = np.array(weights), loss
        self._count()
        timed, due = self.budget.seconds is not None, self._due()
        if due or not timed:
            self._look(measured=due)
        self._bar.update(self._task, completed=self._percent(), description=f"Training, loss {loss:.2e}")
        if time.perf_counter() - self._noted > NOTED_EVERY:
            self._noted = time.perf_counter()
            self._save()
        if self.spent >= 1:
            raise Enough
        self.objective.set_weights(weights)
        self._clock = time.process_time()
        return self.spent

    def finish(self) -> None:
        """The optimizer has stopped: the last weights that it had accepted are measured and kept."""
        if self._reached is None:
            return
        self._look(measured=True)
        self._save()

    def _look(self, measured: bool) -> None:
        assert self._reached is not None
        weights, loss = self._reached
        self.objective.set_weights(weights)
        self.look(loss, measured)

    def _due(self) -> bool:
        if self.budget.seconds is None:
            return self.history.iterations % self.budget.measure_every == 0
        return self._pass_marks()

    def _pass_marks(self) -> bool:
        if self.budget.seconds is None or self.history.seconds < self._mark * self.budget.seconds:
            return False
        while self._mark * self.budget.seconds <= self.history.seconds:
            self._mark *= RATIO
        return True

    def _percent(self) -> int:
        return min(100, round(100 * self.spent))

    def _count(self) -> None:
        """What this process has evaluated goes into the history."""
        now = (self.objective.evaluations, self.objective.jacobians, self.objective.rejected)
        more = [one - other for one, other in zip(now, self._counted, strict=True)]
        self._counted = now
        self.history.residuals += more[0]
        self.history.jacobians += more[1]
        self.history.rejected += more[2]

    def _save(self) -> None:
        assert self._reached is not None
        weights, loss = self._reached
        self.objective.set_weights(weights)
        self.run.save({"weights": self.objective.model.state_dict(), "history": to_plain(self.history)})
        done = {"done": self.history.iterations, "total": self.budget.iterations}
        if self.budget.seconds is not None:
            done = {"done": round(self.history.seconds), "total": math.ceil(self.budget.seconds)}
        self.run.write_json("progress.json", {**done, "status": f"loss {loss:.2e}"})
