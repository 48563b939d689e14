"""Figures and cells shared by the tables of trained density functionals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, TypeVar

from torchimplicit.recipes.density.settings import ChemistrySettings, Molecules
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.settings import from_plain
from torchimplicit.recipes.runtime.table import NONE, Line, Runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torchimplicit.recipes.runtime.run import Run

R = TypeVar("R")

INNER_STEPS = 60
"""Largest number of L-BFGS steps, which usually needs about ten: an optimizer step that goes too far is detected
early."""

PRECISION = "Double precision, one thread."


def labelled(grid: int) -> str:
    """Description of the molecules' densities, for the protocols."""
    return f"Kohn-Sham densities (LDA, def2-SVP) in an even-tempered basis, grid level {grid}"


def molecules(config: Any, *sources: str, **more: Any) -> Molecules:
    """Molecules on the grid and in the folder of a table's settings."""
    return Molecules(sources=sources, data_dir=config.data_dir, chemistry=ChemistrySettings(grid=config.grid), **more)


# -- What a record holds of a training ---------------------------------------------------------------------------------

QUALITIES = ("start", "start_test", "train", "validation", "test")


def figures(config: Any, run: Run) -> dict[str, Any] | None:
    """Figures of a finished training: sums, means over molecules, each molecule's figures, and the history of
    measurements."""
    one = table.read("results.json")(config, run)
    if one is None or one["state"] != "complete":
        return None
    looks = one["looks"]
    seconds = [look["seconds"] for look in looks]
    return {
        "weights": one["weights"],
        "iterations": one["iterations"],
        "selected": one["selected"],
        "seconds": one["seconds"],
        "evaluations": one["residuals"],
        "jacobians": one["jacobians"],
        "rejected": one["rejected"],
        "loss": [looks[0]["loss"], looks[-1]["loss"]],
        "skipped": len(one["skipped"]),
        "pairs": one["config"]["pairs"],
        "pace": median(b - a for a, b in pairwise(seconds)) if len(looks) > 1 else None,
        "inner_steps": fmean(look["inner_steps"] for look in looks),
        "adjoint": fmean(look["adjoint"] for look in looks),
        "losses": [[look["seconds"], look["loss"]] for look in looks],
        "looks": [
            {"iteration": look["iteration"], "seconds": look["seconds"], **look["train"]}
            for look in looks
            if look["train"] is not None
        ],
        **{name: {**summary(one[name]), "count": len(one[name])} for name in QUALITIES if one[name]},
        "molecules": {name: one[name] for name in QUALITIES if one[name]},
    }


def summary(qualities: Sequence[Any]) -> dict[str, Any]:
    """As :func:`~torchimplicit.recipes.density.quality.summarized`, from plain data."""
    from torchimplicit.recipes.density.quality import Quality, summarized  # heavy: it evaluates functionals too

    return asdict(summarized([from_plain(Quality, one) for one in qualities]))


# -- Figures of a run --------------------------------------------------------------------------------------------------


def lowered(line: Line) -> float:
    """The final training loss, with tails and penalties, relative to the initial one."""
    first, last = line["loss"]
    return float(last / first)


def ratio(line: Line) -> float:
    """The training molecules' mean L at the end relative to the start."""
    looks = line["looks"]
    return float(looks[-1]["loss"] / looks[0]["loss"]) if looks else math.nan


def seconds_to(line: Line, level: float) -> float:
    """Seconds until the loss has first fallen to ``level`` times its start; NaN if it has not."""
    losses = line["losses"] or []
    return next((seconds for seconds, loss in losses if loss <= level * losses[0][1]), math.nan)


# -- Rows, cells and notes ---------------------------------------------------------------------------------------------


def there(rows: Iterable[R], runs: Runs) -> list[R]:
    """The rows that have a run."""
    return [row for row in rows if runs.where(row=row)]


def cell(runs: Runs, path: str, digits: int = 3, scale: float = 1.0) -> Callable[[Any], str]:
    """The cell of a row: a figure of its runs; see :func:`told`."""
    return lambda row: told(runs.of(row, path), digits, scale)


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def told(values: Iterable[float | None], digits: int = 3, scale: float = 1.0) -> str:
    """One value, or the mean and range of several, with a number of significant digits."""
    known = [scale * value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return NONE
    text = shown(fmean(known), digits)
    return text if len(known) == 1 else f"{text} ({shown(min(known), digits)}–{shown(max(known), digits)})"


def shown(value: float, digits: int) -> str:
    """A number with this many significant digits, without an exponent for ordinary sizes; integers as they are."""
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def missing(asked: int, runs: Runs) -> Iterator[str]:
    """The note about requested runs that are missing."""
    if len(runs) < asked:
        yield f"{asked - len(runs)} of {asked} runs are missing or diverged."


def draw_seeds(panel: Axes, runs: Runs, path: str, x: str, y: str, label: str, **look: Any) -> None:
    """A line for every run, the seeds told apart by their dashes: of the entries at a path, one figure over another."""
    from torchimplicit.recipes.runtime.page import LINES

    for number, line in enumerate(runs):
        entries = [one for one in line[path] if one.get(y) is not None]
        panel.plot(
            [one[x] for one in entries],
            [one[y] for one in entries],
            linestyle=LINES[number % len(LINES)],
            label=None if number else label,
            **{"linewidth": 1.2, **look},
        )
