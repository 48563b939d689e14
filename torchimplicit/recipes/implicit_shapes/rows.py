"""The rows: which model, what it is trained to be, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torchimplicit.recipes.fields.settings import FILTERS, FilterKind, Representation
from torchimplicit.recipes.fields.shape.config import ShapeConfig, adam, shape
from torchimplicit.recipes.implicit_generalization.rows import NAMES
from torchimplicit.recipes.implicit_shapes.config import ShapesConfig, ShapesCostConfig
from torchimplicit.recipes.options import known_rows
from torchimplicit.recipes.runtime.table import Job

COST = "cost"
TaskKind = Literal["occupancy", "sdf"]
TASKS: tuple[TaskKind, ...] = ("occupancy", "sdf")
Kind = Literal["implicit", "one-step", "explicit"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model.

    Attributes:
        task: what the field is.
        filter: of the model.
        kind: implicit, by its exact gradient where slopes are in the loss; by the one-step estimate; or explicit.
    """

    task: TaskKind
    filter: FilterKind
    kind: Kind

    @property
    def name(self) -> str:
        """For folders and the command line."""
        return f"{self.task}-{self.filter}-{self.kind}"

    @property
    def label(self) -> str:
        """For people."""
        name = NAMES[self.filter, self.kind != "explicit"]
        if self.task == "occupancy" or self.kind == "explicit":
            return name
        return f"{name}, {'exact' if self.kind == 'implicit' else 'one step'}"

    def other(self, kind: Kind) -> Row:
        """The same model in another way."""
        return replace(self, kind=kind)


ROWS = {
    row.name: row
    for row in (
        *(Row(task="occupancy", filter=name, kind=kind) for name in FILTERS for kind in ("implicit", "explicit")),
        *(Row(task="sdf", filter=name, kind=kind) for name in FILTERS for kind in ("implicit", "one-step", "explicit")),
    )
}


def jobs(config: ShapesConfig) -> list[Job]:
    """Seed by seed, so that all rows have seen the machine alike, and the costs after the first seed."""
    known_rows(config.rows, (*ROWS, COST))
    made: list[Job] = []
    for seed in config.plan.all_seeds:
        for row in ROWS.values():
            if not config.rows or row.name in config.rows:
                recipe = "implicit-shape-one-step" if row.kind == "one-step" else "implicit-shape"
                made.append(Job(named(row, seed), recipe, training(config, row, seed)))
        if seed == config.plan.first_seed and (not config.rows or COST in config.rows):
            made.append(Job(COST, "implicit-shapes-cost", costs(config, seed)))
    return made


def named(row: Row, seed: int) -> str:
    """The name of a run."""
    return f"{row.name}-seed{seed}"


def costs(config: ShapesConfig, seed: int) -> ShapesCostConfig:
    """The job that measures steps of all rows in turn."""
    return ShapesCostConfig(
        names=tuple(ROWS),
        fits=tuple(training(config, row, seed) for row in ROWS.values()),
        one_step=tuple(row.kind == "one-step" for row in ROWS.values()),
    )


def training(config: ShapesConfig, row: Row, seed: int) -> ShapeConfig:
    """The settings of one run."""
    paper = config.plan.scale == "paper"
    own = config.steps if row.task == "occupancy" else config.sdf_steps
    steps = own or (10000 if paper else 250 if row.task == "occupancy" else 120)
    optimization = replace(adam(steps, max(1, steps // 8)), seed=seed)
    if paper:
        optimization = replace(optimization, batch_size=50000, learning_rate=5e-4, schedule="constant")
    elif row.task == "sdf":
        optimization = replace(optimization, batch_size=1500)
    return replace(
        shape(),
        file=config.mesh_file,
        shape=config.shape,
        task=row.task,
        samples=config.samples or (500_000 if paper else 40_000),
        resolution=256 if paper else 64,
        representation=Representation(
            filter=row.filter,
            implicit=row.kind != "explicit",
            width=config.width or (256 if paper else 64),
            frequencies=256.0 if paper and row.task == "occupancy" else None,
        ),
        optimization=optimization,
        machine=config.machine,
    )
