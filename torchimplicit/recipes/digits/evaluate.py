"""A trained run, measured again."""

from __future__ import annotations

from rich.console import Console

from torchimplicit.recipes.digits import data
from torchimplicit.recipes.digits.config import DigitsConfig
from torchimplicit.recipes.digits.results import label
from torchimplicit.recipes.digits.task import DigitsTask
from torchimplicit.recipes.digits.validate import validate
from torchimplicit.recipes.runtime.fitting import load_weights
from torchimplicit.recipes.runtime.run import Run, device
from torchimplicit.recipes.runtime.table import Column, Table

COLUMNS = [
    Column("Estimator"),
    Column("Validation accuracy", "%"),
    Column("Validation loss", "nats"),
    Column("Forward evaluations"),
    Column("Converged", "%"),
    Column("Largest residual", "relative"),
]


def evaluate(config: DigitsConfig, run: Run, console: Console) -> None:
    """See :meth:`torchimplicit.recipes.runtime.run.Recipe.evaluate`."""
    where = device(config.device)
    _, validation = data.load(config.split_seed)
    task = DigitsTask(config, total_steps=1, validation=validation)
    load_weights(task, run.checkpoint)
    task.to(where)
    with console.status("Evaluating"):
        found = {name: validate(task.classifier(name), validation) for name in config.estimators}
    run.write_json("evaluation.json", {"steps": task.steps_done, "estimators": found})
    rows = [
        [
            label(name),
            f"{100 * v.accuracy:.1f}",
            f"{v.loss:.4f}",
            f"{v.evaluations:.1f}",
            f"{100 * v.converged:.0f}",
            f"{v.residual:.1e}",
        ]
        for name, v in found.items()
    ]
    console.print(f"After {task.steps_done} steps, on {len(validation.labels)} validation images:", highlight=False)
    console.print(Table(COLUMNS, rows).rich())
