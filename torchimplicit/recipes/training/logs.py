"""The logs of a run: a CSV file, and TensorBoard's beside it."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from torchimplicit.recipes.errors import DamagedFileError
from torchimplicit.recipes.files import no_larger, say_once
from torchimplicit.recipes.fitting import quiet_lightning
from torchimplicit.recipes.run import Run

Row = dict[str, float]


def loggers(run: Run, steps: int, tensorboard: bool) -> list[Logger]:
    """The run's loggers, for training that goes on after ``steps`` steps: what was logged of later ones is dropped."""
    kept = [row for row in rows(run.metrics) if row["step"] <= steps]
    if (there := sum("loss" in row for row in kept)) < steps:
        say_once(f"{run.metrics} has {there} of the {steps} steps that were done; figures and curves lack the others")
    with quiet_lightning():  # that its logger begins an empty file is known: the rows are kept here
        table = CSVLogger(run.path, name=None, version="logs")
        _ = table.experiment
    for row in kept:
        table.log_metrics(dict(row), int(row["step"]))
    made: list[Logger] = [table]
    if tensorboard:
        made.append(TensorBoardLogger(run.path, name=None, version="logs", purge_step=steps + 1))
    return made


def rows(path: Path) -> list[Row]:
    """The rows of a CSV log, without the empty cells; none if there is no file."""
    if not path.is_file():
        return []
    no_larger(path, 1 << 30)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            read = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
        return [{name: float(value) for name, value in row.items()} for row in read if "step" in row]
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise DamagedFileError(f"{path} is damaged ({error}); train again, or restore it from a copy") from None
