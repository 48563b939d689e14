"""Table: pictures from a quarter of their pixels, by implicit and explicit representations (Huang et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from torchimplicit.recipes.representations.cost import COST, FieldCostConfig, parameters, seconds_of, trained
from torchimplicit.recipes.representations.fit import FILTERS, NAMES, FilterKind, Representation, full_batch, truncated
from torchimplicit.recipes.representations.image import PictureConfig, generalization
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.page import axes, canvas, style
from torchimplicit.recipes.runtime.settings import Machine, known_rows, positive
from torchimplicit.recipes.runtime.step_cost import step_sheet
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, TitledTable

if TYPE_CHECKING:
    from torchimplicit.recipes.runtime.run import Run

Kind = Literal["natural", "text"]
KINDS: tuple[Kind, ...] = ("natural", "text")
SIZES = {"1L": (1, 1), "1L-wide": (1, 2), "4L": (4, 1)}
"""Number of layers, and width relative to w."""

# Huang et al. 2021, (Implicit)²: test PSNR in dB of 1L-256, 1L-512, 4L-256 at 512 pixels.
PUBLISHED: dict[Kind, dict[FilterKind, tuple[tuple[float, float, float], tuple[float, float, float]]]] = {
    "natural": {
        "siren": ((24.28, 24.92, 24.05), (22.88, 24.52, 24.10)),
        "fourier": ((24.88, 25.19, 24.52), (23.27, 23.30, 24.57)),
        "gabor": ((24.91, 25.42, 24.53), (24.16, 24.68, 24.65)),
    },
    "text": {
        "siren": ((26.06, 26.81, 26.31), (24.54, 25.69, 26.21)),
        "fourier": ((26.90, 27.19, 26.48), (24.64, 24.84, 26.67)),
        "gabor": ((27.53, 28.07, 27.40), (27.19, 27.74, 27.57)),
    },
}
"""Published figures for each filter: the implicit model's and the explicit model's."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row: one model.

    Attributes:
        filter, implicit, size: which; the size is one of :data:`SIZES`.
        full: trained by solves from zero and the converged adjoint, in place of one evaluation a step and a truncated
            one: a row of our own.
        free: without the spectral bound, which implicit and explicit models have as published.
    """

    filter: FilterKind
    implicit: bool = True
    size: str = "1L"
    full: bool = False
    free: bool = False

    @property
    def name(self) -> str:
        """The name of its folder."""
        kind = "implicit" if self.implicit else "explicit"
        return f"{self.filter}-{kind}-{self.size}" + "-full" * self.full + "-free" * self.free

    def label(self, width: int) -> str:
        """The row's label."""
        layers, factor = SIZES[self.size]
        name = f"{NAMES[self.filter, self.implicit]} {layers}L-{factor * width}"
        return f"{name}, full solves" if self.full else f"{name}, free" if self.free else name

    def published(self, kind: Kind) -> float:
        """The published figure, in dB."""
        return PUBLISHED[kind][self.filter][not self.implicit][list(SIZES).index(self.size)]

    @property
    def twin(self) -> Row:
        """The explicit model with the same number of parameters."""
        return replace(self, implicit=False)


OF_THE_TABLE = [Row(filter=f, implicit=i, size=size) for f in FILTERS for i in (True, False) for size in SIZES]
OUR_OWN = [
    *(Row(filter=name, full=True) for name in FILTERS),
    *(Row(filter=name, implicit=implicit, free=True) for name in FILTERS for implicit in (True, False)),
]
ROWS = {row.name: row for row in (*OF_THE_TABLE, *OUR_OWN)}


@dataclass(frozen=True, kw_only=True)
class GeneralizationConfig:
    """Three filters, implicit and explicit, in three sizes, on natural pictures and pictures of text."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=2, together=12))

    natural: tuple[str, ...] = ("camera", "astronaut")
    """Natural pictures, from scikit-image."""

    texts: tuple[str, ...] = ("text-0", "text-1")
    """Pictures of text: drawn (text-0 to text-3), or scikit-image's page and text."""

    data_dir: Path | None = None
    """Folder of pictures to use instead of the natural ones."""

    size: int | None = None
    """Longest side in pixels. Default: 64, or the paper's 512 with --scale paper."""

    width: int | None = None
    """Width w. Default: 64, or the paper's 256 with --scale paper."""

    steps: int | None = None
    """Optimizer steps of each training. Default: 400, or the paper's 2000 with --scale paper."""

    rows: tuple[str, ...] = ()
    """Rows to run, such as fourier-implicit-1L, gabor-explicit-4L, siren-implicit-1L-full and cost. Default: all."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    def __post_init__(self) -> None:
        positive(self, "size", "width", "steps")
        if not self.natural and not self.texts and self.data_dir is None:
            raise UserError("--natural and --texts are both empty; name a picture")


@dataclass(frozen=True)
class Subject:
    """A picture to fit."""

    name: str
    kind: Kind
    file: Path | None = None


def subjects(config: GeneralizationConfig) -> list[Subject]:
    """The pictures.

    Raises:
        UserError: if the folder that is given holds none.
    """
    natural = [Subject(name, "natural") for name in config.natural]
    if config.data_dir is not None:
        files = sorted(p for p in config.data_dir.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif"))
        if not files:
            raise UserError(f"--data-dir {config.data_dir} holds no PNG, JPEG or TIFF pictures")
        natural = [Subject(path.stem, "natural", path) for path in files]
    return [*natural, *(Subject(name, "text") for name in config.texts)]


def width(config: GeneralizationConfig) -> int:
    """The width w."""
    return config.width or (256 if config.plan.scale == "paper" else 64)


def training(config: GeneralizationConfig, row: Row, subject: Subject, seed: int) -> PictureConfig:
    """The settings of one run."""
    paper = config.plan.scale == "paper"
    steps = config.steps or (2000 if paper else 400)
    layers, factor = SIZES[row.size]
    return replace(
        generalization(),
        file=subject.file,
        picture=subject.name if subject.file is None else "camera",
        size=config.size or (512 if paper else 64),
        representation=Representation(
            filter=row.filter,
            implicit=row.implicit,
            width=factor * width(config),
            depth=layers,
            amortize="off" if row.full else "refresh",
            norm="none" if row.free else "published",
        ),
        optimization=replace(full_batch(steps, max(1, min(steps, 50 * round(steps / 600) or 50))), seed=seed),
        equilibria=replace(truncated(), gradient="implicit") if row.full else truncated(),
        machine=config.machine,
    )


def jobs(config: GeneralizationConfig) -> list[Job]:
    """All jobs, seed by seed and picture by picture so that a slow phase of the machine affects all rows; full solves
    for the first seed and the first picture of a kind, and the costs after the first picture."""
    known_rows(config.rows, (*ROWS, COST))
    pictures = subjects(config)
    firsts = [next((one for one in pictures if one.kind == kind), None) for kind in KINDS]
    planned: list[Job] = []
    for seed in config.plan.all_seeds:
        for subject in pictures:
            fits = {name: training(config, row, subject, seed) for name, row in ROWS.items()}
            for name, row in ROWS.items():
                if not row.full or (seed == config.plan.first_seed and subject in firsts):
                    key = {"row": row, "kind": subject.kind, "picture": subject.name, "seed": seed}
                    title = f"{name}-{subject.name}-seed{seed}"
                    planned.append(Job(title, "implicit-image-generalization", fits[name], key))
            if COST not in {job.name for job in planned}:
                planned.append(Job(COST, "fields-cost", FieldCostConfig(names=tuple(fits), fits=tuple(fits.values()))))
    wanted = config.rows or (*ROWS, COST)
    return [job for job in planned if (job.key["row"].name if job.key else COST) in wanted]


def labels_of(config: GeneralizationConfig) -> dict[Row, str]:
    """The rows with their labels."""
    return {row: row.label(width(config)) for row in ROWS.values()}


def by_seed(config: GeneralizationConfig, runs: Runs, row: Row, kind: Kind) -> list[float]:
    """The mean test PSNR over the pictures of a kind, for every seed that has them all."""
    count = sum(one.kind == kind for one in subjects(config))
    every = (runs.where(kind=kind, seed=seed).of(row, "test.PSNR") for seed in config.plan.all_seeds)
    return [fmean(values) for values in every if values and len(values) == count]


def sheets(config: GeneralizationConfig, runs: Runs) -> Iterator[TitledTable]:
    """Tables of the quality, the cost of a step, and the time to reach an explicit network's quality."""
    labels = labels_of(config)
    yield table.sheet("PSNR of pixels that were not trained on", OF_THE_TABLE, [
        Cell[Row]("Model", lambda row: labels[row]),
        parameters(runs),
        Cell("Natural", lambda row: table.spread(by_seed(config, runs, row, "natural"), 2), "dB",
             "PSNR of the test pixels of natural pictures, with the weights of the best validation; mean over the "
             "pictures, then mean ± standard deviation over the seeds."),
        Cell("Natural, published", lambda row: f"{row.published('natural'):.2f}", "dB",
             "Published PSNR of other pictures of 512 pixels a side, by models of widths 256 and 512."),
        Cell("Text", lambda row: table.spread(by_seed(config, runs, row, "text"), 2), "dB",
             "PSNR of the test pixels of pictures of text, computed in the same way."),
        Cell("Text, published", lambda row: f"{row.published('text'):.2f}", "dB",
             "Published PSNR of other pictures of text."),
        Cell("Gain",
             lambda row: table.mean(runs.gaps(row, row.twin, "test.PSNR") if row.implicit else [], "+.2f"), "dB",
             "PSNR less that of the explicit model of the same size, mean over all pictures and seeds."),
        trained(runs),
    ])  # fmt: skip
    if any(runs.where(row=row) for row in ROWS.values() if row.free):
        yield bounding(runs, labels)
    yield from step_sheet(runs.named(COST), {row.name: label for row, label in labels.items()})
    yield reaching(runs, labels)
    if both := [name for name in FILTERS if amortized(runs, name)]:
        yield amortizing(runs, labels, both)


def bounding(runs: Runs, labels: dict[Row, str]) -> TitledTable:
    """Models of one layer with the spectral bound and without, at the best weights and at the last."""
    rows = [Row(filter=name, implicit=implicit) for name in FILTERS for implicit in (True, False)]

    def best(free: bool) -> Callable[[Row], str]:
        return lambda row: table.spread(runs.of(replace(row, free=free), "test.PSNR"), 2)

    def last(free: bool) -> Callable[[Row], str]:
        return lambda row: table.spread(
            [values[-1]["PSNR"] for values in runs.of(replace(row, free=free), "validations") if values], 2
        )

    return table.sheet("With and without the spectral bound", rows, [
        Cell[Row]("Model", lambda row: labels[row]),
        Cell("Bounded", best(False), "dB",
             "PSNR of the test pixels with the spectral bound, as published, and the weights of the best validation."),
        Cell("Free", best(True), "dB", "The same without the spectral bound."),
        Cell("Bounded, last", last(False), "dB",
             "PSNR of the validation pixels at the last step, as the authors report it, with the bound."),
        Cell("Free, last", last(True), "dB", "The same without the bound."),
        Cell("Gain", lambda row: table.mean(stronger(runs, row.filter), "+.2f") if row.implicit else
             table.NONE, "dB",
             "PSNR of the better of the two implicit models less that of the better of the two explicit ones, mean "
             "over the pictures and seeds."),
    ])  # fmt: skip


def stronger(runs: Runs, name: FilterKind) -> list[float]:
    """The gap between the better implicit model and the better explicit one, for each picture and seed."""

    def best(implicit: bool) -> dict[tuple[str, int], float]:
        scores: dict[tuple[str, int], list[float]] = {}
        for free in (False, True):
            for line in runs.where(row=Row(filter=name, implicit=implicit, free=free)):
                if line["test"]:
                    scores.setdefault((line["picture"], line["seed"]), []).append(line["test.PSNR"])
        return {place: max(values) for place, values in scores.items() if len(values) == 2}

    one, other = best(True), best(False)
    return [one[place] - other[place] for place in one if place in other]


def reaching(runs: Runs, labels: dict[Row, str]) -> TitledTable:
    """Tabulate the steps and time in which a model reaches the final quality of the explicit one-layer network."""

    def cells(row: Row) -> list[str]:
        target = Row(filter=row.filter, implicit=False)
        tries = runs.reaching(row, target, "PSNR")
        reached = [(ours, other) for ours, other in tries if ours is not None]
        line = [labels[row], f"{len(reached)} of {len(tries)}"]
        if not reached:
            return line
        steps = [fmean(pair[i] for pair in reached) for i in (0, 1)]
        times = zip(steps, seconds_of(runs, row, target), strict=True)
        return [*line, *(f"{n:.0f}" for n in steps), *(f"{n * s:.2f}" if s else table.NONE for n, s in times)]

    rows = [row for row in OF_THE_TABLE if row != Row(filter=row.filter, implicit=False)]
    return table.sheet("Steps and time to the final PSNR of the explicit one-layer network", [], [
        Cell("Model", str),
        Cell("Reached", str, "", "Runs whose validation PSNR reached the best one of the explicit network."),
        Cell("Steps", str, "", "Steps until then, mean over these runs; the PSNR is measured at validations only."),
        Cell("Explicit network", str, "steps",
             "Steps until the explicit network reached its best, for the same pictures and seeds."),
        Cell("Time", str, "s", "Number of steps times the CPU time of a step."),
        Cell("Explicit network, time", str, "s", "The same for the explicit network."),
    ], map(cells, rows))  # fmt: skip


def amortized(runs: Runs, name: FilterKind) -> list[tuple[float, float]]:
    """The test PSNR of models trained by one evaluation per step and by full solves, on the pictures that both have."""
    return runs.paired(Row(filter=name), Row(filter=name, full=True), "test.PSNR")


def amortizing(runs: Runs, labels: dict[Row, str], names: list[FilterKind]) -> TitledTable:
    """Compare training by one evaluation per step with training by full solves."""
    cost = runs.named(COST)

    def ratio(name: FilterKind) -> str:
        one, full = seconds_of(runs, Row(filter=name), Row(filter=name, full=True))
        return f"{full / one:.1f}" if one and full else table.NONE

    return table.sheet("One evaluation per step against full solves", names, [
        Cell("Model", lambda name: labels[Row(filter=name)]),
        Cell("One evaluation", lambda name: table.mean((a for a, _ in amortized(runs, name)), ".2f"), "dB",
             "Test PSNR when the cell is evaluated once per step; mean over the pictures and seeds that have both."),
        Cell("Full solves", lambda name: table.mean((b for _, b in amortized(runs, name)), ".2f"), "dB",
             "Test PSNR when every step solves to a relative residual of 1e-3, forward by Anderson from zero and "
             "backward by GMRES."),
        Cell("Difference", lambda name: table.mean((a - b for a, b in amortized(runs, name)), "+.2f"), "dB",
             "PSNR with one evaluation less that with full solves."),
        Cell("Step", ratio, "×", "Time of a step with full solves, divided by that with one evaluation."),
        Cell("Cosine", lambda name: table.shown(cost.get(Row(filter=name).name, {}).get("cosine"), ".3f"), "",
             "Cosine between the truncated gradient and the exact one at the same weights."),
    ])  # fmt: skip


def claims(config: GeneralizationConfig, runs: Runs) -> Iterator[Claim]:
    """Test whether implicit models beat explicit ones, and whether amortized ones are as good as solved ones, and
    faster."""
    labels = labels_of(config)
    for size, margin in (("1L", 1.5), ("4L", 0.0)):
        for name in FILTERS:
            one, other = Row(filter=name), Row(filter=name, implicit=False, size=size)
            gaps = runs.gaps(one, other, "test.PSNR")
            if not gaps:
                continue
            by_kind = {kind: runs.where(kind=kind).gaps(one, other, "test.PSNR") for kind in KINDS}
            parts = ", ".join(f"{fmean(values):+.2f} dB on {kind}" for kind, values in by_kind.items() if values)
            level = f"{labels[one]} has at least the PSNR of {labels[other]}, which has four times the layers"
            better = sum(gap > 0 for gap in gaps)
            yield Claim(
                f"{labels[one]} has a PSNR at least {margin:g} dB above that of {labels[other]}" if margin else level,
                f"{fmean(gaps):+.2f} dB on average ({parts}); better in {better} of {len(gaps)} runs",
                fmean(gaps) >= margin,
            )
    for name in FILTERS:
        if gaps := stronger(runs, name):
            yield Claim(
                f"{labels[Row(filter=name)]} is better than the stronger of its explicit counterparts, with or without "
                "the bound",
                f"{fmean(gaps):+.2f} dB on average; better in {sum(gap > 0 for gap in gaps)} of {len(gaps)} runs",
                fmean(gaps) > 0,
            )
    for name in FILTERS:
        row, full = Row(filter=name), Row(filter=name, full=True)
        one_step, solved = seconds_of(runs, row, full)
        lost = runs.gaps(full, row, "test.PSNR")
        if lost and one_step is not None and solved is not None:
            yield Claim(
                f"A step of {labels[row]} with one evaluation and one product is at least twice as fast as with full "
                "solves, and the PSNR is within 1 dB",
                f"a step is {solved / one_step:.1f} times as fast, and the PSNR is {fmean(lost):.2f} dB lower",
                solved / one_step >= 2 and fmean(lost) <= 1,
            )
    for name in FILTERS:
        row = Row(filter=name)
        yield from table.sooner(
            f"{labels[row]} reaches the best PSNR of {labels[row.twin]} in less time than that model",
            runs.reaching(row, row.twin, "PSNR"),
            *seconds_of(runs, row, row.twin),
        )


def protocol(config: GeneralizationConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    pictures = subjects(config)
    one = training(config, ROWS["fourier-implicit-1L"], pictures[0], config.plan.first_seed)
    chosen = one.optimization
    names = {kind: ", ".join(p.name for p in pictures if p.kind == kind) or "none" for kind in KINDS}
    return (
        f"The natural pictures are {names['natural']}, those of text {names['text']}, of at most {one.size} pixels a "
        "side. Every other pixel of every other row is for training, another such quarter selects the weights, and a "
        f"third such quarter is the test. Every run takes {chosen.steps} steps of Adam at {chosen.learning_rate:g} on "
        f"all training pixels at once and is validated every {chosen.validate_every} steps; there are "
        f"{config.plan.seeds} seeds. The scale of the frequencies is a quarter of the longest side, which at 512 "
        "pixels is the paper's 128. Implicit models are solved by Anderson's method to a relative residual of "
        f"{one.equilibria.tolerance:g} after every validation; all other steps evaluate the cell once, from the state "
        "of the step before, and its backward pass is the Neumann series after one product (T = 1). They are solved "
        "for validation and test."
    )


def notes(config: GeneralizationConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    labels = labels_of(config)
    if config.plan.scale == "cpu":
        yield (
            "The pictures differ from the paper's and are smaller, and the models are narrower and trained for fewer "
            "steps: compare rows with each other only."
        )
    yield (
        "The published differences of one-layer models, implicit less explicit, are 1.4, 1.6 and 0.75 dB on natural "
        "pictures and 1.5, 2.3 and 0.3 dB on text (SIREN, Fourier, Gabor). The published differences with Gabor "
        "filters, and with SIREN on natural pictures, are below the 1.5 dB of the claims too."
    )
    yield ("All rows have the weights of the best validation. How the published weights were selected is unknown.")
    deep = {name: Row(filter=name, size="4L") for name in FILTERS}
    gaps = {name: runs.gaps(row, row.twin, "test.PSNR") for name, row in deep.items()}
    if deeper := [f"{NAMES[name, True]} {fmean(values):+.2f} dB" for name, values in gaps.items() if values]:
        yield (
            f"Implicit models of four layers less explicit ones of four layers: {', '.join(deeper)}. In the paper, "
            "too, implicit models of four layers are no better than those of one layer, except on text with SIREN."
        )
    yield from table.still_rising(runs)
    yield from table.diverged(runs, lambda line: f"{labels[line['row']]} on {line['picture']}, seed {line['seed']}")


def drawings(config: GeneralizationConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """PSNR during training, and the first picture of each kind with its reconstructions."""
    import matplotlib.image

    labels, seed = labels_of(config), config.plan.first_seed
    shown = (("1L", True), ("1L", False), ("1L-wide", False), ("4L", False))
    rows = {name: [Row(filter=name, implicit=implicit, size=size) for size, implicit in shown] for name in FILTERS}
    if any(runs.where(row=row) for row in OF_THE_TABLE):
        figure, panels = axes(3, width=4.2, height=3.6)
        for panel, (name, four) in zip(panels, rows.items(), strict=True):
            table.curves(panel, [(labels[row], runs.where(row=row), style(i)) for i, row in enumerate(four)], "PSNR")
            panel.set(title=f"{NAMES[name, True]} and {NAMES[name, False]}", ylabel="validation PSNR, dB")
        yield CaptionedFigure(
            "training",
            figure,
            "PSNR of the validation pixels during training, mean over all pictures and seeds, for the implicit model "
            "of one layer and explicit models of one layer, of one layer of twice the width, and of four layers.",
        )
    firsts = {one.kind: one.name for one in reversed(subjects(config))}
    pictures = [firsts[kind] for kind in KINDS if kind in firsts]
    every = [[line for row in rows["fourier"] for line in runs.where(row=row, picture=p, seed=seed)] for p in pictures]
    lines = [each for each in every if len(each) == len(shown)]
    files = [[folders[line.name].path / "figures" for line in each] for each in lines]
    if not lines or not all((file / "reconstruction.png").is_file() for each in files for file in each):
        return
    figure = canvas(2.1 * (len(shown) + 1), 2.25 * len(lines))
    for axs, each, paths in zip(figure.subplots(len(lines), len(shown) + 1, squeeze=False), lines, files, strict=True):
        quality = [f"{line['test.PSNR']:.1f} dB" if line["test"] else "" for line in each]
        titles = ["picture\n", *(f"{labels[line['row']]}\n{dB}" for line, dB in zip(each, quality, strict=True))]
        images = [paths[0] / "original.png", *(file / "reconstruction.png" for file in paths)]
        for ax, title, image in zip(axs, titles, images, strict=True):
            ax.imshow(matplotlib.image.imread(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_axis_off()
            ax.set_title(title, fontsize=8)
    yield CaptionedFigure(
        "pictures",
        figure,
        "Pictures reconstructed from a quarter of their pixels by models with Fourier filters and the first seed. The "
        "number above each is its PSNR on the test pixels.",
    )


TABLE = table.published(
    globals(),
    title="Pictures from a quarter of their pixels: implicit and explicit representations",
    source="Huang, Bai and Kolter 2021, (Implicit)²: Implicit Layers for Implicit Representations (NeurIPS 2021), "
    "the table of image generalization",
    figures=table.by_name(cost=table.read("costs.json")),
)
