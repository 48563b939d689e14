"""Table: implicit and phantom training of an image classifier, Table 1 and Fig. 3 of Geng et al. (2021, arXiv
2111.05177)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from torchimplicit.recipes.phantom.images import (
    AS_PUBLISHED,
    CONVERGED,
    CostConfig,
    ImageConfig,
    cifar10,
    cost_table,
    evaluations,
)
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.page import COLOURS, axes, style
from torchimplicit.recipes.runtime.settings import (
    Equilibria,
    EstimatorName,
    Machine,
    Optimization,
    known_rows,
    positive,
)
from torchimplicit.recipes.runtime.step_cost import StepCost, costs_of
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Line, Plan, Runs, TitledTable

if TYPE_CHECKING:
    from torchimplicit.recipes.runtime.run import Run

COST = "cost"
IMPLICIT, UPG, NPG = "implicit", "upg-5", "npg-5"
CONTROL = "implicit-plain"
DROPOUT = 0.25


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row: one way to train.

    Attributes:
        label: label to display.
        published: accuracy and its deviation in %, as published; ``None`` for a row of our own.
        sgd, pretrained, dropout: otherwise Adam, from the start, and without.
        steps, damping: steps and damping of the phantom gradient.
    """

    label: str
    published: tuple[float, float] | None = None
    gradient: EstimatorName = "implicit"
    sgd: bool = False
    pretrained: bool = False
    dropout: bool = False
    steps: int = 5
    damping: float = 0.5


def _upg(steps: int, damping: float) -> Row:
    return Row(
        label=f"UPG({steps}, {damping:g}): SGD", gradient="unrolled-phantom", sgd=True, steps=steps, damping=damping
    )


# Geng et al. 2021, table 1.
TABLE_1 = {
    IMPLICIT: Row(label="Implicit: Adam, pretraining, dropout", published=(85.0, 0.2), pretrained=True, dropout=True),
    "implicit-nopre": Row(label="Implicit: Adam, dropout", published=(82.3, 1.3), dropout=True),
    "implicit-nodrop": Row(label="Implicit: Adam, pretraining", published=(83.7, 0.1), pretrained=True),
    "implicit-sgd": Row(
        label="Implicit: SGD, pretraining, dropout", published=(84.5, 0.3), sgd=True, pretrained=True, dropout=True
    ),
    "implicit-sgd-nopre": Row(label="Implicit: SGD, dropout", published=(82.9, 1.5), sgd=True, dropout=True),
    UPG: replace(_upg(5, 0.5), published=(85.8, 0.5)),
    NPG: Row(label="NPG(5, 0.5): SGD", published=(85.6, 0.5), gradient="neumann-phantom", sgd=True),
    "upg-9-drop": replace(_upg(9, 0.5), label="UPG(9, 0.5): SGD, dropout", published=(86.1, 0.5), dropout=True),
    # what the table above lacks: the phantom rows' settings, with the exact gradient
    CONTROL: Row(label="Implicit: SGD", sgd=True),
}

SWEEP = {f"sweep-{k}-{damping:g}": _upg(k, damping) for k, damping in ((1, 0.5), (9, 0.5), (5, 0.25), (5, 1.0))}
"""Points of Fig. 3 in addition to A(5, 0.5)."""

# The CPU scale. The rates are those of a few chosen that did best on the validation split in single runs of 150 steps.
CPU_STEPS = 100
ADAM_RATE = {"cpu": 5e-3, "paper": 1e-3}


@dataclass(frozen=True, kw_only=True)
class PhantomAblationConfig:
    """An MDEQ trained by implicit and by phantom gradients."""

    plan: Plan = field(default_factory=Plan)

    data: Literal["mnist", "cifar10", "digits"] | None = None
    """Data set. Default: MNIST, or CIFAR-10 with --scale paper."""

    data_dir: Path | None = None
    """Folder of the data. Default: download it."""

    steps: int | None = None
    """Optimizer steps per run. Default: 100, or the paper's 50 epochs with --scale paper."""

    rows: tuple[str, ...] = ()
    """Rows to run, such as implicit, upg-5, sweep-9-0.5 and cost. Default: all."""

    sweep_seeds: int = 1
    """Number of seeds for each further point of the sweep over k and λ."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    @property
    def images(self) -> Literal["mnist", "cifar10", "digits"]:
        """``data``, with its default filled in."""
        return self.data or ("cifar10" if self.plan.scale == "paper" else "mnist")

    def __post_init__(self) -> None:
        positive(self, "steps", "sweep_seeds")


def training(config: PhantomAblationConfig, row: Row, seed: int) -> ImageConfig:
    """The settings of one run."""
    paper = config.plan.scale == "paper"
    base = _paper(config) if paper else _cpu(config)
    steps, rate = base.optimization.steps, ADAM_RATE[config.plan.scale]
    if row.sgd:
        optimization = replace(base.optimization, optimizer="sgd", learning_rate=0.1, weight_decay=1e-4, seed=seed)
    else:
        optimization = replace(base.optimization, optimizer="adam", learning_rate=rate, weight_decay=2.5e-6, seed=seed)
    equilibria = replace(
        base.equilibria,
        gradient=row.gradient,
        phantom_steps=row.steps,
        phantom_damping=row.damping,
        pretrain_steps=(3000 if paper and config.steps is None else round(0.15 * steps)) if row.pretrained else 0,
    )
    settings = replace(base, data_dir=config.data_dir, dropout=DROPOUT if row.dropout else 0.0, machine=config.machine)
    return replace(settings, optimization=optimization, equilibria=equilibria)


def _paper(config: PhantomAblationConfig) -> ImageConfig:
    base = replace(cifar10(), data=config.images)
    return replace(base, optimization=base.optimization.of(base.optimization.seed, config.steps))


def _cpu(config: PhantomAblationConfig) -> ImageConfig:
    steps = config.steps or CPU_STEPS
    bundled = config.images == "digits"
    return ImageConfig(
        data=config.images,
        downsamplings=0 if bundled else 2,
        validation_images=300 if bundled else 1000,
        train_images=None if bundled else 9000,
        test_images=None if bundled else 2000,
        optimization=Optimization(
            steps=steps, batch_size=64, validate_every=max(1, min(steps, round(steps / 4))), clip_norm=5.0
        ),
        equilibria=Equilibria(solver="broyden", solver_steps=18, backward_steps=20),
    )


def jobs(config: PhantomAblationConfig) -> list[Job]:
    """All jobs, seed by seed so that a slow phase of the machine affects all rows."""
    known_rows(config.rows, (*TABLE_1, *SWEEP, COST))
    planned: list[Job] = []
    for place, seed in enumerate(config.plan.all_seeds):
        wanted = {**TABLE_1, **(SWEEP if place < config.sweep_seeds else {})}
        planned += [
            Job(f"{name}-seed{seed}", "images-mnist", training(config, row, seed), {"row": name, "seed": seed})
            for name, row in wanted.items()
        ]
        if not place:
            costs = CostConfig(image=training(config, TABLE_1[UPG], seed))
            planned.insert(len(TABLE_1), Job(COST, "images-cost", costs))
    return [job for job in planned if not config.rows or job.name.partition("-seed")[0] in config.rows]


def accuracies(runs: Runs, row: str) -> list[float]:
    """Test accuracies of the finished runs, in percent."""
    return [100 * value for value in runs.of(row, "test.accuracy")]


def measured(runs: Runs) -> dict[str, StepCost]:
    """The measured cost of a step with each estimator; empty if it was not measured."""
    return costs_of(runs.named(COST))


def sheets(config: PhantomAblationConfig, runs: Runs) -> Iterator[TitledTable]:
    """Tables: Table 1, the cost of a step, and the sweep."""

    def cost(figure: str, digits: int, scale: float = 1.0) -> Any:
        return lambda row: table.mean((scale * value for value in runs.of(row, f"costs.{figure}")), f".{digits}f")

    def published(row: str) -> str:
        known = TABLE_1[row].published
        return table.NONE if known is None else "{:.1f} ± {:.1f}".format(*known)

    def accuracy(row: str) -> str:
        return table.spread(accuracies(runs, row))

    tested = Cell("Accuracy", accuracy, "%",
                  "Accuracy on the test images at the weights of the best validation: mean ± standard deviation over "
                  "the seeds.")  # fmt: skip
    work = [
        Cell("Forward", cost("forward", 1), "evaluations",
             "Evaluations of the cell in the forward pass of a step, in whole-batch equivalents; mean over the steps "
             "after pretraining and over the seeds."),
        Cell("Backward", cost("backward", 1), "products",
             "Products with the cell's Jacobian in the backward pass of a step, in whole-batch equivalents; mean over "
             "the steps after pretraining and over the seeds."),
    ]  # fmt: skip
    yield table.sheet("Table 1: accuracy and cost of training", TABLE_1, [
        Cell("Training", lambda row: TABLE_1[row].label),
        tested,
        Cell("Published", published, "%",
             "Published accuracy of MDEQ-Tiny after 50 epochs on all of CIFAR-10, at the best epoch on the test set."),
        *work,
        Cell("At budget", cost("unconverged", 0, 100), "%",
             "Samples whose forward solve stopped at its step budget before it reached the tolerance; mean over the "
             "steps after pretraining and over the seeds."),
        Cell("Step", cost("seconds", 2), "s",
             "Wall time of a training step: median over the steps, mean over the seeds. Other programs ran on the "
             "machine, so that ratios are better taken from the next table."),
        Cell("Runs", lambda row: f"{len(accuracies(runs, row))} of {len(runs.where(row=row))}", "",
             "Runs that finished, of those that were started."),
    ])  # fmt: skip
    if cells := measured(runs):
        yield TitledTable("Cost of a training step with each gradient, at the same trained weights", cost_table(cells))
    points = {UPG: TABLE_1[UPG], **SWEEP}
    order = sorted(points, key=lambda name: (points[name].damping, points[name].steps))
    yield table.sheet("Sweep over k and λ (Fig. 3)", order, [
        Cell("Gradient", lambda row: points[row].label.removesuffix(": SGD")),
        tested,
        *work,
    ])  # fmt: skip


def claims(config: PhantomAblationConfig, runs: Runs) -> Iterator[Claim]:
    """Compare the results with the targets."""
    spread = table.spread
    for name, other in ((UPG, IMPLICIT), (NPG, IMPLICIT), (UPG, CONTROL)):
        ours, theirs = accuracies(runs, name), accuracies(runs, other)
        if ours and theirs:
            margin = max((stdev(values) for values in (ours, theirs) if len(values) > 1), default=0.0)
            yield Claim(
                f"The row '{TABLE_1[name].label}' is at most one standard deviation less accurate than the row "
                f"'{TABLE_1[other].label}'",
                f"{spread(ours)} % against {spread(theirs)} % on the test images",
                fmean(ours) >= fmean(theirs) - margin,
            )
    with_it, without = accuracies(runs, IMPLICIT), accuracies(runs, "implicit-nopre")
    if with_it and without:
        yield Claim(
            "Implicit training loses accuracy without pretraining",
            f"{spread(with_it)} % on the test images with pretraining, {spread(without)} % without",
            fmean(without) < fmean(with_it),
        )
    if not (cost := measured(runs)):
        return
    converged, implicit, phantom = (cost[name] for name in (CONVERGED, "implicit", "UPG(5, 0.5)"))
    yield Claim(
        "The backward pass of UPG(5, 0.5) takes fewer evaluations and less time than that of the converged implicit "
        "gradient",
        f"{evaluations(phantom):.0f} instead of {evaluations(converged):.0f} evaluations; "
        f"{converged.backward_seconds / phantom.backward_seconds:.1f} times less time",
        evaluations(phantom) < evaluations(converged) and phantom.backward_seconds < converged.backward_seconds,
    )
    pairs = {"when both solve to the same tolerance": (implicit, phantom)}
    if f"implicit{AS_PUBLISHED}" in cost:
        published = (cost[f"implicit{AS_PUBLISHED}"], cost[f"UPG(5, 0.5){AS_PUBLISHED}"])
        pairs["when solvers use up their step budgets, as the published ones do"] = published
    for how, (exact, approximate) in pairs.items():
        yield Claim(
            f"A training step with UPG(5, 0.5) is at least 1.4 times as fast as one with the implicit gradient, {how}",
            f"{exact.seconds / approximate.seconds:.2f} times as fast",
            exact.seconds / approximate.seconds >= 1.4,
        )


def protocol(config: PhantomAblationConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    one = training(config, TABLE_1[IMPLICIT], config.plan.first_seed)
    chosen, equilibria = one.optimization, one.equilibria
    return (
        f"An MDEQ ({one.model}) is trained on {one.train_images or 'all other'} training images of {one.data}; "
        f"{one.validation_images} images are set apart for validation. The weights of the best validation are tested "
        f"on {one.test_images or 'all'} test images. Every row has {config.plan.seeds} seeds. A training takes "
        f"{chosen.steps} steps of {chosen.batch_size} images with a cosine schedule, by Adam (learning rate "
        f"{ADAM_RATE[config.plan.scale]:g}, weight decay 2.5e-6) or by SGD (learning rate 0.1, momentum 0.9, weight "
        f"decay 1e-4). The forward pass solves by Broyden's method in at most {equilibria.solver_steps} steps, the "
        f"implicit backward pass by GMRES in at most {equilibria.backward_steps} steps, both to a relative residual of "
        f"{equilibria.tolerance:g}. Pretraining replaces the solver by {equilibria.pretrain_depth} unrolled "
        f"applications of the cell in the first {equilibria.pretrain_steps} steps. Rows with dropout use a rate of "
        f"{one.dropout:g}."
    )


def notes(config: PhantomAblationConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    if config.plan.scale == "cpu":
        yield (
            "The model is small, the training short, and the data set is not the paper's CIFAR-10: compare rows with "
            "each other only. Adam's learning rate is higher than the paper's 0.001, which learns too slowly for so "
            "few steps; it was chosen on a validation split of CIFAR-10, by one run for each rate."
        )
    yield (
        "The published table has no row with the exact gradient and the settings of the phantom rows. The row "
        "'Implicit: SGD' is ours, and separates the effect of the gradient from that of the other settings."
    )
    yield "The published accuracies were selected on the test set, ours on a validation split."
    yield (
        "The backward pass solves by GMRES, whose residual never grows, instead of the published Broyden's method. "
        "Evaluations are counted per sample: a sample that has converged costs nothing more."
    )
    if cost := measured(runs):
        yield (
            "The published speed-up of 12 is that of the backward pass on ImageNet. The published solvers do not reach "
            "their absolute tolerances and use up their step budgets: 18 steps forward and 20 backward on CIFAR-10, 26 "
            "and 27 on ImageNet. A phantom gradient saves less where solvers stop at a tolerance, as they do here "
            "except in the rows 'as published': on this model, GMRES converges in "
            f"{evaluations(cost[CONVERGED]):.0f} evaluations. The applications of the cell that UPG unrolls count as "
            "forward evaluations."
        )
    by_row = Runs(line for row in (*TABLE_1, *SWEEP) for line in runs.where(row=row))
    yield from table.diverged(by_row, lambda line: line.name)


def drawings(config: PhantomAblationConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """The figures for which there are runs."""
    shown = (IMPLICIT, "implicit-nopre", "implicit-sgd", CONTROL, UPG, NPG)  # all nine would hide each other
    if any(runs.where(row=name) for name in shown):
        yield _training(config, runs, shown)
    if any(runs.where(row=name) for name in SWEEP):
        yield _sweep(runs)
    if cost := measured(runs):
        yield _cost(cost)


def _training(config: PhantomAblationConfig, runs: Runs, shown: tuple[str, ...]) -> CaptionedFigure:
    figure, (by_step, by_cost) = axes(2, width=4.8)
    for index, name in enumerate(shown):
        lines = [line for line in runs.where(row=name) if line["validations"]]
        together = list(zip(*(line["validations"] for line in lines), strict=False))
        if not together:
            continue
        steps = [each[0]["step"] for each in together]
        accuracy = [100 * fmean(v["accuracy"] for v in each) for each in together]
        settings = training(config, TABLE_1[name], config.plan.first_seed).equilibria
        by_step.plot(steps, accuracy, label=TABLE_1[name].label, **style(index))
        by_cost.plot([fmean(_work(one, settings, n) for one in lines) for n in steps], accuracy, **style(index))
    by_step.set(xlabel="optimizer steps", ylabel="validation accuracy, %")
    by_cost.set(xlabel="evaluations of the cell and products with its Jacobian")
    figure.legend(loc="outside lower center", ncols=3)
    return CaptionedFigure(
        "training",
        figure,
        "Validation accuracy during training, mean over the seeds, against optimizer steps (left) and against the work "
        "spent on the equilibrium (right): forward evaluations plus backward products, in whole-batch equivalents. In "
        "pretraining, every application of the cell counts as one of each.",
    )


def _work(line: Line, settings: Equilibria, step: int) -> float:
    """Evaluations and products up to a step."""
    pretraining = min(step, settings.pretrain_steps)
    cost = line["costs.forward"] + line["costs.backward"]
    return 2 * pretraining * settings.pretrain_depth + (step - pretraining) * float(cost)


def _sweep(runs: Runs) -> CaptionedFigure:
    labels = {UPG: TABLE_1[UPG], **SWEEP}
    figure, (over_steps, over_damping) = axes(2, width=4.8)
    for panel, other, along, words in (
        (over_steps, "damping", "steps", "steps k, at λ = 0.5"),
        (over_damping, "steps", "damping", "damping λ, at k = 5"),
    ):
        fixed = getattr(labels[UPG], other)
        names = [name for name in labels if getattr(labels[name], other) == fixed]
        points = sorted((getattr(labels[name], along), accuracies(runs, name)) for name in names)
        points = [(x, values) for x, values in points if values]
        panel.plot([x for x, _ in points], [fmean(values) for _, values in points], **style(0))
        for x, values in points:
            panel.plot([x] * len(values), values, ".", color=COLOURS[6])
        panel.set(xlabel=words, ylabel="test accuracy, %")
    return CaptionedFigure(
        "sweep",
        figure,
        "Test accuracy of UPG(k, λ) against k (left) and against λ (right): mean over the seeds (line) and every run "
        "(dots). Points other than UPG(5, 0.5) have fewer seeds.",
    )


def _cost(cost: dict[str, StepCost]) -> CaptionedFigure:
    figure, (seconds, products) = axes(2, width=4.8, height=2.9)
    names = list(cost)[::-1]
    forward = [1e3 * cost[name].forward_seconds for name in names]
    backward = [1e3 * cost[name].backward_seconds for name in names]
    seconds.barh(names, forward, color=COLOURS[0], label="forward")
    seconds.barh(names, backward, left=forward, color=COLOURS[1], label="backward")
    seconds.set(xlabel="milliseconds a step")
    seconds.legend()
    products.barh(names, [cost[name].backward for name in names], color=COLOURS[1])
    products.set(xlabel="products with the Jacobian, backward")
    products.set_yticklabels([])
    for panel in (seconds, products):
        panel.set_axisbelow(True)
        panel.grid(visible=False, axis="y")
    return CaptionedFigure(
        "cost",
        figure,
        "Cost of a training step with each gradient, at the same trained weights and on the same batches: median time "
        "of the forward and the backward pass (left), and products with the cell's Jacobian in the backward pass "
        "(right).",
    )


TABLE = table.published(
    globals(),
    title="An image classifier trained with implicit and with phantom gradients",
    source="Geng et al. 2021, On Training Implicit Models (arXiv 2111.05177), table 1 and figure 3",
    figures=table.by_name(cost=table.read("costs.json")),
)
