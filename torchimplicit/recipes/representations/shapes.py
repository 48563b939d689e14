"""Table: a mesh by implicit and explicit representations; occupancy, and distances with exact and one-step
gradients.

The one-step estimate is here to show how wrong it is where a loss holds slopes; the library refuses it there
(:func:`torchimplicit.recipes.representations.fit.check_slopes`). A cell applied once more at its detached fixed point
has a first derivative in the weights that is an estimate. As a function of the coordinates its slope leaves out that
the fixed point moves with them, and the loss sees that slope.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from torchimplicit.models import ImplicitRepresentation
from torchimplicit.recipes.representations.cost import COST, Fit, costs_of_fits, parameters
from torchimplicit.recipes.representations.fit import FILTERS, NAMES, FieldRunner, FieldTask, FilterKind, Representation
from torchimplicit.recipes.representations.shape import (
    LONGEST,
    RUNNER,
    DistanceLoss,
    ShapeConfig,
    adam,
    build,
    export,
    ready,
    show,
)
from torchimplicit.recipes.representations.shape import shape as one_shape
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.page import axes, canvas, style
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.settings import Machine, known_rows, positive
from torchimplicit.recipes.runtime.step_cost import StepCost, step_sheet, step_table
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, TitledTable
from torchimplicit.recipes.runtime.trainer import Measuring

# -- The one-step estimate, and what the steps of several fits cost ----------------------------------------------------


def one_step() -> ShapeConfig:
    """A distance trained by the one-step estimate."""
    return replace(one_shape(), task="sdf")


@dataclass(frozen=True, kw_only=True)
class ShapesCostConfig:
    """Measures steps of several fits in turn, and gradients of distances compared with exact ones."""

    names: tuple[str, ...] = ()
    """Names of the fits."""

    fits: tuple[ShapeConfig, ...] = ()
    """Fits, in the order of --names."""

    one_step: tuple[bool, ...] = ()
    """For each fit, whether it is trained by the one-step estimate."""

    warm_steps: int = 10
    """Training steps before the measurement."""

    rounds: int = 5
    """Number of turns of each fit, one step each."""

    def __post_init__(self) -> None:
        positive(self, "warm_steps", "rounds")


def costs() -> ShapesCostConfig:
    """Return settings without runs: the table fills them in."""
    return ShapesCostConfig()


@final
class OneStepRepresentation(nn.Module):
    """In training, one application of the cell at the detached fixed point; in eval mode, the representation itself.

    Args:
        whole: the representation.
    """

    def __init__(self, whole: ImplicitRepresentation):
        super().__init__()
        self.whole = whole
        whole.equilibrium.warm_start = None  # states are remembered by the layer's own gradient only

    def forward(self, x: Tensor) -> Tensor:
        """``[points, inputs]`` to ``[points, outputs]``."""
        if not self.training:
            return self.whole(x)
        filtered = [one(x) for one in self.whole.filters]
        with torch.no_grad():
            state = self.whole.equilibrium(filtered)
        return self.whole.head(self.whole.equilibrium.cell(state, filtered))


def build_one_step(config: ShapeConfig) -> FieldTask:
    """The task of a config, with the same initial weights."""
    task = build(config)
    assert isinstance(task.model, ImplicitRepresentation)
    task.model = OneStepRepresentation(task.model)
    return task


ONE_STEP = FieldRunner(build_one_step, show, ready, export)


@dataclass(frozen=True)
class Direction:
    """The one-step estimate compared with the exact gradient in all weights.

    Attributes:
        cosine, norm: cosine and ratio of norms, for the whole loss.
        values: the cosine for the loss of values alone.
        slopes: that for the loss of slopes alone.
    """

    cosine: float
    norm: float
    values: float
    slopes: float


@dataclass(frozen=True)
class ShapesCost:
    """The measurements.

    Attributes:
        costs: costs of a step, by the fits' names.
        begun: by the name of every implicit fit of a distance: the directions at its initial weights.
        trained: the same after the steps of the measurement.
    """

    costs: dict[str, StepCost]
    begun: dict[str, Direction]
    trained: dict[str, Direction]


def measured(config: ShapesCostConfig, run: Run | None = None) -> ShapesCost:
    """All fits, in turn."""
    named = list(zip(config.names, config.fits, config.one_step, strict=True))
    fits = {name: Fit(name, one, build_one_step if estimate else build) for name, one, estimate in named}
    exact = {n: one for n, one, estimate in named if one.task == "sdf" and one.representation.implicit and not estimate}
    begun = {name: direction(fits[name], one) for name, one in exact.items()}
    directions: dict[str, Direction] = {}
    costs = costs_of_fits(
        list(fits.values()),
        config,
        lambda: directions.update({name: direction(fits[name], one) for name, one in exact.items()}),
    )
    return ShapesCost(costs, begun, directions)


def direction(subject: Fit, config: ShapeConfig) -> Direction:
    """The direction of the estimate at the subject's present weights."""
    other = build_one_step(config).to(subject.where).train()
    assert isinstance(other.model, OneStepRepresentation)
    other.model.whole.load_state_dict(subject.task.model.state_dict())
    weights = subject.task.criterion
    assert isinstance(weights, DistanceLoss)
    directions: dict[str, tuple[Tensor, Tensor]] = {}
    for name, criterion in (
        ("whole", weights),
        ("values", replace(weights, normal=0.0, eikonal=0.0)),
        ("slopes", replace(weights, distance=0.0)),
    ):
        subject.task.criterion = other.criterion = criterion
        directions[name] = (_gradient(other, subject.batch), _gradient(subject.task, subject.batch))
    subject.task.criterion = weights
    cosine = {name: float(torch.cosine_similarity(one, true, dim=0)) for name, (one, true) in directions.items()}
    one, true = directions["whole"]
    return Direction(cosine["whole"], float(one.norm() / true.norm()), cosine["values"], cosine["slopes"])


def _gradient(task: Any, batch: Tensor) -> Tensor:
    weights = list(task.parameters())
    grads = torch.autograd.grad(task.loss(batch), weights, allow_unused=True)
    pairs = zip(weights, grads, strict=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in pairs]).double()


def ready_all(config: ShapesCostConfig) -> None:
    """Raise if one of the fits cannot be run."""
    for one in config.fits:
        RUNNER.check(one)


COSTS = Measuring(measure=measured, ready=ready_all, name="costs.json", show=lambda found: step_table(found.costs))


# -- The table ---------------------------------------------------------------------------------------------------------


TaskKind = Literal["occupancy", "sdf"]
TITLES: dict[TaskKind, str] = {"occupancy": "Occupancy", "sdf": "Signed distance, with slopes in the loss"}
Kind = Literal["implicit", "one-step", "explicit"]
DASHES: dict[Kind, str] = {"implicit": "-", "one-step": ":", "explicit": "--"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row: one model.

    Attributes:
        task: what the field is.
        filter: filter of the model.
        kind: implicit, by its exact gradient where slopes are in the loss; by the one-step estimate; or explicit.
    """

    task: TaskKind
    filter: FilterKind
    kind: Kind

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.task}-{self.filter}-{self.kind}"

    @property
    def model(self) -> str:
        """The model's name, independent of its training."""
        return NAMES[self.filter, self.kind != "explicit"]

    @property
    def label(self) -> str:
        """The row's label."""
        trained = {"implicit": ", exact", "one-step": ", one step", "explicit": ""}[self.kind]
        return self.model + (trained if self.task == "sdf" else "")


ROWS = {
    row.name: row
    for row in (
        *(Row(task="occupancy", filter=name, kind=kind) for name in FILTERS for kind in ("implicit", "explicit")),
        *(Row(task="sdf", filter=name, kind=kind) for name in FILTERS for kind in ("implicit", "one-step", "explicit")),
    )
}


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """Three filters, implicit and explicit: occupancy, and signed distances with exact and one-step gradients."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=2, together=40))

    shape: Literal["knot", "gyroid"] = "knot"
    """Built-in shape to fit: a tube around a torus knot, or a ball of gyroid walls."""

    mesh_file: Path | None = None
    """A mesh of your own to use instead: OBJ, PLY, STL or OFF."""

    width: int | None = None
    """Width of the models. Default: 64, or the paper's 256 with --scale paper."""

    steps: int | None = None
    """Optimizer steps for the occupancy. Default: 250, or the paper's 10,000 with --scale paper."""

    sdf_steps: int | None = None
    """Optimizer steps for the signed distance. Default: 120, or 10,000 with --scale paper."""

    samples: int | None = None
    """Number of training points. Default: 40,000, or 500,000 with --scale paper, of which a step has 50,000."""

    rows: tuple[str, ...] = ()
    """Rows to run, such as occupancy-siren-implicit, sdf-siren-one-step, sdf-gabor-explicit and cost. Default: all."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    def __post_init__(self) -> None:
        positive(self, "width", "steps", "sdf_steps", "samples")


def training(config: ShapesConfig, row: Row, seed: int) -> ShapeConfig:
    """The settings of one run."""
    paper = config.plan.scale == "paper"
    count = config.steps if row.task == "occupancy" else config.sdf_steps
    steps = count or (10000 if paper else 250 if row.task == "occupancy" else 120)
    optimization = replace(adam(steps, max(1, steps // 8)), seed=seed)
    if paper:
        optimization = replace(optimization, batch_size=50000, learning_rate=5e-4, schedule="constant")
    elif row.task == "sdf":
        optimization = replace(optimization, batch_size=1500)
    return replace(
        one_shape(),
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


def jobs(config: ShapesConfig) -> list[Job]:
    """All jobs, seed by seed so that a slow phase of the machine affects all rows; the costs after the first seed."""
    known_rows(config.rows, (*ROWS, COST))
    planned: list[Job] = []
    for seed in config.plan.all_seeds:
        fits = {name: training(config, row, seed) for name, row in ROWS.items()}
        for name, row in ROWS.items():
            recipe = "implicit-shape-one-step" if row.kind == "one-step" else "implicit-shape"
            planned.append(Job(f"{name}-seed{seed}", recipe, fits[name], {"row": row, "seed": seed}))
        if seed == config.plan.first_seed:
            estimates = tuple(row.kind == "one-step" for row in ROWS.values())
            costs = ShapesCostConfig(names=tuple(fits), fits=tuple(fits.values()), one_step=estimates)
            planned.append(Job(COST, "implicit-shapes-cost", costs))
    return [job for job in planned if not config.rows or job.name.partition("-seed")[0] in config.rows]


def figures(config: ShapesConfig, run: Run) -> dict[str, Any] | None:
    """The figures of a training and of its surface."""
    if run.path.name == COST:
        return table.read("costs.json")(config, run)
    trained, surface = table.trained(config, run), table.read("surface.json")(config, run)
    return trained and {**trained, "surface": None if surface is None else surface if surface["found"] else {}}


def tested(runs: Runs) -> Runs:
    """The finished trainings, whose surfaces count."""
    return Runs(line for line in runs if line["test"])


def sheets(config: ShapesConfig, runs: Runs) -> Iterator[TitledTable]:
    """Tables of the quality on both tasks, the cost of a step, and the direction of the one-step estimate."""
    whole = tested(runs)
    cells = [
        Cell[Row]("Model", lambda row: row.label),
        parameters(runs),
        Cell("IoU", whole.told("test.IoU", 2, 100), "%",
             "Intersection over union of the interiors, estimated on test points anywhere in the box, with the weights "
             "of the best validation; this and all other columns are means ± standard deviations over the seeds."),
        Cell("Near", whole.told("test.IoU near", 2, 100), "%",
             "Intersection over union, estimated on test points near the surface."),
        Cell("Error", whole.told("test.loss", 3, 100 / LONGEST), "%",
             "Mean absolute error of the signed distance on test points, relative to the longest side of the mesh."),
        Cell("Chamfer", whole.told("surface.chamfer", 3, 100), "%",
             "Chamfer distance: half the sum of the mean distances from the surface, by marching cubes, to the mesh "
             "and from the mesh to the surface, relative to the longest side of the mesh."),
        Cell("Normals", whole.told("surface.normals", 4), "",
             "Mean absolute cosine between the normals of nearest points, in both directions."),
        Cell("At step", lambda row: table.mean(runs.of(row, "best.step"), ".0f"), "",
             "Step of the best validation, mean over the seeds."),
    ]  # fmt: skip
    for task, title in TITLES.items():
        rows = [row for row in ROWS.values() if row.task == task]
        if any(runs.where(row=row) for row in rows):
            yield table.sheet(title, rows, (c for c in cells if task == "sdf" or c.title != "Error"))
    cost = runs.named(COST)
    if not cost:
        return
    tasks = {"occupancy": "Occupancy", "sdf": "Distance"}
    yield from step_sheet(cost["costs"], {name: f"{tasks[row.task]}: {row.label}" for name, row in ROWS.items()})
    pairs = [
        (ROWS[name].model, label, cost[when][name])
        for name in cost["begun"]
        for label, when in (("initial", "begun"), ("after some steps", "trained"))
    ]
    yield table.sheet("The one-step estimate against the exact gradient", pairs, [
        Cell("Model", lambda one: one[0]),
        Cell("Weights", lambda one: one[1]),
        Cell("Values", lambda one: f"{one[2]['values']:.4f}", "cosine",
             "Cosine between the estimate and the exact gradient for a loss of values alone, for which the library "
             "offers this estimate."),
        Cell("Slopes", lambda one: f"{one[2]['slopes']:.4f}", "cosine",
             "Cosine for a loss of slopes alone (normals and the eikonal term)."),
        Cell("Whole loss", lambda one: f"{one[2]['cosine']:.4f}", "cosine",
             "Cosine for the loss of training, which has both."),
        Cell("Norm", lambda one: f"{one[2]['norm']:.2f}", "×",
             "Norm of the estimate divided by that of the exact gradient, for the loss of training."),
    ])  # fmt: skip


def claims(config: ShapesConfig, runs: Runs) -> Iterator[Claim]:
    """Implicit models against explicit ones; the direction of the one-step estimate; and the result of training by
    it."""
    for name in FILTERS:
        row, twin = (Row(task="occupancy", filter=name, kind=kind) for kind in ("implicit", "explicit"))
        if pairs := runs.paired(row, twin, "test.IoU"):
            ours, theirs = (100 * fmean(each) for each in zip(*pairs, strict=True))
            better = sum(a > b for a, b in pairs)
            yield Claim(
                f"{row.label} reaches a larger IoU than {twin.label} with the same number of parameters and steps",
                f"{ours:.2f} against {theirs:.2f} %; larger in {better} of {len(pairs)} runs",
                better == len(pairs),
            )
    exact = [Row(task="sdf", filter=name, kind="implicit") for name in FILTERS]
    cost = runs.named(COST)
    for row in exact:
        if row.name in cost.get("trained", {}):
            one, begun = cost["trained"][row.name], cost["begun"][row.name]
            yield Claim(
                f"{row.model}: the one-step estimate is ten times as close to the exact gradient (in 1 − cosine) for a "
                "loss of values as for a loss of slopes",
                f"the cosine is {one['values']:.4f} for values, {one['slopes']:.4f} for slopes and {one['cosine']:.4f} "
                f"for both after some steps, and {begun['values']:.4f}, {begun['slopes']:.4f} and "
                f"{begun['cosine']:.4f} at the initial weights",
                10 * (1 - one["values"]) <= 1 - one["slopes"],
            )
    for row in exact:
        other = replace(row, kind="one-step")
        losses, chamfers = (tested(runs).paired(row, other, path) for path in ("test.loss", "surface.chamfer"))
        if not losses:
            continue
        better = sum(a < b for a, b in losses)
        ours, theirs = (100 / LONGEST * fmean(each) for each in zip(*losses, strict=True))
        words = f"mean absolute errors {ours:.3f} against {theirs:.3f} %; smaller in {better} of {len(losses)} runs"
        if chamfers:
            near, far = (100 * fmean(each) for each in zip(*chamfers, strict=True))
            words += f"; Chamfer distances {near:.3f} against {far:.3f} % of the longest side"
        yield Claim(
            f"{row.model} has a smaller error of the distance when it is trained by exact gradients than by one-step "
            "estimates, in the same number of steps",
            words,
            better == len(losses),
        )


def protocol(config: ShapesConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    from torchimplicit.recipes.representations.shape import subject

    rows = [Row(task=task, filter="fourier", kind="implicit") for task in TITLES]
    first, distance = (training(config, row, config.plan.first_seed) for row in rows)
    chosen, other = first.optimization, distance.optimization
    counts = {len(runs.where(row=line["row"])) for line in runs if line.key}
    seeds = "Rows have as many seeds as were run; a figure without ± is of one." if counts else ""
    if len(counts) == 1:
        seeds = f"Every row has {max(counts)} seeds." if max(counts) > 1 else "Every row has one seed."
    return (
        f"{subject(first).describe()} Models have one layer of width {first.representation.width}. There are "
        f"{first.samples} training points, half of them near the surface and half anywhere in the box; for the "
        f"distance, a third is on the surface. {first.held_out_samples} points select the weights by the IoU, and as "
        f"many others are the test. {seeds} The occupancy is trained by cross-entropy, in {chosen.steps} steps of "
        f"{chosen.batch_size} points, with Adam at {chosen.learning_rate:g} ({chosen.schedule}); implicit models are "
        "solved when a point is first seen after a validation, and otherwise evaluate the cell once per step, with the "
        f"Neumann series after one product. The loss of the distance is {distance.distance_weight:g} |f - d| + "
        f"{distance.normal_weight:g} (1 - cosine to the normal on the surface) + {distance.eikonal_weight:g} (|∇f| - "
        f"1)², in {other.steps} steps of {other.batch_size} points; implicit models are solved to "
        f"{distance.equilibria.tolerance:g} by Anderson's method from the last state and differentiated twice exactly, "
        f"with GMRES to {distance.equilibria.backward_tolerance:g}. The one-step estimate applies the cell once more "
        "to the detached fixed point and differentiates that, once in the coordinates and then in the weights, which "
        f"the library refuses. Surfaces are extracted on a grid of {first.resolution} points a side."
    )


def notes(config: ShapesConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    yield "The published figures for 3D occupancy are not available for comparison."
    if config.plan.scale == "cpu":
        yield (
            "The models are narrower than the paper's, with fewer points and steps: compare rows with each other only."
        )
    if config.mesh_file is not None:
        yield "The command below was run with --mesh-file as well; without a file, it generates a knot."
    yield from table.still_rising(runs)
    if without := [line.named for line in runs if line["surface"] == {}]:
        yield f"These runs have no surface: {', '.join(without)}."
    yield from table.diverged(runs)


def drawings(config: ShapesConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """Training, and the surfaces."""
    if not any(line.key for line in runs):
        return
    figure, panels = axes(2, width=5.4, height=3.8)
    labels = ("IoU, %", "mean absolute error of the distance,\n% of the longest side")
    whats = (("IoU", 100.0, "occupancy"), ("loss", 100 / LONGEST, "signed distance"))
    for panel, task, label, (name, scale, title) in zip(panels, TITLES, labels, whats, strict=True):
        rows = [row for row in ROWS.values() if row.task == task]
        looks = [{**style(FILTERS.index(row.filter)), "linestyle": DASHES[row.kind]} for row in rows]
        series = [(row.label, runs.where(row=row), look) for row, look in zip(rows, looks, strict=True)]
        table.curves(panel, series, name, scale)
        panel.set(ylabel=label, title=title)
        if panel.has_data():
            panel.legend(fontsize=7, handlelength=3.6)
    panels[1].set_yscale("log")
    yield CaptionedFigure(
        "training",
        figure,
        "Figures on the validation points during training, mean over the seeds, of implicit models (solid), the same "
        "trained by one-step estimates (dotted), and explicit models (dashed).",
    )
    for task, title in (("occupancy", "occupancy"), ("sdf", "distance")):
        lines = {line["row"]: line for line in runs.where(seed=config.plan.first_seed) if line["row"].task == task}
        if lines:
            yield CaptionedFigure(
                title,
                surfaces(lines, folders),
                "Surfaces by marching cubes, with the first seed. Colours show the distance from the mesh: dark is "
                "none, bright is 2 % of its longest side.",
            )


def surfaces(lines: Mapping[Row, Any], folders: Mapping[str, Run]) -> Any:
    """The true surface and each model's, coloured by their distance."""
    import matplotlib.image

    def left(line: Any, name: str) -> Any:
        file = folders[line.name].path / "figures" / name
        if not file.is_file():
            return None
        picture = matplotlib.image.imread(str(file))
        return picture[:, : picture.shape[1] // 2]

    kinds = [kind for kind in DASHES if any(row.kind == kind for row in lines)]
    figure = canvas(2.2 * (len(FILTERS) + 1), 2.5 * len(kinds))
    grid = figure.subplots(len(kinds), len(FILTERS) + 1, squeeze=False)
    for ax in grid.flat:
        ax.set_axis_off()
    truth = left(next(lines[row] for row in ROWS.values() if row in lines), "original.png")
    if truth is not None:
        grid[0][0].imshow(truth)
        grid[0][0].set_title("the mesh\n", fontsize=8)
    for row, line in lines.items():
        ax = grid[kinds.index(row.kind)][1 + FILTERS.index(row.filter)]
        iou, chamfer = line["test.IoU"], line["surface.chamfer"] or 0.0
        picture = left(line, "error.png") if chamfer and line["test"] else None
        title = f"IoU {100 * iou:.1f} %" if iou is not None else ""
        if picture is not None:
            ax.imshow(picture)
        title += ", no surface" if picture is None else f", Chamfer {100 * chamfer:.2f} %"
        ax.set_title(f"{row.label}\n{title}", fontsize=8)
    return figure


TABLE = table.published(
    globals(),
    title="A mesh: implicit and explicit representations, and exact slopes",
    source="Huang, Bai and Kolter 2021, (Implicit)²: Implicit Layers for Implicit Representations (NeurIPS 2021): "
    "occupancy of 3D shapes. The signed distances, and the comparison of gradients on them, are ours.",
)
