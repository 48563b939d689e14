"""Optimizers of full-batch objectives, which can be stopped and resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from torchimplicit.recipes.runtime.errors import DivergedError
from torchimplicit.recipes.runtime.run import NOTED_EVERY, Run
from torchimplicit.recipes.runtime.settings import OptimizerName, to_plain

# -- What an optimizer is asked to lower, and for how long -------------------------------------------------------------


Array = NDArray[np.float64]


class Objective(Protocol):
    """Half the sum of squares of residuals, as a function of a model's weights.

    Attributes:
        evaluations, jacobians: how many there were.
        rejected: evaluations at weights at which the model's equilibria were not all found.
    """

    evaluations: int
    jacobians: int
    rejected: int

    @property
    def model(self) -> nn.Module:
        """The module that holds the weights."""

    @property
    def weights(self) -> Array:
        """The optimized weights, as one vector."""

    def set_weights(self, vector: Array) -> None:
        """Put a vector into the model."""

    def residuals(self, vector: Array) -> Array:
        """All residuals at some weights; infinite where they are rejected."""

    def jacobian(self, vector: Array) -> Array:
        """``[residuals, weights]``."""

    def loss_and_gradient(self, vector: Array) -> tuple[float, Array]:
        """Half the sum of squares, or its substitute, and its gradient at some weights."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The budget of an optimization.

    Attributes:
        iterations: iterations of the optimizer, at most.
        seconds: CPU seconds, measurements not counted; ``None``: as long as it takes.
        measure_every: iterations between two measurements; with ``seconds`` they are spread over the time.
        measure_at: iterations after which there also is one.
    """

    iterations: int
    seconds: float | None = None
    measure_every: int = 1
    measure_at: tuple[int, ...] = ()


@dataclass
class Clock:
    """Counters of a training so far; saved in the checkpoint.

    Attributes:
        iterations: done.
        seconds: CPU seconds, spent in the optimizer.
        residuals, jacobians: evaluations; one of the loss with its gradient counts as one of the residuals.
        rejected: see :class:`Objective`.
    """

    iterations: int = 0
    seconds: float = 0.0
    residuals: int = 0
    jacobians: int = 0
    rejected: int = 0


# -- What lowers the residuals: SciPy's trust-region Gauss-Newton and L-BFGS, and Adam ---------------------------------


Step = Callable[[Array, float], float]
"""Callback after every iteration, with the weights and the loss. It returns the share of the budget that is spent, and
raises to stop."""


def gauss_newton(objective: Objective, start: Array, step: Step) -> None:
    """Branch, Coleman and Li's trust region (SciPy's ``trf``), with exact Jacobians.

    Raises:
        DivergedError: if the residuals are not finite at the start, from where it could not step back.
    """

    def residuals(vector: Array) -> Array:
        values = objective.residuals(vector)
        if np.array_equal(vector, start) and not np.isfinite(values).all():
            raise DivergedError(
                "the residuals are not finite at the weights that training starts from, where a solution that they are "
                "made of was not found: allow it more steps (--inner-steps, where there is such), try another --seed, "
                "or train by --optimizer adam"
            )
        return values

    def after(intermediate_result: Any) -> None:
        step(intermediate_result.x, float(intermediate_result.cost))

    from scipy.optimize import least_squares

    least_squares(
        residuals,
        start,
        jac=objective.jacobian,
        method="trf",
        ftol=None,
        xtol=1e-15,
        gtol=1e-15,
        max_nfev=10**9,
        callback=after,
    )


FIRST_STEP = 0.1
"""Length of L-BFGS's first trial step in weight space, before it has any curvature information. SciPy uses 1."""


def l_bfgs(objective: Objective, start: Array, step: Step) -> None:
    """SciPy's L-BFGS, restarted when its line search fails as long as that lowers the loss.

    It sees the weights in units of the first step: all later steps are the same in any units.
    """

    def loss_and_gradient(scaled: Array) -> tuple[float, Array]:
        loss, gradient = objective.loss_and_gradient(FIRST_STEP * scaled)
        return loss, FIRST_STEP * gradient

    def after(intermediate_result: Any) -> None:
        step(FIRST_STEP * intermediate_result.x, float(intermediate_result.fun))

    from scipy.optimize import minimize

    start = start / FIRST_STEP
    reached = math.inf
    while True:
        result = minimize(
            loss_and_gradient,
            start,
            jac=True,
            method="L-BFGS-B",
            callback=after,
            options={"maxiter": 10**9, "maxfun": 10**9, "maxcor": 30, "ftol": 0.0, "gtol": 0.0},
        )
        if not result.fun < reached:
            return
        start, reached = result.x, float(result.fun)


def adam(objective: Objective, start: Array, peak: float, spent: float, step: Step) -> None:
    """Adam with a cosine over the budget; its moments are reset when a run is resumed."""
    weights = torch.tensor(start)
    optimizer = torch.optim.Adam([weights], lr=peak)
    while True:
        for group in optimizer.param_groups:
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * spent))
        loss, gradient = objective.loss_and_gradient(weights.numpy())
        weights.grad = torch.as_tensor(gradient)
        optimizer.step()
        spent = step(weights.numpy(), loss)


def run(objective: Objective, name: OptimizerName, learning_rate: float, spent: float, step: Step) -> None:
    """Optimize from the model's present weights, after the share ``spent`` of the budget, until ``step`` raises or
    nothing is left to gain."""
    start = np.asarray(objective.weights)
    if name == "adam":
        adam(objective, start, learning_rate, spent, step)
    elif name == "l-bfgs":
        l_bfgs(objective, start, step)
    else:
        gauss_newton(objective, start, step)


# -- What stands beside an optimizer: its budget, the measurements, the checkpoint, the bar ----------------------------


FIRST, RATIO = 1 / 30, 1.5
"""With a time budget: the share of it at which the error is first measured, and the factor between measurements."""

Watch = Callable[[float, bool], None]
"""Callback with the loss and whether to measure, while the model has the iteration's weights. It adds the results to
the history."""


class Enough(Exception):
    """Raised when the budget is spent."""


class Checkpointer:
    """Called after every iteration; see :data:`~.optimizers.Step`.

    The clock is that of the processor's time, so that what else runs on a machine takes nothing from the budget, and it
    stands while errors are measured.
    """

    def __init__(self, budget: Budget, objective: Objective, history: Clock, look: Watch, run: Run, console: Console):
        self.budget, self.objective, self.look = budget, objective, look
        self.history, self.run = history, run
        self.interrupted = False
        self._reached: tuple[Array, float] | None = None
        from rich.progress import Progress

        self._bar = Progress(console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("Training", total=100, completed=self._percent())
        self._mark = FIRST
        self._pass_marks()
        self._counted = (0, 0, 0)
        self._noted = time.perf_counter()
        self._clock = time.process_time()

    @property
    def spent(self) -> float:
        """The share of the budget that is spent."""
        by_number = self.history.iterations / self.budget.iterations
        return by_number if self.budget.seconds is None else max(by_number, self.history.seconds / self.budget.seconds)

    def __enter__(self) -> Checkpointer:
        self._bar.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._bar.stop()

    def step(self, weights: Array, loss: float) -> float:
        """Called after an iteration; return the spent share of the budget."""
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

    def tell(self, doing: str) -> None:
        """Report progress within an iteration."""
        self._bar.update(self._task, description=f"Training, {doing}")
        if time.perf_counter() - self._noted > NOTED_EVERY:
            self._noted = time.perf_counter()
            self._note(doing)

    def keep(self) -> None:
        """After an interruption: keep the last accepted weights without measuring."""
        if self._reached is not None:
            self._look(measured=False)
            self._save()

    def finish(self) -> None:
        """After the optimizer has stopped: measure and keep its last accepted weights."""
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
        asked = self.history.iterations in self.budget.measure_at
        if self.budget.seconds is None:
            return asked or self.history.iterations % self.budget.measure_every == 0
        return self._pass_marks() or asked

    def _pass_marks(self) -> bool:
        if self.budget.seconds is None or self.history.seconds < self._mark * self.budget.seconds:
            return False
        while self._mark * self.budget.seconds <= self.history.seconds:
            self._mark *= RATIO
        return True

    def _percent(self) -> int:
        return min(100, round(100 * self.spent))

    def _count(self) -> None:
        """Add this process's evaluations to the history."""
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
        self._note(f"loss {loss:.2e}")

    def _note(self, status: str) -> None:
        done = {"done": self.history.iterations, "total": self.budget.iterations}
        if self.budget.seconds is not None:
            done = {"done": round(self.history.seconds), "total": math.ceil(self.budget.seconds)}
        self.run.write_json("progress.json", {**done, "status": status})
