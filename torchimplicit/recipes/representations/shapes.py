"""A mesh by implicit representations and explicit twins: occupancy, and distances with exact and one-step gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from torchimplicit.recipes.representations.fit import FILTERS, NAMES, FilterKind, Representation
from torchimplicit.recipes.representations.shape import LONGEST, ShapeConfig, adam
from torchimplicit.recipes.representations.shape import shape as one_shape
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.page import axes, canvas, style
from torchimplicit.recipes.runtime.settings import Machine, known_rows, positive
from torchimplicit.recipes.runtime.step_cost import step_sheet
from torchimplicit.recipes.runtime.table import Cell, Claim, Drawing, Job, Plan, Runs, Sheet

if TYPE_CHECKING:
    from torchimplicit.recipes.runtime.run import Run

COST = "cost"
TaskKind = Literal["occupancy", "sdf"]
TITLES: dict[TaskKind, str] = {"occupancy": "Occupancy", "sdf": "Signed distance, with slopes in the loss"}
Kind = Literal["implicit", "one-step", "explicit"]
DASHES: dict[Kind, str] = {"implicit": "-", "one-step": ":", "explicit": "--"}


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


# -- settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """Three filters, implicit and explicit: occupancy, and signed distances with exact and one-step gradients."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=2, together=40))

    shape: Literal["knot", "gyroid"] = "knot"
    """What is fitted."""

    mesh_file: Path | None = None
    """A mesh of your own in its place: OBJ, PLY, STL or OFF."""

    width: int | None = None
    """By default 64, and the paper's 256."""

    steps: int | None = None
    """Of occupancy; by default 250, and the paper's 10000."""

    sdf_steps: int | None = None
    """Of the signed distance; by default 120, and 10000 at the paper's scale."""

    samples: int | None = None
    """Points to train on; by default 40 000, and 500 000 at the paper's scale, with 50 000 a step."""

    rows: tuple[str, ...] = ()
    """Only these, such as occupancy-siren-implicit, sdf-siren-one-step, sdf-gabor-explicit and cost; by default all."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    def __post_init__(self) -> None:
        positive(self, "width", "steps", "sdf_steps", "samples")


@dataclass(frozen=True, kw_only=True)
class ShapesCostConfig:
    """Measures steps of several fits in turn, and gradients of distances beside exact ones."""

    names: tuple[str, ...] = ()
    """What the fits are called."""

    fits: tuple[ShapeConfig, ...] = ()
    """The fits, in the same order."""

    one_step: tuple[bool, ...] = ()
    """Which of them are trained by the one-step estimate."""

    warm_steps: int = 10
    """Steps of training before the measurement."""

    rounds: int = 5
    """How often each has its turn, of one step."""

    def __post_init__(self) -> None:
        positive(self, "warm_steps", "rounds")


def costs() -> ShapesCostConfig:
    """Of nothing: the table fills it in."""
    return ShapesCostConfig()


def one_step() -> ShapeConfig:
    """Of a distance, to be trained by the one-step estimate."""
    return replace(one_shape(), task="sdf")


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
    """Seed by seed, so that all rows have seen the machine alike, and the costs after the first seed."""
    known_rows(config.rows, (*ROWS, COST))
    made: list[Job] = []
    for seed in config.plan.all_seeds:
        fits = {name: training(config, row, seed) for name, row in ROWS.items()}
        for name, row in ROWS.items():
            if not config.rows or name in config.rows:
                recipe = "implicit-shape-one-step" if row.kind == "one-step" else "implicit-shape"
                made.append(Job(f"{name}-seed{seed}", recipe, fits[name], {"row": row, "seed": seed}))
        if seed == config.plan.first_seed and (not config.rows or COST in config.rows):
            measured = ShapesCostConfig(
                names=tuple(fits),
                fits=tuple(fits.values()),
                one_step=tuple(row.kind == "one-step" for row in ROWS.values()),
            )
            made.append(Job(COST, "implicit-shapes-cost", measured))
    return made


def figures(config: ShapesConfig, run: Run) -> dict[str, Any] | None:
    """Those of a training, and of its surface."""
    if run.path.name == COST:
        return table.read("costs.json")(config, run)
    trained, surface = table.trained(config, run), table.read("surface.json")(config, run)
    return trained and {**trained, "surface": None if surface is None else surface if surface["found"] else {}}


# -- what the runs come to ---------------------------------------------------------------------------------------------


def tested(runs: Runs) -> Runs:
    """The trainings whose surfaces count: those that came to their end."""
    return Runs(line for line in runs if line["test"])


def sheets(config: ShapesConfig, runs: Runs) -> list[Sheet]:
    """The quality of both tasks, the cost of a step, and where the one-step estimate points."""
    whole = tested(runs)

    cells = [
        Cell[Row]("Model", lambda row: row.label),
        Cell("Parameters", lambda row: str((runs.of(row, "parameters") or [table.NONE])[0])),
        Cell("IoU", whole.told("test.IoU", 2, 100), "%",
             "Of the insides, on test points anywhere in the box, at the weights of the best validation."),
        Cell("Near", whole.told("test.IoU near", 2, 100), "%", "The same on test points near the surface."),
        Cell("Error", whole.told("test.loss", 3, 100 / LONGEST), "%", "Mean absolute error of the distance."),
        Cell("Chamfer", whole.told("surface.chamfer", 3, 100), "%",
             "Mean distance from the surface by marching cubes to the mesh and back, over two. Lengths are shares of "
             "the mesh's longest side."),
        Cell("Normals", whole.told("surface.normals", 4), "",
             "Mean absolute cosine between normals of nearest points, both ways."),
        Cell("At step", lambda row: table.mean(runs.of(row, "best.step"), ".0f"), "", "Of the best validation, mean."),
    ]  # fmt: skip
    made = []
    for task, title in TITLES.items():
        rows = [row for row in ROWS.values() if row.task == task]
        if any(runs.where(row=row) for row in rows):
            made.append(table.sheet(title, rows, (c for c in cells if task == "sdf" or c.title != "Error")))
    cost = runs.named(COST)
    if cost:
        names = {
            name: f"{'Occupancy' if row.task == 'occupancy' else 'Distance'}: {row.label}" for name, row in ROWS.items()
        }
        made += step_sheet(cost["costs"], names)
        pairs = [
            (ROWS[name].label.split(",")[0], label, cost[when][name])
            for name in cost["begun"]
            for label, when in (("initial", "begun"), ("after some steps", "trained"))
        ]
        directions = [
            Cell[Any]("Model", lambda one: one[0]),
            Cell("Weights", lambda one: one[1]),
            Cell("Values", lambda one: f"{one[2]['values']:.4f}", "cosine",
                 "Of the loss of values alone: the estimate is what the library offers."),
            Cell("Slopes", lambda one: f"{one[2]['slopes']:.4f}", "cosine",
                 "Of the loss of slopes alone (normals and the eikonal term)."),
            Cell("Whole loss", lambda one: f"{one[2]['cosine']:.4f}", "cosine",
                 "Of both, in the weights that training gives them."),
            Cell("Norm", lambda one: f"{one[2]['norm']:.2f}", "×",
                 "The estimate's over the exact gradient's, of the whole loss."),
        ]  # fmt: skip
        made.append(table.sheet("The one-step estimate beside the exact gradient", pairs, directions))
    return made


def claims(config: ShapesConfig, runs: Runs) -> list[Claim]:
    """Those for which there are runs."""
    rows = {task: [Row(task=task, filter=name, kind="implicit") for name in FILTERS] for task in TITLES}
    made = [level(runs, row) for row in rows["occupancy"]]
    made += [wrong(runs.named(COST), row) for row in rows["sdf"]]
    made += [worse(runs, row) for row in rows["sdf"]]
    return [claim for claim in made if claim is not None]


def level(runs: Runs, row: Row) -> Claim | None:
    """An implicit model beside its explicit twin."""
    twin = row.other("explicit")
    pairs = runs.paired(row, twin, "test.IoU")
    if not pairs:
        return None
    better = sum(a > b for a, b in pairs)
    return Claim(
        f"{row.label} comes to a larger IoU than {twin.label}, of as many parameters, in as many steps",
        f"{100 * fmean(a for a, _ in pairs):.2f} and {100 * fmean(b for _, b in pairs):.2f} %; larger in {better} "
        f"of {len(pairs)} runs",
        better == len(pairs),
    )


def wrong(cost: Mapping[str, Any], row: Row) -> Claim | None:
    """Where the one-step estimate points, for values and for slopes."""
    if row.name not in cost.get("trained", {}):
        return None
    one, begun = cost["trained"][row.name], cost["begun"][row.name]
    return Claim(
        f"{row.label.split(',')[0]}: the one-step estimate is nearer to the exact gradient (1 - cosine) by ten "
        "times where the loss holds values alone than where it holds slopes alone",
        f"cosine {one['values']:.4f} of values, {one['slopes']:.4f} of slopes and {one['cosine']:.4f} of both after "
        f"some steps; {begun['values']:.4f}, {begun['slopes']:.4f} and {begun['cosine']:.4f} at the initial weights",
        10 * (1 - one["values"]) <= 1 - one["slopes"],
    )


def worse(runs: Runs, row: Row) -> Claim | None:
    """What training by the one-step estimate comes to."""
    losses, chamfers = (
        tested(runs).paired(row, row.other("one-step"), path) for path in ("test.loss", "surface.chamfer")
    )
    if not losses:
        return None
    better = sum(a < b for a, b in losses)
    scale = 100 / LONGEST
    chamfer = (
        f"; Chamfer distances {100 * fmean(a for a, _ in chamfers):.3f} and "
        f"{100 * fmean(b for _, b in chamfers):.3f} % of the longest side"
        if chamfers
        else ""
    )
    return Claim(
        f"{row.label.split(',')[0]} trained by exact gradients ends nearer to the distance than by one-step ones, "
        "in as many steps",
        f"mean absolute errors {scale * fmean(a for a, _ in losses):.3f} and "
        f"{scale * fmean(b for _, b in losses):.3f} %; smaller in {better} of {len(losses)} runs{chamfer}",
        better == len(losses),
    )


def protocol(config: ShapesConfig, runs: Runs) -> str:
    """What was run, in words."""
    from torchimplicit.recipes.representations.shape import subject

    first, distance = (
        training(config, Row(task=task, filter="fourier", kind="implicit"), config.plan.first_seed) for task in TITLES
    )
    chosen, other, weights = first.optimization, distance.optimization, distance
    return (
        f"{subject(first).describe()} Models of one layer of width {first.representation.width}. {first.samples} "
        "points to train on, half of them near the surface and half anywhere in its box; for the distance a third on "
        f"the surface. {first.held_out_samples} points select the weights by the IoU, as many are the test. "
        f"{seeds_of(runs)} Occupancy: cross-entropy, {chosen.steps} steps of {chosen.batch_size} points, "
        f"Adam at {chosen.learning_rate:g} ({chosen.schedule}); implicit models are solved when a point is first seen "
        "after a validation, and then take one evaluation a step, with the Neumann series after its first product. "
        f"Distance: {weights.distance_weight:g} |f - d| + {weights.normal_weight:g} (1 - cosine to the normal on the "
        f"surface) + {weights.eikonal_weight:g} (|∇f| - 1)², {other.steps} steps of {other.batch_size} points; "
        f"implicit models are solved to {distance.equilibria.tolerance:g} (Anderson) from the last state and "
        f"differentiated twice exactly, by GMRES to {distance.equilibria.backward_tolerance:g}. One step: the cell is "
        "applied once more to the detached fixed point, and that is differentiated, once in the coordinates and again "
        f"in the weights; the library refuses this. Surfaces on a grid of {first.resolution} points."
    )


def seeds_of(runs: Runs) -> str:
    """How many there are of each row."""
    counts = {len(runs.where(row=line["row"])) for line in runs if line.key}
    if len(counts) == 1:
        (count,) = counts
        return f"{count} seeds." if count > 1 else "One seed."
    return "Seeds: those that were run so far; a figure without ± is of one." if counts else ""


def notes(config: ShapesConfig, runs: Runs) -> list[str]:
    """What a reader must know."""
    made = ["The published figures for 3D occupancy are not known here, so that none stand beside ours."]
    if config.plan.scale == "cpu":
        made.append("Narrower models, fewer points and steps than the paper's: rows compare among themselves.")
    if config.mesh_file is not None:
        made.append("The mesh is a file (--mesh-file), which the command does not name; without one a knot is made.")
    made += table.still_rising(runs)
    without = [f"{line['row'].name}, seed {line['seed']}" for line in runs if line["surface"] == {}]
    if without:
        made.append(f"Without a surface: {', '.join(without)}.")
    return [*made, *table.diverged(runs)]


# -- figures -----------------------------------------------------------------------------------------------------------


def drawings(config: ShapesConfig, runs: Runs, folders: Mapping[str, Run]) -> list[Drawing]:
    """Training, and the surfaces."""
    if not any(line.key for line in runs):
        return []
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
    caption = (
        "Along training, on the validation points, mean over the seeds: implicit models (solid), the same by one-step "
        "gradients (dotted), and explicit twins (dashed)."
    )
    return [
        Drawing("training", figure, caption),
        *(d for task in TITLES for d in surfaces(config, runs, folders, task)),
    ]


def surfaces(config: ShapesConfig, runs: Runs, folders: Mapping[str, Run], task: TaskKind) -> list[Drawing]:
    """The truth and what each model makes of it, with the distance as colour."""
    import matplotlib.image

    lines = {line["row"]: line for line in runs.where(seed=config.plan.first_seed) if line["row"].task == task}
    if not lines:
        return []

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
        if picture is None:
            title += ", no surface"
        else:
            ax.imshow(picture)
            title += f", Chamfer {100 * chamfer:.2f} %"
        ax.set_title(f"{row.label}\n{title}", fontsize=8)
    caption = (
        "The surfaces by marching cubes; colours are distances from the mesh, dark for none and bright for 2 % of its "
        "longest side. The first seed."
    )
    return [Drawing("occupancy" if task == "occupancy" else "distance", figure, caption)]


TABLE = table.published(
    globals(),
    title="A mesh: implicit and explicit representations, and exact slopes",
    source="Huang, Bai and Kolter 2021, (Implicit)²: Implicit Layers for Implicit Representations (NeurIPS 2021): "
    "occupancy of 3D shapes; the signed distances, and the gradients compared on them, are ours",
)
