"""Training on an inverse problem, and pictures of what it restores."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import matplotlib
import torch
from rich.console import Console
from torch import Tensor

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.gradients import Implicit
from torchimplicit.linear import GMRES
from torchimplicit.recipes.jiio.config import InverseConfig
from torchimplicit.recipes.jiio.inverse import TRAINER, Restoration
from torchimplicit.recipes.jiio.model import joint_solver
from torchimplicit.recipes.jiio.pictures import grid
from torchimplicit.recipes.jiio.runner import PICTURES, SHOWN
from torchimplicit.recipes.runtime import files
from torchimplicit.recipes.runtime.fitting import load_weights
from torchimplicit.recipes.runtime.page import FIGURE, save_figure
from torchimplicit.recipes.runtime.run import Run, threads
from torchimplicit.recipes.runtime.settings import from_plain
from torchimplicit.solvers import Anderson


class InverseRunner:
    """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""

    def check(self, config: InverseConfig) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        TRAINER.check(config)

    def train(self, config: InverseConfig, run: Run, console: Console) -> bool:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        if not TRAINER.train(config, run, console):
            return False
        self._show(config, run)
        return True

    def evaluate(self, config: InverseConfig, run: Run, console: Console) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        TRAINER.evaluate(config, run, console)
        self._show(config, run)

    def _show(self, config: InverseConfig, run: Run) -> None:
        module = TRAINER.module(config)
        load_weights(module, run.best)
        task = module.task.cpu().eval()
        assert isinstance(task, Restoration)
        with threads(config.machine.threads), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            rows = restored(task)
            run.write_json("gradients.json", compared(task))
        files.save({name: [row.half() for row in shown] for name, shown in rows.items()}, run.path / PICTURES)
        with matplotlib.rc_context(FIGURE):
            save_figure(grid(rows), run.product("pictures.png"), 150)


RUNNER = InverseRunner()

COMPARED = 16
"""Validation images on which gradients are compared."""

TIGHT = Anderson(memory=30, rtol=1e-5, max_steps=300)
ADJOINT = GMRES(rtol=1e-4, max_steps=200)


@dataclass(frozen=True)
class Gradients:
    """Gradients of the outer loss at the trained weights, beside the exact one of joint and adjoint solves to tight
    tolerances: cosines, and ratios of lengths.

    Attributes:
        exact, exact_length: of the exact one as in training.
        first_order, first_order_length: of the first-order one as in training.
    """

    exact: float
    exact_length: float
    first_order: float
    first_order_length: float


def compared(task: Restoration) -> Gradients:
    """On validation images."""
    images = task.data.validation.images[:COMPARED]
    joint = task.config.joint
    solver = joint_solver(joint, joint.joint_steps)
    reference = task.slopes(images, Implicit(linear_solver=ADJOINT), TIGHT)
    exact, cheap = (task.slopes(images, task.estimator(kind), solver) for kind in ("exact", "first-order"))
    length = float(reference.norm())
    cosines = [float(torch.cosine_similarity(one, reference, dim=0)) for one in (exact, cheap)]
    return Gradients(cosines[0], float(exact.norm()) / length, cosines[1], float(cheap.norm()) / length)


def read_gradients(run: Run) -> Gradients | None:
    """What a run has measured, if it got so far."""
    there = (run.path / "gradients.json").is_file()
    return from_plain(Gradients, run.read_json("gradients.json")) if there else None


def restored(task: Restoration) -> dict[str, list[Tensor]]:
    """A few test images: clean, corrupted and restored."""
    clean = task.data.test.images[:SHOWN]
    wanted, seen = (part[:SHOWN] for part in task.held_out["test"])
    made, _ = task.restored(wanted, seen)
    return {"clean, corrupted and restored test images": [clean, wanted, made]}
