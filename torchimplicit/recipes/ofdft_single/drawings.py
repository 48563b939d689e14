"""The figures of the table."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from torch import Tensor

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.recipes.chemistry import storage
from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.fitting import read_checkpoint
from torchimplicit.recipes.ofdft_single.config import SingleConfig
from torchimplicit.recipes.ofdft_single.gathered import ESTIMATORS, OPTIMIZERS, Row, name_of
from torchimplicit.recipes.orbital_free import data
from torchimplicit.recipes.orbital_free.case import Case
from torchimplicit.recipes.orbital_free.places import line
from torchimplicit.recipes.orbital_free.runner import started
from torchimplicit.recipes.plotting import COLOURS, LINES, axes
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Drawing


def drawings(config: SingleConfig, rows: list[Row], runs: Mapping[str, Run]) -> list[Drawing]:
    """The loss, and the density's error along a line where the molecule is at hand."""
    if not rows:
        return []
    made = [
        Drawing(
            "loss",
            _loss(rows),
            "The loss over its start: by iterations, and by seconds of the processor's time; a line a seed.",
        )
    ]
    along = _line(config, rows, runs)
    if along is not None:
        made.append(
            Drawing(
                "line",
                along,
                f"{config.molecule}: the error of the density along the line through the first two atoms (grey), "
                f"before training and after, seed {config.plan.first_seed}; the scale is linear within 0.001.",
            )
        )
    return made


def _loss(rows: list[Row]) -> Figure:
    there = [optimizer for optimizer in OPTIMIZERS if any(row.optimizer == optimizer for row in rows)]
    figure, panels = axes(2 * len(there), width=4.0, height=3.6)
    for place, optimizer in enumerate(there):
        for row in (row for row in rows if row.optimizer == optimizer):
            for number, one in enumerate(row.every):
                losses = [look.loss / one.looks[0].loss for look in one.looks]
                for panel, what in zip(panels[2 * place : 2 * place + 2], ("iteration", "seconds"), strict=True):
                    panel.plot(
                        [getattr(look, what) for look in one.looks],
                        losses,
                        color=_colour(row),
                        linestyle=LINES[number % len(LINES)],
                        linewidth=1.2,
                        label=None if number else ESTIMATORS[row.estimator],
                    )
        for panel, label in zip(panels[2 * place : 2 * place + 2], ("iteration", "seconds"), strict=True):
            panel.set(title=OPTIMIZERS[optimizer], xlabel=label, yscale="log")
    panels[0].set_ylabel("loss, over its start")
    for panel in panels[1::2]:
        panel.legend(fontsize=7.5)
    return figure


def _line(config: SingleConfig, rows: list[Row], runs: Mapping[str, Run]) -> Figure | None:
    seed = config.plan.first_seed
    shown = [row for row in rows if row.optimizer == config.optimizers[0] and seed in row.results]
    if not shown:
        return None
    try:
        split = data.load(shown[0].results[seed].config.molecules)
    except UserError:  # neither computed nor computable here
        return None
    (molecule,) = split.train
    basis = storage.read(split.files[molecule.name]).basis
    points, places, atoms = line(basis.centres)
    values = basis.values(points)
    figure, (panel,) = axes(width=7.2)
    for label, error in _errors(shown, seed, Case.of(molecule), runs).items():
        row = next((row for row in shown if ESTIMATORS[row.estimator] == label), None)
        colour = _colour(row) if row else COLOURS[6 if label == "before" else 7]
        panel.plot(places, values @ error, label=label, linewidth=1.2, color=colour, linestyle="-" if row else ":")
    for place in atoms:
        panel.axvline(float(place), color="0.8", linewidth=0.8, zorder=0)
    panel.set(xlabel="bohr", ylabel="Δρ, electrons per cubic bohr", title=molecule.name)
    panel.set_yscale("symlog", linthresh=1e-3)
    panel.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _errors(shown: list[Row], seed: int, case: Case, runs: Mapping[str, Run]) -> dict[str, Tensor]:
    """Of the coefficients, by what made them."""
    molecule = case.molecule
    errors = {"superposition of atoms": molecule.guess - molecule.reference}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for row in shown:
            settings = row.results[seed].config
            functional = started(settings, [case])
            if "before" not in errors:
                errors["before"] = case.solved(functional, settings, cold=True).value - molecule.reference
            run = runs[name_of(row.estimator, row.optimizer, seed)]
            functional.load_state_dict(read_checkpoint(run.best)["weights"])
            case.fresh = False
            errors[ESTIMATORS[row.estimator]] = case.solved(functional, settings, cold=True).value - molecule.reference
    return errors


def _colour(row: Row) -> str:
    return COLOURS[list(ESTIMATORS).index(row.estimator)]
