"""AdamW on batches of molecules; a resumed training continues exactly as if it had not been stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from torchimplicit.recipes.density.learning_settings import Stepping
from torchimplicit.recipes.runtime import files
from torchimplicit.recipes.runtime.errors import DivergedError, UserError
from torchimplicit.recipes.runtime.fitting import read_checkpoint
from torchimplicit.recipes.runtime.run import NOTED_EVERY, Run
from torchimplicit.recipes.runtime.settings import from_plain, to_plain
from torchimplicit.recipes.runtime.task import permutation

RISE = 0.05
"""Share of the budget over which the learning rate rises to its peak."""


@dataclass(frozen=True)
class Glance:
    """One measurement during a training.

    Attributes:
        step: done until then.
        seconds: CPU seconds, without measurements.
        loss: the mean of the steps since the last glance.
        figures: figures of the validation molecules, by name.
    """

    step: int
    seconds: float
    loss: float
    figures: dict[str, float]


@dataclass
class Course:
    """The measurements so far; saved in the checkpoint.

    Attributes:
        step: done.
        seconds: CPU seconds, without measurements.
        best: the step of the best glance, whose weights are kept; -1 before the first.
        glances: in order.
    """

    step: int = 0
    seconds: float = 0.0
    best: int = -1
    glances: list[Glance] = field(default_factory=list)


class Stepper:
    """Minimizes a loss step by step.

    Args:
        model: whose parameters that require gradients are trained.
        settings: how.
        loss: loss of the molecules with these numbers, at a step; it runs backward itself and gives the value.
        look: figures of the validation molecules, of which the first selects the weights, the least being the best.
        kept: what else the checkpoint is to hold, and a function that takes it back.

    Attributes:
        course: so far.
        tell: is to be called with what is being done within a step, for whoever watches.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Stepping,
        count: int,
        seed: int,
        loss: Callable[[list[int], int], float],
        look: Callable[[], dict[str, float]],
        kept: tuple[Callable[[], Any], Callable[[Any], None]] = (lambda: None, lambda held: None),
    ):
        self.model, self.settings, self.count, self.seed = model, settings, count, seed
        self.loss, self.look, self.kept = loss, look, kept
        self.course = Course()
        self.tell: Callable[[str], None] = lambda doing: None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.decay)
        self._trained = trained

    @property
    def spent(self) -> float:
        """The share of the budget that is spent."""
        by_number = self.course.step / self.settings.steps
        if self.settings.seconds is None:
            return by_number
        return max(by_number, self.course.seconds / self.settings.seconds)

    def restore(self, run: Run) -> None:
        """Continue from the run's last checkpoint, if there is one.

        Raises:
            UserError: it does not fit.
        """
        if not run.checkpoint.is_file():
            return
        held = read_checkpoint(run.checkpoint)
        try:
            self.model.load_state_dict(held["weights"])
            self.optimizer.load_state_dict(held["optimizer"])
            self.course = from_plain(Course, held["course"])
            self.kept[1](held["kept"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{run.checkpoint} does not fit this run's settings ({reason}); train again") from None

    def run(self, run: Run, console: Console) -> bool:
        """Step until the budget is spent; return whether it was not interrupted.

        An interruption is answered within a step, and the unfinished step is dropped: the checkpoint is that of a
        finished step, from which a resumed run continues exactly.
        """
        bar = Progress(console=console, disable=not console.is_terminal)
        task = bar.add_task("Training", total=100)
        losses: list[float] = []
        noted = saved = time.perf_counter()

        def due(last: float) -> bool:
            return time.perf_counter() - last > NOTED_EVERY or self.spent >= 1

        def show(doing: str = "") -> None:
            nonlocal noted
            status = f"{self._status()}: {doing}" if doing else self._status()
            bar.update(task, completed=min(100, round(100 * self.spent)), description=status)
            if due(noted):
                noted = time.perf_counter()
                done = {"done": self.course.step, "total": self.settings.steps}
                run.write_json("progress.json", {**done, "status": status})

        self.tell = show
        with bar:
            try:
                if not self.course.glances:
                    self._glance(run, math.nan)
                    self._save(run)
                while self.spent < 1:
                    began = time.process_time()
                    losses.append(self._step())
                    self.course.seconds += time.process_time() - began
                    self.course.step += 1
                    if self.course.step % self.settings.measure_every == 0 or self.spent >= 1:
                        self._glance(run, sum(losses) / len(losses))
                        losses = []
                    if due(saved):
                        self._save(run)
                        saved = time.perf_counter()
                    show()
            except KeyboardInterrupt:
                return False
        return True

    def _step(self) -> float:
        for group in self.optimizer.param_groups:
            rise = min(1.0, 0.1 + 0.9 * self.spent / RISE)
            group["lr"] = self.settings.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, self.spent)))
        self.optimizer.zero_grad()
        loss = self.loss(batch(self.count, self.settings.batch, self.seed, self.course.step), self.course.step)
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {self.course.step + 1}")
        nn.utils.clip_grad_norm_(self._trained, self.settings.clip)
        self.optimizer.step()
        return loss

    def _glance(self, run: Run, loss: float) -> None:
        course, figures = self.course, self.look()
        course.glances.append(Glance(course.step, course.seconds, loss, figures))
        first = [next(iter(glance.figures.values()), math.nan) for glance in course.glances]
        known = [value for value in first if not math.isnan(value)]
        if not known or first[-1] <= min(known):
            course.best = course.step
            files.save({"weights": self.model.state_dict()}, run.best)

    def _status(self) -> str:
        glance = self.course.glances[-1]
        figures = ", ".join(f"{name} {value:.3g}" for name, value in glance.figures.items())
        return f"step {self.course.step}, {figures}" if figures else f"step {self.course.step}, loss {glance.loss:.3g}"

    def _save(self, run: Run) -> None:
        run.save(
            {
                "weights": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "course": to_plain(self.course),
                "kept": self.kept[0](),
            }
        )


def trained_before(run: Run) -> Course:
    """The course of a training whose weights are there.

    Raises:
        UserError: nothing was trained yet.
    """
    if not run.best.is_file():
        raise UserError(f"{run.best} does not exist: nothing was trained yet; 'resume' the run first")
    return from_plain(Course, read_checkpoint(run.checkpoint)["course"])


def batch(count: int, size: int, seed: int, step: int) -> list[int]:
    """The numbers of a step's molecules; every pass over the molecules is a permutation, and those that do not fill a
    batch wait for the next."""
    size = min(size, count)
    turn, place = divmod(step, count // size)
    return permutation(count, seed, turn)[place * size : (place + 1) * size]
