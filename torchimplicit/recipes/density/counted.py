"""A training whose initial and final densities are found by two minimizers, counting their steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from torchimplicit.models.orbital_free import OrbitalFree
from torchimplicit.recipes.density import split as data
from torchimplicit.recipes.density import training as runner
from torchimplicit.recipes.density.case import Case
from torchimplicit.recipes.density.quality import Quality, quality
from torchimplicit.recipes.density.settings import OrbitalFreeTraining
from torchimplicit.recipes.density.stability import CountedTraining
from torchimplicit.recipes.runtime.fitting import read_checkpoint
from torchimplicit.recipes.runtime.run import Run, threads


@dataclass(frozen=True)
class Counted:
    """``counted.json``: steps for the training molecules, starting from the superposition of atoms.

    Attributes:
        descent_before, descent_after: by gradient descent with momentum.
        l_bfgs_before, l_bfgs_after: by L-BFGS with the Hessian of the start as preconditioner.
    """

    descent_before: list[Quality]
    descent_after: list[Quality]
    l_bfgs_before: list[Quality]
    l_bfgs_after: list[Quality]


# -- The runner; see :class:`torchimplicit.recipes.runtime.run.Runner` -------------------------------------------------


def check(config: CountedTraining) -> None:
    """Check the training's settings."""
    runner.check(config.training)


def train(config: CountedTraining, run: Run, console: Console) -> bool:
    """Train, or resume training, then count."""
    done = runner.train(config.training, run, console)
    if done:
        run.write_json("counted.json", counted(config, run.best))
    return done


def evaluate(config: CountedTraining, run: Run, console: Console) -> None:
    """Measure the weights again, and count again."""
    runner.evaluate(config.training, run, console)
    run.write_json("counted.json", counted(config, run.best))


def counted(config: CountedTraining, weights: Path) -> Counted:
    """Count steps at the start of the training, and at its weights."""
    settings = config.training
    quick = replace(
        settings,
        inner="l-bfgs",
        inner_tolerance=config.tight_tolerance,
        inner_steps=300,
        correction=0,  # no iterates are kept: nothing is differentiated here
        gradient="implicit",
    )
    descent = replace(
        quick,
        inner="descent",
        inner_tolerance=config.descent_tolerance,
        inner_steps=config.most_steps,
        inner_rate=config.descent_rate,
    )
    with threads(settings.threads):
        cases = [Case.of(molecule) for molecule in data.load(settings.molecules).train]
        functional = runner.started(settings, cases)
        before = [_all(cases, functional, way) for way in (descent, quick)]
        functional.load_state_dict(read_checkpoint(weights)["weights"])
        after = [_all(cases, functional, way) for way in (descent, quick)]
    return Counted(before[0], after[0], before[1], after[1])


def _all(cases: list[Case], functional: OrbitalFree, way: OrbitalFreeTraining) -> list[Quality]:
    return [quality(case, functional, way) for case in cases]
