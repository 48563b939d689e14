"""Table: number of terms of the adjoint series that a fit needs (Huang et al. 2021, figure 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torchimplicit.recipes.representations import generalization
from torchimplicit.recipes.representations.cost import COST, FieldCostConfig
from torchimplicit.recipes.representations.fit import FILTERS, NAMES, FilterKind, truncated
from torchimplicit.recipes.representations.generalization import GeneralizationConfig, Subject
from torchimplicit.recipes.representations.image import PictureConfig
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.page import axes, style
from torchimplicit.recipes.runtime.settings import Machine, positive
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, TitledTable

if TYPE_CHECKING:
    from torchimplicit.recipes.runtime.run import Run


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row: one model trained with T products in the backward pass, or (``None``) until convergence."""

    filter: FilterKind
    products: int | None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.filter}-{'converged' if self.products is None else f'T{self.products}'}"


@dataclass(frozen=True, kw_only=True)
class GradientsConfig:
    """Three implicit representations, trained with T products in the backward pass for several T."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=1, together=12))

    pictures: tuple[str, ...] = ("camera", "text-0")
    """Pictures, from scikit-image or drawn text."""

    file: Path | None = None
    """A picture of your own to use instead."""

    products: tuple[int, ...] = (0, 1, 2, 4, 8)
    """Numbers of products T in the backward pass: 0 is the one-step gradient, 1 the paper's choice. The converged
    adjoint is always added."""

    size: int | None = None
    """Longest side in pixels. Default: 64, or the paper's 512 with --scale paper."""

    width: int | None = None
    """Width of the models. Default: 64, or the paper's 256 with --scale paper."""

    steps: int | None = None
    """Optimizer steps of each training. Default: 400, or the paper's 2000 with --scale paper."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    def __post_init__(self) -> None:
        positive(self, "size", "width", "steps")
        if not self.pictures and self.file is None:
            raise UserError("--pictures is empty; name one")
        if not self.products or min(self.products) < 0 or len(set(self.products)) < len(self.products):
            raise UserError(f"--products must be different numbers from 0 on, and they are {self.products}")


def rows(config: GradientsConfig, name: FilterKind) -> list[Row]:
    """All T of a filter, in order, and the converged adjoint."""
    return [Row(filter=name, products=products) for products in (*sorted(config.products), None)]


def subjects(config: GradientsConfig) -> list[Subject]:
    """The pictures that are fitted."""
    if config.file is not None:
        return [Subject(config.file.stem, "natural", config.file)]
    texts = ("page", "text")
    return [
        Subject(name, "text" if name in texts or name.startswith("text-") else "natural") for name in config.pictures
    ]


def training(config: GradientsConfig, row: Row, subject: Subject, seed: int) -> PictureConfig:
    """The settings of one run: those of the table of generalization, except for the backward pass."""
    as_there = GeneralizationConfig(
        plan=config.plan, size=config.size, width=config.width, steps=config.steps, machine=config.machine
    )
    converged = replace(truncated(), gradient="implicit")
    equilibria = converged if row.products is None else truncated(row.products + 1)
    usual = generalization.training(as_there, generalization.Row(filter=row.filter), subject, seed)
    return replace(usual, equilibria=equilibria)


def jobs(config: GradientsConfig) -> list[Job]:
    """All jobs, seed by seed and picture by picture; the costs after the first picture."""
    planned: list[Job] = []
    for seed in config.plan.all_seeds:
        for subject in subjects(config):
            fits = {row: training(config, row, subject, seed) for name in FILTERS for row in rows(config, name)}
            for row, fit in fits.items():
                key = {"row": row, "picture": subject.name, "seed": seed}
                planned.append(Job(f"{row.name}-{subject.name}-seed{seed}", "implicit-image-generalization", fit, key))
            if len(planned) == len(fits):
                names = tuple(row.name for row in fits)
                planned.append(Job(COST, "fields-cost", FieldCostConfig(names=names, fits=tuple(fits.values()))))
    return planned


def sheets(config: GradientsConfig, runs: Runs) -> Iterator[TitledTable]:
    """A table per filter."""
    cost = runs.named(COST)

    def step(figure: str, form: str, scale: float = 1.0) -> Any:
        return lambda row: f"{scale * cost[row.name][figure]:{form}}" if row.name in cost else table.NONE

    cells = [
        Cell[Row]("Backward", lambda row: "converged" if row.products is None else f"T = {row.products}", "",
                  "Backward pass: T products with the Jacobian, or a converged solve. T = 0 is the one-step gradient."),
        *(Cell(p.name, runs.where(picture=p.name).told("test.PSNR", 2), "dB",
             f"Test PSNR of the picture {p.name}, mean ± standard deviation over the seeds.")
          for p in subjects(config)),
        Cell("Step", step("seconds", ".2f", 1e3), "ms",
             "CPU time (wall time on a GPU) of a training step, median over the steps, with weights of 40 steps of "
             "training; the rows take turns."),
        Cell("Backward pass", step("backward_seconds", ".2f", 1e3), "ms",
             "CPU time (wall time on a GPU) of the backward pass in these steps, median."),
        Cell("Products", step("backward", ".1f"), "", "Products with the Jacobian in a step, mean."),
        Cell("Cosine", step("cosine", ".4f"), "",
             "Cosine between the gradient in all weights and the exact one, at these weights."),
        Cell("Norm", step("norm", ".2f"), "", "Norm of the gradient divided by that of the exact one."),
    ]  # fmt: skip
    for name in FILTERS:
        yield table.sheet(NAMES[name, True], rows(config, name), cells)


def claims(config: GradientsConfig, runs: Runs) -> Iterator[Claim]:
    """Test whether one product is enough, and what it saves, for each filter."""
    cost = runs.named(COST)
    for name in FILTERS:
        short, whole = Row(filter=name, products=1), Row(filter=name, products=None)
        estimated, exact = (runs.of(row, "test.PSNR") for row in (short, whole))
        if not estimated or len(estimated) != len(exact):
            continue
        yield Claim(
            f"{NAMES[name, True]}: the test PSNR with one product (T = 1) is within 1 dB of that with the converged "
            "backward pass",
            f"{fmean(estimated):.2f} against {fmean(exact):.2f} dB",
            fmean(exact) - fmean(estimated) <= 1,
        )
        if cost:
            ratio, step = (cost[whole.name][k] / cost[short.name][k] for k in ("backward_seconds", "seconds"))
            yield Claim(
                f"{NAMES[name, True]}: the backward pass with one product is at least twice as fast as the converged "
                "one",
                f"{ratio:.1f} times as fast; a whole step is {step:.1f} times as fast",
                ratio >= 2,
            )


def protocol(config: GradientsConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    one = training(config, rows(config, FILTERS[0])[0], subjects(config)[0], config.plan.first_seed)
    chosen = one.optimization
    return (
        f"Implicit representations of one layer of width {one.representation.width} are trained on a quarter of the "
        f"pixels of {', '.join(picture.name for picture in subjects(config))}, of at most {one.size} pixels a side; "
        f"another quarter selects the weights, and a third such quarter is the test. Every run takes {chosen.steps} "
        f"steps of Adam at {chosen.learning_rate:g} and is validated every {chosen.validate_every} steps; the number "
        f"of seeds is {config.plan.seeds}. Every step evaluates the cell once, from the state of the step before. The "
        "backward pass is the Neumann series of the adjoint after T products, or GMRES to a relative residual of "
        f"{one.equilibria.backward_tolerance:g}."
    )


def notes(config: GradientsConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    yield "The values of the published figure are not available for comparison."
    yield (
        "The exact gradient is that of the solved equilibrium. The state of a training step is carried over and not "
        "solved, so the gradients differ from the exact one even with many products and with the converged backward "
        "pass."
    )
    if config.plan.scale == "cpu":
        yield "The pictures are smaller than the paper's, the model is narrower, and it is trained for fewer steps."
    if names := sorted({line["row"].name for line in runs if line["state"] == "diverged"}):
        yield f"These rows diverged: {', '.join(names)}."


def drawings(config: GradientsConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """PSNR, and the angle between the gradient and the exact one."""
    if not any(line.key for line in runs):
        return
    cost = runs.named(COST)
    figure, (quality, error) = axes(2, width=4.8)
    for index, name in enumerate(FILTERS):
        measured = [(x, runs.of(row, "test.PSNR")) for x, row in enumerate(rows(config, name))]
        points = [(x, fmean(values)) for x, values in measured if values]
        quality.plot([x for x, _ in points], [y for _, y in points], label=NAMES[name, True], **style(index))
        known = [(x, cost[row.name]["cosine"]) for x, row in enumerate(rows(config, name)) if row.name in cost]
        error.plot([x for x, _ in known], [max(1 - cosine, 1e-7) for _, cosine in known], **style(index))
    labels = [*map(str, sorted(config.products)), "conv."]
    for panel in (quality, error):
        panel.set_xticks(range(len(labels)), labels)
        panel.set_xlabel("products T in the backward pass")
    quality.set_ylabel("test PSNR, dB")
    quality.legend()
    error.set(ylabel="1 - cosine to the exact gradient", yscale="log")
    yield CaptionedFigure(
        "products",
        figure,
        "Test PSNR (mean over the pictures and seeds), and 1 − cosine between the gradient and the exact one, against "
        "the number of products with the Jacobian in the backward pass.",
    )


TABLE = table.published(
    globals(),
    title="Truncating the backward pass: PSNR by number of products",
    source="Huang, Bai and Kolter 2021, (Implicit)²: Implicit Layers for Implicit Representations (NeurIPS 2021), "
    "figure 4",
    figures=table.by_name(cost=table.read("costs.json")),
)
