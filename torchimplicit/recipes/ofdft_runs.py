"""What the tables of trained density functionals read of their runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

from torchimplicit.recipes.chemistry.settings import ChemistrySettings
from torchimplicit.recipes.orbital_free.config import Molecules
from torchimplicit.recipes.orbital_free.history import Look, Results
from torchimplicit.recipes.orbital_free.measure import Quality, Summary, summarized
from torchimplicit.recipes.plain import from_plain
from torchimplicit.recipes.run import Run

INNER_STEPS = 60
"""The most steps of L-BFGS, which needs some ten: a first step of an optimizer that goes too far is found out early."""

QUALITIES = ("start", "start_test", "train", "validation", "test")


def results_of(run: Run | None) -> Results | None:
    """Of a run that went to its end; ``None`` of one that is missing, or did not."""
    if run is None or not (run.path / "results.json").is_file():
        return None
    one = from_plain(Results, run.read_json("results.json"))
    return one if one.state == "complete" else None


def molecules(*sources: str, grid: int, data_dir: Path | None, **more: Any) -> Molecules:
    """These, on a grid of this level."""
    return Molecules(sources=sources, data_dir=data_dir, chemistry=ChemistrySettings(grid=grid), **more)


def ratio(one: Results) -> float:
    """The mean L of the training molecules when training ends, over that at its start."""
    looks = measured(one)
    return looks[-1][1].loss / looks[0][1].loss


def lowered(one: Results) -> float:
    """What training lowers, at its end over its start: the loss with its tails and penalties."""
    return one.looks[-1].loss / one.looks[0].loss


def seconds_to(one: Results, level: float) -> float:
    """Until the loss has first fallen to ``level`` of its start; NaN if it has not."""
    for look in one.looks:
        if look.loss <= level * one.looks[0].loss:
            return look.seconds
    return math.nan


def measured(one: Results) -> list[tuple[Look, Summary]]:
    """The looks at which all training densities were found from the superposition of atoms, and what they came to."""
    return [(look, look.train) for look in one.looks if look.train is not None]


def mean(values: Iterable[float]) -> float:
    """Of those that are numbers; NaN if there are none."""
    there = [value for value in values if not math.isnan(value)]
    return fmean(there) if there else math.nan


def told(values: Sequence[float], digits: int = 3, scale: float = 1.0) -> str:
    """Of one seed the value, of several their mean and their range, in so many significant digits."""
    there = [scale * value for value in values if not math.isnan(value)]
    if not there:
        return "–"
    text = shown(fmean(there), digits)
    return text if len(there) == 1 else f"{text} ({shown(min(there), digits)}–{shown(max(there), digits)})"


def shown(value: float, digits: int) -> str:
    """In so many significant digits, without an exponent where it is of ordinary size; whole numbers as they are."""
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def missing(asked: int, there: int) -> list[str]:
    """The note on runs that were asked for and are not there; none where all are."""
    return [f"{asked - there} of {asked} runs are missing or diverged."] if there < asked else []


def raw(one: Results) -> dict[str, Any]:
    """Figures of a run for the record."""
    found: dict[str, Any] = {
        "weights": one.weights,
        "iterations": one.iterations,
        "selected": one.selected,
        "seconds": _short(one.seconds),
        "evaluations": one.residuals,
        "jacobians": one.jacobians,
        "rejected": one.rejected,
        "loss": [_short(one.looks[0].loss), _short(one.looks[-1].loss)],
        "skipped": len(one.skipped),
    }
    for name in QUALITIES:
        there: list[Quality] = getattr(one, name)
        if there:
            summary = summarized(there)
            found[name] = {f.name: _short(getattr(summary, f.name)) for f in fields(summary)} | {"count": len(there)}
    return found


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
