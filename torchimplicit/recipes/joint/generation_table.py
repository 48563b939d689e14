"""Joint inference beside nested optimization, and the images of decoders trained by it (Gurumurthy et al. 2021)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from torchimplicit.recipes.joint.decoder import DataName, Kind
from torchimplicit.recipes.joint.generation import (
    GenerationConfig,
    generation_digits,
    generation_mnist,
    generation_olivetti,
)
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.page import axes, style
from torchimplicit.recipes.runtime.settings import Machine, positive
from torchimplicit.recipes.runtime.table import Cell, Claim, Drawing, Job, Plan, Runs, Sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from torchimplicit.recipes.runtime.run import Run

JOINT = "jiio"
LABELS = {
    JOINT: "joint inference",
    "adam": "Adam",
    "adam-one-step": "Adam, one-step gradient",
    "gradient-descent": "gradient descent",
}
"""Of the methods; the first is joint inference, the others nested optimization."""

Model = Literal["jiio", "vae", "wide"]
MODELS: tuple[Model, ...] = ("jiio", "vae", "wide")
SIZES: tuple[Model, ...] = ("jiio", "wide")
"""Those whose inference is timed."""

LONGER = 8
"""Times as many steps for the autoencoder, whose steps have no joint solve in them: about the same time in all."""

WIDER = 3
"""Times the width of a fully connected decoder; a convolutional one gets twice the channels."""

DEFAULTS = {"digits": generation_digits, "mnist": generation_mnist, "olivetti": generation_olivetti}
NAMES: dict[Model, str] = {"jiio": "Decoder", "vae": "Variational autoencoder", "wide": "Wider decoder"}

AIMS = (9.0, 3.5)
"""Times less CPU time than Adam with ``LONGEST`` steps, to the same loss: the aim, and the least that was published."""

LONGEST = 40

PUBLISHED_FID = {"jiio": (46.82, 32.52), "vae": (48.12, 39.12)}
"""The same: CelebA 64×64, generation and reconstruction."""


@dataclass(frozen=True, kw_only=True)
class JiioGenerationConfig:
    """Decoders trained by joint inference, beside autoencoders; loss against time, beside nested optimization."""

    plan: Plan = field(default_factory=Plan)

    data: DataName = "digits"
    """Which images."""

    data_dir: Path | None = None
    """The folder that holds MNIST or the Olivetti faces; without it they are downloaded."""

    kind: Kind | None = None
    """Of every decoder; by default that of the recipe for these images."""

    steps: int | None = None
    """Optimizer steps of every model; by default those of the recipe."""

    repeats: int = 5
    """Of the measurement of time."""

    def __post_init__(self) -> None:
        positive(self, "steps", "repeats")


def training(config: JiioGenerationConfig, model: Model, seed: int) -> GenerationConfig:
    """One model."""
    usual = DEFAULTS[config.data]()
    optimization = replace(usual.optimization, seed=seed)
    decoder = usual.decoder if config.kind is None else replace(usual.decoder, kind=config.kind)
    if config.steps is not None:
        optimization = replace(optimization, steps=config.steps, validate_every=max(1, config.steps // 4))
    if model == "vae":
        steps, every = LONGER * optimization.steps, LONGER * optimization.validate_every
        optimization = replace(optimization, steps=steps, validate_every=every)
    if model == "wide":
        decoder = replace(decoder, width=WIDER * decoder.width, channels=2 * decoder.channels)
        # at the narrow one's rate it becomes so steep that the joint solves diverge
        optimization = replace(optimization, learning_rate=optimization.learning_rate / WIDER)
    return replace(
        usual,
        model="vae" if model == "vae" else "jiio",
        decoder=decoder,
        images=replace(usual.images, data_dir=config.data_dir),
        curves=model in SIZES,
        curve_repeats=config.repeats,
        optimization=optimization,
        machine=Machine(device="cpu", tensorboard=False),
    )


def jobs(config: JiioGenerationConfig) -> list[Job]:
    """Seed by seed."""
    return [
        Job(
            f"{model}-{seed}",
            f"jiio-generation-{config.data}",
            training(config, model, seed),
            {"row": model, "seed": seed},
        )
        for seed in config.plan.all_seeds
        for model in MODELS
    ]


def figures(config: JiioGenerationConfig, run: Run) -> dict[str, Any] | None:
    """Of a run that came to its end."""
    one = table.trained(config, run)
    if one is None or one["state"] != "complete" or one["test"] is None:
        return None
    files = {"generated": "generation.json", "curves": "curves.json"}
    return {**one, **{name: table.read(file)(config, run) for name, file in files.items()}}


# -- what the runs come to ---------------------------------------------------------------------------------------------


Curves = Mapping[str, Any]


def timed(runs: Runs) -> dict[Model, list[Curves]]:
    """The measurements of time that are there, one a seed."""
    return {size: found for size in SIZES if (found := runs.of(size, "curves"))}


def at(one: Curves, method: str, steps: int) -> tuple[float, float]:
    """Seconds and loss."""
    return next((p["seconds"], p["loss"]) for p in one["points"] if (p["method"], p["steps"]) == (method, steps))


@dataclass(frozen=True)
class Overtaking:
    """The cheapest joint solve that is at least as good as a nested one.

    Attributes:
        steps, seconds: of it.
        ratio: the nested one's time over its.
    """

    steps: int
    seconds: float
    ratio: float


def overtaking(one: Curves, method: str, steps: int) -> Overtaking | None:
    """``None``: no joint solve that was measured is as good."""
    seconds, loss = at(one, method, steps)
    good = [p for p in one["points"] if p["method"] == JOINT and p["loss"] <= loss]
    if not good:
        return None
    best = min(good, key=lambda p: p["seconds"])
    return Overtaking(best["steps"], best["seconds"], seconds / best["seconds"])


def sheets(config: JiioGenerationConfig, runs: Runs) -> list[Sheet]:
    """How much sooner the joint solve is there; joint inference by steps; and the images."""
    spread = table.spread
    lines = [
        (size, method, steps, measured, [better for c in measured if (better := overtaking(c, method, steps))])
        for size, measured in timed(runs).items()
        for method, steps in itertools.product([m for m in LABELS if m != JOINT], (10, 20, LONGEST))
    ]

    def cheapest(line: Any) -> str:
        better = [overtaking(c, line[1], line[2]) for c in line[3]]
        return ", ".join(table.NONE if b is None else str(b.steps) for b in better) or table.NONE

    pace = table.sheet("To the same loss", lines, [
        Cell("Nested", lambda line: f"{NAMES[line[0]]}: {LABELS[line[1]]}"),
        Cell("Steps", lambda line: str(line[2])),
        Cell("Its loss", lambda line: spread([at(c, line[1], line[2])[1] for c in line[3]], 5), "",
             "mean ± sd over seeds"),
        Cell("Its time", lambda line: spread([at(c, line[1], line[2])[0] for c in line[3]], 0, 1000), "ms"),
        Cell("Joint steps", cheapest, "", "of the cheapest joint solve with the same loss or a lower one, each seed"),
        Cell("Its time", lambda line: spread([b.seconds for b in line[4]], 0, 1000), "ms", "of that joint solve"),
        Cell("Ratio", lambda line: spread([b.ratio for b in line[4]], 1), "×",
             "nested time over joint time to the same loss or a lower one, mean ± sd over seeds"),
        Cell("Ratio at as many steps",
             lambda line: spread([at(c, line[1], line[2])[0] / at(c, JOINT, line[2])[0] for c in line[3]], 1), "×",
             "both with so many steps; published for 40: 8.9, rivals timed in train mode"),
    ])  # fmt: skip
    points = [
        (size, n, [at(c, JOINT, n) for c in measured])
        for size, measured in timed(runs).items()
        for n in sorted({p["steps"] for c in measured for p in c["points"] if p["method"] == JOINT})
    ]
    joint = table.sheet("Joint inference", points, [
        Cell("Joint steps", lambda point: f"{NAMES[point[0]]}: {point[1]}"),
        Cell("Loss", lambda point: spread([loss for _, loss in point[2]], 5), "",
             "after an exact solve, mean ± sd over seeds"),
        Cell("Time", lambda point: spread([seconds for seconds, _ in point[2]], 0, 1000), "ms", "CPU"),
    ])  # fmt: skip
    floors = [line["generated.floor"] for model in MODELS for line in runs.where(row=model) if line["generated"]]

    def distance(figure: str) -> Any:
        return lambda row: spread(runs.of(row, f"generated.{figure}"), 3) if row != "training images" else table.NONE

    images = table.sheet("Images", [*MODELS, "training images"], [
        Cell("Model", lambda row: NAMES.get(row, row)),
        Cell("Reconstruction", lambda row: spread(runs.of(row, "test.mse"), 5), "",
             "mean squared error of a pixel on the test images, after an exact solve"),
        Cell("Fréchet, new images",
             lambda row: distance("mixture")(row) if row in NAMES else spread(floors[:1], 3), "",
             "latents from a Gaussian mixture fitted on the training images' latents"),
        Cell("Fréchet, one Gaussian", distance("gaussian"), "", "likewise, one Gaussian"),
        Cell("Fréchet, prior", distance("prior"), "", "latents from the autoencoder's own prior"),
        Cell("Fréchet, reconstructions", distance("reconstructions")),
        Cell("FID published", lambda row: " / ".join(f"{v:.2f}" for v in PUBLISHED_FID.get(row, ())) or table.NONE, "",
             "new images / reconstructions, CelebA: another metric, on other images"),
    ])  # fmt: skip
    return [pace, joint, images]


def claims(config: JiioGenerationConfig, runs: Runs) -> list[Claim]:
    """What was aimed at, and what came out."""
    spread = table.spread
    made = []
    for size, measured in timed(runs).items():
        better = [overtaking(c, "adam", LONGEST) for c in measured]
        ratios = [b.ratio for b in better if b is not None]
        made += [
            Claim(
                f"{NAMES[size]}: to the same loss as Adam with {LONGEST} steps or a lower one, at least {aim:g} times "
                "less CPU time",
                f"{spread(ratios)} times ({', '.join(f'{ratio:.1f}' for ratio in ratios)}; "
                f"{len(ratios)} of {len(better)} seeds get there)",
                len(ratios) == len(better) and fmean(ratios) >= aim,
            )
            for aim in AIMS
        ]
        losses = {m: [at(c, m, LONGEST)[1] for c in measured] for m in LABELS}
        made.append(
            Claim(
                f"{NAMES[size]}: {LONGEST} joint steps end at a lower loss than {LONGEST} steps of any nested method",
                ", ".join(f"{LABELS[m]} {spread(values, 5)}" for m, values in losses.items()),
                all(j <= min(rest) for j, *rest in zip(*losses.values(), strict=True)),
            )
        )
    if runs.of("jiio", "generated") and runs.of("vae", "generated"):
        for what, aim in (("mixture", "new images"), ("reconstructions", "reconstructions")):
            values = {model: runs.of(model, f"generated.{what}") for model in ("jiio", "vae")}
            if what == "mixture":  # the autoencoder in the better of its two ways
                prior = runs.of("vae", "generated.prior")
                values["vae"] = min(values["vae"], prior, key=fmean) if prior else values["vae"]
            made.append(
                Claim(
                    f"Fréchet distance of {aim} no larger than the autoencoder's",
                    f"{spread(values['jiio'], 3)} and {spread(values['vae'], 3)}",
                    fmean(values["jiio"]) <= fmean(values["vae"]),
                )
            )
    return made


def protocol(config: JiioGenerationConfig, runs: Runs) -> str:
    """What was run, in words."""
    usual = training(config, "jiio", config.plan.first_seed)
    return (
        f"{config.data}; {usual.decoder.kind} equilibrium decoder, latent {usual.decoder.latent}, {sizes(config)}; "
        f"Adam, rate {usual.optimization.learning_rate:g} (wider: a third), "
        f"{usual.optimization.steps} steps of {usual.optimization.batch_size} images, each with a joint solve of "
        f"{usual.joint.joint_steps} steps (Anderson, memory {usual.joint.joint_memory}, "
        f"regularization {usual.joint.joint_regularization:g}; the loss a sum over pixels, as "
        "published, step sizes as for their mean) and the gradient of the envelope "
        "theorem; the weights with the least validation error are tested. The autoencoder has the same "
        f"equilibrium decoder, an encoder with one hidden layer of {usual.encoder_width}, the exact implicit gradient, "
        f"and {LONGER} times as many steps, which take about as long. Time: {usual.curve_images} test images at the "
        f"trained weights, eval mode, one thread, CPU time of the process, median of {usual.curve_repeats} "
        "repeats in which all take turns; both start from zero. Nested optimization "
        "starts every equilibrium solve from the last one, by plain iteration, and solves the adjoint "
        "system by GMRES; its step size and its tolerance (the loosest that costs at most 1 % of the loss), and the "
        "step size and damping of the joint solve, are tuned on validation images for every seed. The loss is always "
        "that of an exact equilibrium at the latents found."
    )


def sizes(config: JiioGenerationConfig) -> str:
    """Of the decoders."""
    small, wide = (training(config, model, 0).decoder for model in SIZES)
    if small.kind == "mlp":
        return f"a state of {small.width}, in the wider one {wide.width}"
    return f"{small.channels} channels, in the wider one {wide.channels}"


def notes(config: JiioGenerationConfig, runs: Runs) -> list[str]:
    """What a reader must know."""
    accuracies = [a for model in MODELS for a in runs.of(model, "generated.accuracy")]
    made = [
        "The Fréchet distance is that of FID's formula in the 32 features of a small classifier trained here on the "
        "same training images"
        + (f" ({100 * accuracies[0]:.1f} % right on the test images)" if accuracies else "")
        + ": it compares the models of this page with each other, and with no FID.",
        "Published: 7659 ms for Adam with 40 steps, 862 ms for 40 joint steps, 2156 ms for 100, a multiscale model on "
        "CelebA, with the nested optimizer in train mode; here all run in eval mode, "
        "the nested optimizer's equilibria start from the last ones, and their tolerance is tuned.",
        "Nested optimization with the one-step gradient is cheaper and not exact; gradient descent with a tuned step "
        "size is a stronger rival than Adam where the loss is nearly quadratic in the latent.",
    ]
    for size, measured in timed(runs).items():
        tuned = "; ".join(
            f"α = {c['step_size']:g}, damping {' '.join(f'{d:g}' for d in c['damping'])}, "
            + ", ".join(f"{LABELS[m]} {c['rates'][m]:g} at {c['tolerances'][m]:g}" for m in LABELS if m != JOINT)
            for c in measured
        )
        made.append(f"{NAMES[size]}, tuned on validation images, seed by seed (step size at tolerance): {tuned}.")
    if config.plan.scale == "paper":
        made.append("The published size (MDEQ on CelebA 64×64) is not among the recipes: these are the small settings.")
    return [*made, *table.missing(jobs(config), runs)]


# -- figures -----------------------------------------------------------------------------------------------------------


def drawings(config: JiioGenerationConfig, runs: Runs, folders: Mapping[str, Run]) -> list[Drawing]:
    """Loss against time, and images of the first seed that has some."""
    from torchimplicit.recipes.joint.decoder import grid
    from torchimplicit.recipes.joint.generation import read_pictures

    made = [
        Drawing(
            f"curves-{size}",
            against_time(measured),
            f"{NAMES[size]}: loss of a batch of {training(config, size, 0).curve_images} test images against CPU time, "
            "after an exact solve at the latents found; means over seeds (faint: each seed). Numbers are steps.",
        )
        for size, measured in timed(runs).items()
    ]
    for line in runs:  # seed by seed
        pictures = read_pictures(folders[line.name])
        name = f"images-{line['row']}"
        if pictures is not None and line["row"] != "wide" and name not in {one.name for one in made}:
            made.append(Drawing(name, grid(pictures), f"{NAMES[line['row']]}: {config.data}, not selected."))
    return made


def against_time(found: Sequence[Curves]) -> Figure:
    """Loss against time, a line a method: means over seeds, each point so many steps."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (panel,) = axes()
    for index, method in enumerate(LABELS):
        steps = sorted({p["steps"] for one in found for p in one["points"] if p["method"] == method})
        look = style(index)
        for one in found:
            panel.plot(*zip(*(at(one, method, n) for n in steps), strict=True), color=look["color"], alpha=0.2, lw=0.8)
        points = [[at(one, method, n) for one in found] for n in steps]
        means = [(fmean(p[0] for p in each), fmean(p[1] for p in each)) for each in points]
        panel.plot([m[0] for m in means], [m[1] for m in means], label=LABELS[method], **look)
        for n, mean in zip(steps, means, strict=True):
            if n in (10, 20, 40):
                panel.annotate(str(n), mean, xytext=(4, 4), textcoords="offset points", fontsize=7.5)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("CPU time (s)")
    panel.set_ylabel("loss after an exact solve")
    panel.legend()
    return figure


TABLE = table.published(
    globals(),
    title="Joint inference and input optimization: a decoder without an encoder",
    source="Gurumurthy et al. 2021 (arXiv 2111.13236): Fig. 3 and the tables of generation and time.",
)
